"""The paper's own two searches (CoServe, ASPLOS 2025, §4.5), one after the other: how many experts shall be resident,
then how many executors. They are here to be compared with: `joint.py` searches all at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from statistics import linear_regression

from appliance.profiler.settings import Settings

FIRST_WINDOW = 15
DECAY = 1 - FIRST_WINDOW / 100
TOLERANCE = 0.05


@dataclass(frozen=True, slots=True)
class Window:
    """Any number of resident experts above `low` and not above `high` is the search's answer.

    `measured` is what each number that was tried came to.
    """

    low: int
    high: int
    measured: Mapping[int, float | None]

    @property
    def best(self) -> int:
        """Of the answers, the one that was measured; its lower edge where that one has no room, or is worse."""
        high, low = self.measured[self.high], self.measured.get(self.low)
        return self.low if high is None or (low is not None and high < low) else self.high


def decay_window(measure: Callable[[int], float | None], most: int) -> Window:
    """Let more and more experts be resident, by smaller and smaller steps, until it brings less than it did.

    `measure` gives the throughput with so many, None where there is no room; `most` is the last number tried. The line
    through what was measured before tells what to expect of the next; 5 % less than that is the end.
    """
    low, width, found = 0, float(FIRST_WINDOW), dict[int, float | None]()
    while True:
        high = min(low + round(width), most)
        value = found[high] = measure(high)
        if value is None or high == most or _falls_short(found, high, value):
            return Window(low, high, found)
        low, width = high, max(width * DECAY, 1.0)


def _falls_short(found: Mapping[int, float | None], number: int, value: float) -> bool:
    before = [(count, known) for count, known in found.items() if count != number and known is not None]
    if len(before) < 2:
        return False
    slope, intercept = linear_regression(*zip(*before, strict=True))
    expected = slope * number + intercept
    return (expected - value) / expected > TOLERANCE


@dataclass(frozen=True, slots=True)
class Found:
    """What a search came to: the best settings, their value, and how often the workload was played."""

    settings: Settings
    value: float
    evaluations: int


@dataclass(slots=True)
class _Measured:
    """Asks once for each configuration."""

    measure: Callable[[Settings], float | None]
    known: dict[Settings, float | None] = field(default_factory=dict)

    def __call__(self, settings: Settings) -> float | None:
        if settings not in self.known:
            self.known[settings] = self.measure(settings)
        return self.known[settings]

    def best(self) -> Settings:
        return max(self.known, key=lambda settings: self.known[settings] or 0.0)


def two_steps(
    measure: Callable[[Settings], float | None],
    begin: Settings,
    share_of: Callable[[int], float],
    *,
    most_experts: int,
    gpu_executors: range,
    cpu_executors: range,
) -> Found:
    """The window search with the executors of `begin`; with its answer each number of GPU executors, and with the best
    of these each number of CPU executors.

    `share_of` is the share of the GPU's memory that so many experts take.
    """
    measured = _Measured(measure)
    window = decay_window(lambda n: measured(replace(begin, gpu_weights_share=share_of(n))), most_experts)
    chosen = replace(begin, gpu_weights_share=share_of(window.best))
    for count in gpu_executors:
        measured(replace(chosen, gpu_executors=count))
    chosen = measured.best()
    for count in cpu_executors:
        measured(replace(chosen, cpu_executors=count))
    best = measured.best()
    played = sum(value is not None for value in measured.known.values())
    return Found(best, measured.known[best] or 0.0, played)
