"""What a device's memory does beyond what test_conformance.py asks of every memory, and that its pretend is strict."""

from __future__ import annotations

import ctypes
import hashlib
import os
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from appliance.core.types import Segment
from appliance.engine.device_weights import DeviceWeights
from appliance.engine.disk import CHUNK_BYTES, READERS
from appliance.engine.pinned import WINDOW_BYTES
from appliance.errors import Cancelled, DeviceError, Fragmented, LoadError, OutOfMemory
from tests.kit_device import POISON, QUEUE_DEPTH, PretendAccelerator, Refused
from tests.kit_segments import Disk, Reads

BIG = 10 * CHUNK_BYTES
ODD = 2 * CHUNK_BYTES + 4096 + 77


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    return Disk(tmp_path)


@pytest.fixture
def device() -> Iterator[PretendAccelerator]:
    made = PretendAccelerator()
    yield made
    made.close()


@pytest.fixture
def new(disk: Disk, device: PretendAccelerator) -> Iterator[Callable[..., DeviceWeights]]:
    """Makes memories; when the test is over they must give everything back."""
    made: list[DeviceWeights] = []

    def memory(device_bytes: int = 8 * BIG, host_bytes: int = 4 * BIG) -> DeviceWeights:
        made.append(DeviceWeights(disk.path, device, device_bytes=device_bytes, host_bytes=host_bytes))
        return made[-1]

    yield memory
    for weights in made:
        weights.close()
    assert device.is_empty


@pytest.fixture
def memory(new: Callable[..., DeviceWeights]) -> DeviceWeights:
    return new()


def seen(memory: DeviceWeights, segment: Segment) -> bool:
    """Whether runs begun now find the segment's bytes."""
    memory.hold([segment])
    content = ctypes.string_at(memory.address(segment.id), segment.bytes)
    memory.release([segment])
    return hashlib.sha256(content).hexdigest() == segment.id


@pytest.mark.parametrize("host_bytes", [4 * BIG, 0], ids=["host tier", "windows"])
@pytest.mark.parametrize("size", [1, 4096, ODD, WINDOW_BYTES, WINDOW_BYTES + 1, BIG])
def test_a_segment_on_the_device_is_the_file(
    disk: Disk, new: Callable[..., DeviceWeights], size: int, host_bytes: int
) -> None:
    segment, memory = disk.segment(size), new(host_bytes=host_bytes)
    memory.load([segment])
    assert seen(memory, segment)


def test_runs_see_a_segment_only_when_it_is_held(disk: Disk, memory: DeviceWeights) -> None:
    segment = disk.segment(4096)
    memory.load([segment])
    assert ctypes.string_at(memory.address(segment.id), 4096) == bytes([POISON]) * 4096
    assert seen(memory, segment)


def test_no_run_ever_waits_for_the_copy_of_a_segment(
    disk: Disk, device: PretendAccelerator, memory: DeviceWeights
) -> None:
    segment = disk.segment(BIG)
    for _ in range(2):  # from the disk, from the host tier
        memory.load([segment])
        assert device.pending == 0
        assert seen(memory, segment)
        memory.drop([segment])
    assert device.stalls == 0


