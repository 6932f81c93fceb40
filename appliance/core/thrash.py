"""Whether a device spends its loading on experts that it has just evicted.

What counts is the time of the load slots, not the number of loads: a box that is hardly used may load an expert for
each picture and loses nothing by it, one whose slots bring back what they dropped loads instead of inspecting.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from math import floor

WINDOW_SECONDS = 60.0
"""An expert that left less than this ago should have stayed. Three times the patience with which tasks are queued: a
shorter window would not see who left for one that is overdue and came back when its own turn had come."""
BEGIN_SHARE = 1 / 3
"""Of the time of the load slots: when a third of it brings back who has just left, memory is what limits the box."""
END_SHARE = 1 / 6
"""Well below, so that a device on the brink is not told to be thrashing every other minute."""


@dataclass(frozen=True, slots=True)
class Thrashing:
    """What the last window came to on a device that is thrashing."""

    loads_per_picture: float
    came_back_per_picture: float
    working_set_bytes: int
    budget_bytes: int


class Sliding:
    """A sum over the last window, in steps of a second."""

    def __init__(self) -> None:
        self._steps: deque[tuple[int, float]] = deque()
        self._sum = 0.0

    def add(self, value: float, now: float) -> None:
        second = floor(now)
        if self._steps and self._steps[-1][0] == second:
            self._steps[-1] = second, value + self._steps[-1][1]
        else:
            self.sum(now)
            self._steps.append((second, value))
        self._sum += value

    @property
    def ends_at(self) -> float | None:
        """When it is zero if nothing comes; None if it is."""
        return self._steps[-1][0] + WINDOW_SECONDS if self._steps else None

    def sum(self, now: float) -> float:
        while self._steps and self._steps[0][0] <= now - WINDOW_SECONDS:
            self._sum -= self._steps.popleft()[1]
        return self._sum if self._steps else 0.0


class Thrash:
    """Of one device with so many load slots. Times are monotonic seconds."""

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._left_seconds: dict[str, float] = {}
        self._needed: set[str] = set()
        self._back_seconds = Sliding()
        self.loads, self.came_back = Sliding(), Sliding()
        self.is_thrashing = False

    def left(self, expert: str, was_needed: bool, now: float) -> None:
        """Who leaves although queued tasks need it will be back, however late."""
        self._left_seconds[expert] = now
        (self._needed.add if was_needed else self._needed.discard)(expert)

    def left_seconds(self, expert: str) -> float | None:
        """When the expert left, if it did."""
        return self._left_seconds.get(expert)

    def loaded(self, expert: str, began_seconds: float, now: float) -> bool:
        """A load ended for which somebody waited; whether the expert should have stayed."""
        left = self._left_seconds.get(expert)
        is_back = left is not None and (expert in self._needed or began_seconds - left < WINDOW_SECONDS)
        self.loads.add(1, now)
        if is_back:
            self.came_back.add(1, now)
            self._back_seconds.add(now - began_seconds, now)
        return is_back

    def look(self, now: float) -> bool:
        """Judge; whether that changed."""
        share = self._back_seconds.sum(now) / (self._slots * WINDOW_SECONDS)
        was_thrashing = self.is_thrashing
        self.is_thrashing = share >= (END_SHARE if was_thrashing else BEGIN_SHARE)
        return self.is_thrashing is not was_thrashing

    @property
    def ends_at(self) -> float | None:
        """When it is over if nothing happens, so that it ends also on a box that has nothing to do."""
        return self._back_seconds.ends_at if self.is_thrashing else None
