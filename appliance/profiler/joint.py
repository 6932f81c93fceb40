"""The joint search: everything that may be chosen at once, by Optuna (ask and tell), resumable, with pruning.

Guesses are played to the end. All others are judged in rounds, on the beginning of the workload first, and only the
best of a round is played to the end. Half of a round is the sampler's, the other half are small steps from the best so
far. A configuration that a constraint forbids is never the answer, however quick it is; the sampler learns from it.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import StorageInternalError
from optuna.trial import TrialState

from appliance.errors import ProfileError
from appliance.profiler.settings import Knob, Settings, Space

SHARES = (0.1, 1.0)
"""Of the workload: so much of it is played of each configuration, and all of it of the best of a round."""
ROUND = 4
"""So many are played at the beginning; their order there tells who is far behind, not who is a little better."""
_SAMPLED = 2
"""Of a round, at least, chosen by the sampler: it finds what no small step leads to."""
_STEP = 0.15
"""Of the way between a knob's ends: the standard deviation of a small step."""
_STARTUP_TRIALS = 6
"""Chosen by chance, before the sampler has enough to go by; guesses count."""
_REPEATS = 20
"""So often in a row what is asked for may be known already; then there is nothing more to find."""
_STUDY = "profile"
_PLAYED, _EXCESS, _GUESS = "played", "excess", "guess"


@dataclass(frozen=True, slots=True)
class Judged:
    """What a configuration comes to: more is better. `excess` is how far it breaks a constraint; above zero it does.

    One that `has_room` nowhere was not played at all.
    """

    value: float
    excess: float = 0.0
    has_room: bool = True


NO_ROOM = Judged(0.0, 1.0, has_room=False)


Judge = Callable[[Settings, float], Judged]
"""Of these settings, on so large a share of the workload, from its beginning."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One configuration that was judged on the whole workload."""

    settings: Settings
    value: float


@dataclass(frozen=True, slots=True)
class _Begun:
    """One whose beginning was played, and what it came to there."""

    trial: optuna.Trial
    settings: Settings
    value: float


