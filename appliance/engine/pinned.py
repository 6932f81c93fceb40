"""Host memory that a device can fetch from by itself: a tier of whole segments, and windows for what it cannot hold.

All of it is asked for once. Pinning memory takes milliseconds and giving it back waits for everything that the device
does, so neither may happen while it serves.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Lock
from typing import Any, Protocol

from appliance.core.slab import Slab, whole_pages
from appliance.core.types import Segment
from appliance.errors import NoRoom

WINDOW_BYTES = 8 << 20
"""Four reads at a time fill one while the device fetches the other; both stay small beside any tier."""
WINDOWS = 2


@dataclass(frozen=True, slots=True)
class Pinned:
    """Pinned host memory: page-aligned, whole pages."""

    address: int
    memory: memoryview


class Pinning(Protocol):
    """What an accelerator does for pinned host memory. Raises DeviceError that names device and call."""

    def pin(self, size: int) -> Pinned:
        """So many bytes, whole pages. Raises OutOfMemory when there are not as many."""
        ...

    def unpin(self, pinned: Pinned) -> None: ...

    def mark(self) -> Any:
        """An event that happens when every copy queued so far has been made."""
        ...

    def wait(self, event: Any) -> None:
        """Return when the event has happened."""
        ...


@dataclass(slots=True, eq=False)
class Copy:
    """A segment's place in the tier. While it is busy it is read, filled or fetched from, and stays."""

    address: int
    memory: memoryview
    offset: int
    is_busy: bool = True
    is_whole: bool = False


class PinnedTier:
    """Segments in pinned host memory, the longest unused of which leave first. Safe to use from several threads."""

    def __init__(self, accelerator: Pinning, budget_bytes: int) -> None:
        self._accelerator = accelerator
        self._slab = Slab(budget_bytes)
        self._block = accelerator.pin(self._slab.total_bytes) if self._slab.total_bytes else None
        self._lock = Lock()
        self._copies: dict[str, Copy] = {}  # the longest unused first

    @contextmanager
    def place(self, segment: Segment) -> Iterator[Copy | None]:
        """Within, the segment's place here, which nobody takes away; None where there is no room for it.

        Is it not whole yet, it is to be filled: it stays if that ends well. When the block ends the device must have
        fetched all that it wants from it.
        """
        with self._lock:
            copy = self._copies.pop(segment.id, None) or self._made_room(segment.bytes)
            if copy is not None:
                self._copies[segment.id] = copy
                copy.is_busy = True
        try:
            yield copy
            if copy is not None:
                copy.is_whole = True
        finally:
            if copy is not None:
                with self._lock:
                    copy.is_busy = False
                    if not copy.is_whole:
                        self._forget(segment.id)

    def touch(self, segment_id: str) -> None:
        """The segment was of use until now: if it is here, others leave first."""
        with self._lock:
            if segment_id in self._copies:
                self._copies[segment_id] = self._copies.pop(segment_id)

    def close(self) -> None:
        for name in list(self._copies):
            self._forget(name)
        if self._block is not None:
            self._accelerator.unpin(self._block)

    def _made_room(self, size: int) -> Copy | None:
        busy_bytes = sum(len(copy.memory) for copy in self._copies.values() if copy.is_busy)
        if self._block is None or busy_bytes + whole_pages(size) > self._slab.total_bytes:
            return None
        while True:
            try:
                offset = self._slab.take(size)
                memory = self._block.memory[offset : offset + whole_pages(size)]
                return Copy(self._block.address + offset, memory, offset)
            except NoRoom:
                oldest = next((name for name, copy in self._copies.items() if not copy.is_busy), None)
                if oldest is None:
                    return None
                self._forget(oldest)

    def _forget(self, name: str) -> None:
        copy = self._copies.pop(name)
        copy.memory.release()
        self._slab.give_back(copy.offset)


@dataclass(slots=True, eq=False)
class Window:
    """`fetched` happens when the device has all that was last put in here."""

    pinned: Pinned
    fetched: Any = None


class Windows:
    """A pair of small pinned buffers: one is filled while the device fetches the other."""

    def __init__(self, accelerator: Pinning) -> None:
        self._accelerator = accelerator
        self._block = accelerator.pin(WINDOWS * WINDOW_BYTES)
        self._free: SimpleQueue[Window] = SimpleQueue()  # first in, first out: the one whose copy is the oldest
        for start in range(0, WINDOWS * WINDOW_BYTES, WINDOW_BYTES):
            memory = self._block.memory[start : start + WINDOW_BYTES]
            self._free.put(Window(Pinned(self._block.address + start, memory)))

    @contextmanager
    def one(self) -> Iterator[Pinned]:
        """Within, a buffer for a piece of a segment; copies from it are queued before the block ends.

        Who has one must not wait for anybody's turn: others need the pair.
        """
        window = self._free.get()
        try:
            if window.fetched is not None:
                self._accelerator.wait(window.fetched)
            try:
                yield window.pinned
            finally:
                window.fetched = self._accelerator.mark()
        finally:
            self._free.put(window)

    def close(self) -> None:
        for _ in range(WINDOWS):
            self._free.get().pinned.memory.release()
        self._accelerator.unpin(self._block)