def test_every_piece_is_on_its_way_while_the_next_is_read(
    disk: Disk, device: PretendAccelerator, memory: DeviceWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    segment = disk.segment(BIG)
    copies_before_reads = []
    really_read = os.preadv

    def reading(descriptor: int, buffers: Any, offset: int) -> int:
        copies_before_reads.append(device.copies)
        return really_read(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", reading)
    memory.load([segment])
    assert device.copies == BIG // CHUNK_BYTES
    assert all(copies >= number + 1 - READERS for number, copies in enumerate(sorted(copies_before_reads)))


def test_what_left_the_device_is_fetched_by_one_copy(
    disk: Disk, device: PretendAccelerator, memory: DeviceWeights
) -> None:
    segment = disk.segment(BIG)
    memory.load([segment])
    memory.drop([segment])
    before = device.copies
    memory.load([segment])
    assert device.copies == before + 1
    assert disk.asked == [segment.id]
    assert seen(memory, segment)


def test_the_longest_unused_leaves_the_host_tier_first(disk: Disk, new: Callable[..., DeviceWeights]) -> None:
    memory = new(host_bytes=3 * 4096)
    first, second, third, fourth = (disk.segment(4096, seed) for seed in range(4))
    memory.load([first, second, third])
    memory.drop([first])  # of use until now
    memory.load([fourth])
    memory.drop([second, third, fourth])
    memory.load([first, third, fourth, second])
    assert memory.hits == {"device": 0, "host": 3, "disk": 5}


def test_a_segment_larger_than_the_host_tier_leaves_it_as_it_was(disk: Disk, new: Callable[..., DeviceWeights]) -> None:
    memory = new(host_bytes=4096)
    small, large = disk.segment(4096, 1), disk.segment(3 * WINDOW_BYTES + ODD, 2)
    memory.load([small, large])
    assert seen(memory, large)
    memory.drop([small])
    memory.load([small])
    assert memory.hits["host"] == 1


def test_a_failed_load_leaves_the_host_tier_to_others(disk: Disk, new: Callable[..., DeviceWeights]) -> None:
    memory = new(host_bytes=2 * 4096)
    first, second = disk.segment(4096, 1), disk.segment(4096, 2)
    memory.load([first])
    with pytest.raises(LoadError):
        memory.load([Segment("gone", 4096)])
    memory.load([second])
    memory.drop([first, second])
    memory.load([first, second])
    assert memory.hits["host"] == 2


def test_what_is_being_read_into_the_host_tier_stays_there(
    disk: Disk, new: Callable[..., DeviceWeights], monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = new(host_bytes=3 * 4096)
    first, slow, large = disk.segment(4096, 1), disk.segment(4096, 2), disk.segment(2 * 4096, 3)
    memory.load([first])
    reads = Reads(monkeypatch, [slow], slow=[slow])
    with ThreadPoolExecutor(1) as pool:
        load = pool.submit(memory.load, [slow])
        assert reads.begun[slow.id].wait(60)
        try:
            memory.load([large])  # the pages beside the busy one are no room in one piece
        finally:
            reads.go_on.set()
        load.result(60)
    assert all(seen(memory, segment) for segment in (first, slow, large))
    memory.drop([slow])
    memory.load([slow])
    assert memory.hits["host"] == 1


def test_loads_at_once_share_the_windows(disk: Disk, new: Callable[..., DeviceWeights]) -> None:
    memory = new(host_bytes=0)
    segments = [disk.segment(2 * WINDOW_BYTES + ODD, seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        loads = [pool.submit(memory.load, [s], ahead=bool(n % 2)) for n, s in enumerate(segments)]
        for load in loads:
            load.result(60)
    assert all(seen(memory, segment) for segment in segments)


def test_loads_ahead_that_have_the_windows_leave_them_to_what_is_needed(
    disk: Disk, new: Callable[..., DeviceWeights], monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = new(host_bytes=0)
    *early, needed = (disk.segment(3 * WINDOW_BYTES, seed) for seed in range(3))
    reads = Reads(monkeypatch, [*early, needed], slow=[*early, needed])
    with ThreadPoolExecutor(3) as pool:
        try:
            first = [pool.submit(memory.load, [segment], ahead=True) for segment in early]
            assert all(reads.begun[segment.id].wait(60) for segment in early)
            last = pool.submit(memory.load, [needed])
            assert reads.opened[needed.id].wait(60)
            reads.go_on.set()
            last.result(60)
            for load in first:
                load.result(60)
        finally:
            memory.cancel(early)
    for segment in early:
        assert reads.until_last_of(needed).count(segment.id) <= WINDOW_BYTES // CHUNK_BYTES, (
            "the window that it had begun"
        )
    assert all(seen(memory, segment) for segment in (*early, needed))


@pytest.mark.parametrize("host_bytes", [4 * BIG, 0], ids=["host tier", "windows"])
def test_a_cancelled_load_leaves_nothing_behind(
    disk: Disk,
    new: Callable[..., DeviceWeights],
    device: PretendAccelerator,
    monkeypatch: pytest.MonkeyPatch,
    host_bytes: int,
) -> None:
    segment, memory = disk.segment(3 * WINDOW_BYTES), new(host_bytes=host_bytes)
    really_read = os.preadv
    reads = []

    def reading(descriptor: int, buffers: Any, offset: int) -> int:
        memory.cancel([segment])
        reads.append(offset)
        return really_read(descriptor, buffers, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", reading)
        with pytest.raises(Cancelled):
            memory.load([segment])
    assert len(reads) <= READERS
    assert (memory.mapped_bytes, device.pending) == (0, 0)
    memory.load([segment])
    assert seen(memory, segment)


def test_free_bytes_in_pieces_are_a_shortage_that_more_evictions_end(
    disk: Disk, new: Callable[..., DeviceWeights]
) -> None:
    memory = new(device_bytes=4 * 4096)
    small = [disk.segment(4096, seed) for seed in range(5)]
    large = disk.segment(2 * 4096, 9)
    memory.load(small)
    memory.drop([small[0], small[2], small[4]])
    with pytest.raises(Fragmented, match="pretend:0: 8192 bytes are needed in one piece") as shortage:
        memory.load([large])
    assert shortage.value.reason == "fragmented"
    assert memory.mapped_bytes == 2 * 4096
    memory.drop([small[1]])
    memory.load([large])
    assert seen(memory, large)
    assert seen(memory, small[3])


def test_what_all_gaps_together_cannot_hold_is_no_matter_of_pieces(
    disk: Disk, new: Callable[..., DeviceWeights]
) -> None:
    memory = new(device_bytes=4 * 4096)
    memory.load([disk.segment(4 * 4096, 1)])
    with pytest.raises(OutOfMemory) as shortage:
        memory.load([disk.segment(2 * 4096, 2)])
    assert shortage.value.reason == "out-of-memory"


def test_experts_of_several_sizes_fill_the_budget_again_and_again(
    disk: Disk, new: Callable[..., DeviceWeights]
) -> None:
    budget, chance = 400 * 4096, random.Random(1)
    memory = new(device_bytes=budget)
    absent = [disk.segment(pages * 4096, seed) for seed in range(20) for pages in (5, 18, 68)]
    present: list[Segment] = []
    refused = 0
    for _ in range(600):
        coming = absent.pop(chance.randrange(len(absent)))
        while sum(segment.bytes for segment in (*present, coming)) > budget:
            absent.append(present.pop(chance.randrange(len(present))))
            memory.drop([absent[-1]])
        try:
            memory.load([coming])
            present.append(coming)
        except Fragmented:
            absent.append(coming)
            refused += 1
    assert refused <= 12


@pytest.mark.parametrize("call", ["copy_in", "mark", "wait"])
@pytest.mark.parametrize("host_bytes", [4 * BIG, 0], ids=["host tier", "windows"])
def test_a_device_that_fails_during_a_load_is_named_and_what_was_taken_comes_back(
    disk: Disk, new: Callable[..., DeviceWeights], device: PretendAccelerator, host_bytes: int, call: str
) -> None:
    segment, memory = disk.segment(3 * WINDOW_BYTES), new(host_bytes=host_bytes)
    device.fail(call, at=1)
    with pytest.raises(DeviceError, match=f"pretend:0: {call}"):
        memory.load([segment])
    assert memory.mapped_bytes == 0
    memory.load([segment])
    assert seen(memory, segment)


def test_a_device_that_fails_when_a_segment_is_held_holds_nothing(
    disk: Disk, memory: DeviceWeights, device: PretendAccelerator
) -> None:
    segment = disk.segment(4096)
    memory.load([segment])
    device.fail("follow")
    with pytest.raises(DeviceError, match="pretend:0: follow"):
        memory.hold([segment])
    memory.drop([segment])


@pytest.mark.parametrize(("call", "at"), [("allocate", 1), ("pin", 1), ("pin", 2)])
def test_a_memory_that_cannot_be_had_takes_nothing(
    new: Callable[..., DeviceWeights], device: PretendAccelerator, call: str, at: int
) -> None:
    device.fail(call, at=at, error=OutOfMemory(f"{call}: out of memory"))
    with pytest.raises(OutOfMemory):
        new()
    assert device.is_empty


def test_a_budget_beyond_the_device_says_what_it_has(
    new: Callable[..., DeviceWeights], device: PretendAccelerator
) -> None:
    with pytest.raises(OutOfMemory, match=f"{device.total_bytes} of {device.total_bytes} are free"):
        new(device_bytes=device.total_bytes + 4096)


def test_what_is_held_keeps_the_memory_from_being_closed(disk: Disk, memory: DeviceWeights) -> None:
    segment = disk.segment(4096)
    memory.load([segment])
    memory.hold([segment])
    with pytest.raises(LoadError, match="in use"):
        memory.close()
    memory.release([segment])
    assert seen(memory, segment)


@pytest.mark.parametrize("host_bytes", [6 << 20, 0], ids=["host tier", "windows"])
def test_threads_that_load_cancel_and_drop_at_random_always_see_their_bytes(
    disk: Disk, new: Callable[..., DeviceWeights], device: PretendAccelerator, host_bytes: int
) -> None:
    memory = new(device_bytes=24 << 20, host_bytes=host_bytes)
    segments = [disk.segment(size) for size in (4096, 300_000, 3 << 20, 4 << 20, WINDOW_BYTES + 1, 2 * WINDOW_BYTES)]

    def work(number: int) -> int:
        chance, count = random.Random(number), 0
        for _ in range(60):
            segment, step = chance.choice(segments), chance.choice(["load", "load", "ahead", "cancel", "hurry", "drop"])
            with suppress(LoadError, Cancelled, OutOfMemory):  # another one holds it, cancelled it, or took the room
                if step in ("load", "ahead"):
                    memory.load([segment], ahead=step == "ahead")
                    assert seen(memory, segment)
                    count += 1
                else:
                    getattr(memory, step)([segment])
        return count

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(work, range(4))) > 0
    memory.drop([segment for segment in segments if memory.is_mapped(segment)])
    assert (memory.mapped_bytes, device.pending, device.stalls) == (0, 0, 0)


class TestThePretendIsStrict:
    """What a wrong driver does, it refuses or shows."""

    @pytest.fixture
    def strict(self) -> PretendAccelerator:
        return PretendAccelerator()

    def test_fresh_device_memory_is_poisoned(self, strict: PretendAccelerator) -> None:
        assert np.isnan(np.frombuffer(ctypes.string_at(strict.allocate(64), 64), np.float32)).all()

    def test_copies_are_made_as_late_as_may_be(self, strict: PretendAccelerator) -> None:
        device, host = strict.allocate(4096), strict.pin(4096)
        host.memory[0] = 7
        strict.copy_in(device, host.address, 4096)
        event = strict.mark()
        assert strict.pending == 1
        strict.wait(event)
        assert strict.pending == 0
        assert ctypes.string_at(device, 1) == bytes([POISON]), "not seen before it is followed"
        strict.follow(event)
        assert ctypes.string_at(device, 1) == b"\7"

    def test_a_full_queue_makes_room(self, strict: PretendAccelerator) -> None:
        device, host = strict.allocate(4096), strict.pin(4096)
        for _ in range(QUEUE_DEPTH + 3):
            strict.copy_in(device, host.address, 16)
        assert strict.pending == QUEUE_DEPTH

    def test_host_memory_that_changes_before_its_copy_is_refused(self, strict: PretendAccelerator) -> None:
        device, host = strict.allocate(4096), strict.pin(4096)
        strict.copy_in(device, host.address, 4096)
        host.memory[5] = 7
        with pytest.raises(Refused, match="written to before"):
            strict.wait(strict.mark())

    def test_copies_beyond_an_allocation_are_refused(self, strict: PretendAccelerator) -> None:
        device, host = strict.allocate(4096), strict.pin(8192)
        with pytest.raises(Refused, match="no device memory"):
            strict.copy_in(device + 1, host.address, 4096)
        with pytest.raises(Refused, match="no pinned memory"):
            strict.copy_in(device, host.address + 4097, 4096)
        with pytest.raises(Refused, match="no pinned memory"):
            strict.copy_in(device, device, 4096)

    def test_freed_memory_is_not_copied_from_or_to(self, strict: PretendAccelerator) -> None:
        device, host = strict.allocate(4096), strict.pin(4096)
        strict.copy_in(device, host.address, 16)
        with pytest.raises(Refused, match="before a copy from it"):
            strict.unpin(host)
        with pytest.raises(Refused, match="before a copy to it"):
            strict.free(device)
        strict.wait(strict.mark())
        strict.unpin(host)
        with pytest.raises(Refused, match="no pinned memory"):
            strict.copy_in(device, host.address, 16)
        strict.free(device)

    def test_nothing_works_after_close(self, strict: PretendAccelerator) -> None:
        address = strict.allocate(4096)
        with pytest.raises(Refused, match="in use"):
            strict.close()
        strict.free(address)
        strict.close()
        with pytest.raises(Refused, match="after close"):
            strict.mark()

    def test_a_stall_of_the_compute_stream_is_counted(self, strict: PretendAccelerator) -> None:
        device, host = strict.allocate(4096), strict.pin(4096)
        strict.copy_in(device, host.address, 16)
        strict.follow(strict.mark())
        assert strict.stalls == 1

    def test_it_fails_when_told_to(self, strict: PretendAccelerator) -> None:
        strict.fail("mark", at=2)
        strict.mark()
        with pytest.raises(DeviceError, match="pretend:0: mark"):
            strict.mark()
        strict.mark()
