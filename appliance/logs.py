"""Log lines of the service on standard error: one per event, facts as key=value, or JSON lines."""

from __future__ import annotations

import json
import logging
import sys


def log_to_stderr(*, as_json: bool, debug: bool) -> None:
    """Called once, by the command. systemd adds the time to text lines; JSON lines carry their own."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonLines() if as_json else logging.Formatter("%(levelname)-7s %(name)s %(message)s"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.DEBUG if debug else logging.INFO)
    for chatty in ("PIL", "asyncio"):
        logging.getLogger(chatty).setLevel(logging.INFO)


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        facts = {"at": record.created, "level": record.levelname, "room": record.name, "text": record.getMessage()}
        if record.exc_info:
            facts["trace"] = self.formatException(record.exc_info)
        return json.dumps(facts)
