"""Which segments are in a memory, who brings them, who holds them: what is the same for every kind of memory.

It does not decide what to bring or drop, it knows segments and not experts, and not what the memory is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Generic, TypeVar

from appliance.core.types import Segment
from appliance.engine.disk import Reader, Turn
from appliance.errors import ApplianceError, LoadError

Room = TypeVar("Room")
"""Where one segment lies, as a kind of memory sees it."""


@dataclass(slots=True, eq=False)
class _Entry(Generic[Room]):
    """A segment that takes memory. `filled` ends when its bytes are there, or with the error for which they are not."""

    room: Room
    bytes: int
    turn: Turn
    filled: Future[None] = field(default_factory=Future)

    @property
    def is_ending(self) -> bool:
        return self.turn.is_cancelled and not self.filled.done()


class SegmentTable(ABC, Generic[Room]):
    """The `SegmentMemory` of place.py for one kind of memory. Safe to use from several threads."""

    def __init__(self, segment_path: Callable[[str], Path], tiers: Sequence[str], readers: int) -> None:
        self._segment_path = segment_path
        self._nearest = tiers[0]
        self._reader = Reader(readers)
        self._lock = Lock()
        self._entries: dict[str, _Entry[Room]] = {}
        self._held: Counter[str] = Counter()
        self._hits = dict.fromkeys(tiers, 0)
        self._mapped_bytes = self._peak_bytes = 0

    @property
    def mapped_bytes(self) -> int:
        """What the segments take now, those still being filled included."""
        return self._mapped_bytes

    @property
    def peak_bytes(self) -> int:
        return self._peak_bytes

    @property
    def spare_bytes(self) -> int:
        """Beside that, kept for segments that come."""
        return 0

    def trim(self, *, idle_seconds: float = 0.0) -> None:
        """Give back what is spare since so many seconds."""

    @property
    def hits(self) -> Mapping[str, int]:
        """Segments asked for and had so far, by where they were; what another thread was bringing was at hand."""
        with self._lock:
            return dict(self._hits)

    def load(self, segments: Sequence[Segment], *, ahead: bool = False) -> None:
        """Return when all segments are in memory; one that another thread is bringing is waited for, not read twice.

        What is loaded ahead of its need waits while anything needed is read. Raises LoadError naming the file that is
        missing, short or unreadable, OutOfMemory, DeviceError, or Cancelled; segments brought before it stay.
        """
        for segment in segments:
            self._bring(segment, ahead)

    def cancel(self, segments: Sequence[Segment]) -> None:
        """Let the loads of these end soon, all with Cancelled and without their memory; what is here already stays.

        Who asks for one of them from now on is not meant: it is brought anew.
        """
        with self._lock:
            for segment in segments:
                entry = self._entries.get(segment.id)
                if entry is not None and not entry.filled.done():
                    self._reader.cancel(entry.turn)

    def hurry(self, segments: Sequence[Segment]) -> None:
        """Let the loads of these give way no more; what is not being brought is not meant."""
        with self._lock:
            for segment in segments:
                if segment.id in self._entries:
                    self._reader.hurry(self._entries[segment.id].turn)

    def drop(self, segments: Sequence[Segment]) -> None:
        """Give the memory back at once. Raises LoadError, dropping none, when one is absent, loading or in use."""
        with self._lock:
            names = list(dict.fromkeys(segment.id for segment in segments))
            for name in names:
                self._check_free(name)
            for name in names:
                self._forget(name)

    def is_mapped(self, segment: Segment) -> bool:
        """Whether the segment takes memory: it is here, or being brought."""
        with self._lock:
            return segment.id in self._entries

    def address(self, segment_id: str) -> int:
        """Where the segment begins: true as long as it is held. Raises LoadError when it is not in memory."""
        return self._address(self._ready(segment_id))

    def hold(self, segments: Sequence[Segment]) -> None:
        """Until they are released as often, none of these can be dropped; runs begun after it find their bytes.

        Raises LoadError if one is not in memory, or DeviceError; then it holds none.
        """
        with self._lock:
            for segment in segments:
                self._before_runs(self._ready(segment.id))
            self._held.update(segment.id for segment in segments)

    def release(self, segments: Sequence[Segment]) -> None:
        with self._lock:
            self._held.subtract(segment.id for segment in segments)

    def close(self) -> None:
        """Give all memory back and stop the readers. Raises LoadError when something is loading or still in use."""
        self.drop([Segment(name, 0) for name in list(self._entries)])
        self._reader.close()

    @abstractmethod
    def _take(self, segment: Segment) -> tuple[Room, int]:
        """Memory for a segment, and how much that is. Raises OutOfMemory. Called under the lock, as is `_free`."""

    @abstractmethod
    def _fill(self, segment: Segment, room: Room, turn: Turn) -> str:
        """Bring the bytes; the tier where they were. However it ends, nobody writes to the memory any more."""

    @abstractmethod
    def _free(self, segment_id: str, room: Room) -> None:
        """Raises LoadError when it cannot be given back now."""

    @abstractmethod
    def _before_runs(self, room: Room) -> None:
        """Let runs begun from now on find the bytes. Called under the lock. Raises DeviceError."""

    @abstractmethod
    def _address(self, room: Room) -> int: ...

    def _bring(self, segment: Segment, ahead: bool) -> None:
        entry, is_mine = self._enter(segment, ahead)
        while entry.is_ending and not is_mine:
            wait([entry.filled])
            entry, is_mine = self._enter(segment, ahead)
        with self._reader.waiting(entry.turn, ahead=ahead):
            tier = self._brought(segment, entry) if is_mine else self._nearest
            entry.filled.result()
        with self._lock:
            self._hits[tier] += 1

    def _enter(self, segment: Segment, ahead: bool) -> tuple[_Entry[Room], bool]:
        """The segment's entry, and whether it was made now, so that the caller has to fill it."""
        with self._lock:
            known = self._entries.get(segment.id)
            if known is not None:
                return known, False
            room, size = self._take(segment)
            entry = self._entries[segment.id] = _Entry(room, size, Turn(ahead))
            self._mapped_bytes += size
            self._peak_bytes = max(self._peak_bytes, self._mapped_bytes)
            return entry, True

    def _brought(self, segment: Segment, entry: _Entry[Room]) -> str:
        failure: ApplianceError | None = LoadError(f"segment {segment.id[:12]} was not brought to its end", "try again")
        try:
            tier = self._fill(segment, entry.room, entry.turn)
            self._finish(entry)
            failure = None
            return tier
        except ApplianceError as error:
            failure = error
            raise
        finally:  # whatever happened, those who wait for this segment must not wait for ever
            if failure is not None:
                with self._lock:
                    self._forget(segment.id)
                entry.filled.set_exception(failure)

    def _finish(self, entry: _Entry[Room]) -> None:
        """The segment is here from now on. Raises Cancelled when it was cancelled a moment before."""
        with self._lock:
            entry.turn.check()
            entry.filled.set_result(None)

    def _ready(self, name: str) -> Room:
        entry = self._entries.get(name)
        if entry is None or not entry.filled.done():
            raise LoadError(f"segment {name[:12]} is not in memory", "load it first")
        return entry.room

    def _check_free(self, name: str) -> None:
        self._ready(name)
        if self._held[name] > 0:
            raise LoadError(f"segment {name[:12]} is in use", "drop it when its run has ended")

    def _forget(self, name: str) -> None:
        entry = self._entries[name]
        self._free(name, entry.room)
        del self._entries[name]
        self._held.pop(name, None)
        self._mapped_bytes -= entry.bytes
