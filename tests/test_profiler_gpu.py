"""The profiler on a box with GPUs: measured on a pretend one, searched in the simulator, served live on the pretend."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance import profile as profiles
from appliance.catalog import Bundle
from appliance.config import Config, Memory, Paths
from appliance.core import costs
from appliance.core.slab import block_bytes
from appliance.core.types import Batch, Device, Event, Segment
from appliance.drivers.devices import Gpu
from appliance.engine.device_weights import DeviceWeights
from appliance.engine.engine import Engine
from appliance.errors import DeviceError
from appliance.lab import laps
from appliance.profile import Kind
from appliance.profiler import boxes, measure, workload
from appliance.profiler.choosing import guesses
from appliance.profiler.joint import NO_ROOM, Judged, Search
from appliance.profiler.measure import LOADS, GpuPart, measured
from appliance.profiler.measurements import Architecture, Latency, Loading, Measured, OnGpu, errors, plateau
from appliance.profiler.profiled import Plan, profiled
from appliance.profiler.rig import Rig, Taking
from appliance.profiler.settings import Knob, Settings
from appliance.startup import hardware, install
from appliance.store.compile import compile_bundles
from appliance.store.store import Compiled, Store
from tests.kit_box import write_catalog
from tests.kit_device import PretendAccelerator, PretendPlace
from tests.kit_measure_child import open_pretend_gpu
from tests.kit_models import conv_net, write_bundle
from tests.kit_profiler import few_samples, kept

__all__ = ["few_samples"]  # a fixture

GPU = "cuda:0"
NAMES = ("left", "right", "wider", "unfit")
"""Two of one architecture, one of another, and one that no GPU takes."""
ROOM = 64 << 20


@dataclass(frozen=True, slots=True)
class Box:
    """Experts compiled for the CPU and for GPUs."""

    compiled: Mapping[str, Compiled]
    bundles: Mapping[str, Bundle]
    store: Store
    gpus: GpuPart

    def measured(
        self, *, budget_seconds: float = 60.0, known: Measured | None = None, gpus: GpuPart | None = None
    ) -> Measured:
        return measured(
            self.compiled,
            self.bundles,
            self.store.segment_path,
            threads=(1,),
            executors=2,
            budget_seconds=budget_seconds,
            repeats=2,
            known=known,
            gpus=gpus or self.gpus,
        )


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Box:
    home = tmp_path_factory.mktemp("box")
    channels = dict(zip(NAMES, (8, 8, 16, 24), strict=True))
    bundles = {
        name: write_bundle(home / "catalog", name, conv_net(seed, channels[name]), max_batch=6)
        for seed, name in enumerate(NAMES)
    }
    stores = [Store(home / "store"), Store(home / "store", "cuda")]
    on_cpu, on_gpu = (compile_bundles(store, list(bundles.values()), report=lambda *_: None) for store in stores)
    compiled = {name: one for name, one in on_cpu.items() if isinstance(one, Compiled)}
    assert compiled.keys() == set(NAMES)
    there = {name: one for name, one in on_gpu.items() if isinstance(one, Compiled) and name != "unfit"}
    return Box(compiled, bundles, stores[0], GpuPart((GPU,), there, stores[1].segment_path, ROOM))


@pytest.fixture(autouse=True)
def _pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_CHILD", "tests.kit_measure_child")


@pytest.fixture(scope="module")
def found(box: Box) -> Measured:
    with pytest.MonkeyPatch.context() as pretended:
        pretended.setattr(measure, "_CHILD", "tests.kit_measure_child")
        return box.measured()


def test_each_architecture_is_measured_on_the_cpu_and_on_the_gpu_as_compiled_for_it(box: Box, found: Measured) -> None:
    assert found.failed == {}
    assert found.on("cpu").keys() == {one.architecture for one in box.compiled.values()}
    assert found.on("cuda").keys() == {one.architecture for one in box.gpus.compiled.values()}
    assert found.on("cuda", threads=2) == {}


def test_batches_of_a_gpu_are_those_that_run_there(found: Measured) -> None:
    for one in found.on("cuda").values():
        assert [sample.items for sample in one.samples] == [1, 2, 4, 6], (
            "five pictures run as six, the most of the expert"
        )
        pairs = [(sample.items, sample.seconds) for sample in one.samples]
        assert (one.item_seconds, one.fixed_seconds) == costs.fit(pairs)
        assert (one.fit_error, one.worst_error) == errors(one.samples, one.item_seconds, one.fixed_seconds)
        assert one.best_batch == plateau(one.samples)
    assert all([s.items for s in one.samples] == [1, 2, 3, 4, 6] for one in found.on("cpu").values())


def test_loads_of_a_gpu_are_measured_from_the_disk_and_from_host_memory(found: Measured) -> None:
    assert found.gpu is not None
    for loading in (found.gpu.from_disk, found.gpu.from_host):
        assert loading.bytes_per_second.keys() == {1, 2}
        assert all(rate > 0 for rate in loading.bytes_per_second.values())
    assert found.gpu.from_disk != found.gpu.from_host


def test_runs_of_gpu_and_cpu_are_measured_beside_each_other(found: Measured) -> None:
    assert found.gpu is not None
    assert min(found.gpu.beside_cpu, found.gpu.beside_loads, found.gpu.cpu_beside) >= 1.0


def test_what_was_measured_on_a_gpu_is_kept_as_it_was(found: Measured, tmp_path: Path) -> None:
    assert kept(found, tmp_path) == found


def test_what_is_known_of_a_gpu_is_not_measured_again(box: Box, found: Measured) -> None:
    again = box.measured(known=found)
    assert replace(again, seconds=found.seconds) == found


def test_a_gpu_that_cannot_do_it_is_named_and_the_cpu_is_measured(box: Box, found: Measured) -> None:
    """It has no room for anything."""
    tried = box.measured(gpus=replace(box.gpus, memory_bytes=1 << 10), known=replace(found, architectures=(), gpu=None))
    architectures = {one.architecture for one in box.gpus.compiled.values()}
    assert tried.failed.keys() == {*(f"{GPU} {name}" for name in architectures), f"{GPU} {LOADS}"}
    assert tried.on("cpu").keys() == found.on("cpu").keys()
    assert tried.on("cuda") == {}
    assert tried.gpu == OnGpu()


# Predicted and served: experts that are made, of which a pretend GPU holds some.


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Rig, Settings]]:
    asked = laps.Workload("tiny", experts=12, requests=200, budget_share=0.4, gap_seconds=0.0)
    with boxes.made_rig(asked, tmp_path_factory.mktemp("tiny"), lambda line: None) as made:
        yield made


@pytest.fixture(scope="module")
def rig(plain: tuple[Rig, Settings]) -> Rig:
    """The pretend runs what is compiled for the CPU, too."""
    made, _ = plain
    weights = sum(one.bytes for one in made.compiled.values())
    part = GpuPart((GPU, "cuda:1"), made.compiled, made.segment_path, weights + 2 * ROOM, open_pretend_gpu)
    return replace(made, gpus=part)


@pytest.fixture(scope="module")
def default(plain: tuple[Rig, Settings], rig: Rig) -> Settings:
    _, settings = plain
    assert rig.gpus is not None
    return replace(settings, cpu_executors=2, gpu_executors=1, gpu_weights_share=1 - 2 * ROOM / rig.gpus.memory_bytes)


CPU_SECONDS = 0.01


def numbers(rig: Rig, times_as_quick: float, gpu: OnGpu | None = None) -> Measured:
    """A picture takes ten milliseconds of the CPU, whatever the expert and the batch, and less of a GPU."""

    def of(kind: Kind, threads: int, seconds: float) -> list[Architecture]:
        samples = tuple(Latency(n, n * seconds) for n in (1, 2, 4))
        names = dict.fromkeys(one.architecture for one in rig.compiled.values())
        return [Architecture(name, kind, threads, samples, seconds, 0.0, 0.0, 0.0, 1) for name in names]

    on_cpu = [one for threads in rig.thread_counts for one in of("cpu", threads, CPU_SECONDS)]
    models = (*on_cpu, *of("cuda", 1, CPU_SECONDS / times_as_quick))
    loading = Loading({1: 1e9}, 0.0001)
    return Measured(models, loading, (), 1.0, {}, gpu or OnGpu(loading, Loading({1: 1e10}, 0.0001)))


def searched(rig: Rig, default: Settings, known: Measured) -> Settings:
    def judge(settings: Settings, share: float) -> Judged:
        return Judged(rig.predicted(settings, known, share).images_per_second) if rig.holds(settings) else NO_ROOM

    space = {name: knob.including(default.told()[name]) for name, knob in rig.space().items()}
    search = Search(space, default, judge, guesses=guesses(rig, default))
    search.run(lambda: search.trials < 40)
    return search.best()[0].settings


def rate(rig: Rig, settings: Settings, known: Measured) -> float:
    return rig.predicted(settings, known).images_per_second


def test_the_search_gives_the_work_to_gpus_that_are_ten_times_as_quick(rig: Rig, default: Settings) -> None:
    known = numbers(rig, times_as_quick=10.0)
    best = searched(rig, default, known)
    assert best.gpu_executors > 0
    assert rate(rig, best, known) > 5 * rate(rig, replace(best, gpu_executors=0, cpu_executors=2), known)
    assert rate(rig, best, known) > 8 / CPU_SECONDS


def test_the_search_gives_nothing_to_gpus_that_are_far_slower_than_the_cpu(rig: Rig, default: Settings) -> None:
    """Whether it has them stand idle or none at all."""
    known, slower = (numbers(rig, times_as_quick) for times_as_quick in (0.01, 0.001))
    best = searched(rig, default, known)
    assert rate(rig, best, known) == rate(rig, best, slower), "nothing ran there"
    assert rate(rig, best, known) == pytest.approx(rate(rig, replace(best, gpu_executors=0), known), rel=0.01)


def test_a_gpu_that_is_as_quick_as_the_cpu_works_beside_it(rig: Rig, default: Settings) -> None:
    known = numbers(rig, times_as_quick=1.0)
    both, alone = (replace(default, cpu_executors=1, gpu_executors=count) for count in (1, 0))
    assert rate(rig, both, known) > 1.7 * rate(rig, alone, known)


def test_runs_beside_each_other_take_what_was_measured(rig: Rig, default: Settings) -> None:
    beside = OnGpu(Loading(), Loading(), beside_cpu=2.0, beside_loads=1.5, cpu_beside=3.0)
    idle, cores = {"cpu": 0, GPU: 0, "cuda:1": 0}, 4
    taking = Taking(
        replace(rig, cores=cores), numbers(rig, times_as_quick=10.0, gpu=beside), replace(default, gpu_executors=2)
    )
    expert = next(iter(rig.compiled))

    def seconds(device: str, items: int, running: Mapping[str, int], loading: Mapping[str, int] = idle) -> float:
        batch = Batch(1, f"{device}-0", device, expert, tuple(map(str, range(items))))
        return taking(batch, {**idle, **running}, {**idle, **loading}) / CPU_SECONDS

    assert seconds("cpu", 3, {"cpu": 1}) == pytest.approx(3.0)
    assert seconds("cpu", 3, {"cpu": 4, GPU: 1}) == pytest.approx(9.0)
    assert seconds("cpu", 3, {"cpu": 2, GPU: 1}) == pytest.approx(6.0), "half of the cores are free for it"
    assert seconds(GPU, 4, {GPU: 1}) == pytest.approx(0.4)
    assert seconds(GPU, 3, {GPU: 1}) == pytest.approx(0.4), "three run as four"
    assert seconds(GPU, 4, {GPU: 1, "cpu": 4}) == seconds(GPU, 4, {GPU: 1, "cpu": 8}) == pytest.approx(0.8)
    assert seconds(GPU, 4, {GPU: 1, "cuda:1": 1}) == pytest.approx(0.5), "the other one takes one core of four"
    assert seconds(GPU, 4, {GPU: 1}, {GPU: 1}) == pytest.approx(0.6)
    assert seconds(GPU, 4, {GPU: 1}, {"cpu": 1, "cuda:1": 1}) == pytest.approx(0.4)


def test_host_memory_spares_the_disk_what_left_a_gpu(rig: Rig, default: Settings) -> None:
    """A picture every 20 ms, memory for a third of the experts on the GPU, and a disk that takes 0.14 s for each."""
    slow, quick = Loading({1: 1e7}, 0.0001), Loading({1: 1e10}, 0.0001)
    known = replace(numbers(rig, 10.0, OnGpu(slow, quick)), loading=slow)
    requests = tuple(replace(one, arrived_seconds=n * 0.02) for n, one in enumerate(rig.workload.requests))
    paced = replace(rig, workload=replace(rig.workload, requests=requests))
    without = replace(default, cpu_executors=1, gpu_weights_share=default.gpu_weights_share / 3)
    with_tier = replace(without, host_tier_share=0.5, weights_share=2 * without.weights_share)
    assert paced.weights_bytes(with_tier) == pytest.approx(paced.weights_bytes(without), abs=8)
    assert paced.predicted(with_tier, known).wait_p99_seconds < 0.6 * paced.predicted(without, known).wait_p99_seconds


@given(
    st.integers(0, 2), st.floats(0.0, 0.7), st.floats(0.5, 0.98), st.floats(0.3, 0.95), st.integers(1 << 20, 1 << 36)
)
def test_no_split_of_memory_gives_away_more_than_there_is(
    rig: Rig, gpus: int, tier: float, weights: float, gpu_weights: float, size: int
) -> None:
    assert rig.gpus is not None
    there = replace(rig, memory_bytes=size, gpus=replace(rig.gpus, memory_bytes=size))
    chosen = Settings(2, gpu_executors=gpus, host_tier_share=tier, weights_share=weights, gpu_weights_share=gpu_weights)
    pinned, twice = gpus * there.host_tier_bytes(chosen), 2 * there.activation_bytes(chosen)
    assert size - 4 <= pinned + there.weights_bytes(chosen) + twice <= size
    in_use = block_bytes(there.gpu_weights_bytes(chosen)) + 2 * there.gpu_activation_bytes(chosen)
    assert size - 4 <= in_use <= size
    *on_gpus, cpu = there.devices(chosen)
    assert [device.name for device in on_gpus] == [GPU, "cuda:1"][:gpus]
    assert (cpu.name, pinned > 0) == ("cpu", gpus > 0 and int(size * tier) >= gpus)


def test_a_box_without_gpus_has_nothing_to_choose_about_them(plain: tuple[Rig, Settings], rig: Rig) -> None:
    of_gpus = {"gpu_executors", "gpu_weights_share", "host_tier_share"}
    assert rig.space().keys() - plain[0].space().keys() == of_gpus
    assert rig.space()["gpu_executors"] == Knob(0, 2)
    assert rig.space()["cpu_executors"].low == 1, "somebody does what a GPU fails to do"


def test_a_gpu_serves_live_what_it_has_room_for(rig: Rig, default: Settings) -> None:
    opened, held = list[int](), Counter[str]()

    class Watched(DeviceWeights):
        def hold(self, segments: Sequence[Segment]) -> None:
            held["runs"] += 1
            super().hold(segments)

    def open_watched(
        device: Device,
        compiled: Mapping[str, Compiled],
        segment_path: Callable[[str], Path],
        report: Callable[[Event], None],
        *,
        host_bytes: int,
    ) -> Engine:
        opened.append(host_bytes)
        accelerator = PretendAccelerator()
        memory = Watched(segment_path, accelerator, device_bytes=device.budget_bytes, host_bytes=host_bytes)
        return Engine.on(device, compiled, memory, PretendPlace(), report)

    assert rig.gpus is not None
    watched = replace(rig, gpus=replace(rig.gpus, open=open_watched))
    known = numbers(rig, times_as_quick=10.0)
    chosen = replace(default, host_tier_share=0.2)
    outcome = watched.served(chosen, known, 0.5)
    assert outcome.images_per_second > 0
    assert opened == [watched.host_tier_bytes(chosen)]
    assert held["runs"] >= 5, "batches of a hundred pictures"
    watched.served(replace(chosen, gpu_executors=0), known, 0.5)
    assert len(opened) == 1


def test_a_gpu_that_cannot_be_opened_is_named_and_nothing_stays_on_the_others(rig: Rig, default: Settings) -> None:
    accelerator = PretendAccelerator()

    def only_the_first(
        device: Device,
        compiled: Mapping[str, Compiled],
        segment_path: Callable[[str], Path],
        report: Callable[[Event], None],
        *,
        host_bytes: int,
    ) -> Engine:
        if device.name != GPU:
            raise DeviceError(f"{device.name}: lost", "look")
        memory = DeviceWeights(segment_path, accelerator, device_bytes=device.budget_bytes, host_bytes=host_bytes)
        return Engine.on(device, compiled, memory, PretendPlace(), report)

    assert rig.gpus is not None
    lost = replace(rig, gpus=replace(rig.gpus, open=only_the_first))
    with pytest.raises(DeviceError, match="cuda:1: lost"):
        lost.served(replace(default, gpu_executors=2), numbers(rig, 10.0), 0.1)
    assert accelerator.is_empty


@pytest.mark.usefixtures("few_samples")
def test_the_profiler_measures_searches_and_serves_with_a_gpu_and_writes_what_it_found(
    rig: Rig, default: Settings, tmp_path: Path
) -> None:
    found = profiled(rig, default, Plan(14.0, tmp_path))
    assert found.is_complete
    assert found.laps
    written = boxes.profile_of(found, rig, "box1", "throughput", "graph", hardware())
    assert written.gpus.count == found.settings.gpu_executors
    assert written.gpus.running.keys() == {one.architecture for one in rig.compiled.values()}
    assert written.gpus.from_host is not None
    assert (written.gpus.weights_bytes is None) == (found.settings.gpu_executors == 0)
    settings = written.applied(Config())
    assert settings.executors.gpus == found.settings.gpu_executors
    if found.settings.gpu_executors:
        assert settings.memory.gpu_weights == rig.gpu_weights_bytes(found.settings)
        assert settings.memory.gpu_host_tier == rig.host_tier_bytes(found.settings)


def test_the_default_of_a_box_with_gpus_is_how_it_serves_without_a_profile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = [Gpu(0, "one", 8 << 30, 5 << 30, "1"), Gpu(1, "one", 8 << 30, 6 << 30, "1")]
    monkeypatch.setattr("appliance.startup.devices.gpus", lambda: there)
    monkeypatch.setattr("appliance.startup.cuda.usable_gpu", lambda index: None)
    paths = Paths(
        catalog=write_catalog(tmp_path / "catalog", 2), store=tmp_path / "store", profile=tmp_path / "profile.json"
    )
    profiles.save(profiles.DEFAULT, paths.profile)
    memory = Memory.model_validate({"weights": "100MB", "activations": "10MB", "gpu_host_tier": "50MB"})
    made = install(Config(paths=paths, memory=memory))
    rig = boxes.rig_of(made, workload.of_usage(made.catalog, 10, 0.5, 0.001))
    default = boxes.default_of(made)
    assert rig.holds(default)
    *gpus, cpu = made.devices
    *as_searched, cpu_as_searched = rig.devices(default)
    assert cpu_as_searched.budget_bytes == pytest.approx(cpu.budget_bytes, abs=8)
    assert cpu_as_searched.activation_bytes == pytest.approx(cpu.activation_bytes, abs=8)
    for one in as_searched:
        least = min(gpu.budget_bytes for gpu in gpus)
        assert least - (32 << 20) <= one.budget_bytes <= least, "what all of them have, in steps"
        assert one.activation_bytes == pytest.approx(gpus[0].activation_bytes, abs=8)
        assert one.batch_sizes == gpus[0].batch_sizes
    assert [one.name for one in as_searched] == [GPU, "cuda:1"]
    assert rig.host_tier_bytes(default) == pytest.approx(50_000_000, abs=8)
