"""What this box's devices and disk take for its experts: batches of every size, loads, and both beside each other.

Each architecture is measured once, whatever the number of its experts, in a child process of its own: a crash or a
leak ends with it and is told by the architecture's name, and the others are measured. The child runs what serving
runs (`measure_child`) and answers with medians; here they become the numbers of the latency model.

Of several GPUs the first is measured, for all: its batches of the sizes that run there, its loads from the disk and
from pinned host memory, and what its runs and the CPU's take beside each other. **Not run on a GPU** yet: tests measure
a pretend one, by the same seams.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event as Signal
from threading import Timer
from types import MappingProxyType
from typing import Any, Protocol, TypeVar

from pydantic import Base64Bytes, TypeAdapter

from appliance.catalog import Bundle
from appliance.core import costs
from appliance.core.types import Device, Event
from appliance.drivers import devices
from appliance.engine.engine import Engine
from appliance.errors import ApplianceError, ModelError
from appliance.lab.laps import Pictures, encoded_pictures
from appliance.lab.telling import Say
from appliance.profile import Kind
from appliance.profiler.measurements import (
    Architecture,
    Contention,
    Latency,
    Loading,
    Measured,
    OnGpu,
    errors,
    loads_fit,
    plateau,
)
from appliance.sandbox import Child
from appliance.store.store import Compiled

LOADS = "loads"
"""In `failed`, where loads could not be measured."""
AT_ONCE = (1, 2, 4)
"""Loads in flight."""
REPEATS = 25
"""Of each measurement at most, where the time allows it."""
BUSY_SHARE = 0.2
"""Runs by as many threads as there are cores wait for each other, too: 0.05 to 0.1 of their time on a quiet box. With
0.8 to 1.0, when others wanted each core twice over, K came out 2 to 4 times too high (14 MB, two cores, 2026-11)."""
_CHILD = "appliance.profiler.measure_child"
_LOADS_SHARE = 0.15
"""Of the time, for loads by themselves."""
_GPU_SHARE = 0.5
"""Of the time, where there is one."""
_GPU_ADDRESS_BYTES = 1 << 47
"""For a child with a GPU: CUDA reserves addresses for all memory that any device might ever have."""
_EXPERTS = 4
"""Of an architecture, at most: enough for as many loads in flight, and for runs that share no weights in caches."""
_MEMORY_SHARE = 0.75
"""Of the box's, for a child: nobody is served meanwhile, and more would be a leak."""
_ACTIVATIONS_SHARE = 0.5
"""Of the child's, for what the runtime keeps of past runs: enough that a run finds its memory in place. Where sizes by
turns did not fit, each run of a 14 MB network took 1,700 page faults per picture, and up to half as long again
(1.31.1, 2026-11)."""
_PATIENCE_SECONDS = 20.0
"""For a child whose time is over to end the run that it is in."""


@dataclass(frozen=True, slots=True)
class Job:
    """What a child shall measure. `paths` are the segments' files; `until` is a time of the monotonic clock, which
    is the same in all processes."""

    experts: tuple[Compiled, ...]
    bundles: Mapping[str, Bundle]
    paths: Mapping[str, Path]
    threads: tuple[int, ...]
    executors: int
    repeats: int
    activation_bytes: int
    until: float
    pictures: tuple[Base64Bytes, ...]
    gpu: GpuJob | None = None


@dataclass(frozen=True, slots=True)
class GpuJob:
    """The GPU on which to measure, the job's experts as compiled for it, and its bytes for weights and activations."""

    device: str
    experts: tuple[Compiled, ...]
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Runs:
    """A child's answer about one architecture: medians as rows of numbers."""

    latencies: Sequence[tuple[int, int, float]] = ()
    """Threads, pictures, seconds."""
    beside_runs: Sequence[tuple[int, int, float]] = ()
    """Threads, executors at work, times as long."""
    beside_loads: Sequence[tuple[int, float]] = ()
    """Threads, times as long."""
    waited_share: float = 0.0
    """Of the time in which runs were alone."""


@dataclass(frozen=True, slots=True)
class Loads:
    """A child's answer about loads: how many were in flight, bytes of all, seconds until all were ready."""

    rows: Sequence[tuple[int, int, float]] = ()


@dataclass(frozen=True, slots=True)
class GpuRuns:
    """A child's answer about one architecture on a GPU: (pictures, seconds), and times as long (see OnGpu)."""

    latencies: Sequence[tuple[int, float]] = ()
    beside_cpu: float | None = None
    beside_loads: float | None = None
    cpu_beside: float | None = None
    waited_share: float = 0.0


@dataclass(frozen=True, slots=True)
class GpuLoads:
    """A child's answer about a GPU's loads by tier, in rows like those of Loads."""

    from_disk: Sequence[tuple[int, int, float]] = ()
    from_host: Sequence[tuple[int, int, float]] = ()


