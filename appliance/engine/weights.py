"""Weight segments in host memory: one anonymous mapping each, filled by direct reads, the next one's when dropped.

The disk writes into the memory that the runtime will read. Reading is in `disk`, and who has which segment in
`segments`; here is only what main memory is.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from appliance.core.types import Segment
from appliance.engine.disk import CHUNK_BYTES, READERS, Turn
from appliance.engine.segments import SegmentTable
from appliance.engine.spares import Spares
from appliance.errors import LoadError, OutOfMemory

_PAGE = mmap.PAGESIZE


class Weights(SegmentTable[mmap.mmap]):
    """The segments in this process's memory, each once. Safe to use from several threads.

    Memory that is given back stays for the next segments while all of it together is within `budget_bytes`.
    """

    def __init__(self, segment_path: Callable[[str], Path], *, budget_bytes: int = 0, readers: int = READERS) -> None:
        super().__init__(segment_path, ("memory", "disk"), readers)
        self._budget_bytes, self._spares = budget_bytes, Spares()

    @property
    def spare_bytes(self) -> int:
        return self._spares.bytes

    def trim(self, *, idle_seconds: float = 0.0) -> None:
        with self._lock:
            self._spares.give_back(since_seconds=time.monotonic() - idle_seconds)

    def close(self) -> None:
        super().close()
        self._spares.give_back()

    def _take(self, segment: Segment) -> tuple[mmap.mmap, int]:
        size = max(-(-segment.bytes // _PAGE) * _PAGE, _PAGE)
        memory = self._spares.take(size)
        self._spares.give_back(self._budget_bytes - self._mapped_bytes - size)
        return self._fresh(size) if memory is None else memory, size

    def _fresh(self, size: int) -> mmap.mmap:
        try:
            return _mapped(size)
        except OSError:
            self._spares.give_back()
        try:
            return _mapped(size)
        except OSError as error:
            raise OutOfMemory(
                f"{size} bytes of memory cannot be mapped: {error.strerror}", "lower memory.weights"
            ) from error

    def _fill(self, segment: Segment, room: mmap.mmap, turn: Turn) -> str:
        with self._reader.opened(self._segment_path(segment.id), segment.bytes) as file, memoryview(room) as memory:
            self._reader.fill(memory, file, turn)
        return "disk"

    def _free(self, segment_id: str, room: mmap.mmap) -> None:
        try:
            if self._mapped_bytes + self._spares.bytes <= self._budget_bytes:
                self._spares.keep(room, time.monotonic())
            else:
                room.close()
        except BufferError as error:
            raise LoadError(f"segment {segment_id[:12]} is in use", "release the views of it first") from error

    def _before_runs(self, room: mmap.mmap) -> None:
        """Nothing to do: a processor sees what the disk has written."""

    def _address(self, room: mmap.mmap) -> int:
        return int(np.frombuffer(room, np.uint8).ctypes.data)


def _mapped(size: int) -> mmap.mmap:
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if size >= CHUNK_BYTES:
        # A 45 MB fill takes 22 page faults instead of 11,000, and the disk gets long runs of memory to write to.
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory
