"""The offline profiler (CoServe, ASPLOS 2025, §4.5, and beyond): measure, search, confirm live, and say what is best.

What was done is kept beside the search's storage, so that a profiler that was killed goes on where it was. A
configuration is never chosen on a prediction alone: it has to beat the defaults live, in the same rounds.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from appliance.errors import ConfigError, DeviceError, OutOfMemory, ProfileError
from appliance.lab.telling import Say
from appliance.profiler.joint import NO_ROOM, Judged, Search, Trial
from appliance.profiler.measure import LOADS, measured
from appliance.profiler.measurements import Handover, Loading, Measured, handover_fit
from appliance.profiler.rig import Int8Part, Outcome, Rig, Watched
from appliance.profiler.settings import Settings

REFUSED = Outcome(0.0, 1e9, 1.0, 0)
"""Of a candidate that a device refused."""
OBJECTIVES = ("throughput", "deadlines", "p99")
_MEASURE_SHARE, _SEARCH_SHARE = 0.15, 0.2
"""Of the time, at most, for measuring each kind of device and for the search; what is left is for confirming live."""
_ARCHITECTURE_SECONDS = 20.0
"""For measuring each, at most: more repeats tell nothing new."""
_LEAST_MEASURING_SECONDS, _AMPLE_SECONDS = 6.0, 30.0
"""For measuring each kind of device: at least so long, whatever the time, or its children have hardly started; and
from so long on, who has measured nothing is not given more."""
LEAST_TRIALS, _MOST_TRIALS = 12, 5000
"""The guesses and a few more, whatever the time."""
_VAIN_TRIALS = 200
"""After so many that brought nothing better the search ends."""
ROUNDS = 2
"""So often at least whoever wins has been served beside the default."""
CANDIDATES = 4
"""Of the search's best, at most, that are served live; two at least."""
_RANKED = 200
"""Of which these are chosen."""
LEAST_REQUESTS = 100
_WATCHED_SECONDS = 3.0
"""Of the default served live, with one executor and as it is."""
_FAR_OFF = 1.15
"""Times as long as measured, or as short: then runs were measured beside each other in a moment unlike others. Less is
the mix of batches, and the noise of a few seconds: to count it made predictions worse (experts of 1 and 24 ms)."""
_LAPS_SHARE = 0.85
"""Of the time that is left, for playing: what a lap needs to begin and to end takes the rest."""
_LEAST_LAP_SECONDS = 5.0
"""A workload that is over sooner is played again, where the time allows it: in the first second everything is new, and
laps of one second differed by a fifth (experts of 1 ms, 2026-11-22)."""
LEAST_GAIN = 0.01
"""Who is better by less is not known to be better at all."""
_LEAST_OF_DEFAULT = 0.9
"""Where waits or deadlines are what counts, throughput may fall so far, as predicted."""


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
class Lap:
    """A configuration served live once, in one of the rounds."""

    round: int
    settings: Settings
    outcome: Outcome


@dataclass(slots=True)
class Progress:
    """What is known so far. Written after each step; a later run begins with it."""

    path: Path
    spent_seconds: float = 0.0
    measured: Measured | None = None
    laps: list[Lap] = field(default_factory=list)
    share: float | None = None

    @classmethod
    def read(cls, path: Path) -> Progress:
        try:
            found = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError):  # there is none, or it was cut off: begin anew
            return cls(path)
        laps = [Lap(one["round"], Settings(**one["settings"]), Outcome(**one["outcome"])) for one in found["laps"]]
        known = None if found["measured"] is None else Measured.from_json(found["measured"])
        return cls(path, found["spent_seconds"], known, laps, found["share"])

    def write(self) -> None:
        beside = self.path.with_suffix(".new")
        beside.write_text(
            json.dumps(
                {
                    "spent_seconds": self.spent_seconds,
                    "measured": None if self.measured is None else self.measured.as_json(),
                    "laps": [asdict(lap) for lap in self.laps],
                    "share": self.share,
                }
            ),
            "utf-8",
        )
        beside.replace(self.path)


@dataclass(frozen=True, slots=True)
class Profiled:
    """What the profiler came to. `predicted` are the best configurations of the search, the best first."""

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

    @property
    def confirmed(self) -> int:
        return len({lap.settings for lap in self.laps})

    def live(self, settings: Settings) -> float:
        """Images per second, the median of its laps; 0 where it was not served."""
        known = [lap.outcome.images_per_second for lap in self.laps if lap.settings == settings]
        return statistics.median(known) if known else 0.0