Answer = TypeVar("Answer", Runs, GpuRuns)


class OpenGpu(Protocol):
    """Makes the engine of a GPU: `Engine.on_gpu`, and what tests pretend."""

    def __call__(
        self,
        device: Device,
        compiled: Mapping[str, Compiled],
        segment_path: Callable[[str], Path],
        report: Callable[[Event], None],
        *,
        host_bytes: int,
    ) -> Engine: ...


@dataclass(frozen=True, slots=True)
class GpuPart:
    """The GPUs of a box by their names, each taken to be like the first, which is measured; and their experts.

    `memory_bytes` are those of one, for weights, with gaps, and for activations, running and kept.
    """

    names: tuple[str, ...]
    compiled: Mapping[str, Compiled]
    segment_path: Callable[[str], Path]
    memory_bytes: int
    open: OpenGpu = Engine.on_gpu


def measured(
    compiled: Mapping[str, Compiled],
    bundles: Mapping[str, Bundle],
    segment_path: Callable[[str], Path],
    *,
    threads: Sequence[int],
    executors: int,
    budget_seconds: float,
    repeats: int = REPEATS,
    say: Say = lambda line: None,
    known: Measured | None = None,
    memory_bytes: int | None = None,
    pictures: Pictures | None = None,
    gpus: GpuPart | None = None,
    runs: Mapping[str, Runs] = MappingProxyType({}),
    gpu_runs: Mapping[str, GpuRuns] = MappingProxyType({}),
    keep: Callable[[str, Runs | GpuRuns], None] = lambda architecture, found: None,
) -> Measured:
    """Measure every architecture that `known` lacks, by each number of `threads` and up to so many executors; and on
    the first of the `gpus`, if there are any.

    Within the budget, but for one run or a child's start: less time means fewer repeats, and what had no turn at all is
    lacking, or in `failed`. What is `known` is kept as it is. A child may have `memory_bytes` of address space. It
    runs on these encoded `pictures`, or on made ones.

    `keep` hears of each architecture when it is measured. Who was interrupted gives back what it heard as `runs` and
    `gpu_runs`: these are not measured again, and the others have the time that they would have had.
    """
    begun, whole_seconds = time.monotonic(), budget_seconds
    budget_seconds *= 1.0 if gpus is None else 1 - _GPU_SHARE
    most_bytes, shown = memory_bytes or _memory_bytes(), tuple(pictures or encoded_pictures())
    asked = _Asked(bundles, segment_path, tuple(threads), executors, repeats, most_bytes, shown)
    known = known or Measured((), Loading(), (), 0.0, {})
    groups = _new_groups(compiled, known, "cpu", threads)
    loading, loads_share = known.loading, 0.0 if known.loading.bytes_per_second else _LOADS_SHARE
    runs_seconds = _left_of((1 - loads_share) * budget_seconds, groups, runs)
    until = begun + runs_seconds
    answers, failed = _answers(asked.runs, groups, until, say, had=runs, keep=keep)
    until += loads_share * budget_seconds
    if loads_share:
        say("loading")
        try:
            loading = loads_fit(asked.loads(_spread(groups, failed), until).rows)
        except ApplianceError as error:
            failed[LOADS] = str(error)
    fresh = [one for architecture, said in answers.items() for one in _architectures(groups[architecture][0], said)]
    on_gpu = known.gpu
    if gpus is not None:
        until += whole_seconds - budget_seconds
        found, more, failed_there = _on_gpu(asked, compiled, gpus, known, until, say, gpu_runs, keep)
        on_gpu, fresh, failed = found, [*fresh, *more], failed | failed_there
    again = {(one.architecture, one.device, one.threads) for one in fresh}
    kept = (one for one in known.architectures if (one.architecture, one.device, one.threads) not in again)
    return Measured(
        (*kept, *fresh),
        loading,
        _contentions(known, list(answers.values()), threads),
        known.seconds + time.monotonic() - begun,
        failed,
        on_gpu,
    )


def ladder(most: int) -> tuple[int, ...]:
    """1, 2, 3, 4, 6, 8, 12, 16, … and the last step itself: each a third or a half above the one before."""
    steps = {size for power in range(most.bit_length()) for size in (1 << power, 3 << power) if size <= most}
    return tuple(sorted(steps | {most}))


