"""The searches: the space, the paper's two one after the other, ours of all at once, and one against the other."""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from itertools import product
from math import prod
from pathlib import Path

import optuna
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from appliance.errors import ProfileError
from appliance.lab import paper
from appliance.profiler import contest, preset
from appliance.profiler.coserve import decay_window, two_steps
from appliance.profiler.joint import NO_ROOM, ROUND, SHARES, Judge, Judged, Search
from appliance.profiler.settings import Knob, Settings, grid

BEGIN = Settings(cpu_executors=1)
SPACE = {"cpu_executors": Knob(1, 8), "batch_cap": Knob(1, 16, is_log=True), "hold_share": Knob(0.0, 1.0)}


@st.composite
def knobs(draw: st.DrawFn) -> Knob:
    is_whole, is_log = draw(st.booleans()), draw(st.booleans())
    if is_whole:
        low = draw(st.integers(1, 50))
        return Knob(low, low + draw(st.integers(1, 50)), is_log)
    beginning = draw(st.floats(0.01, 50.0))
    return Knob(beginning, beginning + draw(st.floats(0.01, 50.0)), is_log)


@given(knobs(), st.integers(2, 60))
@example(Knob(1.625, 3.375, is_log=True), 2)
@example(Knob(1, 16, is_log=True), 12)
def test_steps_go_from_one_end_to_the_other(knob: Knob, count: int) -> None:
    steps = knob.steps(count)
    assert len(steps) == len(set(steps)) <= count
    assert steps == sorted(steps)
    assert steps[0] == knob.low
    assert steps[-1] == knob.high
    assert all(knob.low <= step <= knob.high for step in steps)
    assert all(isinstance(step, int) for step in steps) == knob.is_whole


@given(knobs())
def test_a_single_step_is_the_highest(knob: Knob) -> None:
    assert knob.steps(1) == [knob.high]


@given(knobs(), st.floats(0, 1), st.floats(-0.5, 0.5))
def test_a_moved_knob_goes_that_way_and_never_beyond_an_end(knob: Knob, where: float, share: float) -> None:
    values = knob.steps(60)
    value = values[round(where * (len(values) - 1))]
    found = knob.moved(value, share)
    assert knob.low <= found <= knob.high
    assert isinstance(found, int) == knob.is_whole
    assert (found - value) * share >= 0
    if knob.is_whole and share and value not in (knob.low, knob.high):
        assert found != value


def test_a_knob_moves_by_a_share_of_its_way_or_of_its_logarithms() -> None:
    assert Knob(1, 11).moved(5, 0.3) == 8
    assert Knob(0.0, 2.0).moved(1.0, -0.25) == 0.5
    assert Knob(1, 16, is_log=True).moved(4, 0.5) == 16
    assert Knob(1, 11).moved(5, -0.001) == 4


@given(st.dictionaries(st.sampled_from(sorted(SPACE)), st.integers(0, 5)))
def test_a_grid_has_every_combination_once_and_leaves_alone_what_is_not_counted(counts: dict[str, int]) -> None:
    found = list(grid(SPACE, counts, BEGIN))
    steps = {name: SPACE[name].steps(count) for name, count in counts.items() if count}
    assert len(found) == len(set(found)) == prod(len(values) for values in steps.values())
    names = sorted(steps)
    assert {tuple(getattr(one, name) for name in names) for one in found} == set(
        product(*(steps[name] for name in names))
    )
    others = [name for name in BEGIN.told() if name not in steps]
    assert all(getattr(one, name) == getattr(BEGIN, name) for one in found for name in others)


def rising(until: int) -> Callable[[int], float]:
    """As the paper's figure: more resident experts bring more, until activations lack the room."""
    return lambda count: 10.0 + 0.3 * min(count, until) - 0.8 * max(count - until, 0)


def test_windows_are_those_of_the_paper() -> None:
    window = decay_window(rising(33), 49)
    assert [*window.measured] == [15, 28, 39]
    assert (window.low, window.high) == (28, 39)


