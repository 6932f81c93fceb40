"""What switching experts costs on this box: real store, templates and weights against the disk and plain sessions.

Each network is made, compiled and measured in one process and in interleaved pairs, and what is reported is a median:
a shared machine is slow for both sides of a pair. Every number stands beside the bound that the appliance promises.
"""

from __future__ import annotations

import gc
import itertools
import mmap
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from appliance.drivers import runtime
from appliance.drivers.devices import anonymous_bytes, cores
from appliance.engine.disk import READERS, chunk_bytes
from appliance.engine.sessions import Sessions
from appliance.engine.weights import Weights
from appliance.errors import ApplianceError
from appliance.lab.shapes import SHAPES, Shape, write_expert
from appliance.lab.telling import Say, Target
from appliance.lab.trunks import trunks
from appliance.store.compile import compile_bundles
from appliance.store.store import Compiled, Store

Pictures = NDArray[np.float32]

_FINE_TUNES = 100
_EQUAL = 1e-4
"""Largest difference that is rounding, relative to the largest output."""
_LEFTOVER_BYTES = 4 << 20
_LEFTOVER_SHARE = 0.02
_TICK_SECONDS = 0.0005
_AT_ONCE = (1, 2, 4)
_QUIET_RUNS = 3
"""Runs after the first, whose median the first is compared with."""
_ACTIVATION_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Effort:
    """How often things are done. `block` runs alternate between a loading and a quiet side, `sides` runs on each."""

    pairs: int
    run_pairs: int
    sides: int
    block: int
    residents: int
    percentile: int

    @classmethod
    def of(cls, shape: Shape, *, pairs: int, quick: bool) -> Effort:
        if quick:
            return cls(pairs, 10, 20, 10, 2, 90)
        if shape.name == "170MB":
            return cls(pairs, 40, 120, 20, 3, 90)
        return cls(pairs, 200, 600, 50, 5, 99)


@dataclass(frozen=True, slots=True)
class Switching:
    """One shape's costs. `plain_…` is an InferenceSession of the same file, as everybody makes it.

    Ready means: bytes in memory, bound, and the first run's penalty paid. The plain session finds its file in the
    page cache; ours is read from the disk.
    """

    shape: str
    like: str
    pairs: int
    weights_bytes: int
    disk_bytes_per_second: float
    cold_load_bytes_per_second: float
    cold_load_seconds: float
    cold_load_fraction: float
    activate_seconds: float
    first_run_penalty_seconds: float
    evict_seconds: float
    ready_seconds: float
    ready_cpu_seconds: float
    plain_ready_seconds: float
    plain_ready_cpu_seconds: float
    template_run_seconds: float
    plain_run_seconds: float
    run_ratio: float
    outputs_equal: bool
    outputs_difference: float
    runs_a_side: int
    percentile: int
    run_p99_ratio_while_loading: float
    run_median_ratio_while_loading: float
    loads_beside_runs: int
    bytes_per_second_at_once: dict[int, float]
    python_stall_seconds: float
    python_stall_idle_seconds: float
    booked_bytes: int
    measured_bytes: int
    leftover_bytes: int


def switch(
    names: Sequence[str], *, pairs: int = 15, quick: bool = False, folder: Path, say: Say = lambda line: None
) -> dict[str, Any]:
    """Measure the shapes one after the other, and what fine-tunes of one trunk share unless shapes were named.

    Experts and store lie under `folder` meanwhile.

    Raises ApplianceError when a shape is unknown or cannot be compiled here.
    """
    unknown = [name for name in names if name not in SHAPES]
    if unknown:
        raise ApplianceError(f"there is no shape {unknown[0]}", f"choose from {', '.join(SHAPES)}")
    shapes = []
    for shape in (SHAPES[name] for name in names or SHAPES):
        found = _measured(shape, Effort.of(shape, pairs=3 if quick else pairs, quick=quick), folder, say)
        goals = [target.told() for target in targets(found)]
        shapes.append(asdict(found) | {"targets": goals})
    return {
        "runtime": f"onnxruntime {onnxruntime.__version__}",
        "cores": cores(),
        "read_depth": READERS,
        "load_average": round(os.getloadavg()[0], 2),
        "shapes": shapes,
        **({"sharing": trunks(_FINE_TUNES, folder, say)} if not names else {}),
    }