@dataclass(frozen=True, slots=True)
class _Asked:
    """Asks children."""

    bundles: Mapping[str, Bundle]
    segment_path: Callable[[str], Path]
    threads: tuple[int, ...]
    executors: int
    repeats: int
    memory_bytes: int
    pictures: tuple[bytes, ...]

    def runs(self, experts: Sequence[Compiled], until: float) -> Runs:
        """Raises ApplianceError when the child died, was given up, or says what failed."""
        return TypeAdapter(Runs).validate_python(self._answer("runs", experts, until))

    def loads(self, experts: Sequence[Compiled], until: float) -> Loads:
        """Raises the same."""
        return TypeAdapter(Loads).validate_python(self._answer("loads", experts, until))

    def gpu_runs(self, gpus: GpuPart, experts: Sequence[Compiled], until: float) -> GpuRuns:
        """Of these experts as the CPU runs them, and the GPU beside it. Raises the same."""
        return TypeAdapter(GpuRuns).validate_python(self._answer("runs", experts, until, gpus))

    def gpu_loads(self, gpus: GpuPart, experts: Sequence[Compiled], until: float) -> GpuLoads:
        """Raises the same."""
        return TypeAdapter(GpuLoads).validate_python(self._answer("loads", experts, until, gpus))

    def _answer(
        self, measure: str, experts: Sequence[Compiled], until: float, gpus: GpuPart | None = None
    ) -> dict[str, Any]:
        if until <= time.monotonic():
            raise ApplianceError("there was no time to measure it", "allow more time")
        paths = {segment.id: self.segment_path(segment.id) for one in experts for segment in one.segments}
        bundles = {one.expert: self.bundles[one.expert] for one in experts}
        working = int(_ACTIVATIONS_SHARE * self.memory_bytes)
        job = Job(
            tuple(experts), bundles, paths, self.threads, self.executors, self.repeats, working, until, self.pictures
        )
        limit_bytes = self.memory_bytes
        if gpus is not None:
            there = tuple(gpus.compiled[one.expert] for one in experts)
            paths |= {segment.id: gpus.segment_path(segment.id) for one in there for segment in one.segments}
            job = replace(job, paths=paths, gpu=GpuJob(gpus.names[0], there, gpus.memory_bytes))
            limit_bytes = _GPU_ADDRESS_BYTES
        # By a file: the hundreds of tensors of a large network do not fit a request.
        with tempfile.NamedTemporaryFile(prefix="measure-", suffix=".json") as file:
            file.write(TypeAdapter(Job).dump_json(job, by_alias=True))
            file.flush()
            left = max(until - time.monotonic(), 0.0) + _PATIENCE_SECONDS
            with Child(_CHILD, memory_bytes=limit_bytes) as child, _given_up(child, left) as has_been:
                try:
                    # As processor time, which several threads take at once; the clock's is watched beside it.
                    return child.ask({"measure": measure, "job": file.name}, seconds=left * (devices.cores() + 1))
                except ModelError as error:
                    if has_been.is_set():
                        raise ModelError(f"it took longer than {left:.0f} s", "look for what hangs") from error
                    raise


@contextmanager
def _given_up(child: Child, seconds: float) -> Iterator[Signal]:
    """Within, the child is killed after so many seconds, and the event says that it was."""
    has_been = Signal()

    def give_up() -> None:
        has_been.set()
        child.kill()

    timer = Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield has_been
    finally:
        timer.cancel()


def _memory_bytes() -> int:
    return int(_MEMORY_SHARE * devices.memory_bytes())


def _answers(
    runs: Callable[[Sequence[Compiled], float], Answer],
    groups: Mapping[str, Sequence[Compiled]],
    until: float,
    say: Say,
    where: str = "",
    *,
    had: Mapping[str, Answer],
    keep: Callable[[str, Answer], None],
) -> tuple[dict[str, Answer], dict[str, str]]:
    """What each architecture's child says, and why by architecture where none does. They share the time alike."""
    answers = {architecture: had[architecture] for architecture in groups if architecture in had}
    failed = dict[str, str]()
    for number, architecture in enumerate((one for one in groups if one not in had), len(answers)):
        experts = groups[architecture]
        name = experts[0].expert
        say(f"running {name}{where}, {number + 1} of {len(groups)} architectures")
        now = time.monotonic()
        try:
            found = answers[architecture] = runs(experts, now + (until - now) / (len(groups) - number))
            if found.waited_share > BUSY_SHARE:
                say(f"something else is at work: {name} waited {found.waited_share:.2f} s of each for a processor")
            keep(architecture, found)
        except ApplianceError as error:
            failed[architecture] = f"{name}: {error}"
            say(f"{name}{where} cannot be measured: {error}")
    return answers, failed


def _left_of(seconds: float, groups: Mapping[str, object], had: Mapping[str, object]) -> float:
    """For those that are not had yet, each as much as without these."""
    return seconds * (1 - sum(one in had for one in groups) / max(len(groups), 1))