def test_a_window_ends_where_it_falls_a_twentieth_short_of_the_line() -> None:
    def falling(share: float) -> Callable[[int], float]:
        return lambda count: (10.0 + 0.3 * count) * (share if count == 39 else 1.0)

    assert decay_window(falling(0.94), 48).high == 39
    assert decay_window(falling(0.96), 48).high == 48


def test_of_the_last_window_the_better_edge_is_taken() -> None:
    assert decay_window(rising(33), 49).best == 28
    assert decay_window(rising(100), 49).best == 49


def test_a_window_ends_where_there_is_no_room() -> None:
    window = decay_window(lambda count: None if count > 20 else float(count), 49)
    assert (window.low, window.high, window.best) == (15, 28, 15)


@given(st.integers(1, 60), st.integers(16, 60))
def test_windows_come_to_an_end_within_the_memory(until: int, most: int) -> None:
    window = decay_window(rising(until), most)
    assert 0 <= window.low < window.high <= most
    assert window.best in window.measured


def test_two_steps_play_each_configuration_once_and_those_without_room_not() -> None:
    asked: list[Settings] = []

    def measure(settings: Settings) -> float | None:
        asked.append(settings)
        if settings.gpu_executors > 4:
            return None
        experts = settings.gpu_weights_share * 100
        return rising(33)(round(experts)) + settings.gpu_executors - 3 * abs(settings.cpu_executors - 1)

    begin = Settings(cpu_executors=1, gpu_executors=3)
    found = two_steps(
        measure, begin, lambda n: n / 100, most_experts=49, gpu_executors=range(1, 7), cpu_executors=range(3)
    )
    assert set(Counter(asked).values()) == {1}
    assert found.evaluations == sum(one.gpu_executors <= 4 for one in asked)
    assert found.settings == Settings(cpu_executors=1, gpu_executors=4, gpu_weights_share=0.28)
    assert found.value == pytest.approx(10.0 + 0.3 * 28 + 4)


def hill(settings: Settings, share: float) -> Judged:
    """Best with five executors, batches of 8 and half a hold; nothing in it depends on chance."""
    value = 100 - (settings.cpu_executors - 5) ** 2 - abs(settings.batch_cap - 8) - abs(settings.hold_share - 0.5)
    return Judged(value)


def search(judge: Judge = hill, storage: Path | None = None, seed: int = 1, guesses: Sequence[Settings] = ()) -> Search:
    return Search(SPACE, BEGIN, judge, seed=seed, storage=storage, guesses=guesses)


def run(made: Search, trials: int) -> Search:
    made.run(lambda: made.trials < trials)
    return made


def test_guesses_are_played_to_the_end_before_all_others_and_nothing_twice() -> None:
    asked: list[tuple[Settings, float]] = []

    def judge(settings: Settings, share: float) -> Judged:
        asked.append((settings, share))
        return hill(settings, share)

    guess = Settings(cpu_executors=5, batch_cap=8, hold_share=0.5)
    guesses = [Settings(cpu_executors=2), guess]
    made = run(search(judge, guesses=guesses), 20)
    assert asked[:4] == [(one, share) for one in guesses for share in SHARES]
    assert asked[4][0] == BEGIN
    assert set(Counter(asked).values()) == {1}
    assert made.best()[0].settings == guess
    assert made.best()[0].value == 100


def test_the_best_are_different_ones_in_order() -> None:
    best = run(search(), 30).best(5)
    assert len({trial.settings for trial in best}) == 5
    assert [trial.value for trial in best] == sorted((trial.value for trial in best), reverse=True)
    assert all(trial.value == hill(trial.settings, 1).value for trial in best)


def test_the_same_seed_asks_the_same_and_another_does_not() -> None:
    def asked(seed: int) -> list[Settings]:
        found: list[Settings] = []

        def judge(settings: Settings, share: float) -> Judged:
            found.append(settings)
            return hill(settings, share)

        run(search(judge, seed=seed), 25)
        return found

    first = asked(1)
    assert asked(1) == first
    assert asked(2) != first


