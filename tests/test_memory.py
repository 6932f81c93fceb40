"""The ledger: nothing held twice, nothing above the budget, nothing pinned leaves."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.core.memory import Freed, Ledger, Residency
from appliance.core.types import Device, Footprint, Segment
from appliance.errors import NoRoom
from tests.kit import expert

TRUNK, HEAD_A, HEAD_B, OTHER = Segment("trunk", 80), Segment("a", 20), Segment("b", 20), Segment("other", 50)
FOOTPRINTS = {
    "a": Footprint((TRUNK, HEAD_A)),
    "b": Footprint((TRUNK, HEAD_B)),
    "c": Footprint((OTHER,)),
    "huge": Footprint((Segment("huge", 200),)),
}


def test_an_expert_goes_from_absent_over_loading_to_ready() -> None:
    ledger = _ledger()
    seen = [ledger.residency("a")]
    ledger.begin_load("a")
    seen.append(ledger.residency("a"))
    ledger.finish_load("a")
    assert [*seen, ledger.residency("a")] == [Residency.ABSENT, Residency.LOADING, Residency.READY]


def test_shared_segments_are_read_and_counted_once() -> None:
    ledger = _ledger()
    _ready(ledger, "a")
    assert ledger.begin_load("b") == ([], (HEAD_B,))
    assert ledger.used_bytes == 120


def test_a_shared_segment_stays_until_its_last_holder_leaves() -> None:
    ledger = _ledger(160)
    _ready(ledger, "a")
    _ready(ledger, "b")
    assert ledger.begin_load("c", ["a"]) == ([Freed("a", (HEAD_A,))], (OTHER,))
    assert ledger.used_bytes == 150


def test_what_the_coming_expert_shares_with_a_leaving_one_is_not_read_again() -> None:
    ledger = _ledger(100)
    _ready(ledger, "a")
    assert ledger.victims(["a"], "b") == ["a"]
    assert ledger.begin_load("b", ["a"]) == ([Freed("a", (HEAD_A,))], (HEAD_B,))
    assert ledger.used_bytes == 100


def test_no_more_leave_than_needed() -> None:
    ledger = _ledger(150)
    _ready(ledger, "a")
    _ready(ledger, "c")
    assert ledger.victims(["c", "a"], "b") == ["c"]


def test_what_does_not_fit_changes_nothing() -> None:
    ledger = _ledger(120)
    _ready(ledger, "a")
    with pytest.raises(NoRoom, match="50 more bytes are needed, 20 could be freed"):
        ledger.begin_load("c")
    assert (ledger.used_bytes, ledger.resident) == (100, ("a",))


def test_an_expert_larger_than_the_budget_never_fits() -> None:
    assert not _ledger(199).ever_fits("huge")
    assert _ledger(200).ever_fits("huge")


def test_a_pinned_expert_cannot_leave() -> None:
    ledger = _ledger()
    _ready(ledger, "a")
    ledger.pin("a")
    ledger.pin("a")
    ledger.unpin("a")
    assert not ledger.is_evictable("a")
    with pytest.raises(AssertionError, match="pinned"):
        ledger.begin_load("c", ["a"])
    ledger.unpin("a")
    assert ledger.is_evictable("a")


def test_a_failed_load_gives_its_memory_back() -> None:
    ledger = _ledger()
    ledger.begin_load("a")
    assert ledger.abort_load("a") == (TRUNK, HEAD_A)
    assert (ledger.used_bytes, ledger.is_absent("a")) == (0, True)


@pytest.mark.parametrize("move", ["finish_load", "abort_load", "pin", "unpin"])
def test_illegal_moves_are_refused(move: str) -> None:
    with pytest.raises(AssertionError, match="a"):
        getattr(_ledger(), move)("a")


@given(st.lists(st.tuples(st.sampled_from(["a", "b", "c", "d"]), st.booleans()), max_size=60), st.data())
def test_used_bytes_are_always_the_distinct_segments_held(moves: list[tuple[str, bool]], data: st.DataObject) -> None:
    shared = [Segment(str(n), 10 * (n + 1)) for n in range(5)]
    sets = {name: tuple(data.draw(st.lists(st.sampled_from(shared), min_size=1, max_size=3))) for name in "abcd"}
    ledger = Ledger(Device("cpu", 100), {name: Footprint(held) for name, held in sets.items()})
    for name, succeeds in moves:
        if not ledger.is_absent(name):
            continue
        try:
            freed, missing = ledger.begin_load(name, ledger.victims(ledger.resident, name))
        except NoRoom:
            continue
        assert not {s.id for f in freed for s in f.segments} & {s.id for s in missing}
        ledger.finish_load(name) if succeeds else ledger.abort_load(name)
        held = {segment for resident in ledger.resident for segment in sets[resident]}
        assert ledger.used_bytes == sum(segment.bytes for segment in held) <= 100


def test_who_stays_shuts_nobody_out() -> None:
    footprints = {name: expert(name, size).footprints["cpu"] for name, size in {"a": 10, "b": 10, "c": 20}.items()}
    ledger = Ledger(Device("cpu", 30), footprints)
    assert ledger.shut_out_by("a") is None
    ledger.begin_load("a")
    ledger.finish_load("a")
    ledger.keep("a")
    assert not ledger.is_evictable("a")
    assert ledger.shut_out_by("b") == ("c", 40)
    with pytest.raises(AssertionError):
        ledger.keep("b")
    ledger.give_up("a")
    assert ledger.is_evictable("a")
    assert ledger.shut_out_by("b") is None


def _ledger(budget: int = 300) -> Ledger:
    return Ledger(Device("cpu", budget), FOOTPRINTS)


def _ready(ledger: Ledger, expert: str) -> None:
    ledger.begin_load(expert)
    ledger.finish_load(expert)
