"""Explaining: every second of a wait has its cause, every eviction its rule, and people can read it."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import starmap
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given
from rich.console import Console

from appliance.core.controller import Controller
from appliance.core.explain import Chronicle, Wait, chronicle
from appliance.core.memory import Residency
from appliance.core.policies import APPLIANCE, PATIENCE_SECONDS, POLICIES, SAMBA, Policy
from appliance.core.types import (
    GOLDEN_MISMATCH,
    OUT_OF_MEMORY,
    Arrived,
    Batch,
    Device,
    Event,
    Executor,
    Expert,
    Finding,
    Finished,
    Heard,
    Load,
    Loaded,
    LoadFailed,
    Refusal,
    Request,
    Rule,
    Run,
    RunFailed,
    Tick,
    Verb,
)
from appliance.drivers.journal import Journal, Opening
from appliance.errors import RecordsError
from appliance.lab.explain import explained
from appliance.lab.simulate import simulate
from appliance.report import print_explanation
from tests.kit import DOUBTFUL, OPEN, SOUND, box, expert, inspection_graph, request
from tests.kit_controller import FAILURES, HALF, WISHES, Commanding, HalfTooLate, workloads


@pytest.mark.parametrize("policy", POLICIES.values(), ids=lambda policy: policy.name)
@HALF
@given(workload=workloads(), wishes=WISHES)
def test_every_second_from_arrival_to_verdict_is_accounted_for(
    policy: Policy,
    workload: tuple[list[Expert], list[Request], int, int, int, dict[str, int]],
    wishes: list[tuple[Verb, int]],
) -> None:
    experts, requests, budget, executors, slots, fails = workload
    graph = inspection_graph([e.name for e in experts if e.name != "detector"])
    graph = replace(graph, limits={"detector": 2}, stand_ins={"e0": "e1"} if "c-e1" in graph.entries else {})
    controller, _ = box(experts, graph, budget, executors, slots, activation_bytes=60, policy=policy)
    noted = Commanding(controller, experts, wishes)
    left = dict(fails)

    def broken(action: Load | Run) -> Refusal | None:
        name = action.expert if isinstance(action, Load) else action.batch.expert
        left[name] = left.get(name, 0) - 1
        return FAILURES[left[name] % (4 if isinstance(action, Run) else 3)] if left[name] >= 0 else None

    def answer(request: str, expert: str) -> tuple[Finding, ...] | Refusal:
        return ((SOUND, DOUBTFUL, OPEN)[int(request[1:]) % 3],)

    devices = tuple(ledger.device for ledger in noted.controller.ledgers.values())
    report = simulate(noted, HalfTooLate(experts, devices, answer, broken), requests)  # type: ignore[arg-type]
    again, _ = box(experts, graph, budget, executors, slots, activation_bytes=60, policy=policy)
    told = chronicle(again, noted.events, in_order=policy.in_order)

    assert {verdict.request: verdict for verdict in report.verdicts} == {
        name: journey.verdict for name, journey in told.journeys.items()
    }
    for journey in told.journeys.values():
        assert journey.verdict is not None
        assert sum(journey.waits.values()) == pytest.approx(journey.verdict.waited_seconds, abs=1e-6)
        assert min(journey.waits.values()) > -1e-6
    assert len(told.departures) == noted.controller.counts["evictions"] == sum(noted.controller.evictions.values())
    assert len(told.loads) == noted.controller.counts["loads"]
    assert not told.queued or told.queued[-1][1] == 0


def _told(
    experts: Sequence[Expert],
    events: Sequence[tuple[float, Event]],
    focus: str,
    policy: Policy = APPLIANCE,
    *,
    budget: int = 100,
    executors: int = 1,
    load_slots: int = 2,
    activation_bytes: int | None = None,
    limits: Mapping[str, int] = MappingProxyType({}),
) -> Chronicle:
    graph = replace(inspection_graph([e.name for e in experts if e.name != "detector"]), limits=limits)
    controller, _ = box(experts, graph, budget, executors, load_slots, activation_bytes, policy)
    return chronicle(controller, starmap(Heard, events), in_order=policy.in_order, focus=focus)


def _finished(number: int, executor: str, name: str, *requests: str) -> Finished:
    return Finished(Batch(number, executor, "cpu", name, requests), ((SOUND,),) * len(requests), 0.1)


def test_a_wait_has_the_causes_that_it_had() -> None:
    """`b` waits for the only slot while `a` loads, then is loaded, then for the executor that runs `a`."""
    experts = [expert("a", 40), expert("b", 40), expert("detector", 10)]
    events: list[tuple[float, Event]] = [
        (0.0, Arrived(request("a", "c-a"))),
        (1.0, Arrived(request("b", "c-b", 0.5))),
        (3.0, Loaded("cpu", "a")),
        (7.0, Loaded("cpu", "b")),
        (15.0, _finished(1, "cpu-0", "a", "a")),
        (31.0, _finished(2, "cpu-0", "b", "b")),
    ]
    told = _told(experts, events, "b", load_slots=1)
    waits = {Wait.SPOOL: 0.5, Wait.LOAD_SLOT: 2.0, Wait.LOAD: 4.0, Wait.EXECUTOR: 8.0, Wait.RUN: 16.0}
    assert {wait: seconds for wait, seconds in told.journeys["b"].waits.items() if seconds} == waits
    assert told.journeys["b"].cause is Wait.RUN
    (question,) = told.journeys["b"].questions
    assert question.standing is not None
    assert question.standing.ahead == (("a", 1),)
    assert (question.found, question.departure) == (Residency.ABSENT, None)


def test_who_is_held_back_by_a_full_step_waits_for_that() -> None:
    """`a2` waits for the run of `a1`, then until the detector, for which `a1` waits, is loaded, then for its run."""
    experts = [expert("a", 40), expert("detector", 10)]
    events: list[tuple[float, Event]] = [
        (0.0, Arrived(request("a1", "c-a"))),
        (1.0, Loaded("cpu", "a")),
        (2.0, Arrived(request("a2", "c-a", 2.0))),
        (3.0, Finished(Batch(1, "cpu-0", "cpu", "a", ("a1",)), ((DOUBTFUL,),), 2.0)),
        (7.0, Loaded("cpu", "detector")),
        (15.0, _finished(2, "cpu-0", "detector", "a1")),
        (31.0, _finished(3, "cpu-0", "a", "a2")),
    ]
    told = _told(experts, events, "a2", limits={"detector": 1})
    waits = {Wait.EXECUTOR: 9.0, Wait.STEP: 4.0, Wait.RUN: 16.0}
    assert {wait: seconds for wait, seconds in told.journeys["a2"].waits.items() if seconds} == waits


def test_who_asks_for_an_expert_on_its_way_is_told_of_the_load_that_began_for_others() -> None:
    experts = [expert("a", 40), expert("detector", 10)]
    events: list[tuple[float, Event]] = [
        (0.0, Arrived(request("a1", "c-a"))),
        (1.0, Arrived(request("a2", "c-a", 1.0))),
        (3.0, Loaded("cpu", "a")),
    ]
    (question,) = _told(experts, events, "a2").journeys["a2"].questions
    assert (question.found, question.waits[Wait.LOAD]) == (Residency.LOADING, 2.0)
    assert [(load.began_seconds, load.ended_seconds, load.waiting) for load in question.loads] == [(0.0, 3.0, 1)]


def test_where_a_load_occupies_its_executor_all_that_is_before_it_is_the_executors_time() -> None:
    experts = [expert("a", 40), expert("b", 40), expert("detector", 10)]
    events: list[tuple[float, Event]] = [
        (0.0, Arrived(request("a", "c-a"))),
        (1.0, Arrived(request("b", "c-b", 1.0))),
        (3.0, Loaded("cpu", "a")),
        (7.0, _finished(1, "cpu-0", "a", "a")),
        (15.0, Loaded("cpu", "b")),
    ]
    told = _told(experts, events, "b", SAMBA)
    waits = told.journeys["b"].waits
    assert {wait: seconds for wait, seconds in waits.items() if seconds} == {Wait.EXECUTOR: 6.0, Wait.LOAD: 8.0}


def _displaced(start: float = 0.0) -> tuple[list[Expert], list[tuple[float, Event]]]:
    """`b` needs the room of `a`, of whom more pictures are queued, until patience ends."""
    experts = [expert("a", 60), expert("b", 60), expert("c", 40), expert("detector", 60)]
    events: list[tuple[float, Event]] = [
        (0.0, Arrived(request("a1", "c-a", start))),
        (0.1, Loaded("cpu", "a")),
        (0.1, Arrived(request("c1", "c-c", start + 0.1))),
        (0.2, Loaded("cpu", "c")),
        (0.3, Arrived(request("b1", "c-b", start + 0.3))),
        (0.4, Arrived(request("a2", "c-a", start + 0.4))),
        (0.5, _finished(1, "cpu-0", "a", "a1")),
        (0.3 + PATIENCE_SECONDS, Tick()),
        (21.0, Loaded("cpu", "b")),
        (22.0, _finished(2, "cpu-0", "c", "c1")),
        (23.0, Arrived(request("a3", "c-a", start + 23.0))),
    ]
    return experts, [(start + seconds, event) for seconds, event in events]


def test_who_left_for_it_and_by_which_rule_is_told() -> None:
    experts, events = _displaced()
    told = _told(experts, events, "b1")
    (question,) = told.journeys["b1"].questions
    (load,) = question.loads
    assert [(left.expert, left.rule, left.coming) for left in load.left] == [("a", Rule.OVERDUE, "b")]
    assert question.waits[Wait.MEMORY] == pytest.approx(PATIENCE_SECONDS)
    assert question.waits[Wait.LOAD_SLOT] == 0
    again = told.journeys["a3"].questions[0].departure
    assert again is not None
    assert (again.rule, again.coming, again.at_seconds) == (Rule.OVERDUE, "b", 0.3 + PATIENCE_SECONDS)


def test_waiting_for_room_to_run_is_not_waiting_for_an_executor() -> None:
    experts = [expert(name, 10, activation_item=40) for name in ("a", "b", "detector")]
    events: list[tuple[float, Event]] = [
        (0.0, Arrived(request("a", "c-a"))),
        (0.0, Loaded("cpu", "a")),
        (1.0, Arrived(request("b", "c-b", 1.0))),
        (2.0, Loaded("cpu", "b")),
        (5.0, _finished(1, "cpu-0", "a", "a")),
    ]
    told = _told(experts, events, "b", activation_bytes=60, executors=2)
    (question,) = told.journeys["b"].questions
    assert (question.executor, question.waits[Wait.ACTIVATIONS], question.waits[Wait.EXECUTOR]) == ("cpu-1", 3.0, 0.0)


def test_who_asks_another_device_after_two_failed_loads_is_followed_there() -> None:
    experts = {name: expert(name, on=("gpu", "cpu")) for name in ("a", "detector")}
    devices = (Device("gpu", 100), Device("cpu", 100))
    executors = (Executor("gpu-0", "gpu"), Executor("cpu-0", "cpu"))
    controller = Controller(inspection_graph(["a"]), experts, devices, executors)
    no_memory = Refusal(OUT_OF_MEMORY, "cudaMalloc")
    events: list[tuple[float, Event]] = [
        (0.0, Arrived(request("a", "c-a"))),
        (1.0, LoadFailed("gpu", "a", no_memory)),
        (3.0, LoadFailed("gpu", "a", no_memory)),
        (7.0, Loaded("cpu", "a")),
    ]
    first, second = chronicle(controller, starmap(Heard, events), in_order=False).journeys["a"].questions
    assert [(load.reason, load.ended_seconds) for load in first.loads] == [(OUT_OF_MEMORY, 1.0), (OUT_OF_MEMORY, 3.0)]
    assert (first.device, first.ended_seconds) == ("gpu", 3.0)
    assert (first.waits[Wait.LOAD], sum(first.waits.values())) == (3.0, 3.0)
    assert (second.device, second.waits[Wait.LOAD], len(second.runs)) == ("cpu", 4.0, 1)


def test_who_asks_a_stand_in_waited_for_the_other_until_that_was_set_aside() -> None:
    experts = [expert(name) for name in ("a", "spare", "detector")]
    graph = replace(inspection_graph(["a", "spare"]), stand_ins={"a": "spare"})
    controller, _ = box(experts, graph, 100, executors=1)
    wrong = Refusal(GOLDEN_MISMATCH, "3 off")
    first, second = Batch(1, "cpu-0", "cpu", "a", ("r0",)), Batch(2, "cpu-0", "cpu", "spare", ("r0", "r1"))
    events: list[tuple[float, Event]] = [
        (0.0, Arrived(request("r0", "c-a"))),
        (1.0, Loaded("cpu", "a")),
        (1.5, Arrived(request("r1", "c-a", 1.5))),
        (2.0, RunFailed(first, wrong)),
        (4.0, Loaded("cpu", "spare")),
        (5.0, Finished(second, ((SOUND,), (SOUND,)), 1.0)),
    ]
    told = chronicle(controller, starmap(Heard, events), in_order=False)
    asked = {name: [(q.expert, q.ended_seconds) for q in told.journeys[name].questions] for name in ("r0", "r1")}
    assert asked == {"r0": [("a", 2.0), ("spare", 5.0)], "r1": [("a", 2.0), ("spare", 5.0)]}
    assert sum(told.journeys["r1"].waits.values()) == pytest.approx(3.5)


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    experts, events = _displaced(start=100.0)
    graph = inspection_graph(["a", "b", "c"])
    executors, devices = (Executor("cpu-0", "cpu"),), (Device("cpu", 100, 2),)
    path = tmp_path / "journal.jsonl"
    with Journal(path, Opening("0", graph, tuple(experts), devices, executors, {})) as written:
        for now, event in events:
            written.note(Heard(now, event))
    return path


def test_a_request_of_a_journal_is_explained_in_order(journal: Path) -> None:
    found = explained(journal, "b")
    told = found["request"]
    (question,) = told["questions"]
    assert (told["request"], told["cause"], told["outcome"]) == ("b1", "memory", None)
    assert question["asked_seconds"] == pytest.approx(0.3)
    assert question["resident"] == {"cpu": ["a", "c"]}
    assert question["running"] == {"expert": "a", "pictures": 1}
    assert question["behind"] == [{"expert": "c", "pictures": 1}]
    assert [(left["expert"], left["rule"], left["for"]) for left in question["loads"][0]["evicted"]] == [
        ("a", "overdue", "b")
    ]
    shown = _printed(found)
    assert "queued pictures needed it, but the one it left for was overdue" in shown
    assert "cpu-0 runs 1 of a; queued behind 1 of c" in shown
    assert "20.000 s for memory" in shown


def test_an_expert_that_was_displaced_is_missed_for_a_reason(journal: Path) -> None:
    assert "it is absent: left at 20.300 s for b (queued pictures needed it" in _printed(explained(journal, "a3"))


def test_without_a_request_the_slowest_and_their_causes_are_told(journal: Path) -> None:
    found = explained(journal)
    assert [(one["request"], one["outcome"]) for one in found["slowest"][:4]] == [
        ("b1", None),
        ("a2", None),
        ("c1", "pass"),
        ("a1", "pass"),
    ]
    assert found["causes"]["run"] == 2
    for one in found["slowest"]:
        assert sum(one["waits"].values()) == pytest.approx(one["waited_seconds"]), "also of who has no verdict yet"
    assert "no verdict" in _printed(found)
    assert found["evictions_by_rule"] == {"overdue": 1}
    assert "1 evictions overdue" in _printed(found)


def test_a_span_tells_who_was_there_who_came_and_who_left(journal: Path) -> None:
    found = explained(journal, since=20.0, until=21.0)
    span = found["span"]
    assert span["resident"] == {"cpu": ["a", "c"]}
    assert [(load["expert"], load["waiting"]) for load in span["loads"]] == [("b", 1)]
    assert span["evictions_by_rule"] == {"overdue": 1}
    assert (span["queued_at_start"], span["verdicts"]) == (2, 0)
    assert explained(journal, since=21.5, until=22.5)["span"]["resident"] == {"cpu": ["c", "b"]}
    assert explained(journal, since=20.5, until=20.6)["span"]["loading"] == {"cpu": ["b"]}
    assert "load of b, for 1 waiting: 0.700 s" in _printed(found)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"request": "nobody"}, "has no request nobody"),
        ({"request": "a"}, "3 requests of .* begin with a"),
        ({"since": 99.0, "until": 100.0}, r"ends after 23\.000 s"),
    ],
)
def test_what_a_journal_does_not_have_is_named(journal: Path, asked: dict[str, Any], says: str) -> None:
    with pytest.raises(RecordsError, match=says):
        explained(journal, **asked)


def test_a_journal_without_events_is_named(journal: Path) -> None:
    journal.write_text(journal.read_text().splitlines()[0] + "\n")
    with pytest.raises(RecordsError, match="has no events"):
        explained(journal)


def test_a_journal_of_another_version_is_one_line(journal: Path) -> None:
    journal.write_text(journal.read_text().replace('"footprints"', '"weights"', 4))
    with pytest.raises(RecordsError, match=r"line 1: experts\.0\.footprints: Field required, and 3 more") as caught:
        explained(journal)
    assert "\n" not in str(caught.value)


def _printed(found: dict[str, Any]) -> str:
    shown = io.StringIO()
    print_explanation(found, Console(file=shown, width=200))
    return shown.getvalue()