def test_a_search_that_is_made_again_goes_on_where_it_was(tmp_path: Path) -> None:
    storage = tmp_path / "not yet there" / "search.db"
    before = run(search(storage=storage), 12)
    again = search(storage=storage)
    assert (again.trials, again.played) == (before.trials, before.played)
    assert again.best(3) == before.best(3)
    assert run(again, 20).trials == 20
    assert again.best()[0].value >= before.best()[0].value


def test_what_was_begun_when_the_process_was_killed_is_asked_again_first(tmp_path: Path) -> None:
    storage = tmp_path / "search.db"
    asked: list[Settings] = []

    def interrupted(settings: Settings, share: float) -> Judged:
        asked.append(settings)
        if len(asked) > 18:  # in the fourth round: each is five plays
            raise KeyboardInterrupt
        return hill(settings, share)

    with pytest.raises(KeyboardInterrupt):
        run(search(interrupted, storage), 100)
    lost = asked[15:19]
    study = optuna.load_study(study_name="profile", storage=f"sqlite:///{storage}")
    assert [t.state for t in study.trials].count(optuna.trial.TrialState.RUNNING) == len(lost), "as a kill leaves it"
    asked.clear()

    def judge(settings: Settings, share: float) -> Judged:
        if share < 1:
            asked.append(settings)
        return hill(settings, share)

    again = search(judge, storage)
    assert again.trials == 12
    run(again, again.trials + 4)
    assert asked[:4] == lost


def test_what_breaks_a_constraint_never_wins_and_what_has_no_room_is_not_played() -> None:
    def judge(settings: Settings, share: float) -> Judged:
        if settings.cpu_executors > 6:
            return NO_ROOM
        return Judged(1000.0 * settings.cpu_executors, excess=max(settings.cpu_executors - 3, 0))

    made = run(search(judge), 40)
    assert {trial.settings.cpu_executors for trial in made.best(40)} <= {1, 2, 3}
    assert made.best()[0].settings.cpu_executors == 3
    nowhere = run(search(lambda settings, share: NO_ROOM), 10)
    assert (nowhere.best(), nowhere.played, nowhere.trials) == ([], 0.0, 10)


def test_of_a_round_only_the_best_at_the_beginning_is_played_to_the_end() -> None:
    played: list[tuple[Settings, float]] = []

    def judge(settings: Settings, share: float) -> Judged:
        played.append((settings, share))
        return hill(settings, share)

    made = run(search(judge), 42)
    rounds = [played[at : at + ROUND + 1] for at in range(0, 50, ROUND + 1)]
    for *begun, (ended, share) in rounds:
        assert {share for _, share in begun} == {SHARES[0]}
        assert share == SHARES[1]
        assert ended == max((one for one, _ in begun), key=lambda one: hill(one, 1).value)
    assert [share for _, share in played[50:]] == [SHARES[0], SHARES[0], SHARES[1]], "a round that has begun is ended"
    assert made.trials == 42
    assert made.played == pytest.approx(sum(share for _, share in played))


def test_where_the_best_of_a_round_breaks_a_constraint_the_next_is_played_to_the_end() -> None:
    ended: list[int] = []

    def judge(settings: Settings, share: float) -> Judged:
        if share < 1:
            return Judged(settings.cpu_executors)
        ended.append(settings.cpu_executors)
        return Judged(settings.cpu_executors, excess=max(settings.cpu_executors - 2, 0))

    made = Search({"cpu_executors": Knob(1, 4)}, BEGIN, judge)
    made.run(lambda: made.trials < 4)
    assert ended == [4, 3, 2]
    assert [trial.settings.cpu_executors for trial in made.best(4)] == [2]


