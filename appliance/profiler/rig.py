"""A box on which configurations are tried: its experts, its memory, what things take there, and a workload.

A configuration is either predicted, by the simulator and what was measured, or served live: real sessions, real reads,
the same controller.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from appliance.catalog import Bundle
from appliance.core.controller import Controller
from appliance.core.costs import Cost
from appliance.core.graph import ExpertGraph
from appliance.core.policies import APPLIANCE, Policy
from appliance.core.types import Batch, Device, Executor, Expert
from appliance.lab import live
from appliance.lab.contenders import Setup
from appliance.lab.laps import Pictures
from appliance.lab.simulate import SharedDisk, Takes, World, simulate
from appliance.lab.telling import quantile
from appliance.profiler.measure import Loading, Measured
from appliance.profiler.settings import Knob, Settings, Space
from appliance.profiler.workload import Workload
from appliance.startup import CPU, footprint
from appliance.store.store import Compiled

ACTIVATIONS_TWICE = 2
"""What running batches take is kept by the runtime once more for the next ones: the promise of `promise.py`."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a configuration comes to on a workload. `late_share` is of the pictures that have a deadline."""

    images_per_second: float
    wait_p99_seconds: float
    late_share: float
    loads: int

    def told(self) -> dict[str, Any]:
        return {
            "images_per_second": self.images_per_second,
            "wait_p99_seconds": self.wait_p99_seconds,
            "late_share": self.late_share,
            "loads": self.loads,
        }


@dataclass(frozen=True, slots=True)
class Rig:
    """`memory_bytes` are for weights and activations together; `chances` how likely a request asks each expert."""

    graph: ExpertGraph
    compiled: Mapping[str, Compiled]
    bundles: Mapping[str, Bundle]
    segment_path: Callable[[str], Path]
    chances: Mapping[str, float]
    pictures: Pictures
    memory_bytes: int
    cores: int
    workload: Workload

    @property
    def thread_counts(self) -> list[int]:
        """Of a run: one, twice as many each time, and all cores. Others are neither measured nor chosen."""
        powers = (1 << exponent for exponent in range(self.cores.bit_length()))
        return sorted({*powers, self.cores})

    def space(self) -> Space:
        """What may be chosen here."""
        largest = max(bundle.manifest.model.max_batch for bundle in self.bundles.values())
        threads = {"threads": Knob(1, self.cores)} if self.cores > 1 else {}
        return {
            "cpu_executors": Knob(1, 2 * self.cores),
            **threads,
            "load_slots": Knob(1, 4),
            "batch_cap": Knob(1, largest, is_log=True),
            "weights_share": Knob(0.5, 0.98),
            "hold_share": Knob(0.0, 1.0),
        }

    def activation_bytes(self, settings: Settings) -> int:
        return (self.memory_bytes - self.weights_bytes(settings)) // ACTIVATIONS_TWICE

    def weights_bytes(self, settings: Settings) -> int:
        return int(self.memory_bytes * settings.weights_share)

    def holds(self, settings: Settings) -> bool:
        """Whether every expert has room with one picture, and processors are not shared more than twice over."""
        prints = [footprint(one) for one in self.compiled.values()]
        return (
            settings.threads in self.thread_counts
            and settings.cpu_executors * settings.threads <= 2 * self.cores
            and max(one.weights_bytes for one in prints) <= self.weights_bytes(settings)
            and max(one.activation_bytes(1) for one in prints) <= self.activation_bytes(settings)
        )

    def predicted(self, settings: Settings, measured: Measured, share: float = 1.0) -> Outcome:
        """By the simulator. `holds` first."""
        workload, policy = self.workload.beginning(share), policy_of(settings)
        box = self._setup(settings, measured, policy)
        controller = Controller(
            self.graph, box.experts, box.devices, box.executors, policy=policy, residents=box.residents
        )
        world = World(
            box.experts.values(),
            box.devices,
            workload.answer,
            disk=SharedDisk(bandwidth(measured.loading, settings.load_slots)),
            residents=box.residents,
            takes=_taking(self.compiled, measured, settings, self.cores),
        )
        found = simulate(controller, world, workload.requests)
        late = sum(not verdict.outcome.is_answer for verdict in found.verdicts)
        return Outcome(
            found.images_per_second,
            quantile(found.waits_seconds, 0.99),
            late / len(found.verdicts),
            found.loads,
        )

    def served(self, settings: Settings, measured: Measured, share: float = 1.0) -> Outcome:
        """Live. Raises ApplianceError when a picture gets no answer."""
        workload, policy = self.workload.beginning(share), policy_of(settings)
        stage = live.Stage(
            self.graph,
            self.bundles,
            self.segment_path,
            workload.requests,
            workload.answer,
            self.pictures,
            settings.batch_cap,
            settings.threads,
        )
        lap = live.served(stage, policy, self._setup(settings, measured, policy), self.compiled)
        return Outcome(lap.images_per_second, lap.wait_seconds(0.99), lap.late / len(lap.waits_seconds), lap.loads)

    def _setup(self, settings: Settings, measured: Measured, policy: Policy) -> Setup:
        device = Device(CPU, self.weights_bytes(settings), settings.load_slots, self.activation_bytes(settings))
        costs = costs_of(self.compiled, measured, settings)
        experts = {
            name: Expert(
                name,
                {CPU: footprint(one)},
                {CPU: costs[name]},
                min(self.bundles[name].manifest.model.max_batch, settings.batch_cap),
                self.chances.get(name, 0.0),
            )
            for name, one in self.compiled.items()
        }
        ranked = sorted(experts, key=lambda name: (-experts[name].probability, name))
        sizes = [(name, experts[name].footprints[CPU].weights_bytes) for name in ranked]
        executors = tuple(Executor(f"{CPU}-{number}", CPU) for number in range(settings.cpu_executors))
        return Setup((device,), executors, experts, tuple(policy.place(sizes, {CPU: device.budget_bytes})))


