"""The child process that measures: `python -m appliance.profiler.measure_child`, a job's file in, medians out.

It has the engines that serve (`bench`): loader lanes and direct reads bring the weights, executor threads decode an
encoded picture, prepare it, run the architecture's session and read its findings. Only the controller is missing.

What is measured on a GPU was held by tests to a pretend device alone: **not run on a GPU** yet.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter

from appliance import sandbox
from appliance.core.slab import block_bytes, whole_pages
from appliance.core.types import Device
from appliance.drivers.runtime import CpuPlace
from appliance.engine import cuda
from appliance.engine.engine import Engine
from appliance.engine.weights import Weights
from appliance.errors import LoadError, OutOfMemory, RunError
from appliance.profiler.bench import Bench, Crew, Lane, Opening, size_of
from appliance.profiler.measure import AT_ONCE, REPEATS, GpuJob, GpuLoads, GpuRuns, Job, Loads, OpenGpu, Runs, ladder
from appliance.profiler.measurements import Latency, plateau
from appliance.startup import CPU
from appliance.store.store import Compiled

Key = TypeVar("Key", bound=Hashable)

_RUNS_SHARE, _BESIDE_RUNS_SHARE = 0.5, 0.75
"""Of an architecture's time: until when batches are measured alone, and until when beside other runs."""
_BINDS_SHARE = 0.1
"""Of the time for loads, for those that read nothing."""
_LEAST = 7
"""Samples without which nothing is steady."""
_STEADY = 0.01
"""Of the median: how far it may be off, by what its samples differ, when no more are wanted."""
_ROUND_SECONDS = 0.05
"""At least, of runs that are measured beside others: many short ones, for they begin one after the other."""
_SLOTS = 2
"""Loads in flight beside runs, as a service has them unless told otherwise."""
_LOADS = "loads"


def answer(request: dict[str, Any], open_gpu: OpenGpu = Engine.on_gpu) -> dict[str, Any]:
    """What `request["measure"]` names, `runs` or `loads`, of the job in the file `request["job"]`: on the GPU if it has
    one."""
    job = TypeAdapter(Job).validate_json(Path(request["job"]).read_bytes())
    if job.gpu is None:
        return asdict(measured_runs(job) if request["measure"] == "runs" else measured_loads(job))
    if request["measure"] == "runs":
        return asdict(measured_gpu_runs(job, job.gpu, open_gpu))
    return asdict(measured_gpu_loads(job, job.gpu, open_gpu))


def measured_runs(job: Job) -> Runs:
    """One architecture's batches: alone, beside others like them, and beside loads. Raises RunError or LoadError."""
    begun = time.monotonic()
    left = max(job.until - begun, 0.0)
    with closing(_bench(job)) as bench:
        sizes = ladder(_most(job))
        keys = [(f"{threads}", items) for items in sizes for threads in job.threads]
        alone, waited_share = _alone(bench, keys, begun + _RUNS_SHARE * left, job.repeats)
        crews = {int(crew.engine): crew for crew in _crews(alone)}

        def together(threads: int, executors: int) -> Callable[[], float]:
            crew = replace(crews[threads], executors=executors)
            return lambda: bench.together(crew)[crew.engine]

        beside_runs = sampled(
            lambda key: bench.times_as_long(together(*key), together(key[0], 1)),
            [(threads, executors) for executors in _others(job.executors) for threads in crews],
            until=begun + _BESIDE_RUNS_SHARE * left,
            most=job.repeats,
        )
        with _lane(job, _SLOTS) as lane:
            beside_loads = sampled(
                lambda threads: bench.times_as_long(
                    _beside(lane, together(threads, job.executors)), together(threads, job.executors)
                ),
                list(crews),
                until=begun + left,
                most=job.repeats,
            )
    return Runs(
        [(int(engine), items, seconds) for (engine, items), seconds in alone.items()],
        [(*key, ratio) for key, ratio in medians(beside_runs).items()],
        list(medians(beside_loads).items()),
        waited_share,
    )


def measured_loads(job: Job) -> Loads:
    """Loads of experts of one architecture at a time; of all where each has too few. Raises LoadError."""
    with _lane(job, max(AT_ONCE)) as lane:
        return Loads(_load_rows(lane, job.experts, job.until, job.repeats))


