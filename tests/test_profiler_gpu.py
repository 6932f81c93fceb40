"""The profiler on a box with GPUs: measured on a pretend one, searched in the simulator, served live on the pretend."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace

import pytest

from appliance.catalog import Bundle
from appliance.core import costs
from appliance.profiler import measure
from appliance.profiler.measure import LOADS, Gpu, Measured, OnGpu, errors, measured, plateau
from appliance.store.compile import compile_bundles
from appliance.store.store import Compiled, Store
from tests.kit_models import conv_net, write_bundle

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
    gpu: Gpu

    def measured(
        self, *, budget_seconds: float = 60.0, known: Measured | None = None, gpu: Gpu | None = None
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
            gpu=gpu or self.gpu,
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
    return Box(compiled, bundles, stores[0], Gpu(GPU, there, stores[1].segment_path, ROOM))


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
    assert found.on("cuda").keys() == {one.architecture for one in box.gpu.compiled.values()}
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


def test_what_was_measured_on_a_gpu_comes_back_from_json_as_it_was(found: Measured) -> None:
    assert Measured.from_json(json.loads(json.dumps(found.as_json()))) == found
    former = {name: value for name, value in found.as_json().items() if name != "gpu"}
    assert Measured.from_json(former).gpu is None, "and so does what was noted before GPUs were measured"


def test_what_is_known_of_a_gpu_is_not_measured_again(box: Box, found: Measured) -> None:
    again = box.measured(known=found)
    assert replace(again, seconds=found.seconds) == found


def test_a_gpu_that_cannot_do_it_is_named_and_the_cpu_is_measured(box: Box, found: Measured) -> None:
    """It has no room for anything."""
    tried = box.measured(gpu=replace(box.gpu, memory_bytes=1 << 10), known=replace(found, architectures=(), gpu=None))
    architectures = {one.architecture for one in box.gpu.compiled.values()}
    assert tried.failed.keys() == {*(f"{GPU} {name}" for name in architectures), f"{GPU} {LOADS}"}
    assert tried.on("cpu").keys() == found.on("cpu").keys()
    assert tried.on("cuda") == {}
    assert tried.gpu == OnGpu()
