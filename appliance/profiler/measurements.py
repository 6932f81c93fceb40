"""What was measured on a box, as the numbers that predictions are made of. Values only: `measure` takes them."""

from __future__ import annotations

import statistics
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from appliance.core import costs
from appliance.profile import Kind

_PLATEAU = 0.05


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

    def scaled(self, times: float) -> Contention:
        """With runs beside each other so many times as long, and never shorter than alone."""
        beside = {n: seconds if n == 1 else max(seconds * times, 1.0) for n, seconds in self.beside_runs.items()}
        return replace(self, beside_runs=beside)

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
class Handover:
    """From the end of a batch until its executor has the next one: so long for each batch, and for each picture of it.

    The pictures are answered then, and the next batch is decided on.
    """

    item_seconds: float = 0.0
    fixed_seconds: float = 0.0

    def seconds(self, items: int) -> float:
        return self.item_seconds * items + self.fixed_seconds


@dataclass(frozen=True, slots=True)
class Measured:
    """All of it. `failed` says why by architecture, or by LOADS, on a GPU behind its name; the others are sound.

    `handover` is None until it was measured. `int8` is the same box with int8 variants in place of their networks.
    """

    architectures: tuple[Architecture, ...]
    loading: Loading
    contention: tuple[Contention, ...]
    seconds: float
    failed: Mapping[str, str]
    gpu: OnGpu | None = None
    handover: Handover | None = None
    int8: Measured | None = None

    def of(self, *, int8: bool) -> Measured:
        """What counts in this precision."""
        return self.int8 if int8 and self.int8 is not None else self

    def on(self, kind: Kind, threads: int = 1) -> dict[str, Architecture]:
        """Those that were measured on this kind of device, the CPU with so many threads."""
        return {one.architecture: one for one in self.architectures if (one.device, one.threads) == (kind, threads)}


def plateau(samples: Sequence[Latency]) -> int:
    """The smallest batch from which a picture's share falls no more than five hundredths with any larger one."""
    shares = {sample.items: sample.seconds / sample.items for sample in samples}
    return next(
        items
        for items in sorted(shares)
        if all(shares[larger] >= (1 - _PLATEAU) * shares[items] for larger in shares if larger > items)
    )


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


def handover_fit(samples: Sequence[tuple[int, float]]) -> Handover:
    """The line through (pictures, seconds), neither part below zero; nothing where there are no samples."""
    if not samples:
        return Handover()
    items, seconds = (statistics.fmean(values) for values in zip(*samples, strict=True))
    item_seconds = min(max(costs.slope(samples), 0.0), seconds / items)
    return Handover(item_seconds, seconds - item_seconds * items)


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
