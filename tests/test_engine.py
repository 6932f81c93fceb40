"""The controller, real sessions and real reads on a CPU and a pretend device at once, without any broker."""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pytest

from appliance.catalog import Bundle
from appliance.core.controller import Controller
from appliance.core.costs import Cost
from appliance.core.types import (
    Acknowledge,
    Arrived,
    Device,
    Event,
    Executor,
    Expert,
    Outcome,
    Publish,
    Quarantine,
    Reinstate,
    Request,
    Tick,
    Verdict,
)
from appliance.drivers.images import Views
from appliance.drivers.runtime import CpuPlace
from appliance.engine.device_weights import DeviceWeights
from appliance.engine.engine import Engine, Engines
from appliance.engine.weights import Weights
from appliance.errors import ApplianceError, DeviceError, OutOfMemory
from appliance.startup import footprint
from appliance.store.compile import compile_bundles
from appliance.store.store import Compiled, Store
from tests import kit_models as kit
from tests.kit import inspection_graph
from tests.kit_device import PretendAccelerator, PretendPlace

GPU, CPU = "pretend", "cpu"
NAMES = ("a", "b", "c", "detector")
WIDTH = 300
TIMEOUT = 60.0


class Line:
    """A box without a door: pictures are noise by request, verdicts come back."""

    def __init__(self, bundles: Mapping[str, Bundle], stores: Mapping[str, Store], places: int) -> None:
        self.accelerator = PretendAccelerator()
        self.compiled = {device: {n: found(store, b) for n, b in bundles.items()} for device, store in stores.items()}
        size = self.compiled[GPU]["a"].bytes
        devices = (
            Device(GPU, places * size, activation_bytes=16 << 20, batch_sizes=(1, 2, 4, 8)),
            Device(CPU, 2 * size, activation_bytes=16 << 20),
        )
        executors = (Executor("pretend-0", GPU), Executor("cpu-0", CPU))
        self.events: queue.Queue[Event] = queue.Queue()
        device_weights = DeviceWeights(
            stores[GPU].segment_path, self.accelerator, device_bytes=places * size, host_bytes=8 * size
        )
        weights = Weights(stores[CPU].segment_path)
        engines = {
            GPU: Engine.on(devices[0], self.compiled[GPU], device_weights, PretendPlace(), self.events.put),
            CPU: Engine.on(devices[1], self.compiled[CPU], weights, CpuPlace(), self.events.put),
        }
        self.engines = Engines(engines, executors, bundles, look, self.events.put)
        self.controller = Controller(inspection_graph(NAMES[:3]), self._experts(), devices, executors)
        self.quarantined: list[str] = []

    def answer(self, components: Sequence[str]) -> list[Verdict]:
        """The verdicts of so many pictures that all come at once."""
        verdicts: list[Verdict] = []
        for number, name in enumerate(components):
            verdicts += self._told(Arrived(Request(f"{number}", f"c-{name}", time.monotonic())))
        while len(verdicts) < len(components):
            verdicts += self._told(self._next_event())
        return verdicts

    def _next_event(self) -> Event:
        """What a device reports, or that it is time to decide anew."""
        now = time.monotonic()
        wakeup = self.controller.next_wakeup(now)
        try:
            return self.events.get(timeout=TIMEOUT if wakeup is None else min(max(wakeup - now, 0.0), TIMEOUT))
        except queue.Empty:
            assert wakeup is not None, "nobody reports anything, and nothing is due"
            return Tick()

    def _told(self, event: Event) -> list[Verdict]:
        verdicts = []
        for action in self.controller.handle(event, time.monotonic()):
            if isinstance(action, Publish):
                verdicts.append(action.verdict)
            elif isinstance(action, Quarantine):
                self.quarantined.append(action.expert)
            elif not isinstance(action, Acknowledge | Reinstate):
                self.engines.obey(action)
        return verdicts

    def _experts(self) -> dict[str, Expert]:
        costs = {GPU: Cost(0.0001, 0.0001, 0.001), CPU: Cost(0.01, 0.01, 0.01)}
        return {
            name: Expert(name, {d: footprint(compiled[name]) for d, compiled in self.compiled.items()}, costs, 4)
            for name in NAMES
        }


def found(store: Store, bundle: Bundle) -> Compiled:
    compiled = store.find(bundle)
    assert compiled is not None
    return compiled


def look(request: str) -> Views:
    return Views(np.random.default_rng(int(request)).integers(0, 256, (kit.SIDE, kit.SIDE, 3), np.uint8))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Mapping[str, Bundle], Mapping[str, Store]]:
    folder = tmp_path_factory.mktemp("engine")
    bundles = {n: kit.write_bundle(folder / "models", n, kit.conv_net(i, width=WIDTH)) for i, n in enumerate(NAMES)}
    stores = {GPU: Store(folder / "store", "cuda"), CPU: Store(folder / "store")}
    for store in stores.values():
        results = compile_bundles(store, list(bundles.values()), report=lambda name, result: None)
        assert [result for result in results.values() if not isinstance(result, Compiled)] == []
    return bundles, stores


@pytest.fixture
def line(made: tuple[Mapping[str, Bundle], Mapping[str, Store]]) -> Iterator[Line]:
    line = Line(*made, places=2)
    yield line
    line.engines.stop()


def test_a_device_and_the_cpu_serve_together_and_answer_the_same(line: Line) -> None:
    components = [NAMES[n * 7 % 3] for n in range(60)]
    verdicts = line.answer(components)
    again = {verdict.request: verdict for verdict in line.answer(components)}
    assert {step.executor for verdict in (*verdicts, *again.values()) for step in verdict.steps} >= {"pretend-0"}
    for verdict in verdicts:
        assert verdict.outcome in (Outcome.PASS, Outcome.FAIL)
        labels = [[finding.label for finding in step.findings] for step in verdict.steps]
        assert labels == [[f.label for f in step.findings] for step in again[verdict.request].steps]
    assert line.controller.counts["evictions"] > 0
    assert line.engines.memory(GPU).hits["host"] > 0, "what comes back does so without the disk"


@pytest.mark.parametrize("error", [OutOfMemory("pretend: full"), DeviceError("pretend: lost")])
def test_what_a_device_fails_to_do_the_cpu_does(line: Line, error: ApplianceError) -> None:
    for call in range(1, 100):
        line.accelerator.fail("copy_in", at=call, error=error)
    verdicts = line.answer(["a", "b", "a"])
    assert [v.outcome in (Outcome.PASS, Outcome.FAIL) for v in verdicts] == [True] * 3
    assert {step.executor for verdict in verdicts for step in verdict.steps} == {"cpu-0"}
    assert line.controller.counts["fallbacks"] > 0


def test_a_device_that_was_short_of_memory_for_a_moment_is_used_again(line: Line) -> None:
    line.accelerator.fail("copy_in", error=OutOfMemory("pretend: full"))
    verdicts = line.answer(["a"])
    assert verdicts[0].steps[0].executor == "pretend-0"
    assert line.controller.counts["out_of_memory"] == 1
    assert line.controller.counts["fallbacks"] == 0
