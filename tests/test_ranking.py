"""The ordered set in which who is first is found at once."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from appliance.core.ranking import Ranking


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.none() | st.integers(0, 3)), max_size=60))
def test_it_is_always_what_sorting_everybody_would_give(moves: list[tuple[str, int | None]]) -> None:
    ranking, known = Ranking[str, int](), dict[str, int]()
    for item, key in moves:
        if key is None:
            assert ranking.drop(item) == (item in known)
            known.pop(item, None)
        else:
            assert ranking.put(item, key) == (known.get(item) != key)
            known[item] = key
        ranked = sorted((key, item) for item, key in known.items())
        assert list(ranking.ranked()) == ranked
        assert (ranking.first(), ranking.least()) == ((ranked[0][1], ranked[0][0]) if ranked else (None, None))
        assert (list(ranking), len(ranking)) == ([item for _, item in ranked], len(known))
        assert all((item in ranking) == (item in known) for item in "abcdef")


@given(st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 3)), st.integers(0, 8))
def test_so_many_of_the_first_leave_at_once(known: dict[str, int], count: int) -> None:
    ranking = Ranking[str, int]()
    for item, key in known.items():
        ranking.put(item, key)
    before = list(ranking)
    assert ranking.drop_first(count) == before[:count]
    assert list(ranking) == before[count:]
    assert all((item in ranking) == (item in before[count:]) for item in "abcdef")
