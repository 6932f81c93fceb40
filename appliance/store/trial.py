"""An expert on trial: opened in either way in which it could be served, run as serving runs it, and measured.

Everything is measured on one thread, in the child that compiles, with the arena for activations that serving has.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from appliance.core import costs
from appliance.drivers import runtime
from appliance.drivers.devices import anonymous_bytes
from appliance.errors import ModelError

Pixels = NDArray[np.float32]
"""Prepared pictures (N, C, H, W)."""
Pictures = Callable[[int], Sequence[Pixels]]
"""So many pictures for each input."""
Weights = Mapping[str, NDArray[Any]]

SLOWER = 0.10
"""How much longer than a plain session's a template's runs may take. With three busy processes on two cores, medians of
convolutions took -0.01 to 0.03 longer, of MatMul 0.3 to 0.5, of INT8 0.9 to 1.1 (1.31.1, 2026-11-21)."""
SLOWER_SECONDS = 0.0001
"""A run that loses less is not worth a session and packed weights of its own."""
MEMORY_PRICE = 0.5
"""A box that is short of memory pays for what plain sessions keep beside the segments by loading others more often: as
much memory again has to buy runs that a template would take this much longer for. INT8 does, MatMul does not."""
_BATCHES = (1, 2, 4, 8)
_LONGEST_SECONDS = 0.5
"""No larger batch is measured than one that takes so long: it costs dozens of runs."""
_MEASURE_SECONDS = 2.0
_PAIRS = 21
_LEAST_PAIRS = 9
_RUNS_TO_SETTLE = 3
"""The second run of a shape plans its memory anew; what the first left stays beside it."""


@dataclass(frozen=True, slots=True)
class Costs:
    """What one architecture costs: K and B in seconds, and bytes beside the segments."""

    is_plain: bool
    item_seconds: float
    fixed_seconds: float
    activation_item_bytes: int
    activation_fixed_bytes: int
    private_bytes: int


class Trial:
    """One session of an expert, with its weights."""

    def __init__(self, session: Any, binding: Any, weights: Sequence[Any]) -> None:
        self._session, self._binding, self._weights = session, binding, weights  # a session does not keep its weights
        self._outputs = [output.name for output in session.get_outputs()]

    def run(self, pictures: Sequence[Pixels], *, shrink: bool = False) -> list[NDArray[Any]]:
        """The outputs in order; with `shrink` the arena is as small as it can be afterwards. Raises ModelError."""
        with runtime_errors("does not run as it would be served"):
            for number, picture in enumerate(pictures):
                self._binding.bind_cpu_input(f"x{number}", picture)
            for name in self._outputs:
                self._binding.bind_output(name, "cpu")
            self._session.run_with_iobinding(self._binding, runtime.CpuPlace().run_options(shrink=shrink))
            outputs = list(self._binding.copy_outputs_to_cpu())
            self._binding.clear_binding_outputs()
        return outputs


def as_template(path: Path, weights: Weights) -> Trial:
    """Raises ModelError when the runtime refuses it."""
    values = _values(weights)
    with runtime_errors("cannot be opened as a template"):
        session = runtime.CpuPlace().open_template(path)
        binding = session.io_binding()
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
    return Trial(session, binding, list(values.values()))


def as_plain(path: Path, weights: Weights) -> Trial:
    """Raises ModelError when the runtime refuses it."""
    values = _values(weights)
    with runtime_errors("cannot be opened with its weights elsewhere"):
        session = runtime.CpuPlace().open_plain(path, values)
        binding = session.io_binding()
    return Trial(session, binding, list(values.values()))


@contextmanager
def runtime_errors(what: str) -> Iterator[None]:
    """What the runtime raises becomes ModelError, or MemoryError."""
    try:
        yield
    except runtime.ERRORS as error:
        if runtime.says_out_of_memory(error):
            raise MemoryError from error
        raise ModelError(f"the graph {what}: {str(error)[:400]}", "export the expert again") from error


def measured(openers: Mapping[bool, Callable[[], Trial]], pictures: Pictures, limit: int, weights_bytes: int) -> Costs:
    """What serving costs, in batches of at most `limit`: in the way that serves better, if there are two.

    Each call of an opener opens a session: as a template (False) or plain (True).
    """
    trials = {is_plain: opened() for is_plain, opened in openers.items()}
    sizes = _sizes(trials[False], pictures, limit)
    lost = _lost(trials[False], trials[True], pictures, sizes) if True in trials else 0.0
    trials.clear()
    private_bytes = _private_bytes(openers[True], pictures(1)) if lost > 0 else 0
    is_plain = is_worth(lost, private_bytes, weights_bytes)
    serving = openers[is_plain]()  # after the others have gone: what they left free would hide what this one takes
    item_seconds, fixed_seconds = costs.fit(_seconds(serving, pictures, sizes))
    item_bytes, fixed_bytes = ceiling([(n, _activation_bytes(serving, pictures(1), pictures, n)) for n in sizes])
    return Costs(is_plain, item_seconds, fixed_seconds, item_bytes, fixed_bytes, private_bytes if is_plain else 0)


def loss(pairs: Sequence[tuple[float, float]]) -> float:
    """How much longer a template's runs take, as a share; 0 if that is too little. Seconds of both, in pairs."""
    share = statistics.median(template / plain for template, plain in pairs) - 1
    seconds = statistics.median(template - plain for template, plain in pairs)
    return share if share > SLOWER and seconds > SLOWER_SECONDS else 0.0


