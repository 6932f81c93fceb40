"""The joint search: everything that may be chosen at once, by Optuna (ask and tell), resumable, with pruning.

A configuration is judged on the beginning of the workload first; where most others came to more there, the whole of it
is not played. One that a constraint forbids is never the answer, however quick it is; the sampler learns from it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState

from appliance.errors import ProfileError
from appliance.profiler.settings import Knob, Settings, Space

SHARES = (0.2, 1.0)
"""Of the workload: so much of it is played first, and then all."""
_STARTUP_TRIALS = 6
"""Chosen by chance, before the sampler has enough to go by; guesses count."""
_REPEATS = 20
"""So often in a row the sampler may ask for what is known already; then it has nothing more to find."""
_KEPT = 50.0
"""Per cent of the configurations that are played to the end."""
_PLAYED, _EXCESS = "played", "excess"


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


class Search:
    """One study. With a `storage` it goes on where it was when it is made again with the same name."""

    def __init__(
        self,
        space: Space,
        begin: Settings,
        judge: Judge,
        *,
        guesses: Sequence[Settings] = (),
        seed: int = 1,
        name: str = "profile",
        storage: Path | None = None,
    ) -> None:
        """Raises ProfileError when the storage cannot be used."""
        self._space = {key: _distribution(knob) for key, knob in space.items()}
        self._begin, self._judge = begin, judge
        self._study = _opened(name, storage, seed)
        for guess in (begin, *guesses):
            self._study.enqueue_trial({key: getattr(guess, key) for key in space}, skip_if_exists=True)
        self._known = {self._settings(t.params): t for t in self._study.get_trials(states=(TrialState.COMPLETE,))}
        for broken in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):  # the process was killed
            self._study.tell(broken.number, state=TrialState.FAIL)
            self._study.enqueue_trial(broken.params)

    @property
    def trials(self) -> int:
        """How many configurations were judged, to the end or not, in this process and before."""
        return sum(_PLAYED in trial.user_attrs for trial in self._study.get_trials(deepcopy=False))

    @property
    def played(self) -> float:
        """How many times the workload was played for them."""
        return sum(float(trial.user_attrs.get(_PLAYED, 0.0)) for trial in self._study.get_trials(deepcopy=False))

    def best(self, count: int = 1) -> list[Trial]:
        """The best different ones, the best first; only such as break no constraint."""
        found = [(t.value or 0.0, settings) for settings, t in self._known.items() if t.constraints[_EXCESS] <= 0]
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
        """Judge one after the other while it `goes_on`, and the sampler has anything new."""
        repeats = 0
        while repeats < _REPEATS and goes_on():
            repeats = 0 if self._one() else repeats + 1

    def _one(self) -> bool:
        """Whether it was a new one."""
        trial = self._study.ask(self._space)
        settings = self._settings(trial.params)
        if (known := self._known.get(settings)) is not None:
            trial.set_constraint(_EXCESS, known.constraints[_EXCESS])
            self._study.tell(trial, known.value)
            return False
        played = 0.0
        for step, share in enumerate(SHARES):
            judged = self._judge(settings, share)
            played += share if judged.has_room else 0.0
            if judged.excess > 0 or share == 1:
                break
            trial.report(judged.value, step)
            if trial.should_prune():
                trial.set_user_attr(_PLAYED, played)
                self._study.tell(trial, state=TrialState.PRUNED)
                return True
        trial.set_user_attr(_PLAYED, played)
        trial.set_constraint(_EXCESS, judged.excess)
        self._known[settings] = self._study.tell(trial, judged.value)
        return True

    def _settings(self, params: Mapping[str, Any]) -> Settings:
        return replace(self._begin, **params)


def _opened(name: str, storage: Path | None, seed: int) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    address = None
    if storage is not None:
        storage.parent.mkdir(parents=True, exist_ok=True)
        address = f"sqlite:///{storage}"
    try:
        study = optuna.create_study(storage=address, study_name=name, direction="maximize", load_if_exists=True)
    except Exception as error:  # SQLAlchemy's or SQLite's: the file is something else, or cannot be made
        why, *_ = str(error).splitlines() or [type(error).__name__]
        raise ProfileError(f"{storage} cannot be used for the search: {why}", "delete it") from error
    # Who goes on does not draw the same again.
    study.sampler = optuna.samplers.TPESampler(
        seed=seed + len(study.get_trials(deepcopy=False)),
        n_startup_trials=_STARTUP_TRIALS,
    )
    study.pruner = optuna.pruners.PercentilePruner(_KEPT, n_startup_trials=_STARTUP_TRIALS)
    return study


def _distribution(knob: Knob) -> BaseDistribution:
    if knob.is_whole:
        return IntDistribution(int(knob.low), int(knob.high), log=knob.is_log)
    return FloatDistribution(knob.low, knob.high, log=knob.is_log)
