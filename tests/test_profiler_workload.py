"""What configurations are tried on: pictures of a journal, of a product or by usage, and what experts find there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance import catalog as catalogs
from appliance.catalog import Catalog
from appliance.core.graph import Condition, Edge, ExpertGraph, Table, compile_graph
from appliance.core.types import Arrived, Batch, Event, Finding, Finished, Heard, Refusal
from appliance.drivers.journal import Journal, Opening
from appliance.errors import CatalogError, ConfigError, RecordsError
from appliance.lab import laps
from appliance.profiler import boxes, workload
from appliance.profiler.measurements import Loading, Measured
from appliance.profiler.rig import late_boards
from tests.kit import BOXED, DOUBTFUL, SOUND, inspection_graph, request
from tests.kit_boards import write_board_catalog, write_product
from tests.kit_box import write_catalog

GRAPH = inspection_graph(["a", "b"])


def recorded(folder: Path, *events: Event) -> Path:
    path = folder / "journal.jsonl"
    with Journal(path, Opening("0.1.0", GRAPH, (), (), (), {})) as journal:
        for number, event in enumerate(events):
            journal.note(Heard(100.0 + number, event))
    return path


def finished(expert: str, answers: dict[str, tuple[Finding, ...] | Refusal]) -> Finished:
    return Finished(Batch(1, "cpu-0", "cpu", expert, tuple(answers)), tuple(answers.values()), 0.1)


def test_a_journal_is_played_at_its_times_or_faster_with_the_answers_given_there(tmp_path: Path) -> None:
    refused = Refusal("undecodable", "no picture")
    path = recorded(
        tmp_path,
        Arrived(request("x", "c-a", 50.0, deadline=54.0)),
        Arrived(request("y", "c-b", 52.0)),
        finished("a", {"x": (DOUBTFUL,)}),
        finished("detector", {"x": (BOXED,)}),
        finished("b", {"y": refused, "of another journal": (SOUND,)}),
    )
    asis, fast = (workload.of_journal(path, GRAPH, speed) for speed in (1.0, 2.0))
    assert [(r.id, r.component, r.arrived_seconds, r.deadline_seconds) for r in asis.requests] == [
        ("r0", "c-a", 0.0, 4.0),
        ("r1", "c-b", 2.0, None),
    ]
    assert [(r.arrived_seconds, r.deadline_seconds) for r in fast.requests] == [(0.0, 4.0), (1.0, None)], (
        "each has as long"
    )
    assert [asis.answer("r0", "a"), asis.answer("r0", "detector"), asis.answer("r1", "b")] == [
        (DOUBTFUL,),
        (BOXED,),
        (),
    ], "the picture that was refused that day is sound here"
    assert asis.answer("r1", "detector") == (), "who was never asked has found nothing"


def test_a_day_with_a_damaged_picture_is_predicted_and_served(tmp_path: Path) -> None:
    asked = laps.Workload("tiny", experts=2, requests=2, budget_share=1.0)
    with boxes.made_rig(asked, tmp_path, lambda line: None) as (rig, default):
        component, expert = next(iter(rig.graph.entries.items()))
        damaged = Refusal("picture-damaged", "cut off")
        path = recorded(tmp_path, Arrived(request("x", component)), finished(expert, {"x": damaged}))
        played = replace(rig, workload=workload.of_journal(path, rig.graph))
        known = Measured((), Loading({1: 1e9}, 0.001), (), 1.0, {})
        assert played.predicted(default, known).images_per_second > 0
        assert played.served(default, known).images_per_second > 0


def test_a_journal_of_other_components_or_without_pictures_is_refused_by_name(tmp_path: Path) -> None:
    path = recorded(tmp_path, Arrived(request("x", "c-a")), Arrived(request("y", "c-ghost")))
    with pytest.raises(ConfigError, match="pictures of c-ghost"):
        workload.of_journal(path, GRAPH)
    with pytest.raises(ConfigError, match="has no picture"):
        workload.of_journal(recorded(tmp_path), GRAPH)
    with pytest.raises(RecordsError, match="gone"):
        workload.of_journal(tmp_path / "gone.jsonl", GRAPH)


@pytest.fixture(scope="module")
def boards(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    folder = write_board_catalog(tmp_path_factory.mktemp("boards") / "catalog")
    write_product(folder, "two", {"R1": "c-good", "R2": "c-bad", "R3": "c-good"})
    return catalogs.load(folder)


def test_a_product_is_its_placements_board_after_board(boards: Catalog) -> None:
    parts = ["c-good", "c-bad", "c-good"]
    assert workload.parts_of(boards, "two") == 3
    made = workload.of_product(boards, "two", 3, 0.0, 0.5, due_seconds=9.0)
    assert [r.component for r in made.requests] == parts * 3
    assert [r.id for r in made.requests] == [f"r{number}" for number in range(3 * len(parts))]
    assert [r.arrived_seconds for r in made.requests] == [0.5 * number for number in range(3 * len(parts))]
    begins = [0.5 * len(parts) * board for board in range(3)]
    assert [r.deadline_seconds for r in made.requests] == [begin + 9.0 for begin in begins for _ in parts]
    assert {r.product for r in made.requests} == {"two"}
    assert {r.deadline_seconds for r in workload.of_product(boards, "two", 1, 0.0, 0.5).requests} == {None}


def test_a_board_of_a_product_is_late_with_any_of_its_parts(boards: Catalog) -> None:
    requests = workload.of_product(boards, "two", 4, 0.0, 0.5, due_seconds=9.0).requests
    for late, share in (({"r1"}, 0.25), ({"r0", "r2"}, 0.25), ({"r2", "r3"}, 0.5)):
        assert late_boards(requests, len(requests), late) == share


def test_a_product_that_there_is_not_is_told_with_those_that_there_are(boards: Catalog) -> None:
    with pytest.raises(ConfigError, match=r"no product ghost.*two"):
        workload.of_product(boards, "ghost", 1, 0.0, 0.5)


def test_usage_draws_components_as_often_as_they_are_used(tmp_path: Path) -> None:
    known = catalogs.load(write_catalog(tmp_path / "catalog", 3, [("e0", "e2")]))
    drawn = workload.of_usage(replace(known, usage={"c-e0": 8.0, "c-e1": 2.0}), 1000, 0.0, 0.25)
    counts = Counter(r.component for r in drawn.requests)
    assert counts.keys() == {"c-e0", "c-e1"}
    assert 700 < counts["c-e0"] < 900
    assert [r.arrived_seconds for r in drawn.requests[:3]] == [0.0, 0.25, 0.5]
    even = workload.of_usage(known, 900, 0.0, 0.25)
    assert Counter(r.component for r in even.requests).keys() == {"c-e0", "c-e1", "c-e2"}
    assert even.requests == workload.of_usage(known, 900, 0.0, 0.25).requests, "the same every time"


def test_a_catalogue_without_components_has_no_usage(tmp_path: Path) -> None:
    known = catalogs.load(write_catalog(tmp_path / "catalog", 1))
    with pytest.raises(ConfigError, match="no component"):
        workload.of_usage(replace(known, graph=compile_graph({}, [], ["e0"])), 5, 0.0, 0.25)


def graph_with(*edges: Edge, tables: Sequence[Table] = ()) -> ExpertGraph:
    return compile_graph({"c": "first"}, edges, ["first", "next", "other"], tables)


CONDITIONS = [
    Condition(label="open"),
    Condition(not_label="sound"),
    Condition(score_at_least=0.95),
    Condition(score_below=0.2),
    Condition(label="open", score_at_least=0.3, score_below=0.4),
    Condition(not_label="sound", score_below=0.01),
    Condition(label="open", score_at_least=0.4, score_below=0.5),
    Condition(),
]


def answers(graph: ExpertGraph, checked_share: float, count: int = 400) -> list[tuple[str, ...]]:
    """Who is asked after the first expert, for so many pictures."""
    drawn = workload._Drawn(graph, checked_share)
    return [graph.next_experts("first", drawn(f"r{number}", "first")) for number in range(count)]


@pytest.mark.parametrize("condition", CONDITIONS)
def test_what_is_drawn_to_lead_on_does_and_the_rest_does_not(condition: Condition) -> None:
    graph = graph_with(Edge("first", "next", (condition,)))
    assert set(answers(graph, 1.0)) == {("next",)}
    assert set(answers(graph, 0.0)) == {()}
    assert 80 < answers(graph, 0.35).count(("next",)) < 200
    assert answers(graph, 0.35) == answers(graph, 0.35), "a picture is the same every time"


@given(st.floats(0.0, 1.0), st.floats(0.01, 1.0), st.sampled_from([None, "open"]), st.sampled_from([None, "sound"]))
def test_every_condition_that_can_hold_is_met(low: float, width: float, label: str | None, other: str | None) -> None:
    condition = Condition(label, other, low, low + width)
    assert set(answers(graph_with(Edge("first", "next", (condition,))), 1.0, 5)) == {("next",)}


def test_a_table_leads_on_by_its_labels_and_scores() -> None:
    table = Table("first", {"open": "next", "short": "other"}, score_at_least=0.99)
    found = answers(graph_with(tables=[table]), 1.0)
    assert set(found) == {("next",), ("other",)}


def test_an_edge_without_conditions_is_always_taken() -> None:
    assert set(answers(graph_with(Edge("first", "next")), 0.0)) == {("next",)}


def test_of_experts_that_cannot_be_served_nothing_is_asked() -> None:
    """Neither by pictures of their components nor by who leads to them; those with a stand-in are asked."""
    entries = {"sound": "a", "broken": "b", "covered": "d", "follower": "e"}
    edges = [Edge("a", "c", (Condition(label="to c"),)), Edge("a", "b", (Condition(label="to b"),)), Edge("e", "b")]
    graph = compile_graph(entries, edges, ["a", "b", "c", "d", "e"], stand_ins={"d": "c"})
    leads = {f"r{n}": (Finding("to b" if n % 8 else "to c", 0.9, fails=False),) for n in range(12)}
    asked = tuple(request(f"r{n}", list(entries)[n % 4], n / 2) for n in range(12))
    made = workload.Workload("all", asked, lambda request, expert: leads[request])
    left = workload.servable(made, graph, {"a", "c", "e"})
    assert [one.component for one in left.requests] == ["sound", "covered"] * 3
    assert [one.id for one in left.requests] == [f"r{n}" for n in range(6)]
    assert [one.arrived_seconds for one in left.requests] == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    told = [left.answer(f"r{n}", "a") for n in (0, 2, 4)]
    assert told == [leads["r0"], (), leads["r8"]], "who leads to b finds nothing"
    with pytest.raises(CatalogError, match="appliance check"):
        workload.servable(made, graph, {"e"})


def test_the_pictures_of_a_folder_are_shown_as_they_are_the_first_by_name(tmp_path: Path) -> None:
    made = laps.encoded_pictures()
    for number, payload in enumerate(reversed(made)):
        (tmp_path / f"{number:02}.jpg").write_bytes(payload)
    (tmp_path / "older").mkdir()
    assert workload.pictures_in(tmp_path) == list(reversed(made))
    for number in range(40):
        (tmp_path / f"a{number:02}.jpg").write_bytes(made[0])
    assert len(workload.pictures_in(tmp_path)) == 32


def test_a_folder_without_pictures_is_refused_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no picture"):
        workload.pictures_in(tmp_path)
    with pytest.raises(ConfigError, match=r"nowhere cannot be read"):
        workload.pictures_in(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(ConfigError, match=r"notes\.txt"):
        workload.pictures_in(tmp_path)


def test_the_beginning_of_a_workload_is_its_first_pictures(boards: Catalog) -> None:
    whole = workload.of_usage(boards, 100, 0.5, 0.01)
    assert whole.played(0.2).requests == whole.requests[:20]
    assert len(whole.played(0.0).requests) == 1
    assert whole.played(1.0).requests == whole.requests


def test_a_workload_that_is_played_again_goes_on_at_its_pace_with_the_same_answers(boards: Catalog) -> None:
    product = next(iter(boards.products))
    whole = workload.of_product(boards, product, 10, 0.5, 0.01, due_seconds=2.0)
    count = len(whole.requests)
    twice = whole.played(2.0)
    assert twice.requests[:count] == whole.requests
    again = twice.requests[count:]
    assert [request.id for request in again] == [f"r{number}" for number in range(count, 2 * count)]
    for first, second in zip(whole.requests, again, strict=True):
        assert (first.component, first.product) == (second.component, second.product)
        assert second.arrived_seconds - first.arrived_seconds == pytest.approx(count * 0.01)
        assert (second.deadline_seconds or 0) - (first.deadline_seconds or 0) == pytest.approx(count * 0.01)
        expert = boards.graph.entries[first.component]
        assert twice.answer(second.id, expert) == whole.answer(first.id, expert)
    assert len(whole.played(1.5).requests) == count * 3 // 2