def profiled(rig: Rig, default: Settings, plan: Plan, say: Say = lambda line: None) -> Profiled:
    """Measure, search and confirm within the plan's time. Ctrl-C ends it early, with what is known by then.

    Raises ApplianceError when nothing can be measured here, or a picture gets no answer.
    """
    home = plan.folder / _key(rig, default, plan)
    home.mkdir(parents=True, exist_ok=True)
    run = _Run(rig, default, plan, Progress.read(home / "progress.json"), home / "search.db", say)
    found = run.all()
    if found.is_complete:
        shutil.rmtree(home, ignore_errors=True)
    return found


class _Run:
    """One sitting of the profiler."""

    def __init__(self, rig: Rig, default: Settings, plan: Plan, known: Progress, storage: Path, say: Say) -> None:
        if not rig.holds(default):
            raise ConfigError("the default settings do not hold the largest expert", "raise memory.weights")
        self._rig, self._default, self._plan, self._known, self._say = rig, default, plan, known, say
        self._storage = storage
        self._began, self._spent = time.monotonic(), known.spent_seconds
        self._is_complete = True
        self._lap_seconds = 0.0

    @property
    def _seconds(self) -> float:
        """Of the budget, with those of sittings before."""
        return self._spent + time.monotonic() - self._began

    def all(self) -> Profiled:
        known = self._measured()
        usual = self._default.told()
        search = Search(
            {name: knob.including(usual[name]) for name, knob in self._rig.space().items()},
            self._default,
            self._judge(known),
            guesses=guesses(self._rig, self._default),
            seed=self._plan.seed,
            storage=self._storage,
        )
        with self._interruptible():
            self._search(search)
        best = diverse(search.best(_RANKED))
        with self._interruptible():
            if self._is_complete:
                self._confirm(known, [trial.settings for trial in best])
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
        )

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
        self._note()
        return found

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
        rate = self._rig.predicted(settings, known).images_per_second
        return self._rig.watched(settings, known, rate * _WATCHED_SECONDS / len(self._rig.workload.requests))

    def _measure(self, budget_seconds: float) -> Measured:
        return measured(
            self._rig.compiled,
            self._rig.bundles,
            self._rig.segment_path,
            threads=self._rig.thread_counts,
            executors=self._rig.cores,
            budget_seconds=budget_seconds,
            say=self._say,
            gpus=self._rig.gpus,
        )

    def _judge(self, known: Measured) -> Callable[[Settings, float], Judged]:
        goal = self._rig.predicted(self._default, known).images_per_second * _LEAST_OF_DEFAULT

        def judge(settings: Settings, share: float) -> Judged:
            if not self._rig.holds(settings):
                return NO_ROOM
            found = self._rig.predicted(settings, known, share)
            excess = 0.0
            if self._plan.objective != "throughput" and share == 1:
                excess = max(goal - found.images_per_second, 0.0) / goal
            return Judged(_value(self._plan.objective, found), excess)

        return judge

    def _search(self, search: Search) -> None:
        until = self._seconds + _SEARCH_SHARE * self._plan.budget_seconds
        self._plan.begun("search", until - self._seconds)
        told, best, best_at = 0, 0.0, 0

        def goes_on() -> bool:
            nonlocal told, best, best_at
            if (found := search.best()) and found[0].value != best:
                best, best_at = found[0].value, search.trials
            if search.trials >= told + 25:
                told = search.trials
                self._say(f"searching: {told} configurations, the best predicted at {best:.1f}")
            most = min(best_at + _VAIN_TRIALS, _MOST_TRIALS)
            return search.trials < LEAST_TRIALS or (self._seconds < until and search.trials < most)

        search.run(goes_on)

    def _confirm(self, known: Measured, candidates: Sequence[Settings]) -> None:
        """The default beside two candidates, and beside the better of them once more; then, as long as there is time,
        the other candidates, and the best of all again."""
        others = [one for one in candidates if one != self._default]
        if not others:
            return
        self._plan.begun("confirm", self._plan.budget_seconds - self._seconds)
        if self._known.share is None:
            self._known.share = self._lap_share(known, 1 + len(others[:2]) + 2 * (ROUNDS - 1))
        for settings in (self._default, *others[:2]):
            self._serve(known, 0, settings)
        self._pair(known, 1)
        for settings in others[2:]:
            if self._has_time(1):
                self._serve(known, 0, settings)
        for number in range(2, 2 + CANDIDATES):
            if self._has_time(2):
                self._pair(known, number)

    def _pair(self, known: Measured, number: int) -> None:
        """The best so far and the default, first one and then the other first."""
        best = max((lap.settings for lap in self._known.laps if lap.settings != self._default), key=self._so_far)
        for settings in (best, self._default) if number % 2 else (self._default, best):
            self._serve(known, number, settings)

    def _so_far(self, settings: Settings) -> float:
        return statistics.median(
            _value(self._plan.objective, lap.outcome) for lap in self._known.laps if lap.settings == settings
        )

    def _has_time(self, laps: int) -> bool:
        """For as many laps more, if they take as long as those before."""
        return self._seconds + laps * self._lap_seconds <= self._plan.budget_seconds

    def _lap_share(self, known: Measured, laps: int) -> float:
        """So much of the workload that so many laps fit the time that is left; of a short one more than once."""
        whole = self._rig.predicted(self._default, known)
        count = len(self._rig.workload.requests)
        left = _LAPS_SHARE * max(self._plan.budget_seconds - self._seconds, 0.0)
        seconds = count / whole.images_per_second
        return min(max(left / laps / seconds, LEAST_REQUESTS / count), max(_LEAST_LAP_SECONDS / seconds, 1.0))

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


