"""The offline profiler (CoServe, ASPLOS 2025, §4.5, and beyond): measure, search, confirm live, and say what is best.

What was done is kept beside the search's storage, so that a profiler that was killed goes on where it was. A
configuration is never chosen on a prediction alone: it has to beat the defaults live, in the same rounds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from appliance.drivers import devices
from appliance.errors import ConfigError, DeviceError, OutOfMemory, ProfileError
from appliance.lab.telling import Say
from appliance.profiler.choosing import (
    CANDIDATES,
    LEAST_OF_DEFAULT,
    OBJECTIVES,
    ROUNDS,
    diverse,
    guesses,
    roomy,
    value,
    winner,
)
from appliance.profiler.joint import NO_ROOM, Judge, Judged, Search, Trial
from appliance.profiler.measure import LOADS, GpuRuns, Runs, measured
from appliance.profiler.measurements import Handover, Loading, Measured, handover_fit
from appliance.profiler.progress import Lap, Progress, search_key
from appliance.profiler.rig import Int8Part, Outcome, Rig, Watched
from appliance.profiler.settings import Settings
from appliance.startup import footprint, hardware

REFUSED = Outcome(0.0, 1e9, 1.0, 0)
"""Of a candidate that a device refused."""
_MEASURE_SHARE, _SEARCH_SHARE = 0.1, 0.1
"""Of the time, at most, for measuring each kind of device and for the search; what is left is for confirming live."""
_ARCHITECTURE_SECONDS = 20.0
"""For measuring each, at most: more repeats tell nothing new."""
_LEAST_MEASURING_SECONDS, _AMPLE_SECONDS = 6.0, 30.0
"""For measuring each kind of device: at least so long, whatever the time, or its children have hardly started; and
from so long on, who has measured nothing is not given more."""
LEAST_TRIALS, _MOST_TRIALS = 12, 5000
"""The guesses and a few more, whatever the time."""
_NOTED_TRIALS = 25
"""After so many each time it is noted, and said, how far the search is."""
_PLAYS = 100
"""So many times a search's part of the workload shall fit its time: to judge the least number of configurations on a
day of 50,000 pictures took two minutes, whatever the budget (2026-11-22)."""
_LEAST_PLAYED = 2000
"""Requests, where there are so many: fewer tell too little of who is resident."""
_GROWTH = 4
"""Times as much of a workload is predicted next, where less of it was over too soon."""
_RANKED = 200
"""Of the search's best, of which candidates are chosen."""
LEAST_REQUESTS = 100
"""In a lap, where there is time for them: fewer tell little."""
_LEAST_BATCHES = 20
"""Of the default served for a moment, to be believed: few and cold ones say nothing."""
_WATCHED_SECONDS = 3.0
"""Of the default served live, with one executor and as it is."""
_FAR_OFF = 1.15
"""Times as long as measured, or as short: then runs were measured beside each other in a moment unlike others. Less is
the mix of batches, and the noise of a few seconds: to count it made predictions worse (experts of 1 and 24 ms)."""
_LAPS_SHARE, _GRACE = 0.8, 0.1
"""Of the time that is left, for playing: what a lap needs to begin and to end takes the rest. And of all the time, what
the first pair may take longer."""
_TRIES, _NEAR = 8, 0.7
"""To find by prediction how much of a workload fits a time, and so much of the time is enough: where pictures come
evenly, the first try is right."""
_LEAST_LAP_SECONDS = 5.0
"""A workload that is over sooner is played again, where the time allows it: in the first second everything is new, and
laps of one second differed by a fifth (experts of 1 ms, 2026-11-22)."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is asked of the profiler. Everything that it keeps meanwhile lies in `folder`.

    `begun` hears of each phase (measure, search, confirm) as it begins, and how many seconds it may take.
    """

    budget_seconds: float
    folder: Path
    objective: str = "throughput"
    seed: int = 1
    begun: Callable[[str, float], None] = lambda phase, seconds: None

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise ConfigError(f"there is no objective {self.objective}", f"choose one of {', '.join(OBJECTIVES)}")


