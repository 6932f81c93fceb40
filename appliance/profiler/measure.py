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
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Event as Signal
from threading import Timer
from typing import Any, Protocol, TypeVar

from pydantic import TypeAdapter, ValidationError

from appliance.catalog import Bundle
from appliance.core import costs
from appliance.core.types import Device, Event
from appliance.drivers import devices
from appliance.engine.engine import Engine
from appliance.errors import ApplianceError, ConfigError, ModelError
from appliance.lab.telling import Say
from appliance.profile import Kind
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
_PLATEAU = 0.05
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
class Latency:
    """A batch of so many pictures: the median of its repeats, from encoded pictures to findings."""

    items: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Architecture:
    """K and B of one architecture on one kind of device ("cpu", "cuda"), and how well they tell what was measured.

    `fit_error` and `worst_error` are the median and the largest of |K·n + B - seconds| / seconds over the samples.
    `best_batch` is the plateau: no larger batch takes five hundredths less per picture. `expert` is the one whose
    weights were used, the bytes of activations are those that compiling measured, and `waited_share` is the part of
    the time for which these runs, alone with the box, waited for a processor: above BUSY_SHARE something else was at
    work, and all of this is too high.
    """

    architecture: str
    device: str
    threads: int
    samples: tuple[Latency, ...]
    item_seconds: float
    fixed_seconds: float
    fit_error: float
    worst_error: float
    best_batch: int
    expert: str = ""
    activation_item_bytes: int = 0
    activation_fixed_bytes: int = 0
    waited_share: float = 0.0

    def line(self, most: int) -> tuple[float, float]:
        """K and B for batches of at most so many pictures: those that are never run need not be told by it."""
        return costs.fit([(sample.items, sample.seconds) for sample in self.samples if sample.items <= most])

    def run_seconds(self, items: int) -> float:
        """What a batch takes by the samples around it: where large ones outgrow a cache, no one line tells them all.

        Beyond the last sample each picture takes K.
        """
        beyond = max(items - self.samples[-1].items, 0)
        return _between([(s.items, s.seconds) for s in self.samples], items) + self.item_seconds * beyond


@dataclass(frozen=True, slots=True)
class Loading:
    """Loads from the disk: n of them in flight are all ready after `fixed_seconds` + bytes / `bytes_per_second[n]`.

    The bytes are those of all of them. It lacks numbers of loads in flight that the box has not experts enough for.
    """

    bytes_per_second: Mapping[int, float] = field(default_factory=dict)
    fixed_seconds: float = 0.0

    def seconds(self, size: int, at_once: int = 1) -> float:
        """Of so many bytes together, by the nearest number of loads that was measured and is not larger."""
        rates = self.bytes_per_second
        nearest = max((n for n in rates if n <= at_once), default=min(rates))
        return self.fixed_seconds + size / rates[nearest]


@dataclass(frozen=True, slots=True)
class Contention:
    """How many times as long runs of so many threads take as one alone; the median over architectures.

    `beside_runs` tells it by the number of executors at work, from 1 (1.0) on. `beside_loads` comes on top while loads
    are in flight: with all executors at work, against the same without loads. What could not be measured is 1.
    """

    threads: int
    beside_runs: Mapping[int, float]
    beside_loads: float

    def times_as_long(self, executors: int) -> float:
        """Beside runs, also for numbers of executors between those that were measured."""
        return _between(sorted(self.beside_runs.items()), executors)


@dataclass(frozen=True, slots=True)
class OnGpu:
    """Loads of a GPU, and what goes on beside its runs; what could not be measured is 1, or an empty Loading.

    Times as long: its runs `beside_cpu`, when every core has an executor at work, and `beside_loads`; and the runs of
    these executors beside its own (`cpu_beside`), whose pictures are prepared by the same cores.
    """

    from_disk: Loading = field(default_factory=Loading)
    from_host: Loading = field(default_factory=Loading)
    beside_cpu: float = 1.0
    beside_loads: float = 1.0
    cpu_beside: float = 1.0


@dataclass(frozen=True, slots=True)
class Measured:
    """All of it. `failed` says why by architecture, or by LOADS, on a GPU behind its name; the others are sound.

    `host_seconds` is the processor time that a picture takes beside its runs. `int8` is the same box with int8 variants
    in place of their networks.
    """

    architectures: tuple[Architecture, ...]
    loading: Loading
    contention: tuple[Contention, ...]
    seconds: float
    failed: Mapping[str, str]
    gpu: OnGpu | None = None
    host_seconds: float = 0.0
    int8: Measured | None = None

    def of(self, *, int8: bool) -> Measured:
        """What counts in this precision."""
        return self.int8 if int8 and self.int8 is not None else self

    def on(self, kind: Kind, threads: int = 1) -> dict[str, Architecture]:
        """Those that were measured on this kind of device, the CPU with so many threads."""
        return {one.architecture: one for one in self.architectures if (one.device, one.threads) == (kind, threads)}

    def as_json(self) -> dict[str, Any]:
        found: dict[str, Any] = _MEASURED.dump_python(self, mode="json")
        return found

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Measured:
        """Raises ConfigError naming the key."""
        try:
            return _MEASURED.validate_python(found)
        except ValidationError as error:
            problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            raise ConfigError(f"these are no measurements: {problems}", "measure again") from error


