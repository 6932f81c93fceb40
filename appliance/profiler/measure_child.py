"""The child process that measures: `python -m appliance.profiler.measure_child`, a job's file in, medians out.

It has the engine that serves: loader lanes and direct reads bring the weights, executor threads decode an encoded
picture, prepare it, run the architecture's session and read its findings. Only the controller is missing: this module
hands out batches and loads by itself, so that it knows what goes on beside what.
"""

from __future__ import annotations

import math
import statistics
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict
from itertools import count, cycle, islice
from pathlib import Path
from queue import Queue
from typing import Any, TypeVar

from pydantic import TypeAdapter

from appliance import sandbox
from appliance.core.types import Batch, Device, Event, Evict, Executor, Finished, Load, Loaded, Refusal, Run, Segment
from appliance.drivers import images
from appliance.drivers.images import Views
from appliance.drivers.runtime import CpuPlace
from appliance.engine.engine import Engine, Engines
from appliance.engine.weights import Weights
from appliance.errors import LoadError, RunError
from appliance.lab.laps import encoded_pictures
from appliance.profiler.measure import AT_ONCE, REPEATS, Job, Latency, Loads, Runs, ladder, plateau
from appliance.startup import footprint
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
_MAX_BYTES, _MAX_PIXELS = 1 << 24, 1 << 24


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """What `request["measure"]` names, `runs` or `loads`, of the job in the file `request["job"]`."""
    job = TypeAdapter(Job).validate_json(Path(request["job"]).read_bytes())
    return asdict(measured_runs(job) if request["measure"] == "runs" else measured_loads(job))


def measured_runs(job: Job) -> Runs:
    """One architecture's batches: alone, beside others like them, and beside loads. Raises RunError or LoadError."""
    begun = time.monotonic()
    left = max(job.until - begun, 0.0)
    with closing(_Bench(job)) as bench:
        alone, waited_share = _alone(bench, job, begun + _RUNS_SHARE * left)
        rounds = _rounds(alone)
        beside_runs = sampled(
            lambda key: bench.times_as_long_beside_runs(*key, *rounds[key[0]]),
            [(threads, executors) for executors in _others(job.executors) for threads in rounds],
            until=begun + _BESIDE_RUNS_SHARE * left,
            most=job.repeats,
        )
        with _Lane(job, _SLOTS) as lane:
            beside_loads = sampled(
                lambda threads: bench.times_as_long_beside_loads(threads, job.executors, *rounds[threads], lane),
                list(rounds),
                until=begun + left,
                most=job.repeats,
            )
    return Runs(
        [(*key, seconds) for key, seconds in alone.items()],
        [(*key, ratio) for key, ratio in medians(beside_runs).items()],
        list(medians(beside_loads).items()),
        waited_share,
    )


def measured_loads(job: Job) -> Loads:
    """Loads of experts of one architecture at a time; of all where each has too few. Raises LoadError."""
    groups = _groups(job.experts)
    sets = [experts for at_once in AT_ONCE for experts in _sets(groups, at_once)]
    left = job.until - time.monotonic()
    with _Lane(job, max(AT_ONCE)) as lane:

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

        until = job.until - (1 - _BINDS_SHARE) * left
        bound = medians(sampled(bind, range(len(groups)), until=until, most=job.repeats))
        loaded = medians(sampled(load, range(len(sets)), until=job.until, most=job.repeats))
    if not loaded:
        raise LoadError("there was no time to load anything", "allow more time")
    return Loads(
        [
            *((1, 0, seconds) for seconds in bound.values()),
            *((len(sets[number]), size_of(sets[number]), seconds) for number, seconds in loaded.items()),
        ]
    )


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


def size_of(experts: Sequence[Compiled]) -> int:
    """What has to be read for all of them."""
    return sum(segment.bytes for segment in _distinct(experts))


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


