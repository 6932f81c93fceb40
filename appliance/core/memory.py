"""The ledger of one device: which experts are absent, loading or ready, and which bytes they hold.

Experts hold segments; a segment is held once however many experts share it, and counted by reference. The ledger
books bytes before they are read, so `used_bytes` never trails what the device really holds. It refuses illegal moves;
whom to evict is decided in `policies`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from appliance.core.types import Device, Segment
from appliance.errors import NoRoom


class Residency(StrEnum):
    ABSENT = "absent"
    LOADING = "loading"
    READY = "ready"


@dataclass(frozen=True, slots=True)
class Freed:
    """An expert that left, and the segments that nobody holds any more."""

    expert: str
    segments: tuple[Segment, ...]


class Ledger:
    """Invariant: `used_bytes` is the sum of the distinct segments held, and never above the budget."""

    def __init__(self, device: Device, segments: Mapping[str, tuple[Segment, ...]]) -> None:
        self.device = device
        self.used_bytes = 0
        self.peak_bytes = 0
        self._segments = segments
        self._holders: Counter[str] = Counter()
        self._residency: dict[str, Residency] = {}
        self._pins: Counter[str] = Counter()

    @property
    def free_bytes(self) -> int:
        return self.device.budget_bytes - self.used_bytes

    @property
    def resident(self) -> tuple[str, ...]:
        """Every expert that holds memory, loading or ready, oldest load first."""
        return tuple(self._residency)

    def residency(self, expert: str) -> Residency:
        return self._residency.get(expert, Residency.ABSENT)

    def is_ready(self, expert: str) -> bool:
        return self._residency.get(expert) is Residency.READY

    def is_absent(self, expert: str) -> bool:
        return expert not in self._residency

    @property
    def loading_count(self) -> int:
        return sum(state is Residency.LOADING for state in self._residency.values())

    def missing(self, expert: str) -> tuple[Segment, ...]:
        """The expert's segments that nobody holds yet."""
        return tuple(s for s in _distinct(self._segments[expert]) if not self._holders[s.id])

    def missing_bytes(self, expert: str) -> int:
        return _bytes(self.missing(expert))

    def ever_fits(self, expert: str) -> bool:
        """Whether the expert fits into the whole budget."""
        return _bytes(_distinct(self._segments[expert])) <= self.device.budget_bytes

    def begin_load(self, expert: str, leaving: Sequence[str] = ()) -> tuple[list[Freed], tuple[Segment, ...]]:
        """Book the expert's memory while `leaving` give theirs back, in one move.

        Returns what each leaving expert frees, then the segments to read. A segment that a leaving expert shares with
        the coming one stays. Raises NoRoom, and changes nothing, when the expert would not fit.
        """
        assert self.is_absent(expert), f"{expert} is loaded twice"
        assert all(self.is_evictable(name) for name in leaving), f"one of {leaving} is pinned or not ready"
        missing = self.missing(expert)
        need, could_free = _bytes(missing), self.free_bytes + self._freed_bytes(leaving, expert)
        if need > could_free:
            raise NoRoom(need, could_free)
        self._holders.update(s.id for s in _distinct(self._segments[expert]))
        freed = [Freed(name, self._release(name)) for name in leaving]
        self._residency[expert] = Residency.LOADING
        self.used_bytes += need
        self.peak_bytes = max(self.peak_bytes, self.used_bytes)
        return freed, missing

    def finish_load(self, expert: str) -> None:
        assert self._residency.get(expert) is Residency.LOADING, f"{expert} was not loading"
        self._residency[expert] = Residency.READY

    def abort_load(self, expert: str) -> tuple[Segment, ...]:
        """The load failed: give its memory back; returns the segments that nobody holds any more."""
        assert self._residency.get(expert) is Residency.LOADING, f"{expert} was not loading"
        return self._release(expert)

    def pin(self, expert: str) -> None:
        """A pinned expert stays; pins are counted."""
        assert self.is_ready(expert), f"{expert} is not ready"
        self._pins[expert] += 1

    def unpin(self, expert: str) -> None:
        assert self._pins[expert] > 0, f"{expert} was not pinned"
        self._pins[expert] -= 1

    def is_evictable(self, expert: str) -> bool:
        return self.is_ready(expert) and not self._pins[expert]

    def victims(self, ranked: Iterable[str], expert: str) -> list[str]:
        """The first of `ranked` whose leaving makes room for `expert`, and no more than needed. Raises NoRoom."""
        need, chosen = self.missing_bytes(expert), list[str]()
        could_free = self.free_bytes
        for victim in ranked:
            if could_free >= need:
                break
            chosen.append(victim)
            could_free = self.free_bytes + self._freed_bytes(chosen, expert)
        if could_free < need:
            raise NoRoom(need, could_free)
        return chosen

    def _freed_bytes(self, leaving: Sequence[str], coming: str) -> int:
        """Bytes of the segments whose last holder leaves and that `coming` does not use."""
        kept = {s.id for s in self._segments[coming]}
        left = Counter(s for name in leaving for s in _distinct(self._segments[name]) if s.id not in kept)
        return sum(segment.bytes for segment, count in left.items() if count == self._holders[segment.id])

    def _release(self, expert: str) -> tuple[Segment, ...]:
        del self._residency[expert]
        freed = []
        for segment in _distinct(self._segments[expert]):
            self._holders[segment.id] -= 1
            if not self._holders[segment.id]:
                freed.append(segment)
        self.used_bytes -= _bytes(freed)
        return tuple(freed)


def _distinct(segments: tuple[Segment, ...]) -> Iterable[Segment]:
    """An expert may use one segment twice; it holds it once."""
    return dict.fromkeys(segments)


def _bytes(segments: Iterable[Segment]) -> int:
    return sum(segment.bytes for segment in segments)
