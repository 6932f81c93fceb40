"""How likely experts are asked: declared, then counted and slowly forgotten, and planned at a product change."""

from __future__ import annotations

from math import isfinite

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.core import usage as usages
from appliance.core.types import Request
from appliance.core.usage import MEMORY_PICTURES, MOST_LINES, PRIOR_PICTURES, STEADY_PICTURES, Usage
from tests.kit import inspection_graph

NAMES = ("a", "b", "c", "d")
DECLARED = {"a": 0.4, "b": 0.3, "c": 0.2, "d": 0.1, "detector": 0.5}
PRODUCTS = {"boards": {"c-c": 3, "c-d": 1}, "plates": {"c-a": 1}}


def test_at_first_probabilities_are_the_declared_ones() -> None:
    usage = _usage()
    assert _probabilities(usage) == pytest.approx(DECLARED)
    usage.changes(_picture("a"))
    assert _probabilities(usage) == pytest.approx(DECLARED, abs=1e-3)


def test_the_order_follows_the_traffic() -> None:
    usage = _usage()
    for number in range(4 * MEMORY_PICTURES):
        _ask(usage, _picture("ddddddccba"[number % 10]))
    assert sorted(NAMES, key=usage.weight, reverse=True) == ["d", "c", "a", "b"]
    assert _probability(usage, "d") == pytest.approx(0.6, abs=0.05)


def test_a_burst_of_one_kind_does_not_turn_everything_over() -> None:
    usage = _usage()
    for number in range(MEMORY_PICTURES):
        _ask(usage, _picture("aaaabbbccd"[number % 10]))
    for _ in range(MEMORY_PICTURES // 100):
        _ask(usage, _picture("d"))
    assert sorted(NAMES, key=usage.weight, reverse=True) == list(NAMES)


def test_who_is_not_asked_keeps_its_weight_and_so_its_rank() -> None:
    usage = _usage()
    usage.changes(_picture("a"))
    before = {name: usage.weight(name) for name in "bcd"}
    assert not any(_ask(usage, _picture("a")) for _ in range(100))
    assert {name: usage.weight(name) for name in "bcd"} == before


def test_at_a_product_change_its_recipe_counts_as_soon_as_it_is_named_steadily() -> None:
    usage = _usage()
    for _ in range(MEMORY_PICTURES):
        _ask(usage, _picture("a", product="plates"))
    boards = [_picture("c", product="boards")] * STEADY_PICTURES
    assert [usage.changes(picture) for picture in boards] == [False] * (STEADY_PICTURES - 1) + [True]
    shares = {"a": 0.0, "b": 0.0, "c": 0.75, "d": 0.25, "detector": 0.5}
    assert _probabilities(usage) == pytest.approx(shares, abs=1e-3)


@pytest.mark.parametrize("passing", ["", "-", "unheard-of", "plates"])
def test_a_passing_picture_takes_nothing_from_what_a_line_taught(passing: str) -> None:
    usage = _usage()
    for number in range(2 * MEMORY_PICTURES):
        _ask(usage, _picture("cd"[number % 15 == 0], product="boards"))
    taught = usage.weight("c") / usage.weight("d")
    assert taught > 9, "the recipe says 3"
    for count in range(1, STEADY_PICTURES):
        for product in [passing] * count + ["boards"] * STEADY_PICTURES:
            assert not _ask(usage, _picture("c", product=product))
    assert usage.weight("c") / usage.weight("d") == pytest.approx(taught, rel=0.01)


@pytest.mark.parametrize("product", ["", "-", "unheard-of"])
def test_what_has_no_recipe_is_no_other_product_however_long_it_is_named(product: str) -> None:
    usage = _usage()
    for number in range(2 * MEMORY_PICTURES):
        _ask(usage, _picture("cd"[number % 15 == 0], product="boards"))
    for name in [product] * 10 * STEADY_PICTURES + ["boards"] * 10 * STEADY_PICTURES:
        assert not _ask(usage, _picture("c", product=name))
    assert usage.weight("c") / usage.weight("d") > 10


def test_who_comes_after_others_counts_by_how_often_they_led_there() -> None:
    usage = _usage()
    for number in range(1000):
        usage.led("c", ["detector"] if number % 10 == 0 else [])
        usage.led("d", ["detector"])
    for _ in range(STEADY_PICTURES):
        usage.changes(_picture("c", product="boards"))
    assert _probability(usage, "detector") == pytest.approx(0.75 * 0.1 + 0.25 * 1.0, abs=0.01)


def test_a_product_without_a_recipe_just_counts() -> None:
    usage = _usage()
    for _ in range(STEADY_PICTURES):
        _ask(usage, _picture("a", product="plates"))
    assert [_ask(usage, _picture("d", product=name)) for name in ("-", "", "unheard-of")] == [False] * 3
    assert _probability(usage, "a") > 0.99


def test_lines_are_mixed_by_what_they_send() -> None:
    usage = _usage()
    for number in range(4 * MEMORY_PICTURES):
        _ask(usage, _picture("a", "line1", "plates") if number % 4 else _picture("d", "line2", "boards"))
    assert _probability(usage, "a") == pytest.approx(0.75, abs=0.1)
    before = _probability(usage, "c")
    usage.changes(_picture("a", "line2", "-"))
    for _ in range(STEADY_PICTURES):
        usage.changes(_picture("a", "line2", "plates"))
    assert _probability(usage, "c") < before
    assert _probability(usage, "a") > 0.99


def test_a_line_that_stopped_counts_less_and_less() -> None:
    usage = _usage()
    for _ in range(MEMORY_PICTURES):
        _ask(usage, _picture("a", "line1", "plates"))
    for _ in range(3 * MEMORY_PICTURES):
        _ask(usage, _picture("d", "line2"))
    assert _probability(usage, "a") < 0.1


def test_products_that_take_turns_picture_by_picture_are_mixed_and_change_nothing_each_time() -> None:
    usage = _usage()
    pictures = [_picture("a", product="plates"), _picture("d", product="boards")] * 100
    assert sum(_ask(usage, picture) for picture in pictures) == 1
    assert sum(_ask(usage, _picture("d", product="boards")) for _ in range(STEADY_PICTURES)) == 1


def test_lines_beyond_the_most_share_one_part() -> None:
    usage = _usage()
    for number in range(10 * MOST_LINES):
        _ask(usage, _picture("a", f"line{number}", "plates"))
    assert len(usage._parts) == MOST_LINES + 1


def test_after_a_million_pictures_probabilities_are_still_between_zero_and_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usages, "LARGEST_STEP", 1e9)
    usage, pictures = _usage(), [_picture("a"), _picture("a", "line2", "plates"), _picture("b", "line3")]
    for number in range(1_000_000):
        _ask(usage, pictures[number % 3])
    found = _probabilities(usage)
    assert all(isfinite(p) and 0.0 <= p <= 1.0 for p in found.values())
    assert found == pytest.approx({"a": 2 / 3, "b": 1 / 3, "c": 0.0, "d": 0.0, "detector": 0.0}, abs=0.02)