@dataclass(frozen=True, slots=True)
class Profiled:
    """What the profiler came to. `predicted` are the best configurations of the search, the best first.

    What is known lies in `home` all the same: whoever has kept the answer may delete it, and the next search is a new
    one.
    """

    settings: Settings
    default: Settings
    measured: Measured
    predicted: Sequence[Trial]
    laps: Sequence[Lap]
    trials: int
    importances: Mapping[str, float]
    predicted_images_per_second: float
    seconds: float
    share: float
    """Of the workload, that a live lap played."""
    is_complete: bool
    home: Path

    @property
    def confirmed(self) -> int:
        return len({lap.settings for lap in self.laps})

    def live(self, settings: Settings) -> float:
        """Images per second, the median of these rounds; 0 where there is none."""
        found = [one.images_per_second for one in self.compared(settings)]
        return statistics.median(found) if found else 0.0

    def compared(self, settings: Settings) -> list[Outcome]:
        """Of the rounds in which it was served beside the default; of the default, of those beside the winner."""
        beside = self.settings if settings == self.default else self.default
        rounds = {lap.round for lap in self.laps if lap.settings == beside}
        return [lap.outcome for lap in self.laps if lap.settings == settings and lap.round in rounds]


def profiled(rig: Rig, default: Settings, plan: Plan, say: Say = lambda line: None) -> Profiled:
    """Measure, search and confirm within the plan's time. Ctrl-C ends it early, with what is known by then; while it
    measures nothing is, and KeyboardInterrupt goes on. The same again goes on from there.

    Raises ApplianceError when nothing can be measured here, or a picture gets no answer.
    """
    here = hardware(() if rig.gpus is None else devices.gpus())
    home = plan.folder / search_key(rig, default, plan.objective, plan.seed, here)
    home.mkdir(parents=True, exist_ok=True)
    return _Run(rig, default, plan, Progress.read(home / "progress.json"), say).all()