def policy_of(settings: Settings) -> Policy:
    return replace(APPLIANCE, hold_share=settings.hold_share)


def costs_of(compiled: Mapping[str, Compiled], measured: Measured, settings: Settings) -> dict[str, Cost]:
    """By expert; what was not measured is as compiling found it."""
    known = {one.architecture: one for one in measured.architectures if one.threads == settings.threads}
    loading = measured.loading
    found = {}
    for name, one in compiled.items():
        load_seconds = loading.seconds(one.bytes)
        if (model := known.get(one.architecture)) is not None:
            found[name] = Cost(*model.line(settings.batch_cap), load_seconds)
        else:
            found[name] = Cost(one.item_seconds, one.fixed_seconds, load_seconds)
    return found


def bandwidth(loading: Loading, at_once: int) -> float:
    """Bytes per second of all loads together, with so many in flight."""
    return 1.0 / (loading.seconds(1, at_once) - loading.fixed_seconds)


def _taking(compiled: Mapping[str, Compiled], measured: Measured, settings: Settings, cores: int) -> Takes:
    """How long a batch takes beside so many others, and so many loads, as measured."""
    models = {(one.architecture, one.threads): one for one in measured.architectures}
    contention = {one.threads: one for one in measured.contention}
    costs = costs_of(compiled, measured, settings)

    def takes(batch: Batch, running: Mapping[str, int], loading: Mapping[str, int]) -> float:
        runs, loads = running[CPU], loading[CPU]
        count, kind = len(batch.requests), compiled[batch.expert].architecture
        model, single = models.get((kind, settings.threads)), models.get((kind, 1))
        seconds = costs[batch.expert].run_seconds(count) if model is None else model.run_seconds(count)
        if (beside := contention.get(settings.threads)) is not None:
            seconds *= beside.times_as_long(runs) * (beside.beside_loads if loads else 1.0)
        if single is None or (alone := contention.get(1)) is None:
            return seconds
        # However runs are cut into threads, the cores do no more per second than with a thread on each.
        return max(seconds, runs * single.run_seconds(count) * alone.times_as_long(cores) / cores)

    return takes