def measured_gpu_runs(job: Job, gpu: GpuJob, open_gpu: OpenGpu) -> GpuRuns:
    """One architecture's batches on a GPU: of the sizes that run there, alone, beside a CPU that is at work on all
    cores, and beside loads. Raises RunError, LoadError, OutOfMemory or DeviceError."""
    begun = time.monotonic()
    left = max(job.until - begun, 0.0)
    with closing(_gpu_bench(job, gpu, open_gpu)) as bench:
        most = _most(job)
        keys = [(gpu.device, items) for items in sorted({*(n for n in cuda.BATCH_SIZES if n < most), most})]
        alone, waited_share = _alone(bench, keys, begun + _RUNS_SHARE * left, job.repeats)
        (crew,) = _crews(alone)
        busy = Crew(CPU, job.executors, crew.items)
        busy = replace(busy, rounds=_rounds(bench.together(busy)[CPU]))
        found = sampled(
            lambda engine: bench.times_as_long(
                lambda: bench.together(crew, busy)[engine],
                lambda: bench.together(busy if engine == CPU else crew)[engine],
            ),
            [gpu.device, CPU],
            until=begun + _BESIDE_RUNS_SHARE * left,
            most=job.repeats,
        )
        with _gpu_lane(job, gpu, open_gpu, slots=_SLOTS) as lane:

            def alone_again() -> float:
                return bench.together(crew)[gpu.device]

            found |= sampled(
                lambda _: bench.times_as_long(_beside(lane, alone_again), alone_again),
                [_LOADS],
                until=begun + left,
                most=job.repeats,
            )
    beside = medians(found)
    latencies = [(items, seconds) for (_, items), seconds in alone.items()]
    return GpuRuns(latencies, beside.get(gpu.device), beside.get(_LOADS), beside.get(CPU), waited_share)


def measured_gpu_loads(job: Job, gpu: GpuJob, open_gpu: OpenGpu) -> GpuLoads:
    """Loads to a GPU, from the disk, and then from pinned memory that holds all. Raises the same."""
    half = (time.monotonic() + job.until) / 2
    with _gpu_lane(job, gpu, open_gpu, slots=max(AT_ONCE)) as lane:
        from_disk = _load_rows(lane, gpu.experts, half, job.repeats)
    pages = sum(whole_pages(segment.bytes) for segment in {s.id: s for e in gpu.experts for s in e.segments}.values())
    with _gpu_lane(job, gpu, open_gpu, slots=max(AT_ONCE), host_bytes=pages) as lane:
        lane.bring(gpu.experts)
        lane.let_go(gpu.experts)
        read = lane.hits["disk"]
        from_host = _load_rows(lane, gpu.experts, job.until, job.repeats)
        if lane.hits["disk"] != read:
            raise LoadError(f"the host memory of {gpu.device} does not keep what it has room for", "report this")
    return GpuLoads(from_disk, from_host)


def _load_rows(lane: Lane, all_experts: Sequence[Compiled], until: float, repeats: int) -> list[tuple[int, int, float]]:
    """How many were in flight, bytes of all, seconds until all were ready."""
    groups = _groups(all_experts)
    sets = [experts for at_once in AT_ONCE for experts in _sets(groups, at_once)]
    left = until - time.monotonic()

    def load(number: int) -> float:
        seconds = lane.bring(sets[number])
        lane.let_go(sets[number])
        return seconds

    def bind(number: int) -> float:
        """A load whose segments are in memory already."""
        experts = groups[number][:1]
        lane.bring(experts)
        lane.let_go(experts, segments=())
        seconds = lane.bring(experts)
        lane.let_go(experts)
        return seconds

    bound = medians(sampled(bind, range(len(groups)), until=until - (1 - _BINDS_SHARE) * left, most=repeats))
    loaded = medians(sampled(load, range(len(sets)), until=until, most=repeats))
    if not loaded:
        raise LoadError("there was no time to load anything", "allow more time")
    return [
        *((1, 0, seconds) for seconds in bound.values()),
        *((len(sets[number]), size_of(sets[number]), seconds) for number, seconds in loaded.items()),
    ]


def _beside(lane: Lane, run: Callable[[], float]) -> Callable[[], float]:
    """The run while the lane loads."""

    def beside() -> float:
        with lane.loading():
            return run()

    return beside


def sampled(
    measure: Callable[[Key], float],
    keys: Sequence[Key],
    *,
    until: float,
    clock: Callable[[], float] = time.monotonic,
    most: int = REPEATS,
) -> dict[Key, list[float]]:
    """Measure the keys by turns, to and fro, so that what slows the box down slows all alike.

    It ends when all are steady, with `most` samples of each, or before the first measurement after `until`; then keys
    that had no turn are lacking. The first of each settles memory and counts only where it is the only one.
    """
    found: dict[Key, list[float]] = {key: [] for key in keys}
    for turn in range(most + 1):
        for key in keys if turn % 2 == 0 else reversed(keys):
            if clock() >= until:
                return _settled(found)
            found[key].append(measure(key))
        if all(is_steady(values[1:]) for values in found.values()):
            break
    return _settled(found)


def is_steady(values: Sequence[float]) -> bool:
    """Whether more samples would hardly move their median."""
    if len(values) < _LEAST:
        return False
    low, middle, high = statistics.quantiles(values, n=4)
    return (high - low) / math.sqrt(len(values)) <= _STEADY * middle


def medians(found: Mapping[Key, Sequence[float]]) -> dict[Key, float]:
    return {key: statistics.median(values) for key, values in found.items()}


def waited_seconds() -> float:
    """How long threads of this process were ready to run while others had the processors; 0 where nobody counts."""
    total = 0
    for path in Path("/proc/self/task").glob("*/schedstat"):
        with suppress(OSError):  # a thread that has just ended
            total += int(path.read_text().split()[1])
    return total / 1e9


def _others(executors: int) -> tuple[int, ...]:
    """Numbers of executors that are more than one. All of them first: without time for the others it tells most."""
    return (executors, *ladder(executors)[1:-1]) if executors > 1 else ()


def _settled(found: Mapping[Key, Sequence[float]]) -> dict[Key, list[float]]:
    return {key: list(values[1:] or values) for key, values in found.items() if values}


def _most(job: Job) -> int:
    """Pictures in a batch."""
    return min(job.bundles[one.expert].manifest.model.max_batch for one in job.experts)


def _alone(
    bench: Bench, keys: Sequence[tuple[str, int]], until: float, repeats: int
) -> tuple[dict[tuple[str, int], float], float]:
    """Seconds by engine and pictures, and the share of the time for which these runs waited for a processor."""
    waited, begun = waited_seconds(), time.monotonic()
    found = medians(sampled(lambda key: bench.seconds(*key), keys, until=until, most=repeats))
    if not found:
        raise RunError("there was no time to run anything", "allow more time")
    return found, (waited_seconds() - waited) / (time.monotonic() - begun)


def _crews(alone: Mapping[tuple[str, int], float]) -> list[Crew]:
    """By engine, what is measured beside others: batches of the plateau's size, and so many one after the other."""
    crews = []
    for engine in dict.fromkeys(engine for engine, _ in alone):
        best = plateau([Latency(items, seconds) for (of, items), seconds in alone.items() if of == engine])
        crews.append(Crew(engine, 1, best, _rounds(alone[engine, best])))
    return crews


def _rounds(seconds: float) -> int:
    return math.ceil(_ROUND_SECONDS / seconds)


def _groups(experts: Sequence[Compiled]) -> list[list[Compiled]]:
    """By architecture."""
    groups = dict[str, list[Compiled]]()
    for one in experts:
        groups.setdefault(one.architecture, []).append(one)
    return list(groups.values())


def _sets(groups: Sequence[Sequence[Compiled]], size: int) -> list[Sequence[Compiled]]:
    """Experts to load together: no two sets have one in common, so that all are read in turn."""
    everybody = [one for group in groups for one in group]
    fitting = [group for group in groups if len(group) >= size] or [everybody]
    return [group[at : at + size] for group in fitting for at in range(0, len(group) - size + 1, size)]


def _bench(job: Job) -> Bench:
    """Of the CPU: one copy of the weights, and an engine for each number of threads."""
    memory = Weights(job.paths.__getitem__, budget_bytes=size_of(job.experts))

    def opening(threads: int) -> Opening:
        device = Device(f"{threads}", size_of(job.experts), 1, job.activation_bytes)
        return lambda tell: Engine.on(device, _by_name(job.experts), memory, CpuPlace(threads), tell)

    engines = {f"{threads}": opening(threads) for threads in job.threads}
    return Bench(
        engines, dict.fromkeys(engines, job.experts), job.bundles, dict.fromkeys(engines, job.executors), job.pictures
    )


def _gpu_bench(job: Job, gpu: GpuJob, open_gpu: OpenGpu) -> Bench:
    """Of a GPU with its one executor, beside the CPU with one for each core."""
    device = Device(CPU, size_of(job.experts), 1, job.activation_bytes)
    engines: dict[str, Opening] = {
        gpu.device: _on_gpu(job, gpu, open_gpu, slots=1, host_bytes=0),
        CPU: lambda tell: Engine.in_main_memory(device, _by_name(job.experts), job.paths.__getitem__, tell),
    }
    experts = {gpu.device: gpu.experts, CPU: job.experts}
    return Bench(engines, experts, job.bundles, {gpu.device: 1, CPU: job.executors}, job.pictures)


def _lane(job: Job, slots: int) -> Lane:
    device = Device(_LOADS, size_of(job.experts), slots, activation_bytes=0)
    return Lane(
        job.experts,
        lambda tell: Engine.in_main_memory(device, _by_name(job.experts), job.paths.__getitem__, tell),
    )


def _gpu_lane(job: Job, gpu: GpuJob, open_gpu: OpenGpu, *, slots: int, host_bytes: int = 0) -> Lane:
    return Lane(gpu.experts, _on_gpu(job, gpu, open_gpu, slots=slots, host_bytes=host_bytes))


def _on_gpu(job: Job, gpu: GpuJob, open_gpu: OpenGpu, *, slots: int, host_bytes: int) -> Opening:
    """An engine beside which there is room for another: what they leave is for activations, running and kept.

    Raises OutOfMemory where that is nothing.
    """
    size = size_of(gpu.experts)
    working = (gpu.memory_bytes - 2 * block_bytes(size)) // (2 * 2)
    if working <= 0:
        raise OutOfMemory(f"{gpu.device} has {gpu.memory_bytes} bytes, and {size} are wanted twice", "free some")
    device = Device(gpu.device, size, slots, working, cuda.BATCH_SIZES)
    return lambda tell: open_gpu(device, _by_name(gpu.experts), job.paths.__getitem__, tell, host_bytes=host_bytes)


def _by_name(experts: Sequence[Compiled]) -> dict[str, Compiled]:
    return {one.expert: one for one in experts}


if __name__ == "__main__":
    sandbox.serve(answer)
