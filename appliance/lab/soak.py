"""Thousands of loads, runs and evictions in one process, to show that nothing stays behind: memory, files, threads."""

from __future__ import annotations

import gc
import os
import random
import statistics
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from appliance.drivers import runtime
from appliance.drivers.devices import anonymous_bytes, cores
from appliance.engine.sessions import Sessions
from appliance.engine.weights import Weights
from appliance.errors import ApplianceError
from appliance.lab.shapes import small_net, write_expert
from appliance.lab.telling import Say
from appliance.store.compile import compile_bundles
from appliance.store.store import Compiled, Store

_SIDE = 32
_ACTIVATION_BYTES = 64 << 20
_CHANNELS = (64, 128, 192)
"""Three architectures, experts of 0.3, 1.2 and 2.7 MB in turn."""
_SAMPLES = 20
_WARM_SAMPLES = 2
"""Not compared: sessions, arena and threads are made once."""
_FLAT = 0.02


@dataclass(frozen=True, slots=True)
class _Sample:
    """The process after so many cycles, the residents' weights (exactly known) taken off its memory.

    The readers of weights, at most as many as there are, begin when first needed and are not counted.
    """

    cycles: int
    other_bytes: int
    booked_bytes: int
    descriptors: int
    threads: int


def soak(
    *, cycles: int = 2000, experts: int = 200, folder: Path, say: Say = lambda line: None, jobs: int = 2
) -> dict[str, Any]:
    """Load, run and evict one expert per cycle, a tenth of them resident at a time, in an order without locality.

    Raises ApplianceError when an expert cannot be compiled here.
    """
    begun = time.perf_counter()
    with _compiled(experts, folder, say, jobs) as (store, made):
        say(f"{cycles} cycles over {experts} experts")
        budget_bytes = _places(made) * max(compiled.bytes for compiled in made)
        weights = Weights(store.segment_path, budget_bytes=budget_bytes)
        sessions = Sessions(weights, runtime.CpuPlace(), activation_bytes=_ACTIVATION_BYTES)
        samples = list(_cycled(weights, sessions, made, cycles))
        _check_empty(weights)
        weights.close()
    return _found(samples, cycles, experts) | {"seconds": time.perf_counter() - begun}


def _found(samples: Sequence[_Sample], cycles: int, experts: int) -> dict[str, Any]:
    settled = samples[min(_WARM_SAMPLES, len(samples) - 1) :]
    third = max(len(settled) // 3, 1)
    first, last = (
        statistics.median(sample.other_bytes + settled[0].booked_bytes for sample in part)
        for part in (settled[:third], settled[-third:])
    )
    growth = last / first - 1
    descriptors = max(s.descriptors for s in settled) - settled[0].descriptors
    threads = max(s.threads for s in settled) - settled[0].threads
    return {
        "runtime": f"onnxruntime {onnxruntime.__version__}",
        "cores": cores(),
        "cycles": cycles,
        "experts": experts,
        "anonymous_growth": growth,
        "descriptor_growth": descriptors,
        "thread_growth": threads,
        "flat": growth <= _FLAT and descriptors <= 0 and threads <= 0,
        "samples": [asdict(sample) for sample in samples],
    }


def _cycled(weights: Weights, sessions: Sessions, experts: Sequence[Compiled], cycles: int) -> Iterator[_Sample]:
    """A sample now and then, and one at the end; in the end nothing is resident."""
    places = _places(experts)
    every = max(cycles // _SAMPLES, 1)
    resident: deque[Compiled] = deque()
    picture = np.random.default_rng(0).random((1, 3, _SIDE, _SIDE), np.float32)

    def evict() -> None:
        leaving = resident.popleft()
        sessions.drop(leaving.expert)
        weights.drop(leaving.segments)

    for number, expert in enumerate(_shuffled(experts, places, cycles), start=1):
        if len(resident) == places:
            evict()
        weights.load(expert.segments)
        sessions.activate(expert)
        resident.append(expert)
        with sessions.lease(expert.expert) as lease:
            lease.run({"image": picture})
        if number % every == 0:
            yield _sample(number, weights)
    while resident:
        evict()


def _places(experts: Sequence[Compiled]) -> int:
    return max(len(experts) // 10, 1)


def _shuffled(experts: Sequence[Compiled], places: int, cycles: int) -> Iterator[Compiled]:
    """Experts at random, but none that is among the last `places`, so that every cycle is a load."""
    chance = random.Random(0)
    waiting, recent = list(experts), deque[Compiled]()
    for _ in range(cycles):
        chosen = waiting.pop(chance.randrange(len(waiting)))
        recent.append(chosen)
        if len(recent) == places:
            waiting.append(recent.popleft())
        yield chosen


def _sample(cycles: int, weights: Weights) -> _Sample:
    gc.collect()
    runtime.trim()
    booked = weights.mapped_bytes + weights.spare_bytes
    descriptors = len(os.listdir("/proc/self/fd"))
    readers = sum(thread.name.startswith("weights-reader") for thread in threading.enumerate())
    threads = len(os.listdir("/proc/self/task")) - readers
    return _Sample(cycles, anonymous_bytes() - booked, booked, descriptors, threads)


def _check_empty(weights: Weights) -> None:
    if weights.mapped_bytes:
        raise ApplianceError(f"{weights.mapped_bytes} bytes are still booked with nothing resident", "report this")


@contextmanager
def _compiled(count: int, folder: Path, say: Say, jobs: int) -> Iterator[tuple[Store, list[Compiled]]]:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="soak-", dir=folder) as home:
        say(f"making and compiling {count} experts")
        bundles = [
            write_expert(Path(home), f"e{i}", small_net(_CHANNELS[i % len(_CHANNELS)])(i), side=_SIDE)
            for i in range(count)
        ]
        store = Store(Path(home) / "store")
        results = compile_bundles(store, bundles, report=lambda name, result: None, jobs=jobs)
        made = []
        for result in results.values():
            if isinstance(result, ApplianceError):
                raise result
            made.append(result)
        yield store, made
