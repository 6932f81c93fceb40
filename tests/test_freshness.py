"""Pictures by the time when they were taken: stale ones, those behind newer ones, and clocks that run ahead."""

from __future__ import annotations

from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.core import freshness
from appliance.core.freshness import AHEAD_SECONDS, LINES, TOLD_SECONDS, Clocks, Newest, Place, stale

PLACE = ("line1", "-", "-", "c-e0")


@pytest.mark.parametrize(
    ("behind", "waited", "most", "is_stale"),
    [
        (9.0, 0.9, 10.0, False),
        (9.0, 1.1, 10.0, True),
        (0.0, 11.0, 10.0, True),
        (-500.0, 9.0, 10.0, False),
        (-500.0, 11.0, 10.0, True),
        (1e9, 1e9, 0.0, False),
    ],
)
def test_a_picture_is_stale_by_its_age_and_its_wait_together(
    behind: float, waited: float, most: float, is_stale: bool
) -> None:
    """One from the future was taken when it came; and 0 means that none is."""
    why = stale(behind, waited, most)
    assert (why is not None) == is_stale
    assert why is None or (why.reason, "limits.stale_seconds (10)" in why.detail) == ("stale", True)


@given(verdicts=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 30)), max_size=60), places=st.integers(1, 3))
def test_a_verdict_is_out_of_order_exactly_when_a_newer_picture_of_its_place_has_one(
    verdicts: list[tuple[int, int]], places: int
) -> None:
    """Also when only few places are remembered, and the others have to be looked up."""
    recorded = defaultdict[Place, list[str]](list)
    newest = Newest(lambda place: max(recorded[place], default=None))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(freshness, "PLACES", places)
        for which, second in verdicts:
            place, captured_at = (f"line{which}", "-", "-", "R1"), f"2026-01-31T08:15:{second:02}+00:00"
            expected = any(captured_at < other for other in recorded[place])
            assert newest.is_out_of_order(place, captured_at) == expected
            recorded[place].append(captured_at)


def test_times_with_and_without_fractions_of_a_second_are_compared_as_times() -> None:
    newest = Newest(lambda place: None)
    assert not newest.is_out_of_order(PLACE, "2026-01-31T08:15:00+00:00")
    assert not newest.is_out_of_order(PLACE, "2026-01-31T08:15:00.500000+00:00")
    assert newest.is_out_of_order(PLACE, "2026-01-31T08:15:00+00:00")


def test_a_line_whose_clock_is_far_ahead_is_told_for_a_while_and_no_more_lines_than_are_useful() -> None:
    clocks = Clocks()
    clocks.note("fine", AHEAD_SECONDS, 0.0)
    clocks.note("ahead", AHEAD_SECONDS + 1.0, 0.0)
    assert clocks.ahead(TOLD_SECONDS) == ("ahead",)
    assert clocks.ahead(TOLD_SECONDS + 1.0) == ()
    for number in range(2 * LINES):
        clocks.note(f"line{number}", 1e6, 1.0)
    assert len(clocks.ahead(1.0)) == LINES
