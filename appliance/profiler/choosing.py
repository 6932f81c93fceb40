"""Which configurations are tried first, which of them are served live, and which of those is the best.

Decides with values: outcomes in, settings out.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import inf

from appliance.profiler.joint import Judge, Trial
from appliance.profiler.progress import Lap
from appliance.profiler.rig import Outcome, Rig
from appliance.profiler.settings import Settings

OBJECTIVES = ("throughput", "deadlines", "p99")
ROUNDS = 2
"""So often at least whoever wins has been served beside the default."""
CANDIDATES = 4
"""Of the search's best, at most, that are served live."""
LEAST_GAIN = 0.02
"""Who is better by less is not known to be better at all: rounds of one configuration differ by as much in a quiet
hour."""
LEAST_OF_DEFAULT = 0.9
"""Where waits or deadlines are what counts, throughput may fall so far, predicted and live."""
_EVEN = 0.01
"""Who is predicted to be worse by less is as good."""
_LATE_DIGITS = 3
"""Of the share of boards that are late: who differs by less than a thousandth is as punctual."""


def is_better(objective: str, one: Outcome, other: Outcome) -> bool:
    """By so much that it is known. Of those that are late as seldom the quicker one."""
    if objective == "p99":
        return one.wait_p99_seconds < (1 - LEAST_GAIN) * other.wait_p99_seconds
    if objective == "deadlines":
        seldom = round(other.late_share - one.late_share, _LATE_DIGITS)
        if seldom:
            return seldom > 0
    return one.images_per_second > (1 + LEAST_GAIN) * other.images_per_second


def value(objective: str, found: Outcome) -> float:
    """To be ordered by: more is better."""
    match objective:
        case "deadlines":  # a billionth each, or some thousand images per second would outweigh a late board
            return 1.0 - round(found.late_share, _LATE_DIGITS) + found.images_per_second * 1e-9
        case "p99":
            return -found.wait_p99_seconds
    return found.images_per_second


def winner(laps: Sequence[Lap], default: Settings, objective: str) -> Settings:
    """Whoever was served often enough beside the default and was clearly better in more than half of these rounds, and
    not too slow for it; of several the best; else the default."""
    rounds: dict[Settings, dict[int, Outcome]] = {}
    for lap in laps:
        rounds.setdefault(lap.settings, {})[lap.round] = lap.outcome
    usual = rounds.pop(default, {})
    able = dict[Settings, float]()
    for settings, found in rounds.items():
        both = found.keys() & usual.keys()
        better = sum(is_better(objective, found[number], usual[number]) for number in both)
        if (
            len(both) >= ROUNDS
            and 2 * better > len(both)
            and _rate(found, both) >= LEAST_OF_DEFAULT * _rate(usual, both)
        ):
            able[settings] = statistics.median(value(objective, found[number]) for number in both)
    return max(able, key=lambda settings: able[settings], default=default)


def _rate(found: Mapping[int, Outcome], rounds: Iterable[int]) -> float:
    return statistics.median(found[number].images_per_second for number in rounds)


def diverse(ranked: Sequence[Trial]) -> list[Trial]:
    """The best of each number of executors and threads in each precision first, then the next best of all: where a
    prediction is wrong, it is so for all that share these.

    Of those that are as good as the best of their kind, it is the one that leaves most memory for activations: what
    runs lose where that is scarce, for they give it back each time, the simulator does not know. Nor does it know all
    that threads cost each other: of kinds that are as good, those with the fewest are first.
    """
    kinds = dict[tuple[int, int, int, int], list[Trial]]()
    for trial in ranked:
        settings = trial.settings
        kind = settings.cpu_executors, settings.gpu_executors, settings.threads, settings.int8
        kinds.setdefault(kind, []).append(trial)
    first = [min(_even(kind), key=lambda trial: trial.settings.weights_share) for kind in kinds.values()]
    even = _even(ranked)
    first.sort(key=lambda trial: _threads(trial.settings) if trial in even else inf)  # who is equal stays in order
    return [*first, *(trial for trial in ranked if trial not in first)][:CANDIDATES]


def roomy(rig: Rig, judge: Judge, trial: Trial) -> Settings:
    """The same with more room for activations, if that is predicted to be as good."""
    found = rig.with_room(trial.settings)
    if found == trial.settings:
        return found
    judged = judge(found, 1.0)
    return found if judged.excess <= 0 and _is_as_good(judged.value, trial.value) else trial.settings


def _threads(settings: Settings) -> int:
    return settings.cpu_executors * settings.threads + settings.gpu_executors


def _even(ranked: Sequence[Trial]) -> list[Trial]:
    """Those that are as good as the first."""
    return [trial for trial in ranked if _is_as_good(trial.value, ranked[0].value)]


def _is_as_good(one: float, best: float) -> bool:
    """As far as predictions tell."""
    return one >= best - _EVEN * abs(best)


def guesses(rig: Rig, default: Settings) -> list[Settings]:
    """Where experience would look first."""
    around = [
        replace(default, cpu_executors=rig.cores, load_slots=1),
        replace(default, cpu_executors=1, threads=rig.cores),
        replace(default, cpu_executors=rig.cores + 1),
        replace(default, weights_share=min(default.weights_share + 0.05, 0.97)),
        replace(default, weights_share=max(default.weights_share - 0.1, 0.5)),
        replace(default, batch_cap=max(default.batch_cap // 2, 1)),
    ]
    if rig.gpus is not None:
        around += [
            replace(default, gpu_executors=0),
            replace(default, gpu_executors=len(rig.gpus.names), cpu_executors=1),
            replace(default, host_tier_share=0.0),
        ]
    around += [] if rig.int8 is None else [replace(settings, int8=1) for settings in (default, *around)]
    return [settings for settings in around if rig.holds(settings)]