def targets(found: Switching) -> list[Target]:
    """What must hold for a shape, beside what was found."""
    read_share = {"45MB": 0.8, "170MB": 0.9}.get(found.shape)
    least_gain = 10.0 if found.shape == "45MB" else 5.0
    allowed = max(_LEFTOVER_BYTES, _LEFTOVER_SHARE * found.measured_bytes)
    return [
        *([Target("cold_load_fraction", found.cold_load_fraction, "at least", read_share)] if read_share else []),
        *([Target("activate_seconds", found.activate_seconds, "at most", 0.002)] if found.shape == "45MB" else []),
        Target("cpu_gain", found.plain_ready_cpu_seconds / found.ready_cpu_seconds, "at least", least_gain),
        Target("run_ratio", found.run_ratio, "at most", 1.03),
        Target("outputs_difference", found.outputs_difference, "at most", _EQUAL),
        Target("run_p99_ratio_while_loading", found.run_p99_ratio_while_loading, "at most", 1.25),
        Target("booking_error", abs(found.booked_bytes / found.measured_bytes - 1), "at most", 0.03),
        Target("leftover_bytes", found.leftover_bytes, "at most", allowed),
    ]


def _measured(shape: Shape, effort: Effort, folder: Path, say: Say) -> Switching:
    with _rig(shape, effort.residents, folder, say) as rig:
        return _summed_up(shape, effort, _found(rig, effort, lambda what: say(f"{shape.name}: {what}")))


@dataclass(frozen=True, slots=True)
class _Found:
    """What was measured of one shape, as it was measured."""

    weights_bytes: int
    memory: _Memory
    laps: list[_Lap]
    runs: _Runs
    beside: _Beside
    at_once: dict[int, float]
    stalls: tuple[float, float]


def _found(rig: _Rig, effort: Effort, say: Say) -> _Found:
    say("memory")
    memory = _memory(rig)
    say(f"{effort.pairs} switches")
    laps = [_lap(rig, number) for number in range(effort.pairs)]
    say(f"{effort.run_pairs} runs, template and plain")
    runs = _runs(rig, effort.run_pairs)
    say(f"{effort.sides} runs with and without loads beside them")
    beside = _beside_loads(rig, effort)
    say("several loads at once")
    at_once = _at_once(rig, effort.pairs)
    say("stalls")
    return _Found(rig.experts[0].bytes, memory, laps, runs, beside, at_once, _stalls(rig, effort.pairs))


def _summed_up(shape: Shape, effort: Effort, found: _Found) -> Switching:
    size, memory, laps, runs, beside = found.weights_bytes, found.memory, found.laps, found.runs, found.beside
    disk, load = _median(laps, "disk_seconds"), _median(laps, "load_seconds")
    return Switching(
        shape=shape.name,
        like=shape.like,
        pairs=effort.pairs,
        weights_bytes=size,
        disk_bytes_per_second=size / disk,
        cold_load_bytes_per_second=size / load,
        cold_load_seconds=load,
        cold_load_fraction=statistics.median(lap.disk_seconds / lap.load_seconds for lap in laps),
        activate_seconds=_median(laps, "activate_seconds"),
        first_run_penalty_seconds=_median(laps, "penalty_seconds"),
        evict_seconds=_median(laps, "evict_seconds"),
        ready_seconds=statistics.median(
            lap.load_seconds + lap.activate_seconds + max(0.0, lap.penalty_seconds) for lap in laps
        ),
        ready_cpu_seconds=_median(laps, "ready_cpu_seconds"),
        plain_ready_seconds=_median(laps, "plain_ready_seconds"),
        plain_ready_cpu_seconds=_median(laps, "plain_ready_cpu_seconds"),
        template_run_seconds=statistics.median(template for template, _ in runs.seconds),
        plain_run_seconds=statistics.median(plain for _, plain in runs.seconds),
        run_ratio=statistics.median(template / plain for template, plain in runs.seconds),
        outputs_equal=runs.difference <= _EQUAL,
        outputs_difference=runs.difference,
        runs_a_side=len(beside.quiet_seconds),
        percentile=effort.percentile,
        run_p99_ratio_while_loading=_ratio(beside, effort.percentile),
        run_median_ratio_while_loading=_ratio(beside, 50),
        loads_beside_runs=beside.loads,
        bytes_per_second_at_once=found.at_once,
        python_stall_seconds=found.stalls[0],
        python_stall_idle_seconds=found.stalls[1],
        booked_bytes=memory.booked_bytes,
        measured_bytes=memory.measured_bytes,
        leftover_bytes=memory.leftover_bytes,
    )