@given(
    st.lists(
        st.tuples(st.sampled_from(NAMES), st.sampled_from(["", "x", "y"]), st.sampled_from(["", "-", *PRODUCTS])),
        max_size=200,
    )
)
def test_probabilities_stay_between_zero_and_one_and_in_the_order_of_the_weights(
    asked: list[tuple[str, str, str]],
) -> None:
    usage = _usage()
    for name, line, product in asked:
        _ask(usage, _picture(name, line, product))
        usage.led(name, ["detector"])
    found = _probabilities(usage)
    assert all(0.0 <= p <= 1.0 for p in found.values())
    assert sum(found[name] for name in NAMES) == pytest.approx(1.0)
    assert sorted(NAMES, key=found.__getitem__) == sorted(NAMES, key=usage.weight)


def _usage() -> Usage:
    return Usage(inspection_graph(NAMES), DECLARED, PRODUCTS)


def _picture(expert: str, line: str = "line1", product: str = "") -> Request:
    return Request("r", f"c-{expert}", 0.0, None, line, product)


def _ask(usage: Usage, picture: Request) -> bool:
    """Whether it changed everything."""
    changes = usage.changes(picture)
    usage.asked(picture, picture.component.removeprefix("c-"))
    return changes


def _probability(usage: Usage, expert: str) -> float:
    """That a picture asks the expert: 0..1."""
    total = sum(part.total for part in usage._parts.values()) or PRIOR_PICTURES
    share = usage.weight(expert) / total
    assert 0 <= share <= 1 + 1e-9
    return share


def _probabilities(usage: Usage) -> dict[str, float]:
    return {name: _probability(usage, name) for name in DECLARED}
