"""A box on which configurations are tried: its experts, its memory, what things take there, and a workload.

A configuration is either predicted, by the simulator and what was measured, or served live: real sessions, real reads,
the same controller.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from appliance.catalog import Bundle
from appliance.core.controller import ledgers_of
from appliance.core.costs import Cost, mixed
from appliance.core.graph import ExpertGraph
from appliance.core.policies import APPLIANCE, Policy, tuned
from appliance.core.slab import SLACK, block_bytes
from appliance.core.types import Batch, Device, Event, Executor, Expert, Footprint, Request
from appliance.engine import cuda
from appliance.engine.engine import Engine
from appliance.lab import live
from appliance.lab.contenders import Setup
from appliance.lab.laps import Lap, Pictures
from appliance.lab.simulate import HostTier, SharedDisk, World, simulate
from appliance.lab.telling import quantile
from appliance.profile import DEFAULT
from appliance.profiler.measure import GpuPart
from appliance.profiler.measurements import Architecture, Handover, Loading, Measured, OnGpu
from appliance.profiler.settings import Knob, Settings, Space
from appliance.profiler.workload import Workload
from appliance.startup import CPU, footprint, host_share
from appliance.store.store import Compiled

ACTIVATIONS_TWICE = 2
"""What running batches take is kept by the runtime once more for the next ones: the promise of `promise.py`."""
_ROOMY = 2
"""Times what runs at once. Two executors with batches of four (experts of 45 MB, 2026-11): with once as much 26 of 178
runs gave back, with twice as much four."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a configuration comes to on a workload, which took so many `seconds`, waiting for pictures included.

    `late_share` is of its boards: the parts of one picture together are one, and any other picture is one.
    """

    images_per_second: float
    wait_p99_seconds: float
    late_share: float
    loads: int
    seconds: float = 0.0

    def told(self) -> dict[str, Any]:
        return {
            "images_per_second": self.images_per_second,
            "wait_p99_seconds": self.wait_p99_seconds,
            "late_share": self.late_share,
            "loads": self.loads,
        }


@dataclass(frozen=True, slots=True)
class Watched:
    """What was seen while a configuration was served: how many times as long as expected its runs of so many batches
    took, and what passed after each batch of so many pictures until its executor had the next."""

    times_as_long: float
    handovers: Sequence[tuple[int, float]]
    batches: int


@dataclass(frozen=True, slots=True)
class Int8Part:
    """The experts of a box that have a sound int8 variant, in it."""

    compiled: Mapping[str, Compiled]
    bundles: Mapping[str, Bundle]


@dataclass(frozen=True, slots=True)
class Rig:
    """`compiled` are the experts as the CPU runs them in full precision, unless that is settled; as GPUs do, and in
    int8, they are in parts of their own.

    `memory_bytes` are of main memory, for weights, activations and what is pinned; `chances` how likely a request asks
    each expert. What is `settled` is not chosen, by the name of the setting, and says why. Who is `pinned` stays in
    memory. All is predicted and served by the `policy`, of which only the hold is chosen.
    """

    graph: ExpertGraph
    compiled: Mapping[str, Compiled]
    bundles: Mapping[str, Bundle]
    segment_path: Callable[[str], Path]
    chances: Mapping[str, float]
    pictures: Pictures
    memory_bytes: int
    cores: int
    workload: Workload
    gpus: GpuPart | None = None
    int8: Int8Part | None = None
    settled: Mapping[str, str] = field(default_factory=dict)
    pinned: tuple[str, ...] = ()
    policy: Policy = APPLIANCE

    def in_precision(self, settings: Settings) -> Rig:
        """The same box, with the experts as these settings have the CPU run them; none other is in it."""
        if not settings.int8 or self.int8 is None:
            return replace(self, int8=None)
        compiled = {**self.compiled, **self.int8.compiled}
        return replace(self, compiled=compiled, bundles={**self.bundles, **self.int8.bundles}, int8=None)

    def _as_run(self, settings: Settings, measured: Measured) -> tuple[Rig, Measured]:
        """The box and what counts on it, in the precision of these settings."""
        if self.int8 is None:
            return self, measured
        return self.in_precision(settings), measured.of(int8=bool(settings.int8))

    def patient(self) -> Rig:
        """The same box, where no picture is ever late."""
        requests = tuple(replace(request, deadline_seconds=None) for request in self.workload.requests)
        return replace(self, workload=replace(self.workload, requests=requests))

    @property
    def thread_counts(self) -> list[int]:
        """Of a run: one, twice as many each time, and all cores. Others are neither measured nor chosen."""
        powers = (1 << exponent for exponent in range(self.cores.bit_length()))
        return sorted({*powers, self.cores})

    def space(self) -> Space:
        """What may be chosen here."""
        largest = max(bundle.manifest.model.max_batch for bundle in self.bundles.values())
        threads = {"threads": Knob(1, self.cores)} if self.cores > 1 else {}
        space: Space = {
            # One at least: it does what a GPU fails to do, and whatever a GPU that is lost leaves.
            "cpu_executors": Knob(1, 2 * self.cores),
            **threads,
            "load_slots": Knob(1, 4),
            "batch_cap": Knob(1, largest, is_log=True),
            "weights_share": Knob(0.5, 0.98),
            **({} if self.policy.in_order else {"hold_share": Knob(0.0, 1.0)}),
            **({} if self.gpus is None else _gpu_space(self.gpus)),
            **({} if self.int8 is None else {"int8": Knob(0, 1)}),
        }
        return {name: knob for name, knob in space.items() if name not in self.settled}

    def compiled_on(self, device: str) -> Mapping[str, Compiled]:
        """The experts as this device runs them."""
        if device == CPU:
            return self.compiled
        assert self.gpus is not None
        return self.gpus.compiled

    def most_items(self, expert: str, settings: Settings) -> int:
        """In a batch."""
        return min(self.bundles[expert].manifest.model.max_batch, settings.batch_cap)

    def devices(self, settings: Settings) -> tuple[Device, ...]:
        slots = settings.load_slots
        cpu = Device(CPU, self.weights_bytes(settings), slots, self.activation_bytes(settings))
        weights, working = self.gpu_weights_bytes(settings), self.gpu_activation_bytes(settings)
        return (*(Device(name, weights, slots, working, cuda.BATCH_SIZES) for name in self._used(settings)), cpu)

    def host_tier_bytes(self, settings: Settings) -> int:
        """Main memory that is pinned for each GPU in use."""
        used = self._used(settings)
        return int(self.memory_bytes * settings.host_tier_share) // len(used) if used else 0

    def weights_bytes(self, settings: Settings) -> int:
        return int(self._main_bytes(settings) * settings.weights_share)

    def activation_bytes(self, settings: Settings) -> int:
        return (self._main_bytes(settings) - self.weights_bytes(settings)) // ACTIVATIONS_TWICE

    def gpu_weights_bytes(self, settings: Settings) -> int:
        """Of each GPU. They lie in a block with room for gaps."""
        return 0 if self.gpus is None else int(self.gpus.memory_bytes * settings.gpu_weights_share / (1 + SLACK))

    def gpu_activation_bytes(self, settings: Settings) -> int:
        if self.gpus is None:
            return 0
        return (self.gpus.memory_bytes - block_bytes(self.gpu_weights_bytes(settings))) // ACTIVATIONS_TWICE

    def _main_bytes(self, settings: Settings) -> int:
        """Main memory that is not pinned."""
        return self.memory_bytes - len(self._used(settings)) * self.host_tier_bytes(settings)

    def _used(self, settings: Settings) -> tuple[str, ...]:
        return () if self.gpus is None else self.gpus.names[: settings.gpu_executors]

    def with_room(self, settings: Settings) -> Settings:
        """The same with room for twice what its executors on the CPU may run at once: with less, what batches of other
        sizes left is given back again and again, which takes time that the simulator does not know."""
        knob = self.space().get("weights_share")
        if knob is None:
            return settings
        one = self.in_precision(settings).compiled.values()
        largest = max(footprint(each).activation_bytes(self.most_items(each.expert, settings)) for each in one)
        wanted = ACTIVATIONS_TWICE * _ROOMY * settings.cpu_executors * largest
        share = max(1 - wanted / self._main_bytes(settings), knob.low)
        return replace(settings, weights_share=min(share, settings.weights_share))

    def holds(self, settings: Settings) -> bool:
        """Whether every expert has room with one picture on the CPU and some have on the GPUs, and processors are not
        shared more than twice over."""
        *gpus, cpu = self.devices(settings)
        return (
            settings.threads in self.thread_counts
            and settings.cpu_executors * settings.threads <= 2 * self.cores
            and all(_has_room(cpu, footprint(one)) for one in self.in_precision(settings).compiled.values())
            and all(any(_has_room(gpu, footprint(o)) for o in self.compiled_on(gpu.name).values()) for gpu in gpus)
            and (not self.pinned or self.in_precision(settings).keeps_pinned(settings))
        )

    def keeps_pinned(self, settings: Settings) -> bool:
        """Whether those that are to stay have room beside each other, and every other one beside them."""
        devices = self.devices(settings)
        experts = {name: Expert(name, self._footprints(name, devices), {}, 1) for name in self.compiled}
        ledgers = ledgers_of(experts, devices, self.pinned).values()
        return all(any(name in ledger.pinned for ledger in ledgers) for name in self.pinned) and all(
            any(ledger.ever_fits(name) for ledger in ledgers) for name in experts
        )

    def _footprints(self, name: str, devices: Sequence[Device]) -> dict[str, Footprint]:
        """Of an expert, by device."""
        there = {device.name: self.compiled_on(device.name) for device in devices}
        return {device: footprint(compiled[name]) for device, compiled in there.items() if name in compiled}

    def predicted(self, settings: Settings, measured: Measured, share: float = 1.0) -> Outcome:
        """By the simulator. `holds` first."""
        rig, measured = self._as_run(settings, measured)
        return rig._simulated(settings, measured, share)

    def _simulated(self, settings: Settings, measured: Measured, share: float) -> Outcome:
        workload, policy = self.workload.played(share), tuned(self.policy, settings.hold_share)
        box = self._setup(settings, measured, policy)
        controller = box.controller(self.graph, policy)
        world = World(
            box.experts.values(),
            box.devices,
            workload.answer,
            disk=SharedDisk(bandwidth(measured.loading, settings.load_slots)),
            residents=box.residents,
            takes=Taking(self, measured, settings),
            tiers=_tiers(measured, box.devices, self.host_tier_bytes(settings)),
        )
        found = simulate(controller, world, workload.requests)
        late = {verdict.request for verdict in found.verdicts if not verdict.outcome.is_answer}
        return Outcome(
            found.images_per_second,
            quantile(found.waits_seconds, 0.99),
            late_boards(workload.requests, len(self.workload.requests), late),
            found.loads,
            found.seconds,
        )

    def served(self, settings: Settings, measured: Measured, share: float = 1.0) -> Outcome:
        """Live. Raises ApplianceError when a GPU cannot be opened, or a picture gets no answer."""
        rig, measured = self._as_run(settings, measured)
        lap = rig._lap(settings, measured, share)
        late = late_boards(self.workload.played(share).requests, len(self.workload.requests), set(lap.late_requests))
        return Outcome(lap.images_per_second, lap.wait_seconds(0.99), late, lap.loads, lap.seconds)

    def watched(self, settings: Settings, measured: Measured, share: float) -> Watched:
        """Live, on so much of the workload. Raises the same."""
        rig, measured = self._as_run(settings, measured)
        lap, taking = rig._lap(settings, measured, share), Taking(rig, measured, settings)
        expected = sum(taking.run_seconds(ran.batch, ran.running, ran.loading) for ran in lap.ran)
        took = sum(ran.seconds for ran in lap.ran)
        return Watched(took / expected if expected else 1.0, lap.handovers, len(lap.ran))

    def _lap(self, settings: Settings, measured: Measured, share: float) -> Lap:
        workload, policy = self.workload.played(share), tuned(self.policy, settings.hold_share)
        bundles = {name: _proven(bundle) for name, bundle in self.bundles.items()}
        stage = live.Stage(self.graph, bundles, workload.requests, workload.answer, self.pictures, settings.batch_cap)

        def opened(device: Device, report: Callable[[Event], None]) -> Engine:
            compiled = self.compiled_on(device.name)
            if device.name == CPU or self.gpus is None:
                return Engine.in_main_memory(device, compiled, self.segment_path, report, threads=settings.threads)
            host_bytes = self.host_tier_bytes(settings)
            return self.gpus.open(device, compiled, self.gpus.segment_path, report, host_bytes=host_bytes)

        try:
            return live.served(stage, policy, self._setup(settings, measured, policy), opened)
        finally:
            gc.collect()  # a lap's sessions keep a GPU's memory, which the next lap asks for, until they are gone

    def _setup(self, settings: Settings, measured: Measured, policy: Policy) -> Setup:
        devices = self.devices(settings)
        costs = {device.name: costs_of(self, device.name, measured, settings) for device in devices}
        experts = {
            name: Expert(
                name,
                self._footprints(name, devices),
                {device: known[name] for device, known in costs.items() if name in known},
                self.most_items(name, settings),
                self.chances.get(name, 0.0),
            )
            for name in self.compiled
        }
        executors = (
            *(Executor(f"{name}-0", name) for name in self._used(settings)),
            *(Executor(f"{CPU}-{number}", CPU) for number in range(settings.cpu_executors)),
        )
        residents = tuple(_residents(experts, devices, policy, self.pinned))
        return Setup(devices, executors, experts, residents, self.pinned)


def late_boards(requests: Sequence[Request], once: int, late: Set[str]) -> float:
    """So large a share of the boards is late, with any part of each. The workload is played again after `once`
    requests, with other boards."""
    boards = dict[tuple[int, str], bool]()
    for number, request in enumerate(requests):
        board = number // once, request.picture or request.id
        boards[board] = boards.get(board, False) or request.id in late
    return sum(boards.values()) / len(boards)


def _proven(bundle: Bundle) -> Bundle:
    """Without golden samples, by which a process proves each expert once: in a lap of seconds that would count."""
    return replace(bundle, manifest=bundle.manifest.model_copy(update={"golden": None}))


def _gpu_space(gpus: GpuPart) -> Space:
    """What may be chosen where there are GPUs, each with one executor."""
    return {
        "gpu_executors": Knob(0, len(gpus.names)),
        "gpu_weights_share": Knob(0.3, 0.95),
        "host_tier_share": Knob(0.0, 0.7),
    }


def _has_room(device: Device, wanted: Footprint) -> bool:
    assert device.activation_bytes is not None
    return wanted.weights_bytes <= device.budget_bytes and wanted.activation_bytes(1) <= device.activation_bytes


def _residents(
    experts: Mapping[str, Expert], devices: Sequence[Device], policy: Policy, pinned: Sequence[str]
) -> Iterator[tuple[str, str]]:
    """Who is in memory at the start: those who stay, then the most probable on the first device that has room, each
    once."""
    left = sorted(experts, key=lambda name: (name not in pinned, -experts[name].probability, name))
    for device in devices:
        prints = {name: experts[name].footprints.get(device.name) for name in left}
        sizes = [
            (name, one.weights_bytes) for name, one in prints.items() if one is not None and _has_room(device, one)
        ]
        placed = policy.place(sizes, {device.name: device.budget_bytes})
        here = {name for _, name in placed}
        left = [name for name in left if name not in here]
        yield from placed


def costs_of(rig: Rig, device: str, measured: Measured, settings: Settings) -> dict[str, Cost]:
    """By expert, on this device; what was not measured is as compiling found it, and as a profile guesses for a GPU."""
    known, compiled = _models(measured, device, settings), rig.compiled_on(device)
    near = 0.0 if device == CPU else host_share(compiled, rig.host_tier_bytes(settings))
    speed = 1.0 if device == CPU else DEFAULT.gpu_speed
    found = {}
    for name, one in compiled.items():
        load_seconds = _load_seconds(measured, device, one.bytes, near)
        if (model := known.get(one.architecture)) is not None:
            found[name] = Cost(*model.line(settings.batch_cap), load_seconds)
        else:
            found[name] = Cost(one.item_seconds / speed, one.fixed_seconds / speed, load_seconds)
    return found


def _models(measured: Measured, device: str, settings: Settings) -> dict[str, Architecture]:
    return measured.on("cpu", settings.threads) if device == CPU else measured.on("cuda")


def _load_seconds(measured: Measured, device: str, size: int, near: float) -> float:
    """From the disk, but so large a share of a GPU's loads from pinned memory."""
    far = measured.loading.seconds(size)
    if device == CPU or measured.gpu is None:
        return far
    if measured.gpu.from_disk.bytes_per_second:
        far = measured.gpu.from_disk.seconds(size)
    from_host = measured.gpu.from_host
    return mixed(far, from_host.seconds(size), near) if from_host.bytes_per_second else far