@dataclass(frozen=True, slots=True)
class _Rig:
    """Compiled experts of one shape, none ready, and what makes them so. The first is the one that is measured."""

    experts: tuple[Compiled, ...]
    model: Path
    segment: Path
    weights: Weights
    sessions: Sessions
    picture: Pictures

    def ready(self, expert: Compiled) -> None:
        self.weights.load(expert.segments)
        self.sessions.activate(expert)

    def evict(self, expert: Compiled) -> None:
        self.sessions.drop(expert.expert)
        self.weights.drop(expert.segments)

    def run(self, expert: Compiled) -> NDArray[Any]:
        with self.sessions.lease(expert.expert) as lease:
            (output,) = lease.run({"image": self.picture}).values()
        return output


@contextmanager
def _rig(shape: Shape, count: int, folder: Path, say: Say) -> Iterator[_Rig]:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bench-", dir=folder) as home:
        say(f"{shape.name}: making {count} networks like {shape.like}")
        bundles = [write_expert(Path(home), f"e{i}", shape.build(i), side=shape.side) for i in range(count)]
        say(f"{shape.name}: compiling them")
        store = Store(Path(home) / "store")
        results = compile_bundles(store, bundles, report=lambda name, result: None)
        experts = tuple(_sound(results[bundle.manifest.name]) for bundle in bundles)
        weights = Weights(store.segment_path, budget_bytes=sum(expert.bytes for expert in experts))
        sessions = Sessions(weights, runtime.CpuPlace(), activation_bytes=_ACTIVATION_BYTES)
        picture = np.random.default_rng(0).random((1, 3, shape.side, shape.side), np.float32)
        segment = store.segment_path(experts[0].segments[0].id)
        try:
            yield _Rig(experts, bundles[0].model_path, segment, weights, sessions, picture)
        finally:
            weights.close()


def _sound(result: Compiled | ApplianceError) -> Compiled:
    if isinstance(result, ApplianceError):
        raise result
    return result


@dataclass(frozen=True, slots=True)
class _Memory:
    booked_bytes: int
    measured_bytes: int
    leftover_bytes: int


def _memory(rig: _Rig) -> _Memory:
    """All experts ready at a time, then none. The first rounds are for what is held once: session, arena, threads."""
    for expert in rig.experts:
        rig.ready(expert)
        for _ in range(_QUIET_RUNS):  # a second run plans its memory anew
            rig.run(expert)
        rig.evict(expert)
    before = _settled_bytes(rig)
    for expert in rig.experts:
        rig.ready(expert)
        rig.run(expert)
    booked, measured = rig.weights.mapped_bytes, _settled_bytes(rig) - before
    for expert in rig.experts:
        rig.evict(expert)
    return _Memory(booked, measured, _settled_bytes(rig) - before)


def _settled_bytes(rig: _Rig) -> int:
    rig.weights.trim()
    gc.collect()
    runtime.trim()
    return anonymous_bytes()


@dataclass(frozen=True, slots=True)
class _Lap:
    """An absent expert made ready and evicted, the same file read bare, and a plain session made of its model."""

    disk_seconds: float
    load_seconds: float
    activate_seconds: float
    penalty_seconds: float
    evict_seconds: float
    ready_cpu_seconds: float
    plain_ready_seconds: float
    plain_ready_cpu_seconds: float


@dataclass(frozen=True, slots=True)
class _Took:
    seconds: float
    cpu_seconds: float

    def __add__(self, other: _Took) -> _Took:
        return _Took(self.seconds + other.seconds, self.cpu_seconds + other.cpu_seconds)