def is_worth(lost: float, private_bytes: int, weights_bytes: int) -> bool:
    """Whether plain sessions serve, for what a template would lose and what they keep beside the segments."""
    return lost > MEMORY_PRICE * private_bytes / weights_bytes


def ceiling(samples: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Bytes per picture and beside them, from (batch size, bytes) in ascending order.

    The line lies above every sample, and beyond the last it rises as steeply as before it. One batch size cannot tell
    the two apart: everything is then per picture, the cautious reading.
    """
    if len(samples) == 1:
        [(count, size)] = samples
        return math.ceil(size / count), 0
    (before, smaller), (last, larger) = samples[-2:]
    item = max(0, costs.slope(samples), (larger - smaller) / (last - before))
    return math.ceil(item), max(0, *(math.ceil(size - math.ceil(item) * count) for count, size in samples))


def _values(weights: Weights) -> dict[str, Any]:
    """OrtValues that lie where the arrays lie, and keep them."""
    return {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in weights.items()}


def _sizes(trial: Trial, pictures: Pictures, limit: int) -> tuple[int, ...]:
    """The batch sizes that are worth measuring."""
    trial.run(pictures(1))
    longest = _timed(trial, pictures(1))
    return tuple(n for n in _BATCHES if n <= limit and (n == 1 or n * longest <= _LONGEST_SECONDS))


def _lost(template: Trial, plain: Trial, pictures: Pictures, sizes: Sequence[int]) -> float:
    return max(loss(list(_pairs(template, plain, pictures(n)))) for n in {1, sizes[-1]})


def _pairs(template: Trial, plain: Trial, pictures: Sequence[Pixels]) -> Iterator[tuple[float, float]]:
    """Runs of both by turns, first one and then the other first: what slows the box down slows both."""
    for trial in (template, plain, template, plain):
        trial.run(pictures)
    end = time.perf_counter() + _MEASURE_SECONDS
    for number in range(_PAIRS):
        first, second = (template, plain) if number % 2 else (plain, template)
        seconds = {id(trial): _timed(trial, pictures) for trial in (first, second)}
        yield seconds[id(template)], seconds[id(plain)]
        if number + 1 >= _LEAST_PAIRS and time.perf_counter() > end:
            return


def _timed(trial: Trial, pictures: Sequence[Pixels]) -> float:
    """Processor time: the clock's would say on a busy box which of two ran while others did.

    This thread's, which does all the work. The process's goes by the tick once it has a limit, as a child has.
    """
    begun = time.thread_time()
    trial.run(pictures)
    return time.thread_time() - begun


def _seconds(trial: Trial, pictures: Pictures, sizes: Sequence[int]) -> list[tuple[int, float]]:
    """Of a run of each size, the median of a few."""
    samples = []
    end = time.perf_counter() + _MEASURE_SECONDS
    for count in sizes:
        batch = pictures(count)
        trial.run(batch)
        samples.append((count, statistics.median(_timed(trial, batch) for _ in range(5))))
        if time.perf_counter() > end:
            break
    return samples


def _activation_bytes(trial: Trial, single: Sequence[Pixels], pictures: Pictures, count: int) -> int:
    """What a run takes beside the weights while it lasts, its pictures and outputs included."""
    trial.run(single, shrink=True)
    before = _settled_bytes()
    batch = pictures(count)
    for _ in range(_RUNS_TO_SETTLE):
        outputs = trial.run(batch)
        taken = anonymous_bytes() - before
        del outputs
    return max(taken, sum(picture.nbytes for picture in batch))


def _private_bytes(opened: Callable[[], Trial], single: Sequence[Pixels]) -> int:
    """What one more session keeps: packed weights and its own objects. The first pays for the process too."""
    first = opened()
    first.run(single, shrink=True)
    before = _settled_bytes()
    another = opened()
    another.run(single, shrink=True)
    return max(0, _settled_bytes() - before)


def _settled_bytes() -> int:
    gc.collect()
    runtime.trim()
    return anonymous_bytes()
