"""Costs that are learnt anew from real runs."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.core.costs import Cost
from appliance.core.relearn import FAR_OFF, LEAST_BATCHES, Learnt, Relearning

TOLD = Cost(item_seconds=0.01, fixed_seconds=0.004, load_seconds=1.0)


def learnt_of(runs: Iterable[tuple[int, float]]) -> Learnt | None:
    learning = Relearning({"cpu": {"e0": "net"}})
    for items, seconds in runs:
        learning.saw("e0", "cpu", items, seconds, TOLD)
    return learning.learnt().get(("net", "cpu"))


@given(
    item=st.floats(1e-4, 1.0),
    fixed=st.floats(0.0, 1.0),
    sizes=st.lists(st.integers(1, 16), min_size=LEAST_BATCHES, max_size=200).filter(lambda sizes: len(set(sizes)) > 1),
)
def test_runs_on_a_line_are_learnt_as_that_line(item: float, fixed: float, sizes: list[int]) -> None:
    found = learnt_of((n, item * n + fixed) for n in sizes)
    assert found is not None
    for n in (1, 16):
        assert found.item_seconds * n + found.fixed_seconds == pytest.approx(item * n + fixed, rel=1e-3)


@given(st.lists(st.tuples(st.integers(1, 16), st.floats(1e-6, 10.0)), min_size=LEAST_BATCHES, max_size=100))
def test_whatever_is_seen_neither_part_is_below_zero(runs: list[tuple[int, float]]) -> None:
    found = learnt_of(runs)
    assert found is not None
    assert found.item_seconds >= 0.0
    assert found.fixed_seconds >= 0.0
    assert found.times_as_long > 0.0


def test_batches_of_one_size_are_all_k() -> None:
    found = learnt_of([(4, 0.2)] * LEAST_BATCHES)
    assert found is not None
    assert found.item_seconds == pytest.approx(0.05)
    assert found.fixed_seconds == 0.0


def test_a_few_batches_say_nothing() -> None:
    assert learnt_of([(1, 5.0)] * (LEAST_BATCHES - 1)) is None


def test_runs_that_take_what_they_should_are_no_drift() -> None:
    found = learnt_of((n % 4 + 1, TOLD.run_seconds(n % 4 + 1)) for n in range(100))
    assert found is not None
    assert found.times_as_long == pytest.approx(1.0)
    assert not found.is_far_off()


@pytest.mark.parametrize("factor", [FAR_OFF * 1.1, 1 / FAR_OFF / 1.1])
def test_what_has_changed_long_ago_is_forgotten(factor: float) -> None:
    before = [(n % 4 + 1, TOLD.run_seconds(n % 4 + 1)) for n in range(500)]
    found = learnt_of([*before, *((n, seconds * factor) for n, seconds in before)])
    assert found is not None
    assert found.times_as_long == pytest.approx(factor, rel=0.02)
    assert found.is_far_off()


def test_experts_of_one_architecture_learn_together_and_devices_apart() -> None:
    learning = Relearning({"cpu": {"e0": "net", "e1": "net"}, "cuda:0": {"e0": "net-for-gpus"}})
    for number in range(LEAST_BATCHES):
        learning.saw(f"e{number % 2}", "cpu", 1, 0.1, TOLD)
        learning.saw("e0", "cuda:0", 1, 0.01, TOLD)
    assert {key: round(found.item_seconds, 3) for key, found in learning.learnt().items()} == {
        ("net", "cpu"): 0.1,
        ("net-for-gpus", "cuda:0"): 0.01,
    }


def test_runs_that_share_their_cores_by_design_are_no_drift() -> None:
    found = Learnt(0.02, 0.0, times_as_long=2.2)
    assert found.is_far_off()
    assert not found.is_far_off(sharing=2.0)
