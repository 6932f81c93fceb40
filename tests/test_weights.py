from __future__ import annotations

import ctypes
import errno
import gc
import hashlib
import mmap
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from appliance.core.types import Segment
from appliance.drivers.devices import anonymous_bytes
from appliance.engine.disk import CHUNK_BYTES, READERS, Reader, Turn
from appliance.engine.weights import Weights
from appliance.errors import Cancelled, LoadError, OutOfMemory
from tests.kit_brokers import until
from tests.kit_process import alone
from tests.kit_segments import Disk, Reads, all_idle, bytes_of


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    return Disk(tmp_path)


@pytest.fixture
def memory(disk: Disk) -> Weights:
    return Weights(disk.path)


@pytest.mark.parametrize("size", [4096, 100 * 4096, CHUNK_BYTES, CHUNK_BYTES + 4096, 3 * CHUNK_BYTES + 5 * 4096])
def test_a_segment_in_memory_is_the_file(disk: Disk, memory: Weights, size: int) -> None:
    segment = disk.segment(size)
    memory.load([segment])
    with bytes_of(memory, segment.id) as view:
        assert hashlib.sha256(view).hexdigest() == segment.id
    assert memory.address(segment.id) % 4096 == 0


def test_a_file_of_odd_size_is_read_to_its_last_byte(disk: Disk, memory: Weights) -> None:
    segment = disk.segment(2 * CHUNK_BYTES + 4096 + 77)
    memory.load([segment])
    with bytes_of(memory, segment.id) as view:
        assert hashlib.sha256(view[: segment.bytes]).hexdigest() == segment.id