class _Run:
    """One sitting of the profiler."""

    def __init__(self, rig: Rig, default: Settings, plan: Plan, known: Progress, say: Say) -> None:
        if not rig.holds(default):
            raise _not_held(rig, default)
        self._rig, self._default, self._plan, self._known, self._say = rig, default, plan, known, say
        self._began, self._spent = time.monotonic(), known.spent_seconds
        self._is_complete = True
        self._lap_seconds = max((lap.outcome.seconds for lap in known.laps), default=0.0)

    @property
    def _seconds(self) -> float:
        """Of the budget, with those of sittings before."""
        return self._spent + time.monotonic() - self._began

    def all(self) -> Profiled:
        known = self._uninterrupted()
        usual, judge = self._default.told(), self._judge(known)
        search = Search(
            {name: knob.including(usual[name]) for name, knob in self._rig.space().items()},
            self._default,
            judge,
            guesses=guesses(self._rig, self._default),
            seed=self._plan.seed,
            storage=self._known.storage,
        )
        with self._interruptible():
            self._search(search)
        best = diverse(search.best(_RANKED))
        with self._interruptible():
            if self._is_complete:
                self._confirm(known, list(dict.fromkeys(roomy(self._rig, judge, trial) for trial in best)))
        best_live = winner(self._known.laps, self._default, self._plan.objective)
        share = self._known.share or 1.0
        return Profiled(
            settings=best_live,
            default=self._default,
            measured=known,
            predicted=best,
            laps=self._known.laps,
            trials=search.trials,
            importances=search.importances(),
            predicted_images_per_second=self._rig.predicted(best_live, known, share).images_per_second,
            seconds=self._seconds,
            share=share,
            is_complete=self._is_complete,
            home=self._known.path.parent,
        )

    def _uninterrupted(self) -> Measured:
        """Raises KeyboardInterrupt: there is no answer without all that is measured. What was measured stays."""
        try:
            return self._measured()
        except KeyboardInterrupt:
            self._note()
            self._say("interrupted while measuring: nothing is known to be better; the same command goes on from here")
            raise

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        """Ctrl-C within ends this step, and those that follow; what was found stays."""
        try:
            yield
        except KeyboardInterrupt:
            self._is_complete = False
            self._say("interrupted: with what is known so far; the same command goes on from here")
        finally:
            self._note()

    def _note(self) -> None:
        self._known.spent_seconds = self._seconds
        self._known.write()

    def _measured(self) -> Measured:
        """Noted after each step: who goes on does not do it again."""
        known = self._known.measured or self._keep(self._measured_full())
        if self._rig.int8 is not None and known.int8 is None:
            known = self._keep(replace(known, int8=self._measure_int8(known, self._rig.int8)))
        return known if known.handover is not None else self._keep(self._watched(known))

    def _keep(self, found: Measured) -> Measured:
        self._known.measured = found
        self._known.runs, self._known.gpu_runs = {}, {}
        self._note()
        return found

    def _keep_runs(self, architecture: str, found: Runs | GpuRuns) -> None:
        self._known.keep(architecture, found)
        self._note()

    def _measured_full(self) -> Measured:
        gpus = self._rig.gpus
        kinds = [self._rig.compiled] if gpus is None else [self._rig.compiled, gpus.compiled]
        architectures = sum(len({one.architecture for one in compiled.values()}) for compiled in kinds)
        budget_seconds = len(kinds) * _MEASURE_SHARE * self._plan.budget_seconds
        budget_seconds = min(budget_seconds, _ARCHITECTURE_SECONDS * architectures)
        budget_seconds = max(budget_seconds, len(kinds) * _LEAST_MEASURING_SECONDS)
        self._plan.begun("measure", budget_seconds)
        found = self._measure(budget_seconds)
        while not found.loading.bytes_per_second and 0 < budget_seconds < len(kinds) * _AMPLE_SECONDS:
            budget_seconds *= 2  # on a busy box the little that is left for loads is over before a child has started
            found = self._measure(budget_seconds)
        if not found.loading.bytes_per_second:
            why = found.failed.get(LOADS, "there was no time")
            raise ProfileError(f"loads could not be measured: {why}", "allow more time")
        return found

    def _measure_int8(self, full: Measured, part: Int8Part) -> Measured:
        """What int8 variants take; loads as those of networks where there was no time for theirs."""
        rig = self._rig.in_precision(replace(self._default, int8=1))
        architectures = len({one.architecture for one in part.compiled.values()})
        seconds = min(_MEASURE_SHARE * self._plan.budget_seconds, _ARCHITECTURE_SECONDS * architectures)
        found = measured(
            rig.compiled,
            rig.bundles,
            rig.segment_path,
            threads=rig.thread_counts,
            executors=rig.cores,
            budget_seconds=max(seconds, _LEAST_MEASURING_SECONDS),
            say=lambda line: self._say(f"{line}, in int8"),
            known=replace(full, loading=Loading()),
            pictures=rig.pictures,
            runs=dict(self._known.runs),
            keep=self._keep_runs,
        )
        return found if found.loading.bytes_per_second else replace(found, loading=full.loading)

    def _watched(self, known: Measured) -> Measured:
        """And what only serving shows: the default for some seconds, on the CPU alone; small batches by one executor
        first."""
        default = replace(self._default, gpu_executors=0)
        small = replace(default, cpu_executors=1, batch_cap=max(default.batch_cap // 4, 1))
        if not self._rig.holds(small) or not self._rig.holds(default):
            return _with_handover(known, Handover())
        self._say("serving the defaults for a moment")
        return learnt(known, self._watch(small, known), self._watch(default, known), default.threads)

    def _watch(self, settings: Settings, known: Measured) -> Watched:
        """Without deadlines: what is late when it comes is not run."""
        rig = self._rig.patient()
        return rig.watched(settings, known, _fitting(rig, settings, known, _WATCHED_SECONDS))

    def _measure(self, budget_seconds: float) -> Measured:
        return measured(
            self._rig.compiled,
            self._rig.bundles,
            self._rig.segment_path,
            threads=self._rig.thread_counts,
            executors=self._rig.cores,
            budget_seconds=budget_seconds,
            say=self._say,
            pictures=self._rig.pictures,
            gpus=self._rig.gpus,
            runs=dict(self._known.runs),
            gpu_runs=dict(self._known.gpu_runs),
            keep=self._keep_runs,
        )

    def _judge(self, known: Measured) -> Judge:
        if self._known.searched_share is None:
            self._known.searched_share = self._searched_share(known)
        whole = self._known.searched_share
        goal = self._rig.predicted(self._default, known, whole).images_per_second * LEAST_OF_DEFAULT

        def judge(settings: Settings, share: float) -> Judged:
            if not self._rig.holds(settings):
                return NO_ROOM
            found = self._rig.predicted(settings, known, whole * share)
            excess = 0.0
            if self._plan.objective != "throughput" and share == 1 and goal:
                excess = max(goal - found.images_per_second, 0.0) / goal
            return Judged(value(self._plan.objective, found), excess)

        return judge

    def _searched_share(self, known: Measured) -> float:
        """Of the workload, that a search plays as its whole."""
        least, began = _LEAST_PLAYED / len(self._rig.workload.requests), time.monotonic()
        if least >= 1.0:
            return 1.0
        self._rig.predicted(self._default, known, least)
        took = max(time.monotonic() - began, 1e-9)
        return min(least * max(_SEARCH_SHARE * self._plan.budget_seconds / (_PLAYS * took), 1.0), 1.0)

    def _search(self, search: Search) -> None:
        """Not once laps have begun: who confirms has chosen."""
        if self._known.share is not None:
            return
        before, began, told = self._known.searched_seconds, self._seconds, 0
        seconds = max(_SEARCH_SHARE * self._plan.budget_seconds - before, 0.0)
        self._plan.begun("search", seconds)

        def noted() -> None:
            self._known.searched_seconds = before + self._seconds - began
            self._note()

        def goes_on() -> bool:
            nonlocal told
            if search.trials >= told + _NOTED_TRIALS:
                told = search.trials
                best = "".join(f", the best predicted at {one.value:.1f}" for one in search.best())
                self._say(f"searching: {told} configurations{best}")
                noted()
            if search.trials < LEAST_TRIALS:
                return True
            return self._seconds < began + seconds and search.trials < _MOST_TRIALS

        try:
            search.run(goes_on)
        finally:
            noted()

    def _confirm(self, known: Measured, candidates: Sequence[Settings]) -> None:
        """The default beside a candidate, and the better of two candidates beside the default once more: without a
        second round nobody wins, so that this may take a tenth longer than there is time. Then, as long as there is,
        the other candidates, each only if it can have such a pair, too, and the best of all again."""
        others = [one for one in candidates if one != self._default]
        if not others:
            return
        self._plan.begun("confirm", self._plan.budget_seconds - self._seconds)
        if self._known.share is None:
            self._known.share = self._lap_share(known, 1 + len(others[:2]) + 2 * (ROUNDS - 1))
        for settings in (self._default, others[0]):
            self._serve(known, 0, settings)
        for settings in others[1:2]:
            if self._has_time(1 + 2 * (ROUNDS - 1)):
                self._serve(known, 0, settings)
        if self._has_time(2, _GRACE * self._plan.budget_seconds):
            self._pair(known, 1)
        for settings in others[2:]:
            if self._has_time(3):
                self._serve(known, 0, settings)
        for number in range(ROUNDS, 2 + CANDIDATES):
            if self._has_time(2):
                self._pair(known, number)

    def _pair(self, known: Measured, number: int) -> None:
        """The best so far and the default, first one and then the other first."""
        best = max((lap.settings for lap in self._known.laps if lap.settings != self._default), key=self._so_far)
        for settings in (best, self._default) if number % 2 else (self._default, best):
            self._serve(known, number, settings)

    def _so_far(self, settings: Settings) -> float:
        return statistics.median(
            value(self._plan.objective, lap.outcome) for lap in self._known.laps if lap.settings == settings
        )

    def _has_time(self, laps: int, grace_seconds: float = 0.0) -> bool:
        """For as many laps more, if they take as long as those before."""
        return self._seconds + laps * self._lap_seconds <= self._plan.budget_seconds + grace_seconds

    def _lap_share(self, known: Measured, laps: int) -> float:
        """So much of the workload that so many laps fit the time that is left; of a short one more than once.

        Where that is too little to tell much, as much as fits the default and a candidate often enough to win."""
        count, left = len(self._rig.workload.requests), max(self._plan.budget_seconds - self._seconds, 0.0)
        left *= _LAPS_SHARE
        most = max(_fitting(self._rig, self._default, known, _LEAST_LAP_SECONDS), 1.0)
        share = min(_fitting(self._rig, self._default, known, left / laps), most)
        if share >= min(LEAST_REQUESTS / count, most):
            return share
        self._say(
            f"{LEAST_REQUESTS} pictures are not served {laps} times in the {left:.0f} s that are left: "
            "a larger --budget tells more, or --speed for a journal"
        )
        seconds = max(left / (2 * ROUNDS), _LEAST_LAP_SECONDS)
        return min(LEAST_REQUESTS / count, _fitting(self._rig, self._default, known, seconds), most)

    def _serve(self, known: Measured, number: int, settings: Settings) -> None:
        if any(lap.round == number and lap.settings == settings for lap in self._known.laps):
            return
        began = self._seconds
        outcome = self._outcome(settings, known)
        self._lap_seconds = self._seconds - began
        self._known.laps.append(Lap(number, settings, outcome))
        self._note()
        name = "the default" if settings == self._default else told(settings, self._default)
        self._say(f"live, round {number + 1}: {outcome.images_per_second:.1f} images/s with {name}")

    def _outcome(self, settings: Settings, known: Measured) -> Outcome:
        """Live. A candidate for which a GPU has not the room that was thought is worth nothing, and ends no search."""
        try:
            return self._rig.served(settings, known, self._known.share or 1.0)
        except (OutOfMemory, DeviceError) as error:
            if settings == self._default:
                raise
            self._say(f"{told(settings, self._default)}: {error}")
            return REFUSED


def _not_held(rig: Rig, default: Settings) -> ConfigError:
    """What the box's own settings lack."""
    most, prints = 2 * rig.cores, [footprint(one) for one in rig.compiled.values()]
    if default.cpu_executors * default.threads > most:
        return ConfigError(
            f"{default.cpu_executors} executors on {rig.cores} cores are not profiled: {most} at most",
            "lower executors.cpu, or leave it out to have it searched",
        )
    if max(one.weights_bytes for one in prints) > rig.weights_bytes(default):
        return ConfigError("the default settings do not hold the largest expert", "raise memory.weights")
    if max(one.activation_bytes(1) for one in prints) > rig.activation_bytes(default):
        return ConfigError("by the default settings a picture has no room to be run", "raise memory.activations")
    if not rig.keeps_pinned(default):
        return ConfigError(
            "by the default settings there is no room for experts.pin beside any other expert",
            "raise memory.weights, or pin fewer",
        )
    return ConfigError(
        "by the default settings a GPU holds no expert", "raise memory.gpu_weights or memory.gpu_activations"
    )


def learnt(known: Measured, one: Watched, all_at_work: Watched, threads: int) -> Measured:
    """With what passes between batches, small and large ones; and, where all executors of so many threads at work took
    far longer or shorter than expected, with contention as it was then, in both precisions."""
    off = all_at_work.times_as_long if all_at_work.batches >= _LEAST_BATCHES else 1.0
    if not 1 / _FAR_OFF < off < _FAR_OFF:
        int8 = None if known.int8 is None else _with_contention(known.int8, threads, off)
        known = replace(_with_contention(known, threads, off), int8=int8)
    return _with_handover(known, handover_fit([*one.handovers, *all_at_work.handovers]))


def _with_contention(known: Measured, threads: int, off: float) -> Measured:
    found = tuple(one.scaled(off) if one.threads == threads else one for one in known.contention)
    return replace(known, contention=found)


def _with_handover(known: Measured, found: Handover) -> Measured:
    int8 = None if known.int8 is None else replace(known.int8, handover=found)
    return replace(known, handover=found, int8=int8)


def _fitting(rig: Rig, settings: Settings, known: Measured, seconds: float) -> float:
    """So large a share of the workload as is served in so many seconds, as predicted, however unevenly it comes; above
    1 where it is over sooner."""
    high = min(_LEAST_PLAYED / len(rig.workload.requests), 1.0)
    while (took := rig.predicted(settings, known, high).seconds) <= seconds and high < 1.0:
        high = min(_GROWTH * high, 1.0)
    if took <= seconds:
        return seconds / took if took else 1.0  # all are late as they come
    low, share = 0.0, high * seconds / took
    for _ in range(_TRIES):
        took = rig.predicted(settings, known, share).seconds
        if _NEAR * seconds <= took <= seconds / _LAPS_SHARE:
            return share
        low, high = (share, high) if took <= seconds else (low, share)
        share = (low + high) / 2
    return low


def told(settings: Settings, default: Settings) -> str:
    """What is other than by default, in words."""
    usual = default.told()
    changed = {name: value for name, value in settings.told().items() if value != usual[name]}
    return ", ".join(f"{name} {value:.3g}" for name, value in changed.items()) or "the default"
