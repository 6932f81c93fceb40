"""Assignment and eviction as CoServe publishes them, and what we add."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.core.costs import LEAST_SHARE, Cost, fit
from appliance.core.policies import (
    Offer,
    Resident,
    dealt,
    filled,
    first_in,
    in_turn,
    least_loss,
    least_probable,
    least_recently_used,
    oracle,
    soonest,
)


def test_the_backlog_that_ends_soonest_wins() -> None:
    assert soonest([Offer("a", 5.0, 1.0), Offer("b", 3.0, 1.5)], 0).executor == "b"


def test_among_equal_ends_the_smaller_addition_wins() -> None:
    offers = [Offer("a", 9.0, 2.0), Offer("b", 1.0, 1.2), Offer("c", 2.0, 0.1)]
    assert soonest(offers, 0).executor == "c"


def test_one_executor_gets_everything() -> None:
    assert soonest([Offer("a", 5.0, 1.0)], 0).executor == "a"


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 10)), min_size=1, max_size=6))
def test_the_choice_is_the_published_formula(numbers: list[tuple[float, float]]) -> None:
    offers = [Offer(str(n), total, extra) for n, (total, extra) in enumerate(numbers)]
    chosen = soonest(offers, 0)

    def score(offer: Offer) -> float:
        return max([offer.total_seconds + offer.extra_seconds, *(o.total_seconds for o in offers if o is not offer)])

    assert score(chosen) == min(score(offer) for offer in offers)


def test_among_equal_scores_the_smaller_addition_is_published_too() -> None:
    offers = [Offer("a", 9.0, 1.0), Offer("b", 5.0, 3.0), Offer("c", 5.0, 2.0), Offer("d", 10.0, 0.5)]
    assert soonest(offers, 0).executor == "a"


def test_even_spread_goes_round() -> None:
    offers = [Offer(name, 0.0, 1.0) for name in "abc"]
    assert [in_turn(offers, turn).executor for turn in range(5)] == ["a", "b", "c", "a", "b"]


def test_every_policy_has_its_own_notion_of_worth() -> None:
    """`x` came first, was used last, is the likelier one and the larger one; the least worth leaves first."""
    x, y = Resident("x", 400, 1.0, 0.3, 1.0, 9.0), Resident("y", 100, 1.0, 0.1, 2.0, 3.0)
    assert least_recently_used(x, 10.0) > least_recently_used(y, 10.0)
    assert first_in(x, 10.0) < first_in(y, 10.0)
    assert least_probable(x, 10.0) > least_probable(y, 10.0)
    assert least_loss(x, 10.0) < least_loss(y, 10.0)


def test_the_oracle_lets_go_whom_nobody_will_ask_for_longest() -> None:
    worth = oracle({"x": [1.0, 5.0], "y": [2.0, 9.0]}).worth
    x, y, z = (Resident(name, 10, 1.0, 0.1, 0.0, 0.0) for name in "xyz")
    assert worth(z, 0.0) < worth(y, 0.0) < worth(x, 0.0)
    assert worth(x, 5.0) < worth(y, 5.0)


def test_at_the_start_experts_are_dealt_round_robin_until_memory_is_full() -> None:
    sizes = [(name, 10) for name in "abcdef"]
    assert dealt(sizes, {"p": 20, "q": 30}) == [("p", "a"), ("q", "b"), ("p", "c"), ("q", "d"), ("q", "e")]


def test_or_the_first_pool_is_filled_first() -> None:
    assert filled([(name, 10) for name in "abcd"], {"p": 20, "q": 10}) == [("p", "a"), ("p", "b"), ("q", "c")]


def test_batch_latency_is_fitted_by_least_squares() -> None:
    slope, fixed = fit([(1, 0.014), (2, 0.024), (4, 0.044)])
    assert (round(slope, 9), round(fixed, 9)) == (0.01, 0.004)
    assert round(Cost(slope, fixed, 1.0).run_seconds(10), 9) == 0.104


def test_a_fit_is_never_negative() -> None:
    assert fit([(1, 1.0), (2, 3.0)]) == (2.0, 0.0)


def test_where_nothing_tells_pictures_from_the_batch_all_of_it_is_theirs() -> None:
    assert fit([(4, 0.04), (4, 0.08)]) == (0.01, 0.0)
    assert fit([(1, 0.02), (2, 0.02), (4, 0.02)]) == (0.005, 0.0)
    assert fit([(1, 0.02), (2, 0.01)]) == (0.005, 0.0)


@pytest.mark.parametrize("slope", [1e-18, 1e-12, 3.6e-8, 1e-6, 0.0001])
def test_nor_does_a_line_that_hardly_rises(slope: float) -> None:
    seconds, fixed = fit([(1, 0.005), (2, 0.005 + slope), (4, 0.005 + 3 * slope)])
    assert (seconds, fixed) == ((0.005 + 3 * slope) / 4, 0.0)


@given(
    item=st.floats(1e-6, 1.0), share=st.floats(0.0, 30.0), sizes=st.sampled_from([(1, 2), (1, 2, 4), (1, 2, 4, 8, 16)])
)
def test_where_pictures_tell_the_fit_is_exact(item: float, share: float, sizes: tuple[int, ...]) -> None:
    found = fit([(n, item * n + share * item) for n in sizes])
    assert share > 9 * sizes[-1] or found == pytest.approx((item, share * item), rel=1e-6, abs=1e-6 * item)


@given(st.lists(st.tuples(st.integers(1, 16), st.floats(1e-9, 100.0)), min_size=1, max_size=8))
def test_no_fit_takes_pictures_for_free_and_none_is_below_zero(samples: list[tuple[int, float]]) -> None:
    seconds, fixed = fit(samples)
    assert seconds >= LEAST_SHARE * min(s / n for n, s in samples)
    assert fixed >= 0.0
