"""What is wrong with the box itself: one retained message for each kind of alarm, and none while all is well."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from appliance import contract
from appliance.config import Config
from appliance.drivers.outbox import Note

log = logging.getLogger(__name__)


class Alarm(StrEnum):
    """A level of the topic. A few fixed ones, so that a box can take back what an earlier process of it raised."""

    CLOCK = "clock"
    EXPERTS = "experts"
    GPU = "gpu"
    MEMORY_BUDGET = "memory-budget"
    MEMORY_DRIFT = "memory-drift"
    OUTBOX = "outbox"
    OUT_OF_MEMORY = "out-of-memory"
    PROFILE = "profile"
    REFUSED_TOPIC = "refused-topic"
    THRASHING = "thrashing"
    VARIANTS = "variants"


class Alarms:
    """Raised and lowered by whoever knows; `tell_all` repeats them to a broker that may have forgotten. Safe to use
    from several threads."""

    def __init__(self, config: Config, tell: Callable[[Note], None]) -> None:
        self._config, self._tell = config, tell
        self._lock = threading.Lock()
        self._raised: dict[Alarm, tuple[Mapping[str, Any], bytes]] = {}

    @property
    def raised(self) -> tuple[Alarm, ...]:
        with self._lock:
            return tuple(sorted(self._raised))

    def set(self, alarm: Alarm, detail: Mapping[str, Any] | None) -> None:
        """Raise it with what is to be known of it, or lower it with None. Told, and logged, when that is new."""
        with self._lock:
            known = self._raised.get(alarm)
            if (known[0] if known else None) == detail:
                return
            if detail is None:
                del self._raised[alarm]
                log.warning("alarm_lowered name=%s", alarm)
            else:
                self._raised[alarm] = (detail, _body(alarm, detail))
                log.error("alarm name=%s %s", alarm, json.dumps(detail))
            self._tell_one(alarm)

    def tell_all(self) -> None:
        with self._lock:
            for alarm in Alarm:
                self._tell_one(alarm)

    def _tell_one(self, alarm: Alarm) -> None:
        """An empty retained message takes the last one off the broker."""
        _, body = self._raised.get(alarm, ({}, b""))
        self._tell(Note(contract.alarm_topic(self._config, alarm), body, retain=True))


def _body(alarm: Alarm, detail: Mapping[str, Any]) -> bytes:
    at = datetime.now(UTC).isoformat(timespec="milliseconds")
    return json.dumps({"schema_version": 1, "alarm": alarm, "raised_at": at, **detail}).encode()
