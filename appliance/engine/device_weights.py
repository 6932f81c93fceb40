"""Weight segments in the memory of an accelerator, by way of pinned host memory, where they stay while there is room.

A segment comes from the disk into pinned memory, and every piece that has been read is on its way to the device while
the next is being read. One that left the device and is still in pinned memory comes back without the disk. What does
not fit there passes through two small windows. The device's memory is asked for once, and divided by `core.slab`.
Which device it is, and what a copy or an event is, only the `Accelerator` knows.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from appliance.core.slab import Slab, block_bytes, whole_pages
from appliance.core.types import Segment
from appliance.engine.disk import READERS, OpenFile, Turn
from appliance.engine.pinned import WINDOW_BYTES, Copy, PinnedTier, Pinning, Windows
from appliance.engine.segments import SegmentTable
from appliance.errors import Fragmented, NoRoom, OutOfMemory


class Accelerator(Pinning, Protocol):
    """A device with memory of its own, a stream on which copies to it are made, and one on which runs compute.

    Copies are made in the order in which they are queued, and runs see those alone that their stream has followed.
    Everything may be called from any thread. All raise DeviceError that names device and call; where memory is asked
    for, OutOfMemory.
    """

    @property
    def name(self) -> str:
        """As it is called in settings and errors: "cuda:0"."""
        ...

    def memory(self) -> tuple[int, int]:
        """Bytes that are free now, and all."""
        ...

    def allocate(self, size: int) -> int:
        """The device address of so many bytes, a multiple of 256."""
        ...

    def free(self, address: int) -> None: ...

    def copy_in(self, device_address: int, host_address: int, size: int) -> None:
        """Queue a copy out of pinned memory, which must stay as it is until an event marked later has happened."""
        ...

    def follow(self, event: Any) -> None:
        """Let runs begun from now on wait for the event and see what was copied until then."""
        ...


@dataclass(slots=True, eq=False)
class _Slot:
    """Where in the slab a segment lies. `copied` happens when all its bytes are there."""

    offset: int
    copied: Any = None


class DeviceWeights(SegmentTable[_Slot]):
    """The segments on one device, each once. Safe to use from several threads.

    A load returns when the last copy was made, so that no run of another expert ever waits for it. Whoever drops a
    segment knows that the runs that used it have ended: a lease ends with its results in host memory.
    """

    def __init__(
        self,
        segment_path: Callable[[str], Path],
        accelerator: Accelerator,
        *,
        device_bytes: int,
        host_bytes: int,
        readers: int = READERS,
    ) -> None:
        """Takes the block for a budget of `device_bytes`, `host_bytes` of pinned memory and the windows, for good.

        Raises OutOfMemory or DeviceError, having taken nothing.
        """
        super().__init__(segment_path, ("device", "host", "disk"), readers)
        self._accelerator = accelerator
        self._slab = Slab(block_bytes(device_bytes))
        with ExitStack() as undo:
            undo.callback(self._reader.close)
            self._start = self._allocated()
            undo.callback(accelerator.free, self._start)
            self._tier = PinnedTier(accelerator, host_bytes)
            undo.callback(self._tier.close)
            self._windows = Windows(accelerator)
            undo.callback(self._windows.close)
            self._belongings = undo.pop_all()

    def close(self) -> None:
        super().close()
        self._belongings.close()

    def _allocated(self) -> int:
        size = self._slab.total_bytes
        try:
            return self._accelerator.allocate(size)
        except OutOfMemory as error:
            free, total = self._accelerator.memory()
            raise OutOfMemory(
                f"{self._accelerator.name} cannot give {size} bytes for weights and gaps: {free} of {total} are free",
                "lower its weights budget",
            ) from error

    def _take(self, segment: Segment) -> tuple[_Slot, int]:
        try:
            return _Slot(self._slab.take(segment.bytes)), whole_pages(segment.bytes)
        except NoRoom as error:
            kind = Fragmented if error.need_bytes <= self._slab.free_bytes else OutOfMemory
            raise kind(
                f"{self._accelerator.name}: {error.need_bytes} bytes are needed in one piece,"
                f" the largest free one has {error.could_free_bytes} of {self._slab.free_bytes}",
                "evict more",
            ) from error

    def _fill(self, segment: Segment, room: _Slot, turn: Turn) -> str:
        target = self._start + room.offset
        with self._tier.place(segment) as copy:
            try:
                return self._copy(segment, copy, target, turn)
            finally:  # until then neither the pinned memory nor the slot may be given to anybody else
                room.copied = self._accelerator.mark()
                self._accelerator.wait(room.copied)

    def _copy(self, segment: Segment, copy: Copy | None, target: int, turn: Turn) -> str:
        """Queue all copies of a segment; the tier that its bytes come from."""
        if copy is not None and copy.is_whole:
            self._accelerator.copy_in(target, copy.address, segment.bytes)
            return "host"
        with self._reader.opened(self._segment_path(segment.id), segment.bytes) as file:
            if copy is None:
                self._pass_through_windows(file, target, turn)
            else:
                self._reader.fill(copy.memory, file, turn, landed=self._copying(target, copy.address))
        return "disk"

    def _pass_through_windows(self, file: OpenFile, target: int, turn: Turn) -> None:
        for start in range(0, file.bytes, WINDOW_BYTES):
            self._reader.wait_for_turn(turn)
            with self._windows.one() as window:
                at_once = Turn()  # who has a window gives way to nobody
                landed = self._copying(target + start, window.address)
                self._reader.fill(window.memory, file, at_once, start=start, landed=landed)

    def _copying(self, target: int, source: int) -> Callable[[int, int], None]:
        """Queues the copy of each piece that has landed in the pinned memory at `source`."""
        return lambda place, size: self._accelerator.copy_in(target + place, source + place, size)

    def _free(self, segment_id: str, room: _Slot) -> None:
        self._slab.give_back(room.offset)
        self._tier.touch(segment_id)

    def _before_runs(self, room: _Slot) -> None:
        self._accelerator.follow(room.copied)

    def _address(self, room: _Slot) -> int:
        return self._start + room.offset