def bandwidth(loading: Loading, at_once: int) -> float:
    """Bytes per second of all loads together, with so many in flight."""
    return 1.0 / (loading.seconds(1, at_once) - loading.fixed_seconds)


def _tiers(measured: Measured, devices: Sequence[Device], tier_bytes: int) -> dict[str, HostTier]:
    """The pinned memory of each GPU, where it is known how quick it is."""
    if measured.gpu is None or not measured.gpu.from_host.bytes_per_second:
        return {}
    from_host = measured.gpu.from_host
    return {
        device.name: HostTier(tier_bytes, bandwidth(from_host, 1), from_host.fixed_seconds)
        for device in devices
        if device.name != CPU
    }


def _gpu_runs(running: Mapping[str, int]) -> int:
    return sum(count for device, count in running.items() if device != CPU)


class Taking:
    """How long a batch takes beside other runs and loads, and until its executor has the next one, as measured.

    Only one GPU was: to its runs, those of another one are like an executor of the CPU, for it prepares its pictures
    there.
    """

    def __init__(self, rig: Rig, measured: Measured, settings: Settings) -> None:
        self._rig, self._settings = rig, settings
        self._devices = {device.name: device for device in rig.devices(settings)}
        self._models = {name: _models(measured, name, settings) for name in self._devices}
        self._costs = {name: costs_of(rig, name, measured, settings) for name in self._devices}
        self._single = measured.on("cpu")
        self._contention = {one.threads: one for one in measured.contention}
        self._on_gpu = measured.gpu or OnGpu()
        self._handover = measured.handover or Handover()

    def __call__(self, batch: Batch, running: Mapping[str, int], loading: Mapping[str, int]) -> float:
        between = self._handover.seconds(len(batch.requests))
        busy = running[CPU] * self._settings.threads + _gpu_runs(running)
        # What passes between two batches is processor time, too: more threads than cores share these.
        return self.run_seconds(batch, running, loading) + between * max(busy / self._rig.cores, 1.0)

    def run_seconds(self, batch: Batch, running: Mapping[str, int], loading: Mapping[str, int]) -> float:
        """Of the batch alone."""
        gpus = _gpu_runs(running)
        busy = running[CPU] * self._settings.threads
        if batch.device == CPU:
            seconds = self._on_cpu(batch, running[CPU], loading[CPU])
            return seconds * self._slowed(self._on_gpu.cpu_beside if gpus else 1.0, busy)
        most = self._rig.most_items(batch.expert, self._settings)
        seconds = self._alone(batch, self._devices[batch.device].filled(len(batch.requests), most))
        seconds *= self._on_gpu.beside_loads if loading[batch.device] else 1.0
        return seconds * self._slowed(self._on_gpu.beside_cpu, busy + gpus - 1)

    def _slowed(self, times_as_long: float, busy: int) -> float:
        """By as large a part of what was measured with all cores at work as so many busy threads are of these."""
        return 1.0 + (times_as_long - 1.0) * min(busy / self._rig.cores, 1.0)

    def _alone(self, batch: Batch, count: int) -> float:
        model = self._models[batch.device].get(self._kind(batch))
        return (model or self._costs[batch.device][batch.expert]).run_seconds(count)

    def _kind(self, batch: Batch) -> str:
        return self._rig.compiled_on(batch.device)[batch.expert].architecture

    def _on_cpu(self, batch: Batch, runs: int, loads: int) -> float:
        count, cores = len(batch.requests), self._rig.cores
        seconds, single = self._alone(batch, count), self._single.get(self._kind(batch))
        if (beside := self._contention.get(self._settings.threads)) is not None:
            seconds *= beside.times_as_long(runs) * (beside.beside_loads if loads else 1.0)
        if single is None or (alone := self._contention.get(1)) is None:
            return seconds
        # However runs are cut into threads, the cores do no more per second than with a thread on each.
        return max(seconds, runs * single.run_seconds(count) * alone.times_as_long(cores) / cores)
