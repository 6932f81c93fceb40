"""Loads and evictions as the controller orders them: weights into memory, a binding on them, and back."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from appliance.core.types import Evict, Load, Rule, Segment
from appliance.engine.cancellation import Cancellation
from appliance.engine.place import SegmentMemory
from appliance.engine.sessions import Sessions
from appliance.errors import OutOfMemory
from appliance.store.store import Compiled


@dataclass(slots=True, eq=False)
class _Coming:
    """A load in work."""

    expert: str
    segments: frozenset[Segment]
    cancellation: Cancellation
    is_ahead: bool


class Residents:
    """The experts in a device's memory. `bring` runs on loader threads, `evict` on the deciding one."""

    def __init__(self, compiled: Mapping[str, Compiled], weights: SegmentMemory, sessions: Sessions) -> None:
        self._compiled, self._weights, self._sessions = compiled, weights, sessions
        self._lock = threading.Lock()
        self._active: set[str] = set()
        self._coming: list[_Coming] = []
        self._hurried: set[str] = set()  # until they are evicted, which comes before every other load of them

    def bring(self, load: Load, cancellation: Cancellation) -> None:
        """Make the expert ready. What came before an error stays to be evicted.

        Raises LoadError, OutOfMemory, StoreError, ModelError or DeviceError, and Cancelled when it was given up before
        all its segments were there; then a segment that another load needs is still brought.
        """
        compiled, doing = self._compiled[load.expert], f"the load of {load.expert}"
        coming = _Coming(load.expert, frozenset(compiled.segments), cancellation, load.ahead)
        with self._announced(coming), cancellation.ended_by(lambda: self._give_up(coming)):
            for segment in compiled.segments:  # one by one, so that what has not begun never begins
                cancellation.check(doing)
                self._weights.load([segment], ahead=coming.is_ahead)
        cancellation.check(doing)
        try:
            self._sessions.activate(compiled)
        except OutOfMemory:
            self._weights.trim()
            raise
        with self._lock:
            self._active.add(load.expert)

    def hurry(self, expert: str) -> None:
        """Somebody waits for what is brought ahead, or is just about to be. It may have come already."""
        with self._lock:
            self._hurried.add(expert)
            for coming in self._coming:
                if coming.expert == expert:
                    coming.is_ahead = False
                    self._weights.hurry(list(coming.segments))

    def evict(self, eviction: Evict) -> None:
        """Give the expert's memory back at once. After a failed load some of it may never have been there."""
        with self._lock:
            is_active = eviction.expert in self._active
            self._active.discard(eviction.expert)
            self._hurried.discard(eviction.expert)
        if is_active:
            self._sessions.drop(eviction.expert)
        self._weights.drop([segment for segment in eviction.segments if self._weights.is_mapped(segment)])
        if eviction.rule is Rule.WITHHELD:  # the device shall have it
            self._weights.trim()

    @contextmanager
    def _announced(self, coming: _Coming) -> Iterator[None]:
        with self._lock:
            self._coming.append(coming)
            coming.is_ahead &= coming.expert not in self._hurried
        try:
            yield
        finally:
            with self._lock:
                self._coming.remove(coming)

    def _give_up(self, coming: _Coming) -> None:
        """Stop what no load that is still wanted is bringing. Who asks for it from now on has it brought anew."""
        with self._lock:
            wanted = [other.segments for other in self._coming if not other.cancellation.is_cancelled]
            self._weights.cancel(list(coming.segments.difference(*wanted)))