def _alone(bench: _Bench, job: Job, until: float) -> tuple[dict[tuple[int, int], float], float]:
    """Seconds by threads and pictures, and the share of the time for which these runs waited for a processor."""
    keys = [(threads, items) for items in ladder(bench.most) for threads in job.threads]
    waited, begun = waited_seconds(), time.monotonic()
    found = medians(sampled(lambda key: bench.seconds(*key), keys, until=until, most=job.repeats))
    if not found:
        raise RunError(f"there was no time to run {job.experts[0].expert}", "allow more time")
    return found, (waited_seconds() - waited) / (time.monotonic() - begun)


def _rounds(alone: Mapping[tuple[int, int], float]) -> dict[int, tuple[int, int]]:
    """By threads, what is measured beside others: batches of the plateau's size, and so many one after the other."""
    rounds = {}
    for threads in dict.fromkeys(threads for threads, _ in alone):
        best = plateau([Latency(items, seconds) for (of, items), seconds in alone.items() if of == threads])
        rounds[threads] = best, math.ceil(_ROUND_SECONDS / alone[threads, best])
    return rounds


def _distinct(experts: Sequence[Compiled]) -> tuple[Segment, ...]:
    return tuple(dict.fromkeys(segment for one in experts for segment in one.segments))


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


class _Lane:
    """Loads as a service makes them, into a memory of its own: what others hold there is read here for real."""

    def __init__(self, job: Job, slots: int) -> None:
        self._experts, self._told = job.experts, Queue[tuple[float, Event]]()
        size = size_of(job.experts)
        self._memory = Weights(lambda id: job.paths[id], budget_bytes=size)  # spares stay, as in a service
        device = Device(_LOADS, size, slots, activation_bytes=0)
        compiled = {one.expert: one for one in job.experts}
        self._engine = Engine.on(device, compiled, self._memory, CpuPlace(), self._tell)

    def __enter__(self) -> _Lane:
        return self

    def __exit__(self, *exception: object) -> None:
        self._engine.loaders.stop()
        self._memory.trim()

    def bring(self, experts: Sequence[Compiled]) -> float:
        """Seconds until all are ready. Raises LoadError when one cannot be brought."""
        begun = time.perf_counter()
        for one in experts:
            self._engine.loaders.load(Load(_LOADS, one.expert, footprint(one).distinct))
        told = [self._told.get() for _ in experts]
        for _, event in told:
            if not isinstance(event, Loaded):
                raise LoadError(getattr(event, "refusal", Refusal("", "")).detail)
        return max(at for at, _ in told) - begun

    def let_go(self, experts: Sequence[Compiled], segments: Sequence[Segment] | None = None) -> None:
        """Evict them and their segments, or only these."""
        freed = _distinct(experts) if segments is None else tuple(segments)
        for one in experts[:-1]:
            self._engine.residents.evict(Evict(_LOADS, one.expert, ()))
        self._engine.residents.evict(Evict(_LOADS, experts[-1].expert, freed))

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Within, as many loads as a service has are in flight, over and over."""
        ending = threading.Event()
        turns = cycle(self._experts)

        def load() -> None:
            while not ending.is_set():
                experts = list(islice(turns, min(_SLOTS, len(self._experts))))
                self.bring(experts)
                self.let_go(experts)

        with ThreadPoolExecutor(1) as pool:
            loads = pool.submit(load)
            try:
                yield
            finally:
                ending.set()
            loads.result()

    def _tell(self, event: Event) -> None:
        self._told.put((time.perf_counter(), event))


class _Bench:
    """One architecture's experts in memory, and executors for them: an engine for each number of threads."""

    def __init__(self, job: Job) -> None:
        self._experts, self._told, self._ids = job.experts, Queue[Event](), count()
        self._is_turned = False
        self._pictures = encoded_pictures()
        self._reference = self._decoded(0)
        self.most = min(job.bundles[one.expert].manifest.model.max_batch for one in job.experts)
        self._memory = Weights(lambda id: job.paths[id], budget_bytes=size_of(job.experts))
        self._engines = {f"{threads}": self._engine(job, threads) for threads in job.threads}
        executors = [Executor(f"{name}-{n}", name) for name in self._engines for n in range(job.executors)]
        self._all = Engines(self._engines, executors, job.bundles, self._look, self._told.put)
        for name in self._engines:
            for one in self._experts:
                self._all.obey(Load(name, one.expert, footprint(one).distinct))
                self._heard()

    def close(self) -> None:
        self._all.stop()
        for engine in self._engines.values():
            for one in self._experts:
                engine.residents.evict(Evict(engine.device.name, one.expert, ()))
        self._memory.drop([segment for segment in _distinct(self._experts) if self._memory.is_mapped(segment)])
        self._memory.close()

    def seconds(self, threads: int, items: int) -> float:
        """Of one batch alone."""
        return self._together(threads, 1, items, 1)

    def times_as_long_beside_runs(self, threads: int, executors: int, items: int, rounds: int) -> float:
        return self._times_as_long(
            lambda: self._together(threads, executors, items, rounds),
            lambda: self._together(threads, 1, items, rounds),
        )

    def times_as_long_beside_loads(self, threads: int, executors: int, items: int, rounds: int, lane: _Lane) -> float:
        def beside() -> float:
            with lane.loading():
                return self._together(threads, executors, items, rounds)

        return self._times_as_long(beside, lambda: self._together(threads, executors, items, rounds))

    def _times_as_long(self, beside: Callable[[], float], without: Callable[[], float]) -> float:
        """A pair, of which now one and now the other is first: a box that becomes slower favours neither."""
        self._is_turned = not self._is_turned
        if self._is_turned:
            seconds = beside()
            return seconds / without()
        seconds = without()
        return beside() / seconds

    def _together(self, threads: int, executors: int, items: int, rounds: int) -> float:
        """The median of batches while so many executors are at work: none rests before all had so many rounds."""
        done, seconds = [0] * executors, list[float]()
        for number in range(executors):
            self._run(threads, number, items)
        at_work = executors
        while at_work:
            finished = self._heard()
            assert isinstance(finished, Finished)
            seconds.append(finished.seconds)
            number = int(finished.batch.executor.rpartition("-")[2])
            done[number] += 1
            if min(done) < rounds:
                self._run(threads, number, items)
            else:
                at_work -= 1
        return statistics.median(seconds)

    def _run(self, threads: int, number: int, items: int) -> None:
        """Executors run different experts where there are several: weights that they share would stay in caches."""
        expert = self._experts[number % len(self._experts)].expert
        requests = tuple(str(next(self._ids)) for _ in range(items))
        self._all.obey(Run(Batch(next(self._ids), f"{threads}-{number}", f"{threads}", expert, requests)))

    def _heard(self) -> Event:
        """Raises RunError or LoadError when it is that something failed."""
        match self._told.get():
            case Loaded() as event:
                return event
            case Finished(batch, answers) as event:
                for one in answers:
                    if isinstance(one, Refusal):
                        raise RunError(f"{batch.expert}: {one.detail}")
                return event
            case event:
                raise RunError(getattr(event, "refusal", Refusal("", "")).detail)

    def _engine(self, job: Job, threads: int) -> Engine:
        compiled = {one.expert: one for one in job.experts}
        device = Device(f"{threads}", size_of(job.experts), 1, job.activation_bytes)
        return Engine.on(device, compiled, self._memory, CpuPlace(threads), self._told.put)

    def _look(self, request: str) -> Views:
        """A picture that nobody has decoded before, and a golden one for experts that compare."""
        return Views(self._decoded(int(request)), self._reference)

    def _decoded(self, number: int) -> images.Picture:
        payload = self._pictures[number % len(self._pictures)]
        return images.decode(payload, max_bytes=_MAX_BYTES, max_pixels=_MAX_PIXELS)


if __name__ == "__main__":
    sandbox.serve(answer)
