"""Which configuration is the best: by objective, in the rounds that it shares with the default, by whole boards."""

from __future__ import annotations

from pathlib import Path

import pytest

from appliance.core.types import Request
from appliance.profiler.choosing import is_better, value, winner
from appliance.profiler.measurements import Loading, Measured
from appliance.profiler.profiled import Profiled
from appliance.profiler.progress import Lap
from appliance.profiler.rig import Outcome, late_boards
from appliance.profiler.settings import Settings

DEFAULT, ONE, TWO = Settings(1), Settings(2), Settings(3)
KNOWN = Measured((), Loading({1: 1e9}, 0.001), (), 1.0, {})


def outcome(rate: float = 10.0, p99: float = 1.0, late: float = 0.0) -> Outcome:
    return Outcome(rate, p99, late, 5)


@pytest.mark.parametrize(
    ("objective", "one", "other", "better"),
    [
        ("throughput", outcome(10.3), outcome(10.0), True),
        ("throughput", outcome(10.1), outcome(10.0), False),
        ("throughput", outcome(10.3, p99=9.0, late=1.0), outcome(10.0), True),
        ("throughput", outcome(0.0), outcome(0.0), False),
        ("p99", outcome(5.0, p99=0.97), outcome(10.0), True),
        ("p99", outcome(20.0, p99=0.99), outcome(10.0), False),
        ("deadlines", outcome(5.0, late=0.010), outcome(10.0, late=0.011), True),
        ("deadlines", outcome(20.0, late=0.011), outcome(10.0, late=0.010), False),
        ("deadlines", outcome(10.3, late=0.0103), outcome(10.0, late=0.0099), True),
        ("deadlines", outcome(10.1, late=0.0099), outcome(10.0, late=0.0103), False),
        ("deadlines", outcome(10.3, late=0.9), outcome(10.0, late=0.95), True),
    ],
)
def test_better_is_by_so_much_that_it_is_known_and_fewer_late_boards_go_before_any_throughput(
    objective: str, one: Outcome, other: Outcome, better: bool
) -> None:
    assert is_better(objective, one, other) == better
    assert not (better and is_better(objective, other, one))


def test_the_most_images_per_second_outweigh_no_late_board() -> None:
    assert value("deadlines", outcome(1.0, late=0.1)) > value("deadlines", outcome(100_000.0, late=0.101))
    assert value("deadlines", outcome(2.0, late=0.1)) > value("deadlines", outcome(1.0, late=0.1))


@pytest.mark.parametrize(("rate", "wins"), [(10.3, ONE), (10.1, DEFAULT)])
def test_who_is_as_punctual_wins_deadlines_only_by_clearly_more_throughput(rate: float, wins: Settings) -> None:
    laps = [
        lap
        for number in range(2)
        for lap in (Lap(number, DEFAULT, outcome(10.0)), Lap(number, ONE, outcome(rate, late=0.0004)))
    ]
    assert winner(laps, DEFAULT, "deadlines") == wins


def test_of_several_that_win_the_best_is_so_in_the_rounds_with_the_default() -> None:
    """A round of a quick moment, in which the default was not served, makes nobody the best."""
    laps = [
        lap
        for number in range(2)
        for lap in (
            Lap(number, DEFAULT, outcome(5.0)),
            Lap(number, ONE, outcome(6.0)),
            Lap(number, TWO, outcome(7.0)),
            Lap(number + 2, ONE, outcome(99.0)),
        )
    ]
    assert winner(laps, DEFAULT, "throughput") == TWO


@pytest.mark.parametrize(("rate", "wins"), [(9.1, ONE), (8.9, DEFAULT)])
@pytest.mark.parametrize("objective", ["deadlines", "p99"])
def test_who_is_in_time_by_being_far_slower_does_not_win(objective: str, rate: float, wins: Settings) -> None:
    laps = [
        lap
        for number in range(2)
        for lap in (Lap(number, DEFAULT, outcome(10.0, late=0.5)), Lap(number, ONE, outcome(rate, p99=0.5)))
    ]
    assert winner(laps, DEFAULT, objective) == wins


def requests(*pictures: str) -> list[Request]:
    return [Request(f"r{number}", "c", 0.0, 1.0, picture=picture) for number, picture in enumerate(pictures)]


@pytest.mark.parametrize(
    ("pictures", "late", "share"),
    [
        (["", "", "", ""], {"r1"}, 0.25),
        (["a", "a", "b", "b"], {"r1"}, 0.5),
        (["a", "a", "b", "b"], {"r0", "r1"}, 0.5),
        (["a", "a", "b", "b"], {"r1", "r2"}, 1.0),
        (["a", "a", "", ""], {"r0"}, 1 / 3),
        (["a", "a"], set[str](), 0.0),
    ],
)
def test_a_board_is_late_with_any_of_its_parts(pictures: list[str], late: set[str], share: float) -> None:
    assert late_boards(requests(*pictures), len(pictures), late) == pytest.approx(share)


def test_a_workload_that_is_played_again_has_other_boards() -> None:
    assert late_boards(requests("a", "a", "a", "a"), 2, {"r3"}) == 0.5


def found(settings: Settings, *laps: Lap) -> Profiled:
    return Profiled(settings, DEFAULT, KNOWN, [], laps, 0, {}, 0.0, 0.0, 1.0, True, Path())


def test_live_rates_are_those_of_the_rounds_in_which_both_were_served() -> None:
    """A box that was slow in one round made neither of them worse."""
    laps = [
        *(Lap(number, DEFAULT, outcome(rate)) for number, rate in enumerate((10.0, 20.0, 30.0))),
        *(Lap(number, ONE, outcome(rate)) for number, rate in ((1, 21.0), (2, 31.0), (7, 99.0))),
        Lap(0, TWO, outcome(9.0)),
    ]
    one = found(ONE, *laps)
    assert (one.live(ONE), one.live(DEFAULT), one.live(TWO)) == (26.0, 25.0, 9.0)
    default = found(DEFAULT, *laps)
    assert (default.live(DEFAULT), default.live(ONE), default.live(Settings(9))) == (20.0, 26.0, 0.0)
