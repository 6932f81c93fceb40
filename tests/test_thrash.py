"""Whether loading brings back who has just left, over the last minute."""

from __future__ import annotations

from appliance.core.thrash import BEGIN_SHARE, WINDOW_SECONDS, Sliding, Thrash


def test_a_sum_forgets_what_is_older_than_the_window() -> None:
    sliding = Sliding()
    for second in range(3):
        sliding.add(1.0, second + 0.5)
    assert [sliding.sum(at) for at in (2.6, WINDOW_SECONDS, WINDOW_SECONDS + 1, WINDOW_SECONDS + 2)] == [3, 2, 1, 0]


def test_loading_who_has_just_left_is_thrashing_and_ends_by_itself() -> None:
    thrash = _thrashing(idle_seconds=5.0)
    assert thrash.is_thrashing
    ends = thrash.ends_at
    assert ends is not None
    assert thrash.look(ends)
    assert (thrash.is_thrashing, thrash.ends_at) == (False, None)


def test_loading_who_left_long_ago_is_not() -> None:
    assert not _thrashing(idle_seconds=2 * WINDOW_SECONDS).is_thrashing


def test_who_left_although_it_was_needed_should_have_stayed_however_long_it_was_away() -> None:
    assert _thrashing(idle_seconds=2 * WINDOW_SECONDS, was_needed=True).is_thrashing


def test_a_device_that_is_hardly_used_may_load_an_expert_for_each_picture() -> None:
    assert not _thrashing(idle_seconds=5.0, load_seconds=WINDOW_SECONDS * BEGIN_SHARE / 25).is_thrashing


def _thrashing(*, idle_seconds: float, load_seconds: float = 2.0, was_needed: bool = False) -> Thrash:
    """A slot that loads an expert twenty times in a minute, each time after it was away so long."""
    thrash = Thrash(1)
    for number in range(20):
        now = 1000.0 + 3 * number
        thrash.left("a", was_needed, now - load_seconds - idle_seconds)
        thrash.loaded("a", now - load_seconds, now)
        thrash.look(now)
    return thrash
