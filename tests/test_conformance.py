"""What every memory for segments does, and every place over it: one suite for main memory, a pretend device and a GPU.

A GPU takes templates of standard operators only, so all of them are given those (see `kit_segments.portable_expert`).
"""

from __future__ import annotations

import mmap
import os
import random
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest
from numpy.typing import NDArray

from appliance.core.slab import whole_pages
from appliance.core.types import Segment
from appliance.drivers.runtime import CpuPlace
from appliance.engine.cuda import CudaAccelerator, CudaPlace, usable_gpu
from appliance.engine.device_weights import DeviceWeights
from appliance.engine.disk import CHUNK_BYTES
from appliance.engine.place import Place, SegmentMemory
from appliance.engine.sessions import Sessions
from appliance.engine.weights import Weights
from appliance.errors import Cancelled, LoadError, OutOfMemory
from appliance.store.store import Compiled
from tests import kit_models as kit
from tests.conftest import Need, decide
from tests.kit_device import PretendAccelerator, PretendPlace
from tests.kit_segments import Reads, portable_expert

WIDTH = 1200
"""Of the nets whose weights take several reads."""
SHARED = ("f0", "f1")
PictureBatch = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Experts:
    """`e0` … `e3` of one architecture, `wide0` and `wide1` of a larger one, `f0` and `f1` with one trunk."""

    folder: Path
    compiled: Mapping[str, Compiled]
    answers: Callable[[str, PictureBatch], NDArray[Any]]


class World(Protocol):
    """A kind of memory and the place that goes with it."""

    nearest: str
    """The tier of what is in memory."""
    has_host_tier: bool
    place: Place

    def memory(self, path: Callable[[str], Path], device_bytes: int, host_bytes: int) -> SegmentMemory:
        """An empty one over the files at these paths."""
        ...

    def without_memory(self, memory: SegmentMemory, monkeypatch: pytest.MonkeyPatch) -> Any:
        """A context within which there is no memory for a segment of a megabyte."""
        ...

    def close(self) -> None:
        """Also checks that everything was given back."""
        ...


