"""Memory given back by segments: kept within bounds, taken again warm, and gone when it is wanted."""

from __future__ import annotations

import mmap
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.core.types import Segment
from appliance.engine.disk import CHUNK_BYTES
from appliance.engine.spares import MOST_TIMES, Spares
from appliance.engine.weights import Weights
from appliance.errors import LoadError
from tests.kit_process import alone
from tests.kit_segments import Disk, all_idle, bytes_of

PAGE = mmap.PAGESIZE


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    return Disk(tmp_path)


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 30)), max_size=60))
def test_what_is_kept_is_what_was_given_less_what_was_taken(moves: list[tuple[bool, int]]) -> None:
    spares, kept = Spares(), list[int]()
    for now, (keeps, pages) in enumerate(moves):
        size = pages * PAGE
        near = [k for k in kept if k <= MOST_TIMES * size and size <= MOST_TIMES * k]
        if keeps:
            spares.keep(_memory(pages), now)
            kept.append(size)
        elif (memory := spares.take(size)) is not None:
            assert len(memory) == size
            memory[:] = b"x" * size
            before = sum(kept) - spares.bytes
            assert abs(before - size) == min(abs(k - size) for k in near)
            kept.remove(before)
        else:
            assert not near
        assert spares.bytes == sum(kept)
    spares.give_back()
    assert spares.bytes == 0


def test_a_small_segment_takes_no_large_spare_and_a_large_one_no_small() -> None:
    spares = Spares()
    spares.keep(_memory(400), 0.0)
    assert spares.take(PAGE) is None
    assert spares.take(10_000 * PAGE) is None
    assert spares.bytes == 400 * PAGE


@given(st.lists(st.integers(1, 9), max_size=20), st.integers(-PAGE, 200 * PAGE))
def test_what_is_given_back_is_no_more_than_it_has_to_be(pages: list[int], most_bytes: int) -> None:
    """Within the page of which a part would be too much."""
    spares = Spares()
    for now, count in enumerate(pages):
        spares.keep(_memory(count), now)
    before = spares.bytes
    spares.give_back(most_bytes)
    assert spares.bytes == min(before, max(0, most_bytes) // PAGE * PAGE)
    spares.give_back()
    assert (spares.bytes, spares.take(PAGE)) == (0, None)


def test_a_small_segment_costs_a_large_spare_little_where_the_budget_is_full(tmp_path: Path) -> None:
    alone(bring_a_small_one_between, tmp_path)


def bring_a_small_one_between(folder: Path) -> None:
    disk = Disk(folder)
    memory = Weights(disk.path, budget_bytes=3 << 20)
    large, small, next_large = disk.segment(3 << 20, 1), disk.segment(PAGE, 2), disk.segment((3 << 20) - PAGE, 3)
    memory.load([large])
    memory.drop([large])
    memory.load([small])
    assert (memory.mapped_bytes, memory.spare_bytes) == (PAGE, (3 << 20) - PAGE)
    assert _faults(lambda: memory.load([next_large])) < (3 << 20) // PAGE // 4, "no page had to be cleared"
    assert memory.spare_bytes == 0


def test_the_oldest_go_first_and_those_that_were_kept_lately_stay() -> None:
    spares = Spares()
    for now, pages in enumerate((1, 2, 3)):
        spares.keep(_memory(pages), now)
    spares.give_back(most_bytes=5 * PAGE)
    assert spares.bytes == 5 * PAGE
    spares.give_back(since_seconds=1)
    assert spares.bytes == 3 * PAGE


def test_a_segment_takes_the_memory_of_one_that_left_and_is_its_own_file_all_the_same(tmp_path: Path) -> None:
    alone(bring_one_after_another, tmp_path)


def bring_one_after_another(folder: Path) -> None:
    disk = Disk(folder)
    memory = Weights(disk.path, budget_bytes=8 << 20)
    first, second, smaller = disk.segment(3 << 20, 1), disk.segment(3 << 20, 2), disk.segment((1 << 20) + 77, 3)
    memory.load([first])
    memory.drop([first])
    assert (memory.mapped_bytes, memory.spare_bytes) == (0, 3 << 20)
    faults = _faults(lambda: memory.load([second]))
    assert memory.spare_bytes == 0
    assert faults < (3 << 20) // PAGE // 4, "no page had to be cleared"
    for segment in (second, smaller):
        memory.load([segment])
        with bytes_of(memory, segment.id) as view:
            assert bytes(view[: segment.bytes]) == (disk.folder / segment.id).read_bytes()
    memory.close()
    assert memory.spare_bytes == 0


def test_segments_and_spares_never_exceed_the_budget(disk: Disk) -> None:
    memory = Weights(disk.path, budget_bytes=10 * PAGE)
    segments = [disk.segment(pages * PAGE, pages) for pages in (2, 3, 4, 5)]
    here = list[Segment]()
    for segment in segments * 5:
        if segment in here:
            continue
        while sum(one.bytes for one in here) + segment.bytes > 10 * PAGE:
            memory.drop([here.pop(0)])
            assert memory.mapped_bytes + memory.spare_bytes <= 10 * PAGE
        memory.load([segment])
        here.append(segment)
        assert memory.mapped_bytes + memory.spare_bytes <= 10 * PAGE
    assert memory.peak_bytes <= 10 * PAGE


def test_without_a_budget_nothing_is_kept(disk: Disk) -> None:
    memory = Weights(disk.path)
    segment = disk.segment(CHUNK_BYTES)
    memory.load([segment])
    memory.drop([segment])
    assert memory.spare_bytes == 0


def test_trimming_gives_back_what_has_been_spare_for_long(disk: Disk) -> None:
    memory = Weights(disk.path, budget_bytes=1 << 20)
    segment = disk.segment(PAGE)
    memory.load([segment])
    memory.drop([segment])
    memory.trim(idle_seconds=3600)
    assert memory.spare_bytes == PAGE
    memory.trim()
    assert memory.spare_bytes == 0


def test_spares_go_before_memory_is_refused(tmp_path: Path) -> None:
    """60 MB are wanted where 8 are left: the spare that would have to grow cannot, and the other has to go as well."""
    alone(want_more_than_there_is, tmp_path)


def want_more_than_there_is(folder: Path) -> None:
    memory = Weights(lambda name: folder / name, budget_bytes=1 << 30)
    sizes = {"first": 32 << 20, "second": 32 << 20, "large": 60 << 20}
    for name, size in sizes.items():
        with (folder / name).open("wb") as file:
            file.truncate(size)
    first, second, large = (Segment(name, size) for name, size in sizes.items())
    memory.load([first, second])
    memory.drop([first, second])
    all_idle(memory._reader)  # one that begins takes memory, too
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_address_space() + (8 << 20), limits[1]))
    memory.load([large])
    resource.setrlimit(resource.RLIMIT_AS, limits)
    assert (memory.mapped_bytes, memory.spare_bytes) == (large.bytes, 0)


def test_memory_that_somebody_still_sees_is_not_spare(disk: Disk) -> None:
    memory = Weights(disk.path, budget_bytes=1 << 20)
    segment = disk.segment(PAGE)
    memory.load([segment])
    with bytes_of(memory, segment.id), pytest.raises(LoadError, match="in use"):
        memory.drop([segment])
    memory.drop([segment])
    assert memory.spare_bytes == PAGE


def _memory(pages: int) -> mmap.mmap:
    return mmap.mmap(-1, pages * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def _faults(work: Callable[[], object]) -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    work()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def _address_space() -> int:
    pages = Path("/proc/self/statm").read_text().split()[0]
    return int(pages) * PAGE