def test_a_file_system_that_refuses_direct_reads_is_read_through_its_cache(
    disk: Disk, memory: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    segment = disk.segment(CHUNK_BYTES + 4096)
    really_open = os.open

    def refusing(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return really_open(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", refusing)
    memory.load([segment])
    with bytes_of(memory, segment.id) as view:
        assert hashlib.sha256(view).hexdigest() == segment.id


def test_memory_file_systems_serve_too() -> None:
    path = Path("/dev/shm") / f"appliance-test-{os.getpid()}"
    path.write_bytes(bytes(range(256)) * 16)
    try:
        memory = Weights(lambda name: path)
        memory.load([Segment("a", 4096)])
        with bytes_of(memory, "a") as view:
            assert view == path.read_bytes()
    finally:
        path.unlink()


def test_direct_reads_leave_no_page_cache(disk: Disk, memory: Weights) -> None:
    segment = disk.segment(16 << 20)
    path = disk.folder / segment.id
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)
    before = cached_pages(path)
    memory.load([segment])
    assert before == cached_pages(path) == 0


def test_the_counters_are_exact_while_segments_come_and_go(disk: Disk, memory: Weights) -> None:
    small, large = disk.segment(4096, 1), disk.segment(3 << 20, 2)
    assert (memory.mapped_bytes, memory.peak_bytes) == (0, 0)
    memory.load([small, large])
    memory.load([small, large])
    assert memory.mapped_bytes == small.bytes + large.bytes
    memory.drop([large])
    assert memory.mapped_bytes == small.bytes
    assert memory.peak_bytes == small.bytes + large.bytes
    assert memory.is_mapped(small)
    assert not memory.is_mapped(large)


def test_two_who_want_one_segment_cause_one_read(disk: Disk, memory: Weights) -> None:
    segment = disk.segment(24 << 20)
    start = threading.Barrier(4)

    def load() -> None:
        start.wait()
        memory.load([segment])
        with bytes_of(memory, segment.id) as view:
            assert bytes(view[-16:]) != bytes(16)

    with ThreadPoolExecutor(4) as pool:
        for waiting in [pool.submit(load) for _ in range(4)]:
            waiting.result()
    assert disk.asked == [segment.id]
    assert memory.peak_bytes == segment.bytes


def test_what_is_needed_is_read_before_what_is_loaded_ahead(
    disk: Disk, memory: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    ahead, needed = disk.segment(12 * CHUNK_BYTES, 1), disk.segment(12 * CHUNK_BYTES, 2)
    reads = Reads(monkeypatch, [ahead, needed], slow=[ahead])
    with ThreadPoolExecutor(2) as pool:
        early = pool.submit(memory.load, [ahead], ahead=True)
        assert reads.begun[ahead.id].wait(60)
        late = pool.submit(memory.load, [needed])
        assert reads.begun[needed.id].wait(60)
        reads.go_on.set()
        late.result()
        early.result()
    between = reads.until_last_of(needed).count(ahead.id)
    assert between <= READERS, "no read ahead begins while something needed is read"
    with bytes_of(memory, ahead.id) as view:
        assert hashlib.sha256(view).hexdigest() == ahead.id


def test_a_load_ahead_that_is_needed_after_all_no_longer_waits(
    disk: Disk, memory: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, segment = disk.segment(12 * CHUNK_BYTES, 1), disk.segment(12 * CHUNK_BYTES, 2)
    reads = Reads(monkeypatch, [slow], slow=[slow])
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(memory.load, [slow])
        assert reads.begun[slow.id].wait(60)
        early = pool.submit(memory.load, [segment], ahead=True)
        try:
            pool.submit(memory.load, [segment]).result(60)
            early.result(60)
            assert not first.done()
        finally:
            reads.go_on.set()
    assert disk.asked == [slow.id, segment.id]


def test_a_load_ahead_that_is_hurried_no_longer_waits(
    disk: Disk, memory: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, segment = disk.segment(12 * CHUNK_BYTES, 1), disk.segment(12 * CHUNK_BYTES, 2)
    reads = Reads(monkeypatch, [slow], slow=[slow])
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(memory.load, [slow])
        assert reads.begun[slow.id].wait(60)
        early = pool.submit(memory.load, [segment], ahead=True)
        try:
            until(lambda: memory.is_mapped(segment))
            memory.hurry([segment])
            early.result(60)
            assert not first.done()
        finally:
            reads.go_on.set()


def test_helpers_that_gave_way_help_again_when_the_load_is_hurried(disk: Disk) -> None:
    segment, reader, turn = disk.segment(12 * CHUNK_BYTES), Reader(), Turn(is_ahead=True)
    begun, has_given_way, is_helped = threading.Event(), threading.Event(), threading.Event()
    me = threading.get_ident()

    def landed(place: int, size: int) -> None:
        if threading.get_ident() != me:
            is_helped.set() if has_given_way.is_set() else begun.wait(60)
        elif has_given_way.is_set():
            assert is_helped.wait(60), "one thread reads it to its end"
        else:
            with reader.waiting(Turn(), ahead=False):
                begun.set()
                all_idle(reader)
            has_given_way.set()
            reader.hurry(turn)

    memory = memoryview(mmap.mmap(-1, segment.bytes))
    with (
        reader.waiting(turn, ahead=True),
        reader.opened(disk.folder / segment.id, segment.bytes) as file,
    ):
        reader.fill(memory, file, turn, landed=landed)
    assert hashlib.sha256(memory).hexdigest() == segment.id
    reader.close()


def test_a_cancelled_load_ends_with_an_error_and_without_memory(
    disk: Disk, memory: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    segment = disk.segment(12 * CHUNK_BYTES)
    reads = Reads(monkeypatch, [segment], slow=[segment])
    with ThreadPoolExecutor(1) as pool:
        load = pool.submit(memory.load, [segment])
        assert reads.begun[segment.id].wait(60)
        memory.cancel([segment])
        reads.go_on.set()
        with pytest.raises(Cancelled):
            load.result()
    assert memory.mapped_bytes == 0
    assert len(reads.ended) <= READERS
    memory.load([segment])
    memory.cancel([segment])
    memory.hold([segment])


def test_who_asks_after_a_cancellation_is_not_cancelled_too(
    disk: Disk, memory: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    segment = disk.segment(12 * CHUNK_BYTES)
    reads = Reads(monkeypatch, [segment], slow=[segment])
    with ThreadPoolExecutor(2) as pool:
        unwanted = pool.submit(memory.load, [segment], ahead=True)
        assert reads.begun[segment.id].wait(60)
        memory.cancel([segment])
        wanted = pool.submit(memory.load, [segment])
        reads.go_on.set()
        with pytest.raises(Cancelled):
            unwanted.result()
        wanted.result()
    with bytes_of(memory, segment.id) as view:
        assert hashlib.sha256(view).hexdigest() == segment.id


def test_hits_tell_what_was_here_from_what_was_read(disk: Disk, memory: Weights) -> None:
    first, second, gone = disk.segment(4096, 1), disk.segment(4096, 2), Segment("gone", 4096)
    memory.load([first])
    memory.load([first, second])
    with pytest.raises(LoadError):
        memory.load([gone])
    assert memory.hits == {"memory": 1, "disk": 2}


def test_memory_that_the_system_refuses_is_an_error_of_its_own(
    disk: Disk, memory: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    segment = disk.segment(4096)

    def refusing(*args: Any, **kwargs: Any) -> Any:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    with monkeypatch.context() as full:
        full.setattr(mmap, "mmap", refusing)
        with pytest.raises(OutOfMemory, match="4096 bytes of memory cannot be mapped"):
            memory.load([segment])
    assert memory.mapped_bytes == 0
    memory.load([segment])


def test_a_segment_in_use_is_not_dropped(disk: Disk, memory: Weights) -> None:
    segment, other = disk.segment(4096, 1), disk.segment(4096, 2)
    memory.load([segment, other])
    memory.hold([segment])
    memory.hold([other, segment])
    memory.release([other, segment])
    with pytest.raises(LoadError, match="in use"):
        memory.drop([other, segment])
    assert memory.is_mapped(other)
    memory.release([segment])
    memory.drop([other, segment])
    assert memory.mapped_bytes == 0


def test_a_segment_somebody_looks_at_is_not_dropped(disk: Disk, memory: Weights) -> None:
    segment = disk.segment(4096)
    memory.load([segment])
    with bytes_of(memory, segment.id) as view:
        with pytest.raises(LoadError, match="in use"):
            memory.drop([segment])
        assert view[0] == (disk.folder / segment.id).read_bytes()[0]
    memory.drop([segment])


def test_absent_segments_can_be_neither_dropped_nor_held_nor_seen(disk: Disk, memory: Weights) -> None:
    segment = disk.segment(4096)
    with pytest.raises(LoadError, match="not in memory"):
        memory.drop([segment])
    with pytest.raises(LoadError, match="not in memory"):
        memory.hold([segment])
    with pytest.raises(LoadError, match="not in memory"):
        memory.address(segment.id)


@pytest.mark.parametrize("left", [0, 1000, 4096, (1 << 20) - 1])
def test_a_truncated_file_is_named_and_takes_no_memory(disk: Disk, memory: Weights, left: int) -> None:
    segment = disk.segment(1 << 20)
    os.truncate(disk.folder / segment.id, left)
    with pytest.raises(LoadError, match=f"{segment.id} has {left} bytes instead of 1048576"):
        memory.load([segment])
    assert memory.mapped_bytes == 0


def test_a_missing_file_is_named_and_the_segments_before_it_stay(disk: Disk, memory: Weights) -> None:
    first, second = disk.segment(4096, 1), disk.segment(4096, 2)
    (disk.folder / second.id).unlink()
    with pytest.raises(LoadError, match=f"{second.id} cannot be read: No such file"):
        memory.load([first, second])
    assert memory.is_mapped(first)
    assert not memory.is_mapped(second)


def test_a_file_that_shrinks_while_it_is_read_is_an_error_and_not_a_crash(
    disk: Disk, memory: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    segment = disk.segment(3 * CHUNK_BYTES)
    really_read = os.preadv

    def shrinking(descriptor: int, buffers: Any, offset: int) -> int:
        os.truncate(disk.folder / segment.id, CHUNK_BYTES)
        return really_read(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", shrinking)
    with pytest.raises(LoadError, match="ends at byte"):
        memory.load([segment])
    assert memory.mapped_bytes == 0


def test_a_failed_load_can_be_repeated_when_the_file_is_back(disk: Disk, memory: Weights) -> None:
    segment = disk.segment(4096)
    hidden = disk.folder / "hidden"
    (disk.folder / segment.id).rename(hidden)
    with pytest.raises(LoadError):
        memory.load([segment])
    hidden.rename(disk.folder / segment.id)
    memory.load([segment])
    assert memory.mapped_bytes == 4096


def test_twelve_experts_take_turns_in_the_memory_of_three(tmp_path: Path) -> None:
    alone(take_turns, tmp_path)


def take_turns(folder: Path) -> None:
    disk = Disk(folder)
    memory = Weights(disk.path)
    size, places = 16 << 20, 3
    segments = [disk.segment(size, seed) for seed in range(12)]
    gc.collect()
    before = anonymous_bytes()
    for number, segment in enumerate(segments * 2):
        if number >= places:
            memory.drop([(segments * 2)[number - places]])
        memory.load([segment])
        assert memory.mapped_bytes == min(number + 1, places) * size
        assert anonymous_bytes() - before < (places + 1) * size
    assert memory.peak_bytes == places * size
    memory.close()
    assert memory.mapped_bytes == 0
    assert anonymous_bytes() - before < size


def cached_pages(path: Path) -> int:
    """How many of a file's pages the kernel keeps."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        pages = -(-len(mapped) // mmap.PAGESIZE)
        present = (ctypes.c_ubyte * pages)()
        start = np.frombuffer(mapped, np.uint8).ctypes.data
        assert ctypes.CDLL(None).mincore(ctypes.c_void_p(start), ctypes.c_size_t(len(mapped)), present) == 0
        return sum(page & 1 for page in present)
