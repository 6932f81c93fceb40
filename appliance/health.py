"""Whether the service gets on and holds the memory that is booked: sums and judgements of what others count."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from appliance.core.drift import Balance, DriftAlarm
from appliance.core.memory import Ledger
from appliance.core.types import (
    CancelLoad,
    Event,
    Finished,
    Footprint,
    HurryLoad,
    Load,
    Loaded,
    LoadFailed,
    Run,
    RunFailed,
)
from appliance.engine.engine import Order
from appliance.promise import DECODING_BYTES_PER_PIXEL

STUCK_SECONDS = 60.0
"""A batch or a thread without a sign for this long is no progress."""
STUCK_LOAD_SECONDS = 180.0
"""So is a load: 9 GB from a disk of 50 MB/s, or a disk that the kernel has reset twice (30 s each) and gave up."""
RESTING_BYTES = 32_000_000
"""What may stay for good beside all that is counted: template sessions, SQLite's caches, threads, what the allocator
keeps after it was trimmed. 14 experts of 45 MB under 450 MB leave 12 MB (1.31.1, 2026-11)."""
GPU_LIBRARIES_BYTES = 256_000_000
"""Main memory that a GPU's libraries take once they are used. A guess until somebody measures it."""
_PAGE_BYTES = 4096

PROCESS = "process"


class Underway:
    """Orders that were given and of which nothing has been heard.

    A load ahead waits for its turn as long as others load: it is watched when it is needed, or has to give way.
    """

    def __init__(self) -> None:
        self._runs: dict[int, tuple[float, int]] = {}
        self._loads: dict[tuple[str, str], float] = {}

    def begun(self, order: Order, now: float) -> None:
        match order:
            case Run(batch):
                self._runs[batch.id] = now, len(batch.requests)
            case Load(device, expert, ahead=False) | HurryLoad(device, expert) | CancelLoad(device, expert):
                self._loads.setdefault((device, expert), now)

    def ended(self, event: Event) -> None:
        match event:
            case Finished(batch) | RunFailed(batch):
                self._runs.pop(batch.id, None)
            case Loaded(device, expert) | LoadFailed(device, expert):
                self._loads.pop((device, expert), None)

    @property
    def has_runs(self) -> bool:
        return bool(self._runs)

    @property
    def pictures(self) -> int:
        """In the batches that run."""
        return sum(count for _, count in self._runs.values())

    def is_stuck(self, now: float) -> bool:
        runs = (begun for begun, _ in self._runs.values())
        return now - min(runs, default=now) >= STUCK_SECONDS or (
            now - min(self._loads.values(), default=now) >= STUCK_LOAD_SECONDS
        )


@dataclass(frozen=True, slots=True)
class Passing:
    """What is in memory at the moment because of pictures that wait or run."""

    queued_bytes: int
    largest_payload_bytes: int
    decoded_bytes: int
    pictures_in_work: int
    largest_pixels: int

    @property
    def bytes(self) -> int:
        """At most; one picture may be on its way from the broker, and once more as it is put together."""
        decoding = DECODING_BYTES_PER_PIXEL * self.largest_pixels * self.pictures_in_work
        return self.queued_bytes + 2 * self.largest_payload_bytes + self.decoded_bytes + decoding


def process_balance(
    ledger: Ledger,
    footprints: Mapping[str, Footprint],
    passing: Passing,
    *,
    at_start_bytes: int,
    kept_bytes: int,
    measured_bytes: int,
    gpus: int = 0,
) -> Balance:
    """Anonymous memory. `kept_bytes` are at most kept of past runs for the next.

    What batches take is booked as they need it at most, and what is loading before it is there: both may be there, but
    do not have to.
    """
    loading, resting = _loading_bytes(ledger, footprints), RESTING_BYTES + gpus * GPU_LIBRARIES_BYTES
    return Balance(
        booked_bytes=at_start_bytes + ledger.used_bytes - loading,
        unbooked_bytes=loading + ledger.running_bytes + kept_bytes + passing.bytes + resting,
        measured_bytes=measured_bytes,
    )


def weights_balance(ledger: Ledger, footprints: Mapping[str, Footprint], mapped_bytes: int) -> Balance:
    """Segments on one device. The ledger counts their bytes and what is private to sessions, the device whole pages."""
    resident, loading = [footprints[name] for name in ledger.resident], _loading_bytes(ledger, footprints)
    not_mapped = min(ledger.used_bytes, loading + sum(footprint.private_bytes for footprint in resident))
    pages = 1 + len({segment.id for footprint in resident for segment in footprint.segments})
    return Balance(ledger.used_bytes - not_mapped, loading + pages * _PAGE_BYTES, mapped_bytes)


def _loading_bytes(ledger: Ledger, footprints: Mapping[str, Footprint]) -> int:
    """At most: what of it others hold already is there."""
    loading = (name for name in ledger.resident if not ledger.is_ready(name))
    return min(ledger.used_bytes, sum(footprints[name].weights_bytes for name in loading))


class Drift:
    """One judgement for the process and each device, over time."""

    def __init__(self) -> None:
        self._alarms: dict[str, DriftAlarm] = {}
        self._raised: dict[str, dict[str, Any]] = {}

    def look(self, balances: Mapping[str, Balance], now: float) -> Mapping[str, Mapping[str, Any]]:
        """Which of them are wrong, each as it was when that was first seen."""
        for name, balance in balances.items():
            alarm = self._alarms.setdefault(name, DriftAlarm())
            if not alarm.look(balance, now):
                self._raised.pop(name, None)
            elif name not in self._raised:
                self._raised[name] = {"drift": round(alarm.drift, 4), **asdict(balance)}
        return dict(self._raised)

    def of(self, name: str) -> float:
        return round(self._alarms[name].drift, 4) if name in self._alarms else 0.0
