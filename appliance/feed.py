"""From the spool to whoever inspects: which picture is next, and which has to wait for room.

Pictures come in order of acceptance, read in pages; before all others those that a former process had in hand when it
crashed.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import inf

from appliance.boards import Boards, monotonic_of
from appliance.core import suspects
from appliance.core.types import Tick
from appliance.drivers.records import Records, Spooled

FED_AT_ONCE = 1000


@dataclass(frozen=True, slots=True)
class Fed:
    """A picture whose turn it is. Nothing runs beside who is `alone`."""

    spooled: Spooled
    arrived_seconds: float
    alone: bool


class Feed:
    """Used by the thread that decides. `room` says how many of so many pictures may come now.

    A Tick behind pictures says that all are known that were read at once: then it is time to decide.
    """

    def __init__(self, records: Records, boards: Boards, room: Callable[[int], int]) -> None:
        self._records, self._boards, self._room = records, boards, room
        self._accepted_seconds: dict[int, float] = {}
        self._told = records.newest_arrival()
        """Up to this one it is known when pictures were accepted."""
        self._read: deque[Spooled] = deque()  # from the spool, and not begun yet
        self._read_through = 0
        self._more_spooled = True
        self._read_seconds = self._begun_seconds = -inf
        """When the spool was read last and had no more; when the picture had come that was begun last in its turn."""
        self._early: deque[Spooled] = deque()  # suspects, and who may clear them, not begun yet
        self._begun_early = set[int]()

    def spooled(self, arrival: int) -> None:
        """On the writer's thread: a picture was committed."""
        self._accepted_seconds[arrival] = time.monotonic()
        self._told = arrival

    def look_again(self) -> None:
        """There may be more in the spool."""
        self._more_spooled = True

    def suspects(self) -> Iterator[Fed | Tick]:
        """Before all others, whom a former process had in hand when it crashed, and with them who may clear them."""
        suspected = {one.arrival: one for one in self._records.suspects()}
        if suspected:
            known = {one.arrival: one for one in self._records.waiting(0, FED_AT_ONCE)} | suspected
            attempts = {arrival: one.attempts for arrival, one in suspected.items()}
            fresh = (arrival for arrival in known if arrival not in suspected)
            order = suspects.running_order(attempts, fresh, lambda arrival: _kind(known[arrival]))
            self._early.extend(known[arrival] for arrival in order)
        return self._first()

    def pictures(self) -> Iterator[Fed | Tick]:
        """As many as there is room for. They are to be begun as they come: that changes how much room there is."""
        if self._boards.is_over(time.monotonic()):
            self._more_spooled = True  # whoever came in time is on the disk by now
        yield from self._first()
        if not self._early:
            yield from self._others()
        self._boards.look(self._read_seconds if self._has_fed_all else self._begun_seconds)

    def _first(self) -> Iterator[Fed | Tick]:
        """Suspects and their witnesses. Until the last of them has begun it is nobody else's turn."""
        waited = len(self._early)
        while self._early and self._boards.has_room(self._early[0].picture):
            one = self._early.popleft()
            self._begun_early.add(one.arrival)
            yield Fed(one, self._arrived_seconds(one), alone=True)
        if len(self._early) < waited:
            yield Tick()

    def _others(self) -> Iterator[Fed | Tick]:
        while (room := self._room(FED_AT_ONCE)) > 0 and self._has_read(room):
            begun = 0
            while self._read and self._room(1) > 0:
                one = self._read[0]
                is_begun = one.arrival in self._begun_early
                if not is_begun and not self._boards.has_room(one.picture):
                    break
                self._read.popleft()
                begun += 1
                if is_begun:
                    self._begun_early.remove(one.arrival)
                else:
                    yield self._next(one)
            if not begun:
                return
            yield Tick()

    def _next(self, one: Spooled) -> Fed:
        arrived = self._begun_seconds = self._arrived_seconds(one)
        self._boards.look(arrived)
        return Fed(one, arrived, alone=False)

    def _has_read(self, room: int) -> bool:
        if not self._read and self._more_spooled:
            told, now = self._told, time.monotonic()
            self._read.extend(one for one in self._records.waiting(self._read_through, room) if one.arrival <= told)
            self._more_spooled = len(self._read) == room
            self._read_seconds = self._read_seconds if self._more_spooled else now
            self._read_through = self._read[-1].arrival if self._read else self._read_through
        return bool(self._read)

    @property
    def _has_fed_all(self) -> bool:
        return not self._read and not self._more_spooled

    def _arrived_seconds(self, spooled: Spooled) -> float:
        """When it was accepted. Only for pictures of a former process wall time must do."""
        known = self._accepted_seconds.pop(spooled.arrival, None)
        return monotonic_of(spooled.picture.accepted_at) if known is None else known


def _kind(spooled: Spooled) -> tuple[str, str]:
    """Pictures of one kind ask the same experts."""
    return spooled.picture.product, spooled.picture.part