class Search:
    """One study. With a `storage` it goes on where it was when it is made again."""

    def __init__(
        self,
        space: Space,
        begin: Settings,
        judge: Judge,
        *,
        guesses: Sequence[Settings] = (),
        seed: int = 1,
        storage: Path | None = None,
    ) -> None:
        """Raises ProfileError when the storage cannot be used."""
        self._knobs, self._space = space, {key: _distribution(knob) for key, knob in space.items()}
        self._begin, self._judge, self._storage = begin, judge, storage
        self._study = _opened(storage)
        # Who goes on does not draw the same again.
        seed += len(self._study.get_trials(deepcopy=False))
        self._chance = random.Random(seed)
        self._study.sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=_STARTUP_TRIALS)
        with _written(storage):
            self._enqueue(guesses)
        judged = self._study.get_trials(states=(TrialState.COMPLETE, TrialState.PRUNED))
        self._known = {self._settings(trial.params): trial for trial in judged}

    def _enqueue(self, guesses: Sequence[Settings]) -> None:
        """What is asked first: guesses, and what was being judged when a former process ended."""
        for settings in (*guesses, self._begin):
            asked = {key: getattr(settings, key) for key in self._space}
            self._study.enqueue_trial(asked, {_GUESS: settings in guesses}, skip_if_exists=True)
        for broken in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            self._study.tell(broken.number, state=TrialState.FAIL)
            self._study.enqueue_trial(broken.params, {_GUESS: broken.user_attrs.get(_GUESS, False)})

    @property
    def trials(self) -> int:
        """How many configurations were judged, to the end or not, in this process and before."""
        found = self._study.get_trials(deepcopy=False)
        return sum(_PLAYED in trial.user_attrs and trial.state != TrialState.FAIL for trial in found)

    @property
    def played(self) -> float:
        """How many times the workload was played for them."""
        return sum(float(trial.user_attrs.get(_PLAYED, 0.0)) for trial in self._study.get_trials(deepcopy=False))

    def best(self, count: int = 1) -> list[Trial]:
        """The best different ones, the best first; only such as break no constraint."""
        ended = [(settings, t) for settings, t in self._known.items() if t.state == TrialState.COMPLETE]
        found = [(t.value or 0.0, settings) for settings, t in ended if t.constraints[_EXCESS] <= 0]
        found.sort(key=lambda one: -one[0])
        return [Trial(settings, value) for value, settings in found[:count]]

    def importances(self) -> dict[str, float]:
        """How much of the difference between good and bad each setting accounts for; empty if there are too few."""
        evaluator = optuna.importance.PedAnovaImportanceEvaluator()
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # all are said to be equal where nothing is known
            try:
                return dict(optuna.importance.get_param_importances(self._study, evaluator=evaluator))
            except (ValueError, RuntimeError, UserWarning):
                return {}

    def run(self, goes_on: Callable[[], bool]) -> None:
        """Judge round after round while it `goes_on`, and there is anything new. A round that has begun is ended.

        Raises ProfileError when the storage takes no more.
        """
        with _written(self._storage):
            while begun := self._round(goes_on):
                self._end(begun)

    def _end(self, begun: list[_Begun]) -> None:
        """Play the best of a round to the end, the next best where it breaks a constraint; the others stay behind."""
        begun.sort(key=lambda one: -one.value)
        while begun and not self._is_able(begun.pop(0)):
            pass
        for behind in begun:
            self._known[behind.settings] = self._study.tell(behind.trial, state=TrialState.PRUNED)

    def _round(self, goes_on: Callable[[], bool]) -> list[_Begun]:
        """New ones, whose beginning was played; fewer when it does not go on, or nothing new is found."""
        begun, repeats = list[_Begun](), 0
        size = 1 if self._has_guesses() else ROUND
        while len(begun) < size and repeats < _REPEATS and goes_on():
            if len(begun) >= _SAMPLED:
                self._step()
            trial = self._study.ask(self._space)
            settings = self._settings(trial.params)
            if settings in self._known or any(settings == one.settings for one in begun):
                self._study.tell(trial, state=TrialState.FAIL)
                repeats += 1
                continue
            repeats = 0
            judged = self._judge(settings, SHARES[0])
            trial.set_user_attr(_PLAYED, SHARES[0] if judged.has_room else 0.0)
            if judged.excess > 0:
                self._tell(trial, settings, judged)
            else:
                trial.report(judged.value, 0)
                begun.append(_Begun(trial, settings, judged.value))
        return begun

    def _has_guesses(self) -> bool:
        """Whether any is still to be judged."""
        waiting = self._study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        return any(trial.user_attrs.get(_GUESS) for trial in waiting)

    def _step(self) -> None:
        """Ask next for what is near the best so far: one or two of its knobs, moved."""
        best = self.best()
        if not best:
            return
        params = {key: getattr(best[0].settings, key) for key in self._knobs}
        for key in self._chance.sample(sorted(params), min(self._chance.choice((1, 2)), len(params))):
            params[key] = self._knobs[key].moved(params[key], self._chance.gauss(0, _STEP))
        self._study.enqueue_trial(params)

    def _is_able(self, one: _Begun) -> bool:
        """Play it to the end; whether it breaks no constraint."""
        judged = self._judge(one.settings, SHARES[1])
        one.trial.set_user_attr(_PLAYED, sum(SHARES))
        self._tell(one.trial, one.settings, judged)
        return judged.excess <= 0

    def _tell(self, trial: optuna.Trial, settings: Settings, judged: Judged) -> None:
        trial.set_constraint(_EXCESS, judged.excess)
        self._known[settings] = self._study.tell(trial, judged.value)

    def _settings(self, params: Mapping[str, Any]) -> Settings:
        return replace(self._begin, **params)


@contextmanager
def _written(storage: Path | None) -> Iterator[None]:
    """Raises ProfileError for what the storage does not take."""
    try:
        yield
    except StorageInternalError as error:
        why, *_ = str(error.__cause__).splitlines()
        raise ProfileError(
            f"{storage} cannot be written: {why}",
            "make room there: the same command goes on from what is there already",
        ) from error


def _opened(storage: Path | None) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    address = None
    if storage is not None:
        storage.parent.mkdir(parents=True, exist_ok=True)
        address = f"sqlite:///{storage}"
    try:
        return optuna.create_study(storage=address, study_name=_STUDY, direction="maximize", load_if_exists=True)
    except Exception as error:  # SQLAlchemy's or SQLite's: the file is something else, or cannot be made
        why, *_ = str(error).splitlines() or [type(error).__name__]
        raise ProfileError(
            f"{storage} cannot be used for the search: {why}", "delete it, or make room there"
        ) from error


def _distribution(knob: Knob) -> BaseDistribution:
    if knob.is_whole:
        return IntDistribution(int(knob.low), int(knob.high), log=knob.is_log)
    return FloatDistribution(knob.low, knob.high, log=knob.is_log)