def _on_gpu(
    asked: _Asked,
    compiled: Mapping[str, Compiled],
    gpus: GpuPart,
    known: Measured,
    until: float,
    say: Say,
    had: Mapping[str, GpuRuns],
    keep: Callable[[str, GpuRuns], None],
) -> tuple[OnGpu, list[Architecture], dict[str, str]]:
    """Loads and contention, new architectures, and what failed."""
    groups, found = _new_groups(gpus.compiled, known, "cuda", (1,)), known.gpu or OnGpu()
    name = gpus.names[0]
    where, now = f" on {name}", time.monotonic()
    loads_share = 0.0 if found.from_host.bytes_per_second else _LOADS_SHARE

    def runs(experts: Sequence[Compiled], until: float) -> GpuRuns:
        return asked.gpu_runs(gpus, [compiled[one.expert] for one in experts], until)

    loads_seconds = loads_share * (until - now)
    runs_seconds = _left_of(until - now - loads_seconds, groups, had)
    answers, why = _answers(runs, groups, now + runs_seconds, say, where, had=had, keep=keep)
    until = now + runs_seconds + loads_seconds
    failed = {f"{name} {architecture}": reason for architecture, reason in why.items()}
    if loads_share:
        say(f"loading{where}")
        try:
            rows = asked.gpu_loads(gpus, [compiled[one.expert] for one in _spread(groups, why)], until)
            found = replace(found, from_disk=loads_fit(rows.from_disk), from_host=loads_fit(rows.from_host))
        except ApplianceError as error:
            failed[f"{name} {LOADS}"] = str(error)
    if answers:
        found = replace(
            found,
            beside_cpu=_no_gain([runs.beside_cpu for runs in answers.values()]),
            beside_loads=_no_gain([runs.beside_loads for runs in answers.values()]),
            cpu_beside=_no_gain([runs.cpu_beside for runs in answers.values()]),
        )
    fresh = [
        _architecture(groups[architecture][0], "cuda", 1, runs.latencies, runs.waited_share)
        for architecture, runs in answers.items()
    ]
    return found, fresh, failed


def _new_groups(
    compiled: Mapping[str, Compiled], known: Measured, kind: Kind, threads: Sequence[int]
) -> dict[str, tuple[Compiled, ...]]:
    """Some experts by their architecture, the quickest first: what time they leave goes to the others."""
    there = {(one.architecture, one.threads) for one in known.architectures if one.device == kind}
    groups = dict[str, list[Compiled]]()
    for one in sorted(compiled.values(), key=lambda one: one.item_seconds):
        groups.setdefault(one.architecture, []).append(one)
    return {
        architecture: tuple(experts[:_EXPERTS])
        for architecture, experts in groups.items()
        if any((architecture, count) not in there for count in threads)
    }


def _spread(groups: Mapping[str, Sequence[Compiled]], failed: Mapping[str, str]) -> list[Compiled]:
    return [one for architecture, experts in groups.items() if architecture not in failed for one in experts]


def _architectures(expert: Compiled, runs: Runs) -> Iterator[Architecture]:
    """One for each number of threads."""
    for threads in dict.fromkeys(threads for threads, _, _ in runs.latencies):
        latencies = [(items, seconds) for count, items, seconds in runs.latencies if count == threads]
        yield _architecture(expert, "cpu", threads, latencies, runs.waited_share)


def _architecture(
    expert: Compiled, kind: Kind, threads: int, latencies: Sequence[tuple[int, float]], waited_share: float
) -> Architecture:
    samples = tuple(Latency(items, seconds) for items, seconds in latencies)
    item_seconds, fixed_seconds = costs.fit(latencies)
    return Architecture(
        expert.architecture,
        kind,
        threads,
        samples,
        item_seconds,
        fixed_seconds,
        *errors(samples, item_seconds, fixed_seconds),
        plateau(samples),
        expert.expert,
        expert.activation_item_bytes,
        expert.activation_fixed_bytes,
        waited_share,
    )


def _contentions(known: Measured, answers: Sequence[Runs], threads: Sequence[int]) -> tuple[Contention, ...]:
    there = {one.threads: one for one in known.contention}
    return tuple((there | {n: _contention(n, answers) for n in threads if n not in there}).values())


def _contention(threads: int, answers: Sequence[Runs]) -> Contention:
    by_executors = dict[int, list[float]]()
    for runs in answers:
        for count, executors, ratio in runs.beside_runs:
            if count == threads:
                by_executors.setdefault(executors, []).append(ratio)
    beside_loads = [ratio for runs in answers for count, ratio in runs.beside_loads if count == threads]
    return Contention(
        threads,
        {1: 1.0} | {n: _no_gain(ratios) for n, ratios in sorted(by_executors.items())},
        _no_gain(beside_loads),
    )


def _no_gain(ratios: Sequence[float | None]) -> float:
    """The median of those there are. Beside others nothing is quicker: what says so, or nothing at all, is noise."""
    there = [ratio for ratio in ratios if ratio is not None]
    return max(statistics.median(there), 1.0) if there else 1.0