def learnt(known: Measured, one: Watched, all_at_work: Watched, threads: int) -> Measured:
    """With what passes between batches, small and large ones; and, where all executors of so many threads at work took
    far longer or shorter than expected, with contention as it was then."""
    contention = known.contention
    if not 1 / _FAR_OFF < (off := all_at_work.times_as_long) < _FAR_OFF:
        contention = tuple(other.scaled(off) if other.threads == threads else other for other in contention)
    handover = handover_fit([*one.handovers, *all_at_work.handovers])
    return _with_handover(replace(known, contention=contention), handover)


def _with_handover(known: Measured, found: Handover) -> Measured:
    int8 = None if known.int8 is None else replace(known.int8, handover=found)
    return replace(known, handover=found, int8=int8)


def winner(laps: Sequence[Lap], default: Settings, objective: str) -> Settings:
    """Whoever was served often enough beside the default and was clearly better in more than half of these rounds; of
    several the best; else the default."""
    rounds: dict[Settings, dict[int, float]] = {}
    for lap in laps:
        rounds.setdefault(lap.settings, {})[lap.round] = _value(objective, lap.outcome)
    usual = rounds.pop(default, {})
    able = dict[Settings, float]()
    for settings, values in rounds.items():
        both = values.keys() & usual.keys()
        better = sum(values[number] > usual[number] + LEAST_GAIN * abs(usual[number]) for number in both)
        if len(both) >= ROUNDS and 2 * better > len(both):
            able[settings] = statistics.median(values.values())
    return max(able, key=lambda settings: able[settings], default=default)


def diverse(ranked: Sequence[Trial]) -> list[Trial]:
    """The best of each number of executors and threads in each precision first, then the next best of all: where a
    prediction is wrong, it is so for all that share these."""
    first, rest = dict[tuple[int, int, int, int], Trial](), list[Trial]()
    for trial in ranked:
        settings = trial.settings
        key = settings.cpu_executors, settings.gpu_executors, settings.threads, settings.int8
        if first.setdefault(key, trial) is not trial:
            rest.append(trial)
    return [*first.values(), *rest][:CANDIDATES]


def guesses(rig: Rig, default: Settings) -> list[Settings]:
    """Where experience would look first."""
    around = [
        replace(default, cpu_executors=rig.cores, load_slots=1),
        replace(default, cpu_executors=1, threads=rig.cores),
        replace(default, cpu_executors=rig.cores + 1),
        replace(default, weights_share=min(default.weights_share + 0.05, 0.97)),
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


def told(settings: Settings, default: Settings) -> str:
    """What is other than by default, in words."""
    usual = default.told()
    changed = {name: value for name, value in settings.told().items() if value != usual[name]}
    return ", ".join(f"{name} {value:.3g}" for name, value in changed.items()) or "the default"


def _value(objective: str, found: Outcome) -> float:
    """More is better."""
    match objective:
        case "deadlines":  # of those that are equally in time, the quickest
            return 1.0 - found.late_share + found.images_per_second * 1e-6
        case "p99":
            return -found.wait_p99_seconds
    return found.images_per_second


def _key(rig: Rig, default: Settings, plan: Plan) -> str:
    """Names what is searched: another workload, box or memory is another search."""
    asks = [(request.component, request.arrived_seconds, request.deadline_seconds) for request in rig.workload.requests]
    experts = {name: (one.architecture, one.bytes) for name, one in rig.compiled.items()}
    gpus = None if rig.gpus is None else (rig.gpus.names, rig.gpus.memory_bytes, sorted(rig.gpus.compiled))
    int8 = None if rig.int8 is None else {name: one.architecture for name, one in rig.int8.compiled.items()}
    described = repr((asks, experts, rig.memory_bytes, rig.cores, gpus, int8, default, plan.objective, plan.seed))
    return hashlib.sha256(described.encode()).hexdigest()[:16]