def test_half_of_what_is_asked_is_near_the_best_so_far_and_half_is_the_samplers() -> None:
    changed: list[bool] = []
    best = 0.0, BEGIN

    def judge(settings: Settings, share: float) -> Judged:
        nonlocal best
        value = hill(settings, share).value
        if share == 1:
            best = max(best, (value, settings), key=lambda one: one[0])
        else:
            changed.append(settings.hold_share != best[1].hold_share)
        return Judged(value)

    run(search(judge), 200)
    assert 0.6 < sum(changed) / len(changed) < 0.9, "the sampler never chooses the very share, a step mostly leaves it"


@pytest.mark.parametrize("seed", range(1, 6))
def test_few_plays_climb_a_hill(seed: int) -> None:
    made = search(seed=seed)
    made.run(lambda: made.played + sum(SHARES) <= 15)
    assert made.best()[0].value > 98.5


def test_a_space_that_is_known_in_full_ends_the_search() -> None:
    made = Search({"cpu_executors": Knob(1, 3)}, BEGIN, lambda settings, share: Judged(settings.cpu_executors))
    made.run(lambda: True)
    assert made.trials == 3
    assert made.best()[0].settings.cpu_executors == 3


def test_importances_are_shares_of_the_settings_that_were_searched() -> None:
    assert search().importances() == {}, "nothing is known yet"
    found = run(search(), 40).importances()
    assert found.keys() == SPACE.keys()
    assert sum(found.values()) == pytest.approx(1.0)


def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    storage = tmp_path / "search.db"
    storage.write_bytes(b"this is not a database, whatever its name says" * 100)
    with pytest.raises(ProfileError, match=r"search\.db.*delete it"):
        search(storage=storage)
    storage.unlink()
    with sqlite3.connect(storage) as other:
        other.execute("CREATE TABLE studies (what TEXT)")
    other.close()
    with pytest.raises(ProfileError, match=r"search\.db"):
        search(storage=storage)


def test_a_storage_that_takes_no_more_is_named(tmp_path: Path) -> None:
    storage = tmp_path / "search.db"

    def broken(settings: Settings, share: float) -> Judged:
        with closing(sqlite3.connect(storage)) as other:
            other.execute("DROP TABLE IF EXISTS trial_values")
        return hill(settings, share)

    with pytest.raises(ProfileError, match=r"search\.db cannot be written: .*no such table.*same command"):
        run(search(broken, storage), 20)


@pytest.mark.parametrize(("device", "task"), [("uma", "A1"), ("uma", "B1")])
def test_the_joint_search_finds_no_less_than_the_papers_two_with_no_more_plays(device: str, task: str) -> None:
    found = contest.row(paper.MACHINES[device], task, seed=1)
    assert found["joint_plays"] <= found["two_steps_plays"]
    assert found["joint_to_two_steps"] >= 1.0
    assert found["joint_to_casual"] >= found["paper_best_to_casual"] > 1.0
    assert all(target["met"] for target in found["targets"])
    for name in ("two_steps", "joint"):
        settings = Settings(**found[f"{name}_settings"])
        value = preset.throughput(paper.MACHINES[device], paper.JOBS[task], "coserve", settings)
        assert value == found[f"{name}_images_per_second"], "what is told is what it comes to"


@pytest.mark.parametrize("seed", [1, 2, 3, 4])
def test_without_guesses_too_the_joint_search_finds_more_than_the_papers_two_do(seed: int) -> None:
    machine, job = paper.MACHINES["uma"], paper.JOBS["A1"]
    plays, stepped = 8, 26.300839522797745
    found = contest.joint_search(machine, job, plays, seed, guesses=())
    assert found.played <= plays
    assert found.value >= stepped


def test_what_a_box_has_by_default_lies_within_what_is_searched() -> None:
    assert Knob(0.5, 0.98).including(0.1) == Knob(0.1, 0.98)
    assert Knob(1, 4).including(6) == Knob(1, 6)
    assert Knob(1, 4, is_log=True).including(2) == Knob(1, 4, is_log=True)
