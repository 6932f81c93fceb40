"""Files into page-aligned memory by direct reads, several at a time; what is needed before what may be needed later.

Nothing is parsed, copied or cached on the way: the disk writes into the memory that will be used. It knows files and
memory, not segments, and does not care whether the memory is pageable or pinned for a device.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Condition, get_native_id

from appliance.errors import Cancelled, LoadError

READERS = 4
"""Reads in flight. From two on the disk delivers all it can; with four, somebody is reading while others wait for
fresh pages to be cleared: 93 to 96 % of the bandwidth into memory already there, against 90 to 94 with two. Eight gain
one more and keep other threads waiting for a processor (2026-11-21, 14 to 170 MB, two cores, virtio disk)."""
CHUNK_BYTES = 2 << 20
"""Of a small file; also the size of a huge page."""
_CHUNKS = 16
"""Of a large file: enough to keep the readers together to its end; each one more is a fight for the interpreter."""
_NICE = 10
"""Clearing fresh pages competes with runs: with two runners on two busy cores, loads made the ninetieth percentile of
their runs 1.5 times as long, and at this priority 1.1 times, while the loads themselves took the same (2026-11-21)."""
_PAGE = mmap.PAGESIZE
_COMPILE_AGAIN = "delete it; the next start compiles its expert again"

Landed = Callable[[int, int], None]
"""Told of each piece that has come: where in the memory it begins, and its bytes. By several threads at a time."""


@dataclass(slots=True, eq=False)
class Turn:
    """One load's place among the others. While it `is_ahead` nobody waits for it, and it waits for all that are not."""

    is_ahead: bool = False
    is_cancelled: bool = False

    def check(self) -> None:
        """Raises Cancelled."""
        if self.is_cancelled:
            raise Cancelled("the load was cancelled", "load it again")


@dataclass(frozen=True, slots=True)
class OpenFile:
    """A file of `bytes` bytes that is read directly where its file system allows it, else past its cache."""

    path: Path
    bytes: int
    buffered: int
    direct: int | None


class Reader:
    """The threads that read, and the order in which they do. Safe to use from several threads."""

    def __init__(self, readers: int = READERS) -> None:
        self._depth = readers
        self._helpers = ThreadPoolExecutor(max(readers - 1, 1), "weights-reader", initializer=_step_back)
        self._calm = Condition()  # told when a load ends, is wanted after all, or is cancelled
        self._wanted = 0  # loads in work that somebody waits for

    def close(self) -> None:
        self._helpers.shutdown()

    @contextmanager
    def waiting(self, turn: Turn, *, ahead: bool) -> Iterator[None]:
        """Within, somebody waits for this load, unless he does so `ahead` too: then it still gives way."""
        self._tell(turn, ahead, +1)
        try:
            yield
        finally:
            self._tell(turn, ahead, -1)

    def hurry(self, turn: Turn) -> None:
        """Somebody waits for this load after all."""
        with self._calm:
            turn.is_ahead = False
            self._calm.notify_all()

    def cancel(self, turn: Turn) -> None:
        with self._calm:
            turn.is_cancelled = True
            self._calm.notify_all()

    def wait_for_turn(self, turn: Turn) -> None:
        """Return when this load may read. Raises Cancelled."""
        with self._calm:
            self._calm.wait_for(lambda: turn.is_cancelled or not self._gives_way(turn))
        turn.check()

    @contextmanager
    def opened(self, path: Path, size: int) -> Iterator[OpenFile]:
        """Within, the file can be read. Raises LoadError that names it when it has another size, or cannot be read."""
        try:
            with _opened(path, size) as file:
                yield file
        except OSError as error:
            raise LoadError(f"{path} cannot be read: {error.strerror or error}", _COMPILE_AGAIN) from error

    def fill(
        self, memory: memoryview, file: OpenFile, turn: Turn, *, start: int = 0, landed: Landed = lambda *_: None
    ) -> None:
        """The file's bytes from `start` on into page-aligned memory, whole pages, as far as either goes.

        Whoever loads reads too, so that a load goes on, if slower, while others have all the helpers. Raises Cancelled,
        LoadError when the file ends early, OSError, and whatever `landed` does; then too nobody writes any more.
        """
        size = min(len(memory), file.bytes - start)
        step = chunk_bytes(size)
        places = iter(range(0, size, step))  # shared: each chunk is taken once

        def help_out() -> None:
            while not self._gives_way(turn) and (place := next(places, None)) is not None:
                bring(place)

        def bring(place: int) -> None:
            with memory[place : place + step] as piece:
                _read(file, piece, start + place)
            landed(place, min(step, size - place))

        helpers = [self._helpers.submit(help_out) for _ in range(min(self._depth, -(-size // step)) - 1)]
        try:
            for place in places:
                self.wait_for_turn(turn)
                helpers = [self._helpers.submit(help_out) if _gave_way(job) else job for job in helpers]
                bring(place)
        finally:
            # All must have ended before anybody may free what they write to, whatever became of the first.
            failures = [failure for job in helpers if not job.cancel() and (failure := job.exception()) is not None]
        if failures:
            raise failures[0]

    def _gives_way(self, turn: Turn) -> bool:
        return turn.is_cancelled or (turn.is_ahead and self._wanted > 0)

    def _tell(self, turn: Turn, ahead: bool, more: int) -> None:
        with self._calm:
            turn.is_ahead &= ahead
            self._wanted += 0 if ahead else more
            self._calm.notify_all()


def _gave_way(helper: Future[None]) -> bool:
    """Or found nothing left to read, which its like will find, too."""
    return helper.done() and helper.exception() is None


def _step_back() -> None:
    with suppress(OSError):  # a sandbox may refuse; then it reads at the priority of all
        os.setpriority(os.PRIO_PROCESS, get_native_id(), _NICE)  # on Linux, of this thread alone


def chunk_bytes(size: int) -> int:
    """How much of a file of this size one read brings: whole huge pages."""
    return max(-(-size // (_CHUNKS * CHUNK_BYTES)), 1) * CHUNK_BYTES


@contextmanager
def _opened(path: Path, size: int) -> Iterator[OpenFile]:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        found = os.fstat(descriptor).st_size
        if found != size:
            raise LoadError(f"{path} has {found} bytes instead of {size}", _COMPILE_AGAIN)
        direct = _open_direct(path)
        try:
            yield OpenFile(path, size, descriptor, direct)
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


def _read(file: OpenFile, buffer: memoryview, offset: int) -> None:
    """Fill the buffer from there, as far as the file's size allows."""
    done, wanted = 0, min(len(buffer), file.bytes - offset)
    while done < wanted:
        with buffer[done:] as rest:
            count = _read_some(file, rest, offset + done)
        if count == 0:
            raise LoadError(f"{file.path} ends at byte {offset + done} of {file.bytes}", _COMPILE_AGAIN)
        done += count


def _read_some(file: OpenFile, rest: memoryview, offset: int) -> int:
    if file.direct is not None and offset % _PAGE == 0:
        try:
            return os.preadv(file.direct, [rest], offset)
        except OSError as error:
            if error.errno != errno.EINVAL:  # a file system that takes O_DIRECT and then refuses to read with it
                raise
    count = os.preadv(file.buffered, [rest], offset)
    os.posix_fadvise(file.buffered, offset, count, os.POSIX_FADV_DONTNEED)
    return count
