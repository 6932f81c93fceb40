"""Weight segments from disk to host memory: one anonymous mapping each, filled by direct reads, gone when dropped.

Nothing is parsed, copied or cached on the way: the disk writes into the memory that the runtime will read. It does
not decide what to bring or drop, and it knows segments, not experts.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock, get_native_id

import numpy as np

from appliance.core.types import Segment
from appliance.errors import LoadError

READERS = 4
"""Reads in flight. From two on the disk delivers all it can; with four, somebody is reading while others wait for
fresh pages to be cleared: 93 to 96 % of the bandwidth into memory already there, against 90 to 94 with two. Eight gain
one more and keep other threads waiting for a processor (2026-11-21, 14 to 170 MB, two cores, virtio disk)."""
CHUNK_BYTES = 2 << 20
"""Of a small segment; also the size of a huge page."""
_CHUNKS = 16
"""Of a large segment: enough to keep the readers together to its end; each one more is a fight for the interpreter."""
_NICE = 10
"""Clearing fresh pages competes with runs: with two runners on two busy cores, loads made the ninetieth percentile of
their runs 1.5 times as long, and at this priority 1.1 times, while the loads themselves took the same (2026-11-21)."""
_PAGE = mmap.PAGESIZE
_COMPILE_AGAIN = "delete it; the next start compiles its expert again"


@dataclass(slots=True)
class _Region:
    """A mapped segment. `filled` ends when its bytes are there, or with the error for which they are not."""

    memory: mmap.mmap
    address: int
    filled: Future[None]


class Weights:
    """The segments in this process's memory, each once. Safe to use from several threads."""

    def __init__(self, segment_path: Callable[[str], Path], *, readers: int = READERS) -> None:
        self._segment_path = segment_path
        self._lock = Lock()
        self._regions: dict[str, _Region] = {}
        self._held: Counter[str] = Counter()
        self._mapped_bytes = self._peak_bytes = 0
        self._depth = readers
        self._helpers = ThreadPoolExecutor(max(readers - 1, 1), "weights-reader", initializer=_step_back)

    @property
    def mapped_bytes(self) -> int:
        """What the mappings take now, those still being filled included."""
        return self._mapped_bytes

    @property
    def peak_bytes(self) -> int:
        return self._peak_bytes

    def load(self, segments: Sequence[Segment]) -> None:
        """Return when all segments are in memory; one that another thread is bringing is waited for, not read twice.

        Raises LoadError naming the file that is missing, short or unreadable; segments brought before it stay.
        """
        for segment in segments:
            self._bring(segment)

    def drop(self, segments: Sequence[Segment]) -> None:
        """Give the memory back at once. Raises LoadError, dropping none, when one is absent, loading or in use."""
        with self._lock:
            names = list(dict.fromkeys(segment.id for segment in segments))
            for name in names:
                self._check_free(name)
            for name in names:
                self._unmap(name)

    def is_mapped(self, segment: Segment) -> bool:
        """Whether the segment takes memory: it is here, or being brought."""
        with self._lock:
            return segment.id in self._regions

    def address(self, segment_id: str) -> int:
        """Where the segment begins: true as long as it is held. Raises LoadError when it is not in memory."""
        return self._ready(segment_id).address

    def view(self, segment_id: str) -> memoryview:
        """The segment's bytes; while a view of it lives, it cannot be dropped."""
        return memoryview(self._ready(segment_id).memory)

    def hold(self, segments: Sequence[Segment]) -> None:
        """Until they are released as often, none of these can be dropped. Raises LoadError if one is not in memory."""
        with self._lock:
            for segment in segments:
                self._ready(segment.id)
            self._held.update(segment.id for segment in segments)

    def release(self, segments: Sequence[Segment]) -> None:
        with self._lock:
            self._held.subtract(segment.id for segment in segments)

    def close(self) -> None:
        """Stop the readers and give all memory back. Raises LoadError when something is still in use."""
        self._helpers.shutdown()
        self.drop([Segment(name, 0) for name in self._regions])

    def _bring(self, segment: Segment) -> None:
        with self._lock:
            region = self._regions.get(segment.id)
            is_mine = region is None
            if region is None:
                region = self._map(segment)
        if is_mine:
            self._fill(segment, region)
        region.filled.result()

    def _map(self, segment: Segment) -> _Region:
        size = _mapping_bytes(segment.bytes)
        try:
            memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise LoadError(
                f"{size} bytes of memory cannot be mapped: {error.strerror}", "lower memory.weights"
            ) from error
        if size >= CHUNK_BYTES:
            # A 45 MB fill takes 22 page faults instead of 11,000, and the disk gets long runs of memory to write to.
            memory.madvise(mmap.MADV_HUGEPAGE)
        region = _Region(memory, np.frombuffer(memory, np.uint8).ctypes.data, Future())
        self._regions[segment.id] = region
        self._mapped_bytes += size
        self._peak_bytes = max(self._peak_bytes, self._mapped_bytes)
        return region

    def _fill(self, segment: Segment, region: _Region) -> None:
        path = self._segment_path(segment.id)
        failure: LoadError | None = LoadError(f"{path} was not read to its end", "load it again")
        try:
            with _opened(path, segment.bytes) as read:
                self._read_chunks(read, region.memory, segment.bytes)
            failure = None
        except OSError as error:
            failure = LoadError(f"{path} cannot be read: {error.strerror or error}", _COMPILE_AGAIN)
        except LoadError as error:
            failure = error
        finally:  # whatever happened, those who wait for this segment must not wait for ever
            if failure is None:
                region.filled.set_result(None)
            else:
                self._give_up(segment.id, failure)

    def _read_chunks(self, read: Callable[[memoryview, int], None], memory: mmap.mmap, size: int) -> None:
        """Whoever loads reads too, so that a load goes on, if slower, while others have all the helpers."""
        step = chunk_bytes(size)
        starts = iter(range(0, size, step))  # shared: each chunk is taken once

        def work() -> None:
            for start in starts:
                with memoryview(memory) as whole, whole[start : start + step] as piece:
                    read(piece, start)

        helpers = [self._helpers.submit(work) for _ in range(min(self._depth, -(-size // step)) - 1)]
        try:
            work()
        finally:
            # All must have ended before anybody may unmap what they write to, whatever became of the first.
            failures = [failure for job in helpers if not job.cancel() and (failure := job.exception()) is not None]
        if failures:
            raise failures[0]

    def _give_up(self, name: str, error: LoadError) -> None:
        with self._lock:
            filled = self._regions[name].filled
            self._unmap(name)
        filled.set_exception(error)

    def _ready(self, name: str) -> _Region:
        region = self._regions.get(name)
        if region is None or not region.filled.done():
            raise LoadError(f"segment {name[:12]} is not in memory", "load it first")
        return region

    def _check_free(self, name: str) -> None:
        self._ready(name)
        if self._held[name] > 0:
            raise LoadError(f"segment {name[:12]} is in use", "drop it when its run has ended")

    def _unmap(self, name: str) -> None:
        region = self._regions[name]
        size = len(region.memory)
        try:
            region.memory.close()
        except BufferError as error:
            raise LoadError(f"segment {name[:12]} is in use", "release the views of it first") from error
        del self._regions[name]
        self._held.pop(name, None)
        self._mapped_bytes -= size


def _step_back() -> None:
    with suppress(OSError):  # a sandbox may refuse; then it reads at the priority of all
        os.setpriority(os.PRIO_PROCESS, get_native_id(), _NICE)  # on Linux, of this thread alone


def chunk_bytes(size: int) -> int:
    """How much of a segment of this size one read brings: whole huge pages."""
    return max(-(-size // (_CHUNKS * CHUNK_BYTES)), 1) * CHUNK_BYTES


def _mapping_bytes(size: int) -> int:
    return max(-(-size // _PAGE) * _PAGE, _PAGE)


@contextmanager
def _opened(path: Path, size: int) -> Iterator[Callable[[memoryview, int], None]]:
    """A function that fills a buffer from an offset of the file. Raises LoadError when the file has another size."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        found = os.fstat(descriptor).st_size
        if found != size:
            raise LoadError(f"{path} has {found} bytes instead of {size}", _COMPILE_AGAIN)
        direct = _open_direct(path)
        try:
            yield lambda buffer, offset: _read(path, descriptor, direct, buffer, offset, size)
        finally:
            if direct is not None:
                os.close(direct)
    finally:
        os.close(descriptor)


def _open_direct(path: Path) -> int | None:
    """For reading past the page cache, which would hold every weight a second time; None where that is refused."""
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return None


def _read(path: Path, buffered: int, direct: int | None, buffer: memoryview, offset: int, size: int) -> None:
    """Fill the buffer as far as the file's `size` allows."""
    done, wanted = 0, min(len(buffer), size - offset)
    while done < wanted:
        with buffer[done:] as rest:
            count = _read_some(buffered, direct, rest, offset + done)
        if count == 0:
            raise LoadError(f"{path} ends at byte {offset + done} of {size}", _COMPILE_AGAIN)
        done += count


def _read_some(buffered: int, direct: int | None, rest: memoryview, offset: int) -> int:
    if direct is not None and offset % _PAGE == 0:
        try:
            return os.preadv(direct, [rest], offset)
        except OSError as error:
            if error.errno != errno.EINVAL:  # a file system that takes O_DIRECT and then refuses to read with it
                raise
    count = os.preadv(buffered, [rest], offset)
    os.posix_fadvise(buffered, offset, count, os.POSIX_FADV_DONTNEED)
    return count
