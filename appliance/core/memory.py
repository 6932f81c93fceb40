"""The ledger of one device: which experts are absent, loading or ready, and which bytes they hold.

Experts hold segments; a segment is held once however many experts share it, and counted by reference. The ledger
books bytes before they are read, so `used_bytes` never trails what the device really holds; what batches take while
they run is booked apart. It refuses illegal moves; whom to evict is decided in `policies`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from appliance.core.types import Device, Footprint, Segment, bytes_together
from appliance.errors import NoRoom

RECOVERY_SECONDS = 60.0
LEAST_WITHHELD = 64
"""Less than this part of the budget is not worth withholding."""


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
    """Invariant: `used_bytes` is the sum of the distinct segments held and of what is private to their holders, and
    never above the budget; `running_bytes` is what the batches in work take, and never above theirs.

    `footprints` has the experts that the device can serve. Those of them that are `pinned` never leave; what they all
    take is nobody else's.
    """

    def __init__(
        self, device: Device, footprints: Mapping[str, Footprint], pinned: frozenset[str] = frozenset()
    ) -> None:
        self.device, self.pinned = device, pinned
        self.used_bytes = self.peak_bytes = 0
        self.running_bytes = self.running_peak_bytes = 0
        self.withheld_bytes, self._recovers_at = 0, 0.0
        self.loading_count = 0
        self._footprints = footprints
        self._needs: dict[str, int] = {}
        self._distinct: dict[str, tuple[Segment, ...]] = {}
        self._least_activation_bytes = min((f.activation_bytes(1) for f in footprints.values()), default=0)
        self._holders: Counter[str] = Counter()
        self._residency: dict[str, Residency] = {}
        self._pins: Counter[str] = Counter()

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

    def missing(self, expert: str) -> tuple[Segment, ...]:
        """The expert's segments that nobody holds yet."""
        return tuple(s for s in self._segments(expert) if not self._holders.get(s.id))

    def missing_bytes(self, expert: str) -> int:
        return _bytes(self.missing(expert)) + self._footprints[expert].private_bytes

    def weights_bytes(self, expert: str) -> int:
        """Of the expert when it shares with nobody."""
        return _bytes(self._segments(expert)) + self._footprints[expert].private_bytes

    def free_bytes(self, expert: str) -> int:
        """What a load of the expert may take without anybody leaving: withholding never shuts it out for good."""
        spare = max(0, self.device.budget_bytes - self._need_bytes(expert))
        return self.device.budget_bytes - self.used_bytes - min(self.withheld_bytes, spare)

    def ever_fits(self, expert: str) -> bool:
        """Whether the device can serve the expert: its weights fit into the budget beside those of who is pinned, and
        a run of one picture into that for activations."""
        footprint, working = self._footprints.get(expert), self.device.activation_bytes
        return (
            footprint is not None
            and self._need_bytes(expert) <= self.device.budget_bytes
            and (working is None or footprint.activation_bytes(1) <= working)
        )

    def begin_load(self, expert: str, leaving: Sequence[str] = ()) -> tuple[list[Freed], tuple[Segment, ...]]:
        """Book the expert's memory while `leaving` give theirs back, in one move.

        Returns what each leaving expert frees, then the segments to read. A segment that a leaving expert shares with
        the coming one stays. Raises NoRoom, and changes nothing, when the expert would not fit.
        """
        assert self.is_absent(expert), f"{expert} is loaded twice"
        assert all(self.is_evictable(name) for name in leaving), f"one of {leaving} is pinned or not ready"
        missing = self.missing(expert)
        need = _bytes(missing) + self._footprints[expert].private_bytes
        could_free = self.free_bytes(expert) + self._freed_bytes(leaving, expert)
        if need > could_free:
            raise NoRoom(need, could_free)
        self._holders.update(s.id for s in self._segments(expert))
        freed = [Freed(name, self._release(name)) for name in leaving]
        self._residency[expert] = Residency.LOADING
        self.loading_count += 1
        self.used_bytes += need
        self.peak_bytes = max(self.peak_bytes, self.used_bytes)
        return freed, missing

    def finish_load(self, expert: str) -> None:
        assert self._residency.get(expert) is Residency.LOADING, f"{expert} was not loading"
        self._residency[expert] = Residency.READY
        self.loading_count -= 1
        if expert in self.pinned:
            self.pin(expert)

    def abort_load(self, expert: str) -> tuple[Segment, ...]:
        """The load failed: give its memory back; returns the segments that nobody holds any more."""
        assert self._residency.get(expert) is Residency.LOADING, f"{expert} was not loading"
        self.loading_count -= 1
        return self._release(expert)

    def pin(self, expert: str) -> None:
        """A pinned expert stays; pins are counted."""
        assert self.is_ready(expert), f"{expert} is not ready"
        self._pins[expert] += 1

    def unpin(self, expert: str) -> None:
        assert self._pins[expert] > 0, f"{expert} was not pinned"
        self._pins[expert] -= 1

    def most_items(self, expert: str, limit: int) -> int:
        """The largest batch, up to `limit`, whose activations fit beside those of the batches in work."""
        footprint, working = self._footprints[expert], self.device.activation_bytes
        if working is None:
            return limit
        free_bytes = working - self.running_bytes
        if footprint.activation_bytes(1) > free_bytes:
            return 0
        sizes = range(limit, 0, -1)
        return next((n for n in sizes if footprint.activation_bytes(self.device.filled(n, limit)) <= free_bytes), 0)

    @property
    def has_room_to_run(self) -> bool:
        """Whether the activations of any expert's single picture may fit beside those of the batches in work."""
        working = self.device.activation_bytes
        return working is None or working - self.running_bytes >= self._least_activation_bytes

    def begin_run(self, expert: str, items: int, limit: int) -> None:
        """The expert stays and its batch's activations are booked, until the run ends; those of the whole batch that
        is run for so many pictures, of an expert that takes up to `limit`."""
        takes = self._footprints[expert].activation_bytes(self.device.filled(items, limit))
        self.pin(expert)
        self.running_bytes += takes
        self.running_peak_bytes = max(self.running_peak_bytes, self.running_bytes)
        assert self.device.activation_bytes is None or self.running_bytes <= self.device.activation_bytes

    def end_run(self, expert: str, items: int, limit: int) -> None:
        self.unpin(expert)
        self.running_bytes -= self._footprints[expert].activation_bytes(self.device.filled(items, limit))

    def withhold(self, less_bytes: int, now: float) -> None:
        """The device ran out of memory, whatever is booked: from now on hold what is held now, or so much less."""
        budget = self.device.budget_bytes
        self.withheld_bytes = min(budget, max(budget - self.used_bytes + less_bytes, budget // LEAST_WITHHELD))
        self._recovers_at = now + RECOVERY_SECONDS

    def recover(self, now: float) -> None:
        """Half of what is withheld comes back with every RECOVERY_SECONDS: whoever took that memory may be gone."""
        while self.withheld_bytes and now >= self._recovers_at:
            self.withheld_bytes //= 2
            self._recovers_at += RECOVERY_SECONDS
            if self.withheld_bytes < self.device.budget_bytes // LEAST_WITHHELD:
                self.withheld_bytes = 0

    @property
    def recovers_at(self) -> float | None:
        """When `recover` has something to do."""
        return self._recovers_at if self.withheld_bytes else None

    @property
    def excess_bytes(self) -> int:
        """How much has to leave because it is withheld."""
        return max(0, self.used_bytes + self.withheld_bytes - self.device.budget_bytes)

    def shut_out_by(self, expert: str) -> tuple[str, int] | None:
        """Who could be served no more if `expert` stayed for good, itself perhaps, and the bytes that this one and all
        who stay would need together; None when everybody still could."""
        staying = self.pinned | {expert}
        for name in (expert, *filter(self.ever_fits, self._footprints)):
            need_bytes = self._together_bytes(staying | {name})
            if need_bytes > self.device.budget_bytes:
                return name, need_bytes
        return None

    def keep(self, expert: str) -> None:
        """From now on the expert never leaves, once it is there."""
        assert self.shut_out_by(expert) is None, f"{expert} has no room beside the others"
        if expert not in self.pinned:
            self.pinned |= {expert}
            self._needs.clear()
            if self.is_ready(expert):
                self.pin(expert)

    def give_up(self, expert: str) -> None:
        """An expert that was to stay may leave, and its place is anybody's."""
        if expert in self.pinned:
            self.pinned -= {expert}
            self._needs.clear()
            if self.is_ready(expert):
                self.unpin(expert)

    def evict(self, expert: str) -> Freed:
        """The expert leaves, and nobody comes."""
        assert self.is_evictable(expert), f"{expert} is pinned or not ready"
        return Freed(expert, self._release(expert))

    def is_evictable(self, expert: str) -> bool:
        return self.is_ready(expert) and not self._pins.get(expert)

    def victims(self, ranked: Iterable[str], expert: str) -> list[str]:
        """The first of `ranked` whose leaving makes room for `expert`, and no more than needed. Raises NoRoom."""
        need, chosen = self.missing_bytes(expert), list[str]()
        free = could_free = self.free_bytes(expert)
        for victim in ranked:
            if could_free >= need:
                break
            chosen.append(victim)
            could_free = free + self._freed_bytes(chosen, expert)
        if could_free < need:
            raise NoRoom(need, could_free)
        return chosen

    def _segments(self, expert: str) -> tuple[Segment, ...]:
        """Of the expert, each once."""
        if expert not in self._distinct:
            self._distinct[expert] = self._footprints[expert].distinct
        return self._distinct[expert]

    def _need_bytes(self, expert: str) -> int:
        """Of the expert and all who are pinned together."""
        if expert not in self._needs:
            together = self._together_bytes(self.pinned | {expert}) if self.pinned else self.weights_bytes(expert)
            self._needs[expert] = together
        return self._needs[expert]

    def _together_bytes(self, experts: Iterable[str]) -> int:
        return bytes_together(self._footprints[name] for name in experts)

    def _freed_bytes(self, leaving: Sequence[str], coming: str) -> int:
        """Private bytes of who leaves, and those of the segments that nobody then holds and `coming` does not use."""
        kept = {s.id for s in self._segments(coming)}
        left = Counter(s for name in leaving for s in self._segments(name) if s.id not in kept)
        shared = sum(segment.bytes for segment, count in left.items() if count == self._holders[segment.id])
        return shared + sum(self._footprints[name].private_bytes for name in leaving)

    def _release(self, expert: str) -> tuple[Segment, ...]:
        del self._residency[expert]
        freed = []
        for segment in self._segments(expert):
            self._holders[segment.id] -= 1
            if not self._holders[segment.id]:
                freed.append(segment)
        self.used_bytes -= _bytes(freed) + self._footprints[expert].private_bytes
        return tuple(freed)


def _bytes(segments: Iterable[Segment]) -> int:
    return sum(segment.bytes for segment in segments)
