"""How many pictures each line may send."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from appliance.core.rates import BUCKETS, Rate, Rates


def test_a_line_may_send_its_burst_at_once_and_its_rate_for_good() -> None:
    rates = Rates({"line1": Rate(2.0, 3)}, None)
    assert [rates.admit("line1", 0.0) for _ in range(5)] == [True] * 3 + [False] * 2
    assert [rates.admit("line1", 0.5 * n) for n in range(1, 5)] == [True] * 4
    assert not rates.admit("line1", 2.0)


def test_a_line_without_a_limit_may_send_what_it_likes_and_others_have_the_default() -> None:
    rates = Rates({"free": None}, Rate(1.0, 1))
    assert all(rates.admit("free", 0.0) for _ in range(100))
    assert [rates.admit("other", 0.0), rates.admit("other", 0.0)] == [True, False]


def test_a_noisy_line_takes_nothing_from_others_and_no_more_lines_are_remembered_than_are_useful() -> None:
    rates = Rates({}, Rate(1.0, 1))
    for n in range(3 * BUCKETS):
        rates.admit("noisy", 0.0)
        assert rates.admit(f"line{n}", 0.0)
    assert not rates.admit("noisy", 0.0)
    assert len(rates._buckets) == BUCKETS


@given(
    per_second=st.floats(0.1, 50),
    burst=st.integers(1, 20),
    pauses=st.lists(st.floats(0, 3), min_size=1, max_size=100),
)
def test_within_any_time_no_more_come_than_the_burst_and_the_rate_allow(
    per_second: float, burst: int, pauses: list[float]
) -> None:
    rates, now, admitted = Rates({}, Rate(per_second, burst)), 0.0, list[float]()
    for pause in pauses:
        now += pause
        if rates.admit("line1", now):
            admitted.append(now)
        else:
            assert len(admitted) >= burst, "nobody is turned away before the burst is spent"
    for first in range(len(admitted)):
        for last in range(first, len(admitted)):
            assert last - first + 1 <= burst + per_second * (admitted[last] - admitted[first]) + 1e-6
