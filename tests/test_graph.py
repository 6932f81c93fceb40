"""The expert graph: conditions, checks, and one request's way through it."""

from __future__ import annotations

import pytest

from appliance.core.graph import Condition, Edge, Progress, Table, compile_graph, draw, start
from appliance.core.types import Finding, Outcome, Refusal, Step
from appliance.errors import GraphError
from tests.kit import DOUBTFUL, OPEN, SOUND, inspection_graph, request


@pytest.mark.parametrize(
    ("condition", "finding", "holds"),
    [
        (Condition(), SOUND, True),
        (Condition(label="sound"), SOUND, True),
        (Condition(label="sound"), OPEN, False),
        (Condition(not_label="sound"), OPEN, True),
        (Condition(not_label="sound"), SOUND, False),
        (Condition(label="sound", score_below=0.8), DOUBTFUL, True),
        (Condition(label="sound", score_below=0.7), DOUBTFUL, False),
        (Condition(score_at_least=0.7), DOUBTFUL, True),
        (Condition(score_at_least=0.71), DOUBTFUL, False),
    ],
)
def test_a_condition_holds_when_every_given_part_fits(condition: Condition, finding: Finding, holds: bool) -> None:
    assert condition.holds(finding) is holds


def test_a_condition_must_be_met_by_one_finding_alone() -> None:
    weak_open, sure_short = Finding("open", 0.3, False), Finding("short", 0.9, True)
    assert not Edge("a", "b", (Condition(label="open", score_at_least=0.5),)).taken([weak_open, sure_short])


def test_no_finding_takes_only_an_unconditional_edge() -> None:
    always, never = Edge("a", "b"), Edge("a", "c", (Condition(not_label="sound"),))
    assert compile_graph({}, [always, never], ["a", "b", "c"]).next_experts("a", []) == ("b",)


def test_two_edges_to_one_expert_ask_it_once() -> None:
    edges = [Edge("a", "b", (Condition(label="open"),)), Edge("a", "b", (Condition(score_at_least=0.5),))]
    assert compile_graph({}, edges, ["a", "b"]).next_experts("a", [OPEN]) == ("b",)


def test_a_cycle_is_refused_and_drawn() -> None:
    with pytest.raises(GraphError, match="a → b → c → a"):
        compile_graph({}, [Edge("a", "b"), Edge("b", "c"), Edge("c", "a")], ["a", "b", "c"])


def test_an_expert_that_leads_to_itself_is_a_cycle() -> None:
    with pytest.raises(GraphError, match="a → a"):
        compile_graph({}, [Edge("a", "a")], ["a"])


def test_only_who_is_asked_after_others_has_a_limit() -> None:
    assert compile_graph({}, [Edge("a", "b")], ["a", "b"], limits={"b": 3}).limits == {"b": 3}
    with pytest.raises(GraphError, match="names a, to which no edge leads"):
        compile_graph({}, [Edge("a", "b")], ["a", "b"], limits={"a": 3})


def test_unknown_experts_are_named() -> None:
    with pytest.raises(GraphError, match="component R1 asks ghost"):
        compile_graph({"R1": "ghost"}, [], ["a"])
    with pytest.raises(GraphError, match="an edge names ghost"):
        compile_graph({}, [Edge("a", "ghost")], ["a"])


def test_only_an_expert_behind_others_is_subsequent() -> None:
    graph = inspection_graph(["a", "b"])
    assert graph.is_subsequent("detector")
    assert not graph.is_subsequent("a")


def test_a_sound_part_ends_after_its_classifier() -> None:
    progress = _begun()
    assert progress.answered(Step("a", (SOUND,), "cpu-0", 0.1), inspection_graph(["a"])) == ()
    assert progress.is_complete
    assert progress.outcome() is Outcome.PASS


def test_a_doubtful_part_goes_on_to_the_detector_and_passes_when_that_finds_nothing() -> None:
    graph, progress = inspection_graph(["a"]), _begun()
    assert progress.answered(Step("a", (DOUBTFUL,), "cpu-0", 0.1), graph) == ("detector",)
    assert not progress.is_complete
    assert progress.answered(Step("detector", (), "cpu-0", 0.1), graph) == ()
    assert progress.outcome() is Outcome.PASS


def test_one_failing_finding_fails_the_part() -> None:
    graph, progress = inspection_graph(["a"]), _begun()
    progress.answered(Step("a", (OPEN,), "cpu-0", 0.1), graph)
    progress.answered(Step("detector", (), "cpu-0", 0.1), graph)
    assert progress.outcome() is Outcome.FAIL


def test_an_expert_reached_on_two_ways_is_asked_once() -> None:
    graph = compile_graph(
        {"c-a": "a"}, [Edge("a", "b"), Edge("a", "c"), Edge("b", "d"), Edge("c", "d")], ["a", "b", "c", "d"]
    )
    progress = start(request("r", "c-a"), graph)
    assert isinstance(progress, Progress)
    asked = [expert for step in "abc" for expert in progress.answered(Step(step, (), "x", 0), graph)]
    assert asked == ["b", "c", "d"]


def test_an_unknown_component_is_a_refusal() -> None:
    begun = start(request("r", "nobody"), inspection_graph(["a"]))
    assert isinstance(begun, Refusal)
    assert begun.reason == "unknown-component"


def test_the_drawing_groups_experts_with_the_same_ways_on() -> None:
    picture = draw(inspection_graph([f"e{n}" for n in range(300)]))
    assert "e0 … e299 (300 experts)" in picture
    assert "not sound or sound and score < 0.8" in picture
    assert len(picture.splitlines()) < 6


def _begun() -> Progress:
    progress = start(request("r", "c-a"), inspection_graph(["a"]))
    assert isinstance(progress, Progress)
    return progress


def test_a_table_asks_the_expert_of_each_label_that_scores_enough() -> None:
    table = Table("reader", {"open": "a", "short": "b", "scratch": "a"}, score_at_least=0.5)
    graph = compile_graph({}, [Edge("reader", "c")], ["reader", "a", "b", "c"], [table])
    found = [Finding("open", 0.9, False), Finding("short", 0.4, False), Finding("scratch", 0.5, False)]
    assert graph.next_experts("reader", found) == ("c", "a")
    assert graph.next_experts("reader", [Finding("unheard-of", 1.0, False)]) == ("c",)
    assert graph.following("reader") == ("c", "a", "b")
    assert graph.before["b"] == ("reader",)
    assert graph.is_subsequent("a")


def test_a_table_of_hundreds_is_drawn_as_one_node() -> None:
    names = [f"e{number}" for number in range(300)]
    graph = compile_graph({"board": "reader"}, [], ["reader", *names], [Table("reader", {n: n for n in names})])
    assert "e0 … e299 (300 experts)" in draw(graph)
    assert len(draw(graph).splitlines()) == 3


def test_a_table_is_checked_like_edges() -> None:
    with pytest.raises(GraphError, match="ghost"):
        compile_graph({}, [], ["a"], [Table("a", {"open": "ghost"})])
    with pytest.raises(GraphError, match="b → a → b"):
        compile_graph({}, [Edge("b", "a")], ["a", "b"], [Table("a", {"open": "b"})])
    with pytest.raises(GraphError, match="a has 2 tables"):
        compile_graph({}, [], ["a", "b"], [Table("a", {"open": "b"}), Table("a", {"short": "b"})])