class MainMemory:
    nearest = "memory"
    has_host_tier = False

    def __init__(self) -> None:
        self.place: Place = CpuPlace()

    def memory(self, path: Callable[[str], Path], device_bytes: int, host_bytes: int) -> SegmentMemory:
        return Weights(path)

    @contextmanager
    def without_memory(self, memory: SegmentMemory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        def refusing(*args: Any, **kwargs: Any) -> Any:
            raise OSError(12, "Cannot allocate memory")

        with monkeypatch.context() as full:
            full.setattr(mmap, "mmap", refusing)
            yield

    def close(self) -> None:
        pass


class Device:
    """What devices with a slab have in common."""

    nearest = "device"
    has_host_tier = True
    _accelerator: Any

    def memory(self, path: Callable[[str], Path], device_bytes: int, host_bytes: int) -> SegmentMemory:
        return DeviceWeights(path, self._accelerator, device_bytes=device_bytes, host_bytes=host_bytes)

    @contextmanager
    def without_memory(self, memory: SegmentMemory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        """The slab is full, as it is when the ledger is wrong or the free bytes are in pieces."""
        assert isinstance(memory, DeviceWeights)
        slab = memory._slab
        taken = []
        while slab.largest_free_bytes:
            taken.append(slab.take(slab.largest_free_bytes))
        yield
        for offset in taken:
            slab.give_back(offset)

    def close(self) -> None:
        self._accelerator.close()


class PretendDevice(Device):
    def __init__(self) -> None:
        self._accelerator = PretendAccelerator()
        self.place: Place = PretendPlace()


class CudaDevice(Device):
    def __init__(self) -> None:
        decide(Need("APPLIANCE_REQUIRE_GPU", lambda: usable_gpu(0)), os.environ)
        self._accelerator = CudaAccelerator(0)
        self.place: Place = CudaPlace(0, self._accelerator.compute_stream, activation_bytes=256 << 20)


WORLDS = [
    pytest.param(MainMemory, id="main memory"),
    pytest.param(PretendDevice, id="pretend accelerator"),
    pytest.param(CudaDevice, id="cuda", marks=pytest.mark.gpu),
]


@dataclass(slots=True)
class Bench:
    """One world with an empty memory, sessions over it, and how often each file was opened for reading."""

    world: World
    experts: Experts
    memory: SegmentMemory
    sessions: Sessions
    reads: list[str]
    active: set[str] = field(default_factory=set)

    def ready(self, name: str) -> None:
        self.memory.load(self.experts.compiled[name].segments)
        self.sessions.activate(self.experts.compiled[name])
        self.active.add(name)

    def run(self, name: str, pictures: PictureBatch, size: int = 0) -> NDArray[Any]:
        with self.sessions.lease(name) as lease:
            return lease.run({"image": pictures}, size=size)["logits"]

    def evict(self, name: str) -> None:
        """The expert and those of its segments that no other active one needs."""
        self.sessions.drop(name)
        self.active.discard(name)
        needed = {segment for other in self.active for segment in self.experts.compiled[other].segments}
        self.memory.drop([s for s in self.experts.compiled[name].segments if s not in needed])

    def right(self, name: str, pictures: PictureBatch, size: int = 0) -> None:
        found, expected = self.run(name, pictures, size), self.experts.answers(name, pictures)
        np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-3, err_msg=name)

    def segment(self, name: str) -> Segment:
        (segment,) = self.experts.compiled[name].segments
        return segment

    def close(self) -> None:
        for name in list(self.active):
            self.evict(name)
        self.memory.close()
        assert self.memory.mapped_bytes == 0


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Experts:
    folder = tmp_path_factory.mktemp("experts")
    nets = {f"e{seed}": kit.conv_net(seed) for seed in range(4)}
    nets |= {f"wide{seed}": kit.conv_net(seed, width=WIDTH) for seed in range(2)}
    nets |= {"f0": kit.conv_net(0, width=200), "f1": kit.fine_tune(1, width=200)}
    compiled = {name: portable_expert(name, net, folder) for name, net in nets.items()}
    digests = [{slot.sha256 for slot in compiled[name].tensors} for name in SHARED]
    for name in SHARED:
        compiled[name] = portable_expert(name, nets[name], folder, shared=digests[0] & digests[1])
    plain = {name: kit.plain_session(kit.save(net, folder / f"plain-{name}.onnx")) for name, net in nets.items()}
    return Experts(folder, compiled, lambda name, pictures: np.asarray(plain[name].run(None, {"image": pictures})[0]))


@pytest.fixture(params=WORLDS)
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    made: World = request.param()
    yield made
    made.close()


@pytest.fixture
def new_bench(world: World, experts: Experts) -> Iterator[Callable[..., Bench]]:
    benches: list[Bench] = []

    def made(*, folder: Path = experts.folder, device_bytes: int = 64 << 20, host_bytes: int = 64 << 20) -> Bench:
        reads: list[str] = []

        def path(name: str) -> Path:
            reads.append(name)
            return folder / name

        memory = world.memory(path, device_bytes, host_bytes)
        sessions = Sessions(memory, world.place, activation_bytes=256 << 20)
        benches.append(Bench(world, experts, memory, sessions, reads))
        return benches[-1]

    yield made
    for bench in benches:
        bench.close()


@pytest.fixture
def bench(new_bench: Callable[..., Bench]) -> Bench:
    return new_bench()


def test_answers_are_those_of_the_plain_session(bench: Bench) -> None:
    for name in bench.experts.compiled:
        bench.ready(name)
        for size in (1, 2, 8):
            bench.right(name, kit.noise(size, seed=size))


def test_two_experts_of_one_architecture_take_turns_and_give_their_own_answers(bench: Bench) -> None:
    assert bench.experts.compiled["wide0"].architecture == bench.experts.compiled["wide1"].architecture
    bench.ready("wide0")
    bench.ready("wide1")
    for turn in range(50):
        bench.right(f"wide{turn % 2}", kit.noise(2, seed=turn))


def test_experts_that_take_each_others_place_give_their_own_answers(new_bench: Callable[..., Bench]) -> None:
    bench = new_bench(device_bytes=whole_pages(new_bench().segment("wide0").bytes))
    for turn in range(10):
        bench.ready(f"wide{turn % 2}")
        bench.right(f"wide{turn % 2}", kit.noise(2, seed=turn))
        bench.evict(f"wide{turn % 2}")


def test_bytes_that_are_wrong_change_the_answer(
    new_bench: Callable[..., Bench], experts: Experts, tmp_path: Path
) -> None:
    segment = experts.compiled["wide0"].segments[0]
    content = np.fromfile(experts.folder / segment.id, np.uint8)
    (tmp_path / segment.id).write_bytes((content ^ 0x40).tobytes())
    bench = new_bench(folder=tmp_path)
    bench.ready("wide0")
    with pytest.raises(AssertionError, match="wide0"):
        bench.right("wide0", kit.noise(2))


def test_loading_again_costs_no_read(bench: Bench) -> None:
    segment = bench.segment("wide0")
    for _ in range(3):
        bench.memory.load([segment])
    assert bench.reads == [segment.id]
    assert bench.memory.hits[bench.world.nearest] == 2
    assert bench.memory.hits["disk"] == 1


def test_many_who_want_one_segment_cause_one_read(bench: Bench) -> None:
    segment, start = bench.segment("wide0"), threading.Barrier(8)

    def load() -> None:
        start.wait()
        bench.memory.load([segment])
        bench.memory.hold([segment])
        bench.memory.release([segment])

    with ThreadPoolExecutor(8) as pool:
        for waiting in [pool.submit(load) for _ in range(8)]:
            waiting.result()
    assert bench.reads == [segment.id]
    assert bench.memory.peak_bytes == whole_pages(segment.bytes)
    assert bench.memory.hits[bench.world.nearest] == 7


def test_a_shared_segment_is_brought_once_and_leaves_with_its_last_user(bench: Bench) -> None:
    first, second = (bench.experts.compiled[name] for name in SHARED)
    (shared,) = set(first.segments) & set(second.segments)
    bench.ready("f0")
    bench.ready("f1")
    assert bench.reads.count(shared.id) == 1
    bench.evict("f0")
    assert bench.memory.is_mapped(shared)
    bench.right("f1", kit.noise(3))
    with pytest.raises(LoadError, match="in use"):
        bench.memory.drop([shared])
    bench.evict("f1")
    assert not bench.memory.is_mapped(shared)
    assert bench.memory.mapped_bytes == 0


def test_what_is_held_is_not_dropped(bench: Bench) -> None:
    one, other = bench.segment("e0"), bench.segment("e1")
    bench.memory.load([one, other])
    bench.memory.hold([one])
    bench.memory.hold([other, one])
    bench.memory.release([other, one])
    with pytest.raises(LoadError, match="in use"):
        bench.memory.drop([other, one])
    with pytest.raises(LoadError, match="in use"):
        bench.memory.close()
    assert bench.memory.is_mapped(other), "nothing is dropped when not all can be"
    bench.memory.release([one])
    bench.memory.drop([other, one])


def test_what_is_absent_can_be_neither_dropped_nor_held_nor_addressed(bench: Bench) -> None:
    segment, here = bench.segment("e0"), bench.segment("e1")
    bench.memory.load([here])
    for attempt in (bench.memory.drop, bench.memory.hold, lambda segments: bench.memory.address(segments[-1].id)):
        with pytest.raises(LoadError, match="not in memory"):
            attempt([here, segment])
    bench.memory.drop([here])


def test_evicting_gives_every_byte_back(bench: Bench) -> None:
    for name in bench.experts.compiled:
        bench.ready(name)
    segments = {s.id: whole_pages(s.bytes) for c in bench.experts.compiled.values() for s in c.segments}
    assert bench.memory.mapped_bytes == bench.memory.peak_bytes == sum(segments.values())
    for name in bench.experts.compiled:
        bench.evict(name)
    assert bench.memory.mapped_bytes == 0
    if isinstance(bench.memory, DeviceWeights):
        slab = bench.memory._slab
        assert slab.largest_free_bytes == slab.total_bytes


@pytest.mark.parametrize("seed", range(5))
def test_a_budget_is_never_exceeded_however_experts_come_and_go(new_bench: Callable[..., Bench], seed: int) -> None:
    chance = random.Random(seed)
    budget = 10 << 20
    bench = new_bench(device_bytes=budget, host_bytes=4 << 20)
    for turn in range(40):
        name = chance.choice(sorted(bench.experts.compiled))
        if name in bench.active and chance.random() < 0.3:
            bench.evict(name)
        while name not in bench.active:
            own = {s for active in bench.active for s in bench.experts.compiled[active].segments}
            segments = set(bench.experts.compiled[name].segments)
            try:
                if sum(whole_pages(s.bytes) for s in own | segments) > budget:
                    raise OutOfMemory("as the ledger says")
                bench.ready(name)
            except OutOfMemory:  # also when the free bytes are in pieces
                bench.memory.drop([s for s in segments - own if bench.memory.is_mapped(s)])
                bench.evict(chance.choice(sorted(bench.active)))
        bench.right(name, kit.noise(1, seed=turn))
        taken = {s for active in bench.active for s in bench.experts.compiled[active].segments}
        assert bench.memory.mapped_bytes == sum(whole_pages(s.bytes) for s in taken) <= budget
    assert bench.memory.peak_bytes <= budget


def missing(path: Path) -> None:
    path.unlink()


def short(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 4096)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def long(path: Path) -> None:
    os.truncate(path, path.stat().st_size + 1)


@pytest.mark.parametrize("spoil", [missing, short, empty, long])
def test_a_file_that_is_not_as_it_should_be_is_named_and_takes_no_memory(
    new_bench: Callable[..., Bench], experts: Experts, tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    sound, bad = experts.compiled["e0"].segments[0], experts.compiled["wide0"].segments[0]
    contents = {segment.id: (experts.folder / segment.id).read_bytes() for segment in (sound, bad)}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    bench = new_bench(folder=tmp_path)
    spoil(tmp_path / bad.id)
    with pytest.raises(LoadError, match=bad.id):
        bench.memory.load([sound, bad])
    assert bench.memory.is_mapped(sound), "what came before it stays"
    assert bench.memory.mapped_bytes == whole_pages(sound.bytes)
    (tmp_path / bad.id).write_bytes(contents[bad.id])
    bench.ready("wide0")
    bench.right("wide0", kit.noise(1))


def test_a_file_that_shrinks_while_it_is_read_is_an_error(
    new_bench: Callable[..., Bench], experts: Experts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    segment = experts.compiled["wide0"].segments[0]
    (tmp_path / segment.id).write_bytes((experts.folder / segment.id).read_bytes())
    bench = new_bench(folder=tmp_path)
    really_read = os.preadv

    def shrinking(descriptor: int, buffers: Any, offset: int) -> int:
        os.truncate(tmp_path / segment.id, CHUNK_BYTES)
        return really_read(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", shrinking)
    with pytest.raises(LoadError, match="ends at byte"):
        bench.memory.load([segment])
    assert bench.memory.mapped_bytes == 0


def test_a_cancelled_load_ahead_ends_and_the_next_load_succeeds(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    segment = bench.segment("wide0")
    with monkeypatch.context() as patch, ThreadPoolExecutor(1) as pool:
        reads = Reads(patch, [segment], slow=[segment])
        early = pool.submit(bench.memory.load, [segment], ahead=True)
        assert reads.begun[segment.id].wait(60)
        bench.memory.cancel([segment])
        reads.go_on.set()
        with pytest.raises(Cancelled):
            early.result(60)
    assert bench.memory.mapped_bytes == 0
    bench.ready("wide0")
    bench.right("wide0", kit.noise(1))
    bench.memory.cancel([segment])
    bench.right("wide0", kit.noise(1))


def test_a_load_ahead_waits_while_something_needed_is_read(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    needed, later = bench.segment("wide0"), bench.segment("wide1")
    with monkeypatch.context() as patch, ThreadPoolExecutor(2) as pool:
        reads = Reads(patch, [needed, later], slow=[needed])
        first = pool.submit(bench.memory.load, [needed])
        assert reads.begun[needed.id].wait(60)
        second = pool.submit(bench.memory.load, [later], ahead=True)
        assert reads.opened[later.id].wait(60)
        reads.go_on.set()
        first.result(60)
        second.result(60)
    assert later.id not in reads.until_last_of(needed)
    for name in ("wide0", "wide1"):
        bench.ready(name)
        bench.right(name, kit.noise(1))


@pytest.mark.parametrize("needs", ["load", "hurry"])
def test_a_load_ahead_that_is_needed_after_all_no_longer_waits(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, needs: str
) -> None:
    slow, segment = bench.segment("wide0"), bench.segment("wide1")
    with monkeypatch.context() as patch, ThreadPoolExecutor(2) as pool:
        reads = Reads(patch, [slow, segment], slow=[slow])
        first = pool.submit(bench.memory.load, [slow])
        assert reads.begun[slow.id].wait(60)
        early = pool.submit(bench.memory.load, [segment], ahead=True)
        assert reads.opened[segment.id].wait(60)
        try:
            getattr(bench.memory, needs)([segment])
            early.result(60)
            assert not first.done()
        finally:
            reads.go_on.set()
    assert bench.reads.count(segment.id) == 1


def test_a_shortage_of_memory_is_an_error_of_its_own_and_leaves_all_as_it_was(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.ready("e0")
    before = bench.memory.mapped_bytes
    with bench.world.without_memory(bench.memory, monkeypatch), pytest.raises(OutOfMemory):
        bench.ready("wide0")
    assert bench.memory.mapped_bytes == before
    assert not bench.memory.is_mapped(bench.segment("wide0"))
    bench.right("e0", kit.noise(1))
    bench.ready("wide0")
    bench.right("wide0", kit.noise(1))


@pytest.mark.parametrize(("count", "size"), [(1, 2), (3, 4), (5, 8), (8, 8)])
def test_a_batch_that_is_filled_up_gives_the_same_answers(bench: Bench, count: int, size: int) -> None:
    bench.ready("e0")
    bench.right("e0", kit.noise(count), size)
    assert bench.run("e0", kit.noise(count), size).shape == (count, len(kit.LABELS))


def test_a_file_system_in_memory_serves_too(new_bench: Callable[..., Bench], experts: Experts) -> None:
    segment = experts.compiled["wide0"].segments[0]
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        (Path(folder) / segment.id).write_bytes((experts.folder / segment.id).read_bytes())
        bench = new_bench(folder=Path(folder))
        bench.ready("wide0")
        bench.right("wide0", kit.noise(2))


def test_what_left_the_device_comes_back_without_the_disk(bench: Bench) -> None:
    if not bench.world.has_host_tier:
        pytest.skip("main memory has no tier below it")
    segment = bench.segment("wide0")
    for _ in range(3):
        bench.ready("wide0")
        bench.right("wide0", kit.noise(2))
        bench.evict("wide0")
    assert bench.reads == [segment.id]
    assert bench.memory.hits == {"device": 0, "host": 2, "disk": 1}


def test_without_a_host_tier_the_disk_is_read_again(new_bench: Callable[..., Bench], world: World) -> None:
    bench = new_bench(host_bytes=0)
    for _ in range(2):
        bench.ready("wide0")
        bench.right("wide0", kit.noise(2))
        bench.evict("wide0")
    assert bench.reads == [bench.segment("wide0").id] * 2
    assert bench.memory.hits["disk"] == 2


def test_threads_that_load_run_and_evict_at_once_see_their_own_weights(new_bench: Callable[..., Bench]) -> None:
    bench = new_bench(host_bytes=3 << 20)
    pictures = kit.noise(2)
    names = ["wide0", "wide1", "e0", "e1"]
    expected = {name: bench.experts.answers(name, pictures) for name in names}

    def work(name: str) -> None:
        compiled = bench.experts.compiled[name]
        for _ in range(12):
            bench.memory.load(compiled.segments)
            bench.sessions.activate(compiled)
            np.testing.assert_allclose(bench.run(name, pictures), expected[name], atol=1e-4, rtol=1e-3)
            bench.sessions.drop(name)
            bench.memory.drop(compiled.segments)

    with ThreadPoolExecutor(len(names)) as pool:
        list(pool.map(work, names))
    assert bench.memory.mapped_bytes == 0


def test_addresses_suit_direct_reads_and_devices(bench: Bench) -> None:
    segments: Sequence[Segment] = [bench.segment(name) for name in ("e0", "wide0", "e1")]
    bench.memory.load(segments)
    assert [bench.memory.address(segment.id) % 256 for segment in segments] == [0, 0, 0]
    bench.memory.drop(segments)