_MEASURED = TypeAdapter(Measured)


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
    gpus: GpuPart | None = None,
) -> Measured:
    """Measure every architecture that `known` lacks, by each number of `threads` and up to so many executors; and on
    the first of the `gpus`, if there are any.

    Within the budget, but for one run or a child's start: less time means fewer repeats, and what had no turn at all is
    lacking, or in `failed`. What is `known` is kept as it is. A child may have `memory_bytes` of address space.
    """
    begun, whole_seconds = time.monotonic(), budget_seconds
    budget_seconds *= 1.0 if gpus is None else 1 - _GPU_SHARE
    asked = _Asked(bundles, segment_path, tuple(threads), executors, repeats, memory_bytes or _memory_bytes())
    known = known or Measured((), Loading(), (), 0.0, {})
    groups = _new_groups(compiled, known, "cpu", threads)
    loading, loads_share = known.loading, 0.0 if known.loading.bytes_per_second else _LOADS_SHARE
    until = begun + budget_seconds
    answers, failed = _answers(asked.runs, groups, until - loads_share * budget_seconds, say)
    if loads_share:
        say("loading")
        try:
            loading = loads_fit(asked.loads(_spread(groups, failed), until).rows)
        except ApplianceError as error:
            failed[LOADS] = str(error)
    fresh = [one for architecture, runs in answers.items() for one in _architectures(groups[architecture][0], runs)]
    on_gpu = known.gpu
    if gpus is not None:
        found, more, failed_there = _on_gpu(asked, compiled, gpus, known, begun + whole_seconds, say)
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


def plateau(samples: Sequence[Latency]) -> int:
    """The smallest batch from which a picture's share falls no more than five hundredths with any larger one."""
    shares = {sample.items: sample.seconds / sample.items for sample in samples}
    return next(
        items
        for items in sorted(shares)
        if all(shares[larger] >= (1 - _PLATEAU) * shares[items] for larger in shares if larger > items)
    )


def ladder(most: int) -> tuple[int, ...]:
    """1, 2, 3, 4, 6, 8, 12, 16, … and the last step itself: each a third or a half above the one before."""
    steps = {size for power in range(most.bit_length()) for size in (1 << power, 3 << power) if size <= most}
    return tuple(sorted(steps | {most}))


def _between(points: Sequence[tuple[int, float]], at: int) -> float:
    """The value there on the lines from point to point, which ascend; outside them that of the nearest."""
    after = bisect_left(points, at, key=lambda point: point[0])
    if after in (0, len(points)):
        return points[min(after, len(points) - 1)][1]
    (left, low), (right, high) = points[after - 1 : after + 1]
    return low + (at - left) / (right - left) * (high - low)


def errors(samples: Sequence[Latency], item_seconds: float, fixed_seconds: float) -> tuple[float, float]:
    """The median and the largest of what K·n + B is off, as a share of what was measured."""
    off = [abs(item_seconds * s.items + fixed_seconds - s.seconds) / s.seconds for s in samples]
    return statistics.median(off), max(off)


def loads_fit(rows: Sequence[tuple[int, int, float]]) -> Loading:
    """Of (in flight, bytes of all, seconds): a fixed part by the line through single loads, and bandwidth beside it.

    A load of no bytes, whose segments are in memory already, is one of the single ones.
    """
    single = [(size, seconds) for at_once, size, seconds in rows if at_once == 1]
    if not single:
        return Loading()
    slope = costs.slope(single)
    fixed = max(statistics.fmean(s for _, s in single) - slope * statistics.fmean(n for n, _ in single), 0.0)
    fixed = min(fixed, *(seconds for size, seconds in single))
    by_count = dict[int, list[tuple[int, float]]]()
    for at_once, size, seconds in rows:
        if seconds > fixed and size:
            by_count.setdefault(at_once, []).append((size, seconds - fixed))
    # All bytes by all seconds: small experts, whose reads hardly get going, count by what they bring.
    together = {n: sum(size for size, _ in found) / sum(s for _, s in found) for n, found in by_count.items()}
    return Loading(dict(sorted(together.items())), fixed)


@dataclass(frozen=True, slots=True)
class _Asked:
    """Asks children."""

    bundles: Mapping[str, Bundle]
    segment_path: Callable[[str], Path]
    threads: tuple[int, ...]
    executors: int
    repeats: int
    memory_bytes: int

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
        job = Job(tuple(experts), bundles, paths, self.threads, self.executors, self.repeats, working, until)
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
) -> tuple[dict[str, Answer], dict[str, str]]:
    """What each architecture's child says, and why by architecture where none does. They share the time alike."""
    answers, failed = dict[str, Answer](), dict[str, str]()
    for number, (architecture, experts) in enumerate(groups.items()):
        name = experts[0].expert
        say(f"running {name}{where}, {number + 1} of {len(groups)} architectures")
        now = time.monotonic()
        try:
            found = answers[architecture] = runs(experts, now + (until - now) / (len(groups) - number))
            if found.waited_share > BUSY_SHARE:
                say(f"something else is at work: {name} waited {found.waited_share:.0%} of its time for a processor")
        except ApplianceError as error:
            failed[architecture] = f"{name}: {error}"
            say(f"{name}{where} cannot be measured: {error}")
    return answers, failed


def _on_gpu(
    asked: _Asked, compiled: Mapping[str, Compiled], gpus: GpuPart, known: Measured, until: float, say: Say
) -> tuple[OnGpu, list[Architecture], dict[str, str]]:
    """Loads and contention, new architectures, and what failed."""
    groups, found = _new_groups(gpus.compiled, known, "cuda", (1,)), known.gpu or OnGpu()
    name = gpus.names[0]
    where, now = f" on {name}", time.monotonic()
    loads_share = 0.0 if found.from_host.bytes_per_second else _LOADS_SHARE

    def runs(experts: Sequence[Compiled], until: float) -> GpuRuns:
        return asked.gpu_runs(gpus, [compiled[one.expert] for one in experts], until)

    answers, why = _answers(runs, groups, until - loads_share * (until - now), say, where)
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
