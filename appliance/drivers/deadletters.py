"""Pictures that were given up because they ended the service, as files for whoever wants to know why.

Nobody waits for them, so what cannot be kept is counted and logged, and stops nothing.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from appliance.drivers.records import Picture

log = logging.getLogger(__name__)


class DeadLetters:
    """Two files for each in the folder: `<id>.picture`, as it came, and `<id>.json`, what is known of it.

    The oldest leave when all come to more than `most_bytes`. For one thread.
    """

    def __init__(self, folder: Path, most_bytes: int) -> None:
        self._folder, self._most_bytes = folder, most_bytes
        self.counts: Counter[str] = Counter()

    def keep(self, picture: Picture, payload: bytes, attempts: int) -> None:
        """Never raises for the disk's sake."""
        known = {name: value for name, value in asdict(picture).items() if name != "correlation"}
        known |= {"picture_bytes": len(payload), "attempts": attempts}
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder / f"{picture.id}.json").write_text(json.dumps(known, indent=1), "utf-8")
            (self._folder / f"{picture.id}.picture").write_bytes(payload)
            self.counts["kept"] += 1
            self._make_room()
        except OSError as error:
            self.counts["failed"] += 1
            log.error("dead_letter not kept request=%s why=%s", picture.id, error)

    def numbers(self) -> dict[str, int]:
        """Since the service began: how many were kept, left for newer ones, and could not be kept."""
        return {name: self.counts[name] for name in ("kept", "dropped", "failed")}

    def _make_room(self) -> None:
        pictures = sorted(self._folder.glob("*.picture"), key=lambda path: path.stat().st_mtime_ns)
        excess = sum(path.stat().st_size for path in pictures) - self._most_bytes
        for path in pictures:
            if excess <= 0:
                return
            excess -= path.stat().st_size
            path.unlink()
            path.with_suffix(".json").unlink(missing_ok=True)
            self.counts["dropped"] += 1
