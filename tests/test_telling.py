"""What measurements tell: quantiles of what was found, and whether a target was met."""

from __future__ import annotations

import pytest

from appliance.lab.telling import Target, quantile


@pytest.mark.parametrize(
    ("values", "share", "found"),
    [([3.0, 1.0, 2.0], 0.5, 2.0), ([1.0, 2.0], 0.99, 2.0), ([1.0, 2.0], 0.0, 1.0), ([5.0], 1.0, 5.0), ([], 0.5, 0.0)],
)
def test_a_quantile_is_one_of_the_values(values: list[float], share: float, found: float) -> None:
    assert quantile(values, share) == found


def test_a_target_is_met_at_its_bound() -> None:
    assert [Target("x", value, "at most", 1.0).met for value in (0.9, 1.0, 1.1)] == [True, True, False]
    assert [Target("x", value, "at least", 1.0).met for value in (0.9, 1.0, 1.1)] == [False, True, True]
    told = {"name": "x", "value": 2.0, "relation": "at most", "bound": 1.0, "met": False}
    assert Target("x", 2.0, "at most", 1.0).told() == told
