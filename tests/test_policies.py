"""Assignment and eviction as CoServe publishes them, and what we add."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from appliance.core.costs import Cost, fit
from appliance.core.policies import Offer, Resident, assign, eviction_order


def test_the_backlog_that_ends_soonest_wins() -> None:
    assert assign([Offer("a", 5.0, 1.0), Offer("b", 3.0, 1.5)]).executor == "b"


def test_among_equal_ends_the_smaller_addition_wins() -> None:
    offers = [Offer("a", 9.0, 2.0), Offer("b", 1.0, 1.2), Offer("c", 2.0, 0.1)]
    assert assign(offers).executor == "c"


def test_one_executor_gets_everything() -> None:
    assert assign([Offer("a", 5.0, 1.0)]).executor == "a"


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 10)), min_size=1, max_size=6))
def test_the_choice_is_the_published_formula(numbers: list[tuple[float, float]]) -> None:
    offers = [Offer(str(n), total, extra) for n, (total, extra) in enumerate(numbers)]
    chosen = assign(offers)

    def score(offer: Offer) -> float:
        return max([offer.total_seconds + offer.extra_seconds, *(o.total_seconds for o in offers if o is not offer)])

    assert score(chosen) == min(score(offer) for offer in offers)


def test_orphaned_subsequent_experts_leave_first_and_the_largest_of_them_before() -> None:
    residents = [_resident("rare", p=0.01), _resident("small", orphaned=True, size=5), _resident("big", orphaned=True)]
    assert eviction_order(residents, spare_queued=False) == ["big", "small", "rare"]


def test_then_the_least_probable_leave() -> None:
    assert eviction_order([_resident("hot", p=0.5), _resident("cold", p=0.1)], spare_queued=False) == ["cold", "hot"]


def test_what_a_queued_request_needs_leaves_last_or_not_at_all() -> None:
    residents = [_resident("cold", p=0.1, queued=3), _resident("hot", p=0.5)]
    assert eviction_order(residents, spare_queued=False) == ["hot", "cold"]
    assert eviction_order(residents, spare_queued=True) == ["hot"]


def test_batch_latency_is_fitted_by_least_squares() -> None:
    slope, fixed = fit([(1, 0.014), (2, 0.024), (4, 0.044)])
    assert (round(slope, 9), round(fixed, 9)) == (0.01, 0.004)
    assert round(Cost(slope, fixed, 1.0).run_seconds(10), 9) == 0.104


def test_a_fit_is_never_negative_and_one_size_is_all_slope() -> None:
    assert fit([(1, 0.02), (2, 0.01)])[0] == 0.0
    assert fit([(4, 0.04), (4, 0.08)]) == (0.01, 0.0)


def _resident(name: str, p: float = 0.1, orphaned: bool = False, size: int = 10, queued: int = 0) -> Resident:
    return Resident(name, size, p, orphaned, queued)