def _lap(rig: _Rig, number: int) -> _Lap:
    expert = rig.experts[0]
    parts: dict[str, _Took] = {}

    def read_bare() -> None:
        parts["disk"] = _bare_read(rig.segment)

    def load() -> None:
        parts["load"] = _took(lambda: rig.weights.load(expert.segments))

    for step in (read_bare, load) if number % 2 else (load, read_bare):
        step()
    activate = _took(lambda: rig.sessions.activate(expert))
    penalty = _first_run_penalty(lambda: rig.run(expert))
    evict = _took(lambda: rig.evict(expert))
    plain = _plain_ready(rig)
    ours = parts["load"] + activate
    return _Lap(
        disk_seconds=parts["disk"].seconds,
        load_seconds=parts["load"].seconds,
        activate_seconds=activate.seconds,
        penalty_seconds=penalty.seconds,
        evict_seconds=evict.seconds,
        ready_cpu_seconds=ours.cpu_seconds + max(0.0, penalty.cpu_seconds),
        plain_ready_seconds=plain.seconds,
        plain_ready_cpu_seconds=plain.cpu_seconds,
    )


def _bare_read(path: Path) -> _Took:
    """The bound: the file by direct reads, as many at a time and as large as ours, into memory already there."""
    size = path.stat().st_size
    step = chunk_bytes(size)
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    memory = _fresh_memory(size)
    try:
        with memoryview(memory) as whole, ThreadPoolExecutor(READERS) as pool:
            list(pool.map(lambda _: time.sleep(0.001), range(READERS)))  # its threads begin before the clock does

            def read(start: int) -> None:
                end = min(start + step, size)
                while start < end:
                    with whole[start:end] as piece:
                        start += os.preadv(descriptor, [piece], start)

            return _took(lambda: list(pool.map(read, range(0, size, step))))
    finally:
        os.close(descriptor)
        memory.close()


def _fresh_memory(size: int) -> mmap.mmap:
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    np.frombuffer(memory, np.uint8)[:: mmap.PAGESIZE] = 1
    return memory


def _plain_ready(rig: _Rig) -> _Took:
    """A session with default options, made and past its first run; no trim before it, so its heap is warm."""
    sessions: list[Any] = []
    made = _took(lambda: sessions.append(onnxruntime.InferenceSession(rig.model, providers=["CPUExecutionProvider"])))
    penalty = _first_run_penalty(lambda: sessions[0].run(None, {"image": rig.picture}))
    return _Took(made.seconds + max(0.0, penalty.seconds), made.cpu_seconds + max(0.0, penalty.cpu_seconds))


def _first_run_penalty(run: Callable[[], object]) -> _Took:
    """What the first run takes more than those after it; below zero when there is none but noise."""
    first = _took(run)
    later = [_took(run) for _ in range(_QUIET_RUNS)]
    return _Took(
        first.seconds - statistics.median(took.seconds for took in later),
        first.cpu_seconds - statistics.median(took.cpu_seconds for took in later),
    )


def _took(work: Callable[[], object]) -> _Took:
    cpu, begun = time.process_time(), time.perf_counter()
    work()
    return _Took(time.perf_counter() - begun, time.process_time() - cpu)


@dataclass(frozen=True, slots=True)
class _Runs:
    """Seconds of template and plain session by turns, one thread each; the difference of what they answered."""

    seconds: list[tuple[float, float]]
    difference: float


def _runs(rig: _Rig, pairs: int) -> _Runs:
    expert = rig.experts[0]
    plain = runtime.open_session(rig.model, "all", intra_threads=1)
    rig.ready(expert)
    try:
        ours, theirs = rig.run(expert), plain.run(None, {"image": rig.picture})[0]
        seconds = []
        for number in range(pairs):
            took: dict[str, float] = {}
            for side in ("template", "plain") if number % 2 else ("plain", "template"):
                if side == "template":
                    took[side] = _took(lambda: rig.run(expert)).seconds
                else:
                    took[side] = _took(lambda: plain.run(None, {"image": rig.picture})).seconds
            seconds.append((took["template"], took["plain"]))
    finally:
        rig.evict(expert)
    return _Runs(seconds, float(np.max(np.abs(ours - theirs)) / np.max(np.abs(theirs))))


