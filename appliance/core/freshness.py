"""Pictures by the time when they were taken: which are too old to be worth inspecting, which come behind newer ones,
and whose clock runs ahead.

Capture times are the camera's, so they are compared with the box's clock only where somebody asked for it, and with
each other otherwise. Waiting on the box counts by its monotonic clock: a leap of its wall clock makes nothing old.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from appliance.core.types import Refusal

STALE = "stale"
AHEAD_SECONDS = 60.0
"""A camera's clock may be so far ahead of the box's before anybody is told."""
TOLD_SECONDS = 60.0
PLACES, LINES = 4096, 64

Place = tuple[str, str, str, str]
"""Line, product, board and part."""


def stale(behind_seconds: float, waited_seconds: float, most_seconds: float) -> Refusal | None:
    """Why a picture is too old, that was taken `behind_seconds` before it was accepted and has waited since. One from
    the future was taken just now, for all that we can say."""
    old_seconds = max(behind_seconds, 0.0) + waited_seconds
    if not most_seconds or old_seconds <= most_seconds:
        return None
    return Refusal(STALE, f"it was taken {old_seconds:.1f} s ago, more than limits.stale_seconds ({most_seconds:g})")


class Newest:
    """When the newest picture with a verdict was taken, by place; `recorded` finds it where we have forgotten."""

    def __init__(self, recorded: Callable[[Place], str | None]) -> None:
        self._recorded = recorded
        self._newest: OrderedDict[Place, str] = OrderedDict()

    def is_out_of_order(self, place: Place, captured_at: str) -> bool:
        """Whether a newer one has its verdict, now that this one gets its own. Times are ISO 8601 in UTC."""
        newest = self._newest.pop(place, None) or self._recorded(place)
        self._newest[place] = captured_at if newest is None else max(newest, captured_at)
        if len(self._newest) > PLACES:
            self._newest.popitem(last=False)
        return newest is not None and captured_at < newest


class Clocks:
    """Lines whose pictures come from the future, by the box's clock."""

    def __init__(self) -> None:
        self._seen: OrderedDict[str, float] = OrderedDict()

    def note(self, line: str, ahead_seconds: float, now: float) -> None:
        if ahead_seconds > AHEAD_SECONDS:
            self._seen[line] = now
            self._seen.move_to_end(line)
            if len(self._seen) > LINES:
                self._seen.popitem(last=False)

    def ahead(self, now: float) -> tuple[str, ...]:
        """Of the last minute."""
        return tuple(sorted(line for line, seen in self._seen.items() if now - seen <= TOLD_SECONDS))