@dataclass(frozen=True, slots=True)
class _Beside:
    """Seconds of runs with loads going on beside them and without."""

    loading_seconds: list[float]
    quiet_seconds: list[float]
    loads: int


def _beside_loads(rig: _Rig, effort: Effort) -> _Beside:
    """Blocks of runs on this thread by turns with and without another that loads and evicts without a pause."""
    runner, other = rig.experts[:2]
    sides: dict[bool, list[float]] = {True: [], False: []}
    loads = 0
    rig.ready(runner)
    try:
        rig.run(runner)
        for number in range(2 * effort.sides // effort.block):
            is_loading = number % 4 in (1, 2)
            with _switching(rig, other) if is_loading else _nothing() as counted:
                sides[is_loading] += [_took(lambda: rig.run(runner)).seconds for _ in range(effort.block)]
            loads += len(counted)
    finally:
        rig.evict(runner)
    return _Beside(sides[True], sides[False], loads)


@contextmanager
def _switching(rig: _Rig, expert: Compiled) -> Iterator[list[int]]:
    """Another thread makes the expert ready and evicts it over and over; it yields a list that grows with each."""
    done: list[int] = []
    stop, has_begun = Event(), Event()

    def work() -> None:
        for number in itertools.count():
            has_begun.set()
            rig.ready(expert)
            rig.evict(expert)
            done.append(number)
            if stop.is_set():
                return

    thread = Thread(target=work, name="bench-loads")
    thread.start()
    has_begun.wait()
    try:
        yield done
    finally:
        stop.set()
        thread.join()


@contextmanager
def _nothing() -> Iterator[list[int]]:
    yield []


def _at_once(rig: _Rig, rounds: int) -> dict[int, float]:
    """Bytes per second that come in when one, two or four different experts are loaded at a time, by turns."""
    counts = [count for count in _AT_ONCE if count <= len(rig.experts)]
    rates: dict[int, list[float]] = {count: [] for count in counts}
    with ThreadPoolExecutor(max(counts)) as pool:
        list(pool.map(lambda _: time.sleep(0.001), counts))  # its threads begin before the clock does
        for number in range(rounds):
            for count in counts if number % 2 else reversed(counts):
                coming = rig.experts[:count]
                size = sum(expert.bytes for expert in coming)
                begun = time.perf_counter()
                list(pool.map(lambda expert: rig.weights.load(expert.segments), coming))
                rates[count].append(size / (time.perf_counter() - begun))
                for expert in coming:
                    rig.weights.drop(expert.segments)
    return {count: float(statistics.median(found)) for count, found in rates.items()}


def _stalls(rig: _Rig, loads: int) -> tuple[float, float]:
    """The longest that a Python thread which only ticks was kept from it: during loads, and with nothing going on."""
    with _ticking() as gaps:
        for _ in range(loads):
            rig.ready(rig.experts[1])
            rig.evict(rig.experts[1])
    with _ticking() as idle_gaps:
        time.sleep(sum(gaps))
    return max(gaps, default=0.0), max(idle_gaps, default=0.0)


@contextmanager
def _ticking() -> Iterator[list[float]]:
    gaps: list[float] = []
    stop = Event()

    def tick() -> None:
        last = time.perf_counter()
        while not stop.is_set():
            time.sleep(_TICK_SECONDS)
            now = time.perf_counter()
            gaps.append(now - last)
            last = now

    thread = Thread(target=tick, name="bench-ticks")
    thread.start()
    try:
        yield gaps
    finally:
        stop.set()
        thread.join()


def _median(laps: Sequence[_Lap], field: str) -> float:
    return float(statistics.median(getattr(lap, field) for lap in laps))


def _ratio(beside: _Beside, percentile: int) -> float:
    loading, quiet = np.percentile(beside.loading_seconds, percentile), np.percentile(beside.quiet_seconds, percentile)
    return float(loading / quiet)
