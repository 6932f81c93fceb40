"""The controller, in a pretend world that refuses illegal moves."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.core import thrash
from appliance.core.controller import Controller
from appliance.core.graph import Edge, compile_graph
from appliance.core.memory import RECOVERY_SECONDS, Residency
from appliance.core.policies import (
    APPLIANCE,
    COSERVE,
    EM,
    EM_RA,
    HEAD_START_SECONDS,
    PAPER,
    PATIENCE_SECONDS,
    POLICIES,
    ROOM_PATIENCE_SECONDS,
    SAMBA,
    SAMBA_FIFO,
    SLACK_SHARE,
    Policy,
    oracle,
)
from appliance.core.types import (
    CANCELLED,
    FRAGMENTED,
    GOLDEN_MISMATCH,
    OUT_OF_MEMORY,
    QUEUE_FULL,
    Acknowledge,
    Action,
    Arrived,
    Batch,
    CancelLoad,
    CancelRun,
    Command,
    Device,
    Event,
    Evict,
    Executor,
    Expert,
    Finding,
    Finished,
    HurryLoad,
    Load,
    Loaded,
    LoadFailed,
    Outcome,
    Overflow,
    Publish,
    Quarantine,
    Refusal,
    Request,
    Rule,
    Run,
    RunFailed,
    Segment,
    Tick,
    Verb,
)
from appliance.lab.simulate import IllegalMove, PretendDevice, World, replay, simulate
from tests.kit import BOXED, DOUBTFUL, OPEN, SOUND, box, expert, inspection_graph, pretend, request

BROKEN = Refusal("load", "unreadable")
FAILURES = (
    BROKEN,
    Refusal(OUT_OF_MEMORY, "cudaMalloc"),
    Refusal(FRAGMENTED, "in pieces"),
    Refusal(GOLDEN_MISMATCH, "3 off"),
)


def test_a_picture_of_an_absent_expert_is_loaded_run_and_answered() -> None:
    controller, _ = _one_expert()
    (load,) = controller.handle(Arrived(request("r", "c-a")), 0.0)
    assert load == Load("cpu", "a", (Segment("a-weights", 10),))
    run = _run(controller.handle(Loaded("cpu", "a"), 0.1))
    (publish,) = controller.handle(Finished(run.batch, ((SOUND,),), 0.03), 0.2)
    assert isinstance(publish, Publish)
    assert publish.verdict.outcome is Outcome.PASS
    assert publish.verdict.waited_seconds == 0.2


def test_many_pictures_of_a_cold_expert_cause_one_load_and_go_in_batches() -> None:
    controller, devices = _one_expert()
    report = simulate(controller, pretend(_experts("a"), devices), [request(str(n), "c-a") for n in range(10)])
    assert [a.expert for a in report.actions if isinstance(a, Load)] == ["a", "detector"]
    assert [len(a.batch.requests) for a in report.actions if isinstance(a, Run)] == [4, 4, 2]


def test_a_request_that_has_to_be_alone_shares_none_of_its_batches() -> None:
    experts = _experts("a")
    controller, devices = box(experts, inspection_graph(["a"]), 100)
    requests = [replace(request(str(n), "c-a"), alone=n in (2, 3)) for n in range(6)]
    report = simulate(controller, pretend(experts, devices, DOUBTFUL), requests)
    batches = [a.batch.requests for a in report.actions if isinstance(a, Run)]
    assert [batch for batch in batches if set(batch) & {"2", "3"}] == [("2",), ("3",)] * 2


def test_a_doubtful_part_is_asked_again_and_keeps_its_place_in_the_verdict() -> None:
    experts = _experts("a")
    controller, devices = box(experts, inspection_graph(["a"]), 100)
    world = World(experts, devices, lambda r, e: (BOXED,) if e == "detector" else (DOUBTFUL,))
    (verdict,) = simulate(controller, world, [request("r", "c-a")]).verdicts
    assert [step.expert for step in verdict.steps] == ["a", "detector"]
    assert verdict.outcome is Outcome.FAIL


def test_an_unknown_component_is_rejected_at_once() -> None:
    controller, _ = _one_expert()
    (publish,) = controller.handle(Arrived(request("r", "nobody")), 0.0)
    assert isinstance(publish, Publish)
    assert publish.verdict.outcome is Outcome.REJECTED


def test_the_same_request_while_it_is_answered_is_not_asked_twice() -> None:
    controller, _ = _one_expert()
    controller.handle(Arrived(request("r", "c-a")), 0.0)
    assert controller.handle(Arrived(request("r", "c-a")), 0.01) == []
    assert controller.scheduler.demand("cpu", "a") == 1


def test_an_expert_larger_than_the_budget_is_an_error_that_says_so() -> None:
    controller, _ = box([expert("a", 1000), expert("detector")], inspection_graph(["a"]), 100)
    (publish,) = controller.handle(Arrived(request("r", "c-a")), 0.0)
    assert isinstance(publish, Publish)
    assert publish.verdict.refusal is not None
    assert publish.verdict.refusal.reason == "no-room"


def test_an_unavailable_expert_is_an_error_that_says_why() -> None:
    why = Refusal("digest-mismatch", "model.onnx has other bytes")
    controller = Controller(inspection_graph(["a"]), {}, (Device("cpu", 100),), (Executor("cpu-0", "cpu"),), {"a": why})
    (publish,) = controller.handle(Arrived(request("r", "c-a")), 0.0)
    assert isinstance(publish, Publish)
    assert (publish.verdict.outcome, publish.verdict.refusal) == (Outcome.ERROR, why)


def test_a_refused_picture_does_not_fail_its_neighbours() -> None:
    experts = _experts("a")
    controller, devices = box(experts, inspection_graph(["a"]), 100)
    bad = Refusal("picture-damaged", "truncated")
    world = World(experts, devices, lambda r, e: bad if r == "2" else (SOUND,))
    verdicts = simulate(controller, world, [request(str(n), "c-a") for n in range(4)]).verdicts
    assert {v.request: v.outcome for v in verdicts} == {"0": "pass", "1": "pass", "2": "error", "3": "pass"}


def test_a_failed_load_is_tried_once_more_and_then_answered() -> None:
    experts = _experts("a")
    for failures, outcome in ((1, Outcome.PASS), (2, Outcome.ERROR)):
        left = iter([BROKEN] * failures)
        controller, devices = box(experts, inspection_graph(["a"]), 100)
        world = World(experts, devices, lambda r, e: (SOUND,), lambda a, left=left: next(left, None))  # type: ignore[misc]
        report = simulate(controller, world, [request("r", "c-a")])
        assert [v.outcome for v in report.verdicts] == [outcome]
        assert [a.expert for a in report.actions if isinstance(a, Load)][:2] == ["a", "a"]


def test_a_failed_run_is_repeated_one_picture_at_a_time() -> None:
    experts = _experts("a")
    controller, devices = box(experts, inspection_graph(["a"]), 100, executors=1)

    def fails(action: Load | Run) -> Refusal | None:
        return Refusal("run", "crash") if isinstance(action, Run) and "2" in action.batch.requests else None

    report = simulate(
        controller, World(experts, devices, lambda r, e: (SOUND,), fails), [request(str(n), "c-a") for n in range(4)]
    )
    assert Counter(v.outcome for v in report.verdicts) == {Outcome.PASS: 3, Outcome.ERROR: 1}
    assert [len(a.batch.requests) for a in report.actions if isinstance(a, Run)] == [4, 1, 1, 1, 1]


def test_a_request_past_its_deadline_is_late_at_once_and_only_once() -> None:
    controller, _ = _one_expert()
    controller.handle(Arrived(request("r", "c-a", deadline=1.0)), 0.0)
    assert controller.next_wakeup(0.0) == 1.0
    (publish,) = controller.handle(Tick(), 1.0)
    assert isinstance(publish, Publish)
    assert publish.verdict.outcome is Outcome.LATE
    assert controller.handle(Loaded("cpu", "a"), 1.1) == []
    assert controller.scheduler.is_idle


def test_a_late_request_ignores_the_answer_that_comes_after_it() -> None:
    controller, _ = _one_expert()
    controller.handle(Arrived(request("r", "c-a", deadline=1.0)), 0.0)
    run = _run(controller.handle(Loaded("cpu", "a"), 0.5))
    assert controller.handle(Tick(), 1.0)[1:] == [CancelRun(run.batch)]
    assert controller.handle(Finished(run.batch, ((OPEN,),), 0.7), 1.2) == []


def test_a_cold_expert_waits_for_residents_with_work_until_its_patience_ends() -> None:
    """`a` is idle for a moment between two batches, with more of them queued: only patience keeps it from leaving."""
    experts = [*_experts("a", "b", size=60), expert("c", 40)]
    controller, _ = box(experts, inspection_graph(["a", "b", "c"]), 100, executors=1)
    controller.handle(Arrived(request("a1", "c-a")), 0.0)
    run = _run(controller.handle(Loaded("cpu", "a"), 0.1))
    controller.handle(Arrived(request("c1", "c-c")), 0.1)
    controller.handle(Loaded("cpu", "c"), 0.2)
    assert controller.handle(Arrived(request("b1", "c-b")), 0.3) == []
    assert controller.handle(Arrived(request("a2", "c-a")), 0.4) == []
    run = _run(controller.handle(Finished(run.batch, ((SOUND,),), 0.3), 0.5))
    assert run.batch.expert == "c"
    assert controller.handle(Tick(), 1.0) == []
    assert controller.next_wakeup(1.0) == 0.3 + PATIENCE_SECONDS
    moves = controller.handle(Tick(), 0.3 + PATIENCE_SECONDS)
    assert [type(move) for move in moves] == [Evict, Load]
    evict = Evict("cpu", "a", (Segment("a-weights", 60),), Rule.OVERDUE)
    assert (moves[0], moves[1].expert) == (evict, "b")  # type: ignore[union-attr]


def test_whom_an_earlier_picture_needs_stays_however_long_a_cold_expert_waits() -> None:
    """It runs before anyway: leaving would cost a load and help nobody."""
    experts = [*_experts("a", "b", size=60), expert("c", 40)]
    controller, _ = box(experts, inspection_graph(["a", "b", "c"]), 100, executors=1)
    controller.handle(Arrived(request("a1", "c-a")), 0.0)
    run = _run(controller.handle(Loaded("cpu", "a"), 0.1))
    controller.handle(Arrived(request("c1", "c-c")), 0.1)
    controller.handle(Loaded("cpu", "c"), 0.2)
    controller.handle(Arrived(request("a2", "c-a")), 0.3)
    controller.handle(Arrived(request("b1", "c-b")), 0.4)
    assert [type(a) for a in controller.handle(Finished(run.batch, ((SOUND,),), 0.3), 0.5)] == [Publish, Run]
    assert controller.handle(Tick(), 0.4 + PATIENCE_SECONDS) == []


def test_a_picture_that_is_due_soon_displaces_one_that_is_not() -> None:
    experts = [*_experts("a", "b", size=60), expert("c", 40)]
    controller, _ = box(experts, inspection_graph(["a", "b", "c"]), 100, executors=1)
    controller.handle(Arrived(request("a1", "c-a")), 0.0)
    run = _run(controller.handle(Loaded("cpu", "a"), 0.1))
    controller.handle(Arrived(request("c1", "c-c")), 0.1)
    controller.handle(Loaded("cpu", "c"), 0.2)
    controller.handle(Arrived(request("a2", "c-a")), 0.3)
    controller.handle(Arrived(request("b1", "c-b", deadline=2.0)), 0.4)
    controller.handle(Finished(run.batch, ((SOUND,),), 0.3), 0.5)
    wakeup = controller.next_wakeup(0.5)
    assert wakeup is not None
    assert wakeup == pytest.approx(2.0 - SLACK_SHARE * 0.13)
    assert [type(move) for move in controller.handle(Tick(), wakeup)] == [Evict, Load]


def test_a_picture_whose_turn_came_long_before_it_is_due_is_looked_at_again_then() -> None:
    """Its deadline leaves it more time than patience: it takes its turn by patience, and displaces by its deadline."""
    experts = [*_experts("a", "b", size=60), expert("c", 40)]
    controller, _ = box(experts, inspection_graph(["a", "b", "c"]), 100, executors=1)
    controller.handle(Arrived(request("a1", "c-a")), 0.0)
    run = _run(controller.handle(Loaded("cpu", "a"), 0.1))
    controller.handle(Arrived(request("c1", "c-c")), 0.1)
    controller.handle(Loaded("cpu", "c"), 0.2)
    controller.handle(Arrived(request("b1", "c-b", deadline=60.0)), 0.3)
    controller.handle(Arrived(request("a2", "c-a", deadline=100.0)), 0.4)
    controller.handle(Finished(run.batch, ((SOUND,),), 0.3), 0.5)
    assert controller.next_wakeup(0.5) == 0.3 + PATIENCE_SECONDS
    assert controller.handle(Tick(), 0.3 + PATIENCE_SECONDS) == []
    due = controller.next_wakeup(0.3 + PATIENCE_SECONDS)
    assert due is not None
    assert due == pytest.approx(60.0 - SLACK_SHARE * 0.13)
    assert [type(move) for move in controller.handle(Tick(), due)] == [Evict, Load]


def test_the_least_probable_is_loaded_first_until_patience_of_another_ends() -> None:
    """More pictures will likely come for the others: loaded later, they need no second load for these."""
    likely, rare, first = (
        expert(name, 30, probability=p) for name, p in (("likely", 0.3), ("rare", 0.1), ("first", 0.2))
    )
    experts = [likely, rare, first, expert("detector", 200)]
    for asked_again, following in ((1.0, "rare"), (PATIENCE_SECONDS + 1.0, "likely")):
        controller, _ = box(experts, inspection_graph(["likely", "rare", "first"]), 100, executors=1, load_slots=1)
        controller.handle(Arrived(request("0", "c-first")), 0.0)
        controller.handle(Arrived(request("1", "c-likely")), 0.1)
        controller.handle(Arrived(request("2", "c-rare")), asked_again)
        loads = [a for a in controller.handle(Loaded("cpu", "first"), asked_again + 0.1) if isinstance(a, Load)]
        assert [load.expert for load in loads] == [following]


def test_a_hold_that_ends_before_anybody_asks_when_to_wake_up_is_not_forgotten() -> None:
    """Deciding takes time, and small experts are held for less: what has passed since is due at once."""
    controller, _ = box(_experts("here", "next", size=60), inspection_graph(["here", "next"]), 100, executors=1)
    controller.handle(Arrived(request("0", "c-here")), 0.0)
    run = _run(controller.handle(Loaded("cpu", "here"), 0.1))
    controller.handle(Finished(run.batch, ((SOUND,),), 0.1), 0.2)
    assert controller.handle(Arrived(request("1", "c-next")), 1.0) == []
    held_until = 1.0 + APPLIANCE.hold_share * 0.1
    assert controller.next_wakeup(held_until + 0.01) == pytest.approx(held_until)
    assert [type(move) for move in controller.handle(Tick(), held_until + 0.01)] == [Evict, Load]


def test_a_load_for_which_somebody_has_to_leave_is_held_for_a_moment_and_a_rarer_one_may_come_first() -> None:
    here, first, rarer = (
        expert(name, 60, load=0.4, probability=p) for name, p in (("here", 0.5), ("first", 0.2), ("rarer", 0.1))
    )
    experts = [here, first, rarer, expert("detector", 200)]
    controller, _ = box(experts, inspection_graph(["here", "first", "rarer"]), 100, executors=1, load_slots=1)
    controller.handle(Arrived(request("0", "c-here")), 0.0)
    run = _run(controller.handle(Loaded("cpu", "here"), 0.4))
    controller.handle(Finished(run.batch, ((SOUND,),), 0.1), 0.5)
    assert controller.handle(Arrived(request("1", "c-first")), 1.0) == []
    assert controller.next_wakeup(1.0) == pytest.approx(1.0 + APPLIANCE.hold_share * 0.4)
    assert controller.handle(Arrived(request("2", "c-rarer")), 1.05) == []
    wakeup = controller.next_wakeup(1.05)
    assert wakeup is not None
    assert wakeup == pytest.approx(1.05 + APPLIANCE.hold_share * 0.4)
    evict, load = controller.handle(Tick(), wakeup)
    assert (evict, load) == (
        Evict("cpu", "here", (Segment("here-weights", 60),)),
        Load("cpu", "rarer", (Segment("rarer-weights", 60),)),
    )


def test_an_expert_loaded_for_waiting_pictures_stays_until_it_has_run() -> None:
    """However long another waits: a load that is evicted before its run would be for nothing."""
    experts = [*(expert(name, 50) for name in "abc"), expert("detector", 200)]
    controller, _ = box(experts, inspection_graph(["a", "b", "c"]), 100, executors=1)
    controller.handle(Arrived(request("a1", "c-a")), 0.0)
    controller.handle(Loaded("cpu", "a"), 0.1)
    controller.handle(Arrived(request("b1", "c-b")), 0.2)
    controller.handle(Loaded("cpu", "b"), 0.3)
    controller.handle(Arrived(request("c1", "c-c")), 0.4)
    assert controller.handle(Tick(), 0.4 + 2 * PATIENCE_SECONDS) == []


def test_an_expert_whose_pictures_are_all_late_may_leave() -> None:
    controller, _ = box(_experts("a", "b", size=100), inspection_graph(["a", "b"]), 100, executors=1)
    controller.handle(Arrived(request("a1", "c-a")), 0.0)
    run = _run(controller.handle(Loaded("cpu", "a"), 0.1))
    controller.handle(Finished(run.batch, ((SOUND,),), 0.1), 0.2)
    controller.handle(Arrived(request("b1", "c-b", deadline=1.0)), 0.3)
    controller.handle(Arrived(request("b2", "c-b", deadline=1.0)), 0.3)
    controller.handle(Tick(), 0.35)
    run = _run(controller.handle(Loaded("cpu", "b"), 0.4))
    controller.handle(Arrived(request("b3", "c-b", deadline=1.0)), 0.5)
    controller.handle(Tick(), 1.0)
    controller.handle(Finished(run.batch, ((SOUND,),) * 2, 0.1), 1.1)
    assert controller.ledgers["cpu"].is_evictable("b")


def test_a_batch_whose_pictures_are_all_late_is_cancelled_once_and_not_repeated() -> None:
    controller, _ = _one_expert()
    controller.handle(Arrived(request("r1", "c-a", deadline=1.0)), 0.0)
    controller.handle(Arrived(request("r2", "c-a", deadline=2.0)), 0.0)
    run = _run(controller.handle(Loaded("cpu", "a"), 0.5))
    assert [type(action) for action in controller.handle(Tick(), 1.0)] == [Publish]
    assert controller.handle(Tick(), 2.0)[1:] == [CancelRun(run.batch)]
    assert controller.handle(Tick(), 2.1) == []
    assert controller.handle(RunFailed(run.batch, Refusal(CANCELLED, "")), 2.2) == []
    assert controller.scheduler.is_idle
    assert controller.counts["run_failures"] == 0


@pytest.mark.parametrize(("pictures", "waits"), [(60, False), (180, True)])
def test_a_load_for_which_somebody_leaves_waits_while_executors_have_plenty_to_run(pictures: int, waits: bool) -> None:
    """A load takes as long as ten runs of `a`, and as many are over when `b` is asked. While more than 80 are to come
    the load waits, as more may be asked of `b`."""
    experts = [expert(name, 40, item=0.01, fixed=0.0, load=0.1, max_batch=1) for name in ("a", "b", "idle")]
    graph = compile_graph({f"c-{e.name}": e.name for e in experts}, [], [e.name for e in experts])
    controller, devices = box(experts, graph, 80, executors=1)
    begun = [request("idle", "c-idle"), *(request(f"a{n}", "c-a", 1.0) for n in range(pictures))]
    report = simulate(controller, pretend(experts, devices), [*begun, request("b", "c-b", 1.2)])
    moves = [action for action in report.actions if isinstance(action, Load | Run)]
    loaded = next(n for n, move in enumerate(moves) if isinstance(move, Load) and move.expert == "b")
    runs = sum(isinstance(move, Run) and move.batch.expert == "a" for move in moves[:loaded])
    assert runs == pytest.approx(pictures - 80 if waits else 12, abs=4)
    assert len(report.verdicts) == pictures + 2


def test_whom_a_running_batch_may_lead_to_is_loaded_ahead_into_free_memory() -> None:
    controller, _ = box(_experts("a", size=50), inspection_graph(["a"]), 100, executors=1)
    controller.handle(Arrived(request("r", "c-a")), 0.0)
    _, ahead = controller.handle(Loaded("cpu", "a"), 0.1)
    assert ahead == Load("cpu", "detector", (Segment("detector-weights", 50),), ahead=True)


def test_nobody_leaves_for_what_is_loaded_ahead() -> None:
    controller, _ = box(_experts("a", "b", size=50), inspection_graph(["a", "b"]), 149, executors=1)
    controller.handle(Arrived(request("a", "c-a")), 0.0)
    controller.handle(Arrived(request("b", "c-b")), 0.0)
    controller.handle(Loaded("cpu", "a"), 0.1)
    assert [a for a in controller.handle(Loaded("cpu", "b"), 0.2) if isinstance(a, Load | Evict)] == []


def test_what_is_loaded_ahead_gives_way_to_who_waits() -> None:
    controller, _ = box(_experts("a", "b", size=50), inspection_graph(["a", "b"]), 100, executors=1)
    controller.handle(Arrived(request("a", "c-a")), 0.0)
    controller.handle(Loaded("cpu", "a"), 0.1)
    assert controller.handle(Arrived(request("b", "c-b")), 0.2) == [CancelLoad("cpu", "detector")]
    assert controller.handle(Arrived(request("b2", "c-b")), 0.2) == []
    evict, load = controller.handle(LoadFailed("cpu", "detector", Refusal(CANCELLED, "")), 0.3)
    assert (evict, load) == (
        Evict("cpu", "detector", (Segment("detector-weights", 50),), Rule.NOT_LOADED),
        Load("cpu", "b", (Segment("b-weights", 50),)),
    )
    assert controller.counts["load_failures"] == 0


def test_what_is_loaded_ahead_is_hurried_when_somebody_needs_it() -> None:
    controller, _ = _one_expert()
    controller.handle(Arrived(request("r", "c-a")), 0.0)
    run = _run(controller.handle(Loaded("cpu", "a"), 0.1))
    assert controller.handle(Finished(run.batch, ((DOUBTFUL,),), 0.1), 0.2) == [HurryLoad("cpu", "detector")]
    assert controller.handle(Tick(), 0.3) == []
    assert _run(controller.handle(Loaded("cpu", "detector"), 0.4)).batch.requests == ("r",)


def test_pinned_experts_are_loaded_at_the_start_and_never_leave() -> None:
    experts = _experts("a", "b", "c", size=30)
    controller, devices = _pinning(experts, 90, pinned=["b"], preload=["a"])
    assert controller.handle(Tick(), 0.0) == [
        Load("cpu", "b", (Segment("b-weights", 30),), ahead=True),
        Load("cpu", "a", (Segment("a-weights", 30),), ahead=True),
    ]
    controller, devices = _pinning(experts, 90, pinned=["b"], preload=["a"])
    stream = [request(f"{n}", f"c-{name}", n * 0.3) for n, name in enumerate("abccabcbacbabc" * 4)]
    report = simulate(controller, pretend(experts, devices, DOUBTFUL), stream)
    assert len(report.verdicts) == len(stream)
    assert [a for a in report.actions if isinstance(a, Evict) and a.expert == "b"] == []
    assert report.evictions > 0


def test_an_expert_that_has_no_room_beside_the_pinned_ones_is_refused_and_not_kept_waiting() -> None:
    controller, _ = _pinning(_experts("a", "b", size=60), 100, pinned=["b"])
    (publish, *_) = controller.handle(Arrived(request("r", "c-a")), 0.0)
    assert isinstance(publish, Publish)
    assert publish.verdict.refusal is not None
    assert publish.verdict.refusal.reason == "no-room"


def test_what_is_preloaded_gives_way_to_who_waits_and_a_pinned_expert_comes_later() -> None:
    controller, _ = _pinning(_experts("a", "b", "c", size=30), 60, pinned=["b"], preload=["c"])
    controller.handle(Tick(), 0.0)
    assert controller.handle(Arrived(request("r", "c-a")), 0.1) == [CancelLoad("cpu", "b"), CancelLoad("cpu", "c")]
    _, load = controller.handle(LoadFailed("cpu", "b", Refusal(CANCELLED, "")), 0.2)
    assert load == Load("cpu", "a", (Segment("a-weights", 30),))
    controller.handle(LoadFailed("cpu", "c", Refusal(CANCELLED, "")), 0.3)
    run = _run(controller.handle(Loaded("cpu", "a"), 0.4))
    moves = controller.handle(Finished(run.batch, ((SOUND,),), 0.1), 0.5)
    assert [m.expert for m in moves if isinstance(m, Load)] == []
    assert controller.ledgers["cpu"].resident == ("a", "b")


def test_a_batch_is_only_as_large_as_its_activations_have_room() -> None:
    experts = [expert("a", activation_fixed=10, activation_item=30), expert("detector")]
    controller, devices = box(experts, inspection_graph(["a"]), 100, executors=1, activation_bytes=100)
    report = simulate(controller, pretend(experts, devices), [request(str(n), "c-a") for n in range(5)])
    assert [len(a.batch.requests) for a in report.actions if isinstance(a, Run)] == [3, 2]
    assert controller.ledgers["cpu"].running_bytes == 0


def test_a_batch_is_booked_as_large_as_it_is_filled_up() -> None:
    """Five pictures of an expert that takes six are run as six, and three as four."""
    experts = [expert("a", max_batch=6, activation_item=10), expert("detector")]
    for room, batches in ((60, [5]), (59, [4, 1])):
        device = Device("cpu", 100, 2, activation_bytes=room, batch_sizes=(1, 2, 4, 8))
        graph, executors = inspection_graph(["a"]), (Executor("cpu-0", "cpu"),)
        controller = Controller(graph, {e.name: e for e in experts}, (device,), executors)
        report = simulate(controller, pretend(experts, (device,)), [request(str(n), "c-a") for n in range(5)])
        assert [len(a.batch.requests) for a in report.actions if isinstance(a, Run)] == batches
        assert controller.ledgers["cpu"].running_peak_bytes == (60 if room == 60 else 40)
        assert controller.ledgers["cpu"].running_bytes == 0


def test_an_expert_whose_activations_never_fit_is_an_error_that_says_so() -> None:
    experts = [expert("a", activation_item=101), expert("detector")]
    controller, _ = box(experts, inspection_graph(["a"]), 100, activation_bytes=100)
    (publish,) = controller.handle(Arrived(request("r", "c-a")), 0.0)
    assert isinstance(publish, Publish)
    assert publish.verdict.refusal is not None
    assert "101 of activations on cpu" in publish.verdict.refusal.detail


def test_small_batches_do_not_keep_a_large_one_waiting_for_ever() -> None:
    experts = [expert("small", item=0.5, max_batch=1, activation_item=20), expert("large", activation_item=100)]
    experts.append(expert("detector"))
    for executors in (2, 3, 4):
        controller, devices = box(
            experts, inspection_graph(["small", "large"]), 100, executors=executors, activation_bytes=100
        )
        stream = [request(f"s{n}", "c-small", n * 0.55 / executors) for n in range(200)]
        asked = sorted([*stream, request("large", "c-large", 1.0)], key=lambda r: r.arrived_seconds)
        report = simulate(controller, pretend(experts, devices), asked)
        (waited,) = [v.waited_seconds for v in report.verdicts if v.request == "large"]
        assert waited < ROOM_PATIENCE_SECONDS + 1.0


NO_MEMORY = Refusal(OUT_OF_MEMORY, "cudaMalloc")
IN_PIECES = Refusal(FRAGMENTED, "40 free in pieces of 20")


def test_a_load_that_finds_no_memory_evicts_and_is_tried_once_more() -> None:
    controller, _ = box(_experts("a", "b", size=30), inspection_graph(["a", "b"]), 100, executors=1, load_slots=1)
    controller.handle(Arrived(request("a", "c-a")), 0.0)
    run = _run(controller.handle(Loaded("cpu", "a"), 0.1))
    controller.handle(Loaded("cpu", "detector"), 0.2)
    controller.handle(Finished(run.batch, ((SOUND,),), 0.1), 0.3)
    controller.handle(Arrived(request("b", "c-b")), 0.4)
    moves = controller.handle(LoadFailed("cpu", "b", NO_MEMORY), 0.5)
    assert [(type(move), move.expert) for move in moves if isinstance(move, Evict | Load)] == [
        (Evict, "b"),
        (Evict, "detector"),
        (Load, "b"),
    ]
    assert controller.ledgers["cpu"].used_bytes == 60


def test_who_finds_no_memory_twice_asks_the_cpu_and_then_is_told() -> None:
    experts = [expert(name, on=("gpu", "cpu")) for name in ("a", "detector")]
    devices = (Device("gpu", 100), Device("cpu", 100))
    names = (Executor("gpu-0", "gpu"), Executor("cpu-0", "cpu"))
    for broken, outcome, where in ((("gpu",), Outcome.PASS, "cpu"), (("gpu", "cpu"), Outcome.ERROR, None)):
        for kind in (Load, Run):

            def fails(
                action: Load | Run, broken: Sequence[str] = broken, kind: type[Load | Run] = kind
            ) -> Refusal | None:
                device = action.device if isinstance(action, Load) else action.batch.device
                return NO_MEMORY if isinstance(action, kind) and device in broken else None

            controller = Controller(inspection_graph(["a"]), {e.name: e for e in experts}, devices, names)
            world = World(experts, devices, lambda r, e: (SOUND,), fails)
            (verdict,) = simulate(controller, world, [request("r", "c-a")]).verdicts
            assert verdict.outcome is outcome
            assert [step.executor for step in verdict.steps] == ([f"{where}-0"] if where else [])
            assert where or (verdict.refusal == NO_MEMORY)


def test_memory_withheld_after_a_shortage_comes_back_by_and_by() -> None:
    controller, _ = _one_expert()
    ledger = controller.ledgers["cpu"]
    controller.handle(Arrived(request("r", "c-a")), 0.0)
    controller.handle(LoadFailed("cpu", "a", NO_MEMORY), 0.1)
    controller.handle(Loaded("cpu", "a"), 0.2)
    assert ledger.withheld_bytes == 100
    wakeups = []
    while (wakeup := controller.next_wakeup(0.0)) is not None:
        controller.handle(Tick(), wakeup)
        wakeups.append((wakeup, ledger.withheld_bytes))
    assert wakeups[:2] == [(0.1 + RECOVERY_SECONDS, 50), (0.1 + 2 * RECOVERY_SECONDS, 25)]
    assert wakeups[-1][1] == 0


def test_a_device_whose_free_memory_is_in_pieces_lets_one_leave_and_is_not_short_of_memory() -> None:
    controller, _ = box(_experts("a", "b", size=30), inspection_graph(["a", "b"]), 100, executors=1, load_slots=1)
    controller.handle(Arrived(request("a", "c-a")), 0.0)
    run = _run(controller.handle(Loaded("cpu", "a"), 0.1))
    controller.handle(Loaded("cpu", "detector"), 0.2)
    controller.handle(Finished(run.batch, ((SOUND,),), 0.1), 0.3)
    controller.handle(Arrived(request("b", "c-b")), 0.4)
    for left in ("detector", "a"):
        moves = controller.handle(LoadFailed("cpu", "b", IN_PIECES), 0.5)
        assert [(m.expert, m.rule if isinstance(m, Evict) else None) for m in moves if isinstance(m, Evict | Load)] == [
            ("b", Rule.NOT_LOADED),
            (left, Rule.FRAGMENTED),
            ("b", None),
        ]
    assert controller.ledgers["cpu"].withheld_bytes == 0
    controller.handle(LoadFailed("cpu", "b", IN_PIECES), 0.6)
    moves = controller.handle(LoadFailed("cpu", "b", IN_PIECES), 0.7)
    assert [m.verdict.refusal for m in moves if isinstance(m, Publish)] == [IN_PIECES], "nobody is left who could leave"


def test_what_failed_while_nobody_needed_it_does_not_count_when_somebody_does() -> None:
    controller, _ = _one_expert()
    controller.handle(Arrived(request("r1", "c-a")), 0.0)
    run = _run(controller.handle(Loaded("cpu", "a"), 0.1))
    controller.handle(LoadFailed("cpu", "detector", BROKEN), 0.2)
    (load,) = controller.handle(Finished(run.batch, ((DOUBTFUL,),), 0.1), 0.3)
    assert isinstance(load, Load)
    (_, load) = controller.handle(LoadFailed("cpu", "detector", BROKEN), 0.4)
    assert isinstance(load, Load), "the first of two attempts"


def test_a_pinned_expert_whose_load_failed_is_loaded_again() -> None:
    controller, _ = _pinning(_experts("a", "b"), 90, pinned=["b"])
    controller.handle(Tick(), 0.0)
    _, load = controller.handle(LoadFailed("cpu", "b", BROKEN), 0.1)
    assert load == Load("cpu", "b", (Segment("b-weights", 10),), ahead=True)
    assert [type(move) for move in controller.handle(LoadFailed("cpu", "b", BROKEN), 0.2)] == [Evict]


def test_a_quarantined_expert_gives_its_memory_back_even_if_it_was_pinned() -> None:
    controller, _ = _pinning(_experts("a", "b", size=70), 100, pinned=["b"])
    controller.handle(Tick(), 0.0)
    controller.handle(Loaded("cpu", "b"), 0.1)
    run = _run(controller.handle(Arrived(request("r", "c-b")), 0.2))
    moves = controller.handle(RunFailed(run.batch, Refusal(GOLDEN_MISMATCH, "3 off")), 0.3)
    assert Evict("cpu", "b", (Segment("b-weights", 70),), Rule.QUARANTINED) in moves
    (load,) = controller.handle(Arrived(request("r2", "c-a")), 0.4)
    assert load == Load("cpu", "a", (Segment("a-weights", 70),))


def test_nobody_is_loaded_ahead_while_somebody_waits_for_memory() -> None:
    experts = [expert("hot", 40), expert("cold", 70), expert("detector", 20)]
    controller, _ = box(experts, inspection_graph(["hot", "cold"]), 100, executors=1)
    controller.handle(Arrived(request("h1", "c-hot")), 0.0)
    controller.handle(Arrived(request("c", "c-cold")), 0.0)
    moves = controller.handle(Loaded("cpu", "hot"), 0.1)
    assert [type(move) for move in moves] == [Run]


def test_an_expert_that_fails_its_golden_samples_serves_no_more() -> None:
    why = Refusal(GOLDEN_MISMATCH, "output logits is 3 off")
    controller, _ = box(_experts("a"), inspection_graph(["a"]), 100, executors=1)
    controller.handle(Arrived(request("r1", "c-a")), 0.0)
    run = _run(controller.handle(Loaded("cpu", "a"), 0.1))
    controller.handle(Arrived(request("r2", "c-a")), 0.2)
    moves = controller.handle(RunFailed(run.batch, why), 0.3)
    assert moves[0] == Quarantine("a", why)
    assert [(m.verdict.request, m.verdict.refusal) for m in moves if isinstance(m, Publish)] == [
        ("r1", why),
        ("r2", why),
    ]
    (publish,) = controller.handle(Arrived(request("r3", "c-a")), 0.4)
    assert isinstance(publish, Publish)
    assert publish.verdict.refusal == why
    assert controller.ledgers["cpu"].is_absent("a")


def test_who_is_asked_more_than_was_declared_stays_and_another_leaves() -> None:
    """`a` was declared to be asked twice as often as `b`; the lines ask only `b`, and then `c` has to be loaded."""
    experts = [*(expert(name, 40, probability=p) for name, p in (("a", 0.2), ("b", 0.1), ("c", 0.1)))]
    for policy, pictures, leaves in ((APPLIANCE, 10, "b"), (APPLIANCE, 4000, "a"), (COSERVE, 4000, "b")):
        graph = compile_graph({f"c-{e.name}": e.name for e in experts}, [], [e.name for e in experts])
        controller, devices = box(experts, graph, 80, executors=1, policy=policy)
        asked = ["c-a", *(["c-b"] * pictures), "c-c"]
        requests = [request(str(n), component, n * 0.5) for n, component in enumerate(asked)]
        report = simulate(controller, pretend(experts, devices), requests)
        assert [move.expert for move in report.actions if isinstance(move, Evict)] == [leaves]


def test_whom_a_running_batch_may_lead_to_leaves_after_all_others() -> None:
    """The detector is the least likely of all; but while `a` runs, which leads to it, `likely` makes room for `b`."""
    experts = [
        expert("a", 40, item=1.0),
        expert("b", 40),
        expert("detector", 40, probability=0.01),
        expert("likely", 40, probability=0.9),
    ]
    graph = compile_graph({f"c-{e.name}": e.name for e in experts}, [Edge("a", "detector")], [e.name for e in experts])
    asked = [request("1", "c-detector"), request("2", "c-likely", 1.0), request("3", "c-a", 2.0)]
    for at, leaves in ((2.5, "likely"), (9.0, "detector")):
        controller, devices = box(experts, graph, 120)
        report = simulate(controller, pretend(experts, devices), [*asked, request("4", "c-b", at)])
        assert [move.expert for move in report.actions if isinstance(move, Evict)][:1] == [leaves]


def test_at_a_product_change_the_former_products_experts_leave_first() -> None:
    """`old` is asked for 2,000 pictures; after one picture of the other product it is worth less than whoever that
    will ask, although none of these was asked before."""
    experts = [expert(name, 40) for name in ("new", "new-too", "old", "other")]
    graph = compile_graph({f"c-{e.name}": e.name for e in experts}, [], [e.name for e in experts])
    products = {"former": {"c-old": 8}, "next": {"c-new": 1, "c-new-too": 1, "c-other": 1}}
    devices, executors = (Device("cpu", 120),), (Executor("cpu-0", "cpu"),)
    here = [("cpu", name) for name in ("new", "new-too", "old")]
    controller = Controller(graph, {e.name: e for e in experts}, devices, executors, residents=here, products=products)
    made = [("old", "former")] * 2000 + [("new", "next"), ("other", "next")]
    requests = [Request(str(n), f"c-{name}", n * 0.5, None, "line1", product) for n, (name, product) in enumerate(made)]
    world = World(experts, devices, lambda request, expert: (SOUND,), residents=here)
    report = simulate(controller, world, requests)
    assert [move.expert for move in report.actions if isinstance(move, Evict)] == ["old"]


def test_a_quick_load_goes_before_rarer_experts_that_take_long() -> None:
    """The likeliest of all, but its load takes no longer than one of its pictures."""
    experts = [
        expert("first", 90),
        expert("rare", 90, probability=0.01),
        expert("detector", 90, load=0.02, probability=0.5),
    ]
    graph = compile_graph({f"c-{e.name}": e.name for e in experts}, [], [e.name for e in experts])
    controller, _ = box(experts, graph, 100, executors=1, load_slots=1)
    for name in ("first", "rare", "detector"):
        controller.handle(Arrived(request(name, f"c-{name}")), 0.0)
    run = _run(controller.handle(Loaded("cpu", "first"), 0.1))
    moves = controller.handle(Finished(run.batch, ((SOUND,),), 0.1), 0.2)
    assert [move.expert for move in moves if isinstance(move, Load)] == ["detector"]


def test_while_it_thrashes_each_load_serves_more_and_everybody_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    """300 experts in memory for 60, and twice as many pictures as the executors can run."""
    chance = random.Random(1)
    names = [f"e{number:03}" for number in range(300)]
    experts = [expert(name, load=0.6, item=0.04, fixed=0.01, probability=1 / 300) for name in names]
    graph = compile_graph({f"c-{name}": name for name in names}, [], names)
    requests = [request(str(n), f"c-{chance.choice(names)}", n * 0.01) for n in range(9000)]
    loads = []
    for share in (inf, thrash.BEGIN_SHARE):  # without protection, and with it
        monkeypatch.setattr(thrash, "BEGIN_SHARE", share)
        controller, devices = box(experts, graph, 600, executors=2, load_slots=4)
        report = simulate(controller, pretend(experts, devices), requests)
        assert len(report.verdicts) == len(requests)
        assert max(verdict.waited_seconds for verdict in report.verdicts) < 200
        assert controller.counts["came_back"] > 0
        assert controller.thrashing(report.seconds + 3600) == {}, "it is over by itself"
        loads.append(report.loads)
    assert loads[1] < 0.9 * loads[0]


def test_who_waits_for_a_load_is_counted_by_what_it_waits_for() -> None:
    experts = [expert(name, 60, load=0.4) for name in ("a", "b")]
    graph = compile_graph({"c-a": "a", "c-b": "b"}, [], ["a", "b"])
    controller, devices = box(experts, graph, 100, executors=1)
    report = simulate(controller, pretend(experts, devices), [request("0", "c-a"), request("1", "c-b", 2.0)])
    assert (report.loads, controller.counts["switches"]) == (2, 1)
    waits = controller.load_waits
    assert waits.tasks == 2
    assert waits.load_seconds == pytest.approx(0.8)
    assert waits.turn_seconds == pytest.approx(APPLIANCE.hold_share * 0.4), "b was held before a left for it"
    assert controller.idle_seconds == pytest.approx(2.1 - 0.4), "a was used last when its run began"


def test_load_and_run_overlap() -> None:
    controller, _ = box(_experts("a", "b"), inspection_graph(["a", "b"]), 100, executors=1)
    controller.handle(Arrived(request("a1", "c-a")), 0.0)
    controller.handle(Loaded("cpu", "a"), 0.1)
    assert isinstance(controller.handle(Arrived(request("b1", "c-b")), 0.11)[0], Load)


def test_the_pretend_world_refuses_illegal_moves() -> None:
    device = PretendDevice(Device("cpu", 15, 1))
    a, b = expert("a"), expert("b")
    with pytest.raises(IllegalMove, match="not ready"):
        device.run(Batch(1, "cpu-0", "cpu", "a", ("r",)), 4)
    device.load(Load("cpu", "a", a.footprints["cpu"].segments), a)
    with pytest.raises(IllegalMove, match="twice"):
        device.load(Load("cpu", "a", a.footprints["cpu"].segments), a)
    with pytest.raises(IllegalMove, match="loads at once"):
        device.load(Load("cpu", "b", b.footprints["cpu"].segments), b)
    with pytest.raises(IllegalMove, match="while it loads"):
        device.evict(Evict("cpu", "a", a.footprints["cpu"].segments))
    device.loading.clear()
    device.run(Batch(1, "cpu-0", "cpu", "a", ("r",)), 4)
    with pytest.raises(IllegalMove, match="while it runs"):
        device.evict(Evict("cpu", "a", a.footprints["cpu"].segments))
    with pytest.raises(IllegalMove, match="exceed the budget"):
        device.load(Load("cpu", "b", b.footprints["cpu"].segments), b)


PRIORITIES = {"line1": 1, "line2": 9}
SHARED = [Segment(f"s{n}", 5 + 5 * n) for n in range(4)]


@st.composite
def workloads(draw: st.DrawFn) -> tuple[list[Expert], list[Request], int, int, int, dict[str, int]]:
    """Experts with private and shared segments, arrivals with and without deadlines, a box, and what fails."""
    names = [f"e{n}" for n in range(draw(st.integers(1, 6)))]
    experts = [
        replace(
            expert(
                name,
                draw(st.integers(5, 40)),
                load=draw(st.floats(0.01, 3)),
                item=draw(st.floats(0.01, 1)),
                probability=draw(st.floats(0, 1)),
                activation_fixed=draw(st.integers(0, 20)),
                activation_item=draw(st.integers(0, 45)),
            ),
            max_batch=draw(st.integers(1, 4)),
        )
        for name in [*names, "detector"]
    ]
    experts = [_with(e, draw(st.lists(st.sampled_from(SHARED), max_size=2)), draw(st.integers(0, 3))) for e in experts]
    gaps = draw(st.lists(st.tuples(st.floats(0, 1.5), st.sampled_from([*names, "nobody"]), st.booleans()), max_size=40))
    now, requests = 0.0, []
    for number, (gap, name, hurried) in enumerate(gaps):
        now += gap
        line = f"line{number % 3}"  # as if by three lines in turn, of which two have a priority
        requests.append(Request(f"r{number}", f"c-{name}", now, now + 2.0 if hurried else None, line))
    fails = draw(st.dictionaries(st.sampled_from([e.name for e in experts]), st.integers(1, 5), max_size=2))
    return experts, requests, draw(st.integers(45, 160)), draw(st.integers(1, 3)), draw(st.integers(1, 3)), fails


def _with(expert: Expert, shared: list[Segment], private_bytes: int) -> Expert:
    own = expert.footprints["cpu"]
    grown = replace(own, segments=(*own.segments, *shared), private_bytes=private_bytes)
    return replace(expert, footprints={"cpu": grown})


class HalfTooLate(World):
    """Every other cancellation comes when its load or run has just ended by itself."""

    cancellations = 0

    def note(self, event: Event) -> Event:
        told = super().note(event)
        self.cancellations += told is not event
        return event if self.cancellations % 2 else told


EVERY = pytest.mark.parametrize("policy", [*POLICIES.values(), oracle({})], ids=lambda policy: policy.name)
HALF = settings(max_examples=settings().max_examples // 2)
"""For what is tried with every policy: nine times as many runs in all."""


@EVERY
@HALF
@given(workload=workloads())
def test_every_request_gets_exactly_one_verdict_whatever_fails(
    policy: Policy, workload: tuple[list[Expert], list[Request], int, int, int, dict[str, int]]
) -> None:
    experts, requests, budget, executors, slots, fails = workload
    graph = inspection_graph([e.name for e in experts if e.name != "detector"])
    graph = replace(graph, stand_ins={"e0": "e1"} if "c-e1" in graph.entries else {})
    controller, devices = box(experts, graph, budget, executors, slots, 60, policy, PRIORITIES)
    left = dict(fails)

    def broken(action: Load | Run) -> Refusal | None:
        name = action.expert if isinstance(action, Load) else action.batch.expert
        left[name] = left.get(name, 0) - 1
        return FAILURES[left[name] % (4 if isinstance(action, Run) else 3)] if left[name] >= 0 else None

    def answer(request: str, expert: str) -> tuple[Finding, ...] | Refusal:
        number = int(request[1:])
        return Refusal("picture-damaged", "") if number % 7 == 6 else ((SOUND, DOUBTFUL, OPEN)[number % 3],)

    report = simulate(controller, HalfTooLate(experts, devices, answer, broken), requests)

    assert sorted(v.request for v in report.verdicts) == sorted(r.id for r in requests)
    assert report.peak_bytes <= budget
    assert controller.scheduler.is_idle
    assert not controller.progress
    assert all(queue.total_seconds == 0.0 for queue in controller.scheduler.queues.values())
    for ledger in controller.ledgers.values():
        assert all(ledger.is_evictable(name) for name in ledger.resident)
        assert ledger.running_bytes == 0
    unhurried = {r.id for r in requests if r.deadline_seconds is None}
    assert not [v for v in report.verdicts if v.outcome is Outcome.LATE and v.request in unhurried]


@EVERY
@HALF
@given(workload=workloads(), budgets=st.lists(st.integers(5, 120), min_size=1, max_size=3))
def test_no_verdict_is_lost_whatever_the_devices_hold(
    policy: Policy,
    workload: tuple[list[Expert], list[Request], int, int, int, dict[str, int]],
    budgets: list[int],
) -> None:
    """Some experts fit nowhere, some on one device only."""
    experts, requests, _, executors, slots, _ = workload
    devices = tuple(Device(f"d{n}", budget, slots) for n, budget in enumerate(budgets))
    experts = [
        replace(
            e,
            costs=dict.fromkeys((d.name for d in devices), e.costs["cpu"]),
            footprints=dict.fromkeys((d.name for d in devices), e.footprints["cpu"]),
        )
        for e in experts
    ]
    names = tuple(Executor(f"{d.name}-{n}", d.name) for d in devices for n in range(executors))
    graph = replace(inspection_graph([e.name for e in experts if e.name != "detector"]), limits={"detector": 2})
    controller = Controller(graph, {e.name: e for e in experts}, devices, names, policy=policy)
    report = simulate(controller, pretend(experts, devices, DOUBTFUL), requests)
    assert sorted(v.request for v in report.verdicts) == sorted(r.id for r in requests)
    assert controller.scheduler.is_idle


@EVERY
@HALF
@given(workload=workloads(), most=st.integers(1, 6), overflow=st.sampled_from([Overflow.REJECT, Overflow.OLDEST]))
def test_never_more_pictures_are_open_than_may_be_and_each_has_its_verdict(
    policy: Policy,
    workload: tuple[list[Expert], list[Request], int, int, int, dict[str, int]],
    most: int,
    overflow: Overflow,
) -> None:
    experts, requests, budget, executors, slots, _ = workload
    graph = inspection_graph([e.name for e in experts if e.name != "detector"])
    controller, devices = box(
        experts, graph, budget, executors, slots, 60, policy, PRIORITIES, most_waiting=most, overflow=overflow
    )

    class Counted(Noting):
        def look(self, actions: Sequence[Action], now: float) -> None:
            assert len(controller.progress) <= most

    report = simulate(Counted(controller), pretend(experts, devices, DOUBTFUL), requests)  # type: ignore[arg-type]
    assert sorted(v.request for v in report.verdicts) == sorted(r.id for r in requests)
    begun = {name for action in report.actions if isinstance(action, Run) for name in action.batch.requests}
    turned_away = {v.request for v in report.verdicts if v.refusal is not None and v.refusal.reason == QUEUE_FULL}
    assert not turned_away & begun
    assert controller.scheduler.is_idle
    for ledger in controller.ledgers.values():
        assert all(ledger.is_evictable(name) for name in ledger.resident)


@EVERY
@HALF
@given(
    workload=workloads(),
    more=st.sets(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=6),
    limits=st.dictionaries(st.integers(0, 5), st.integers(1, 4)),
    detectors=st.integers(1, 4),
)
def test_with_limits_on_steps_everybody_is_answered_and_no_step_overflows(
    policy: Policy,
    workload: tuple[list[Expert], list[Request], int, int, int, dict[str, int]],
    more: set[tuple[int, int]],
    limits: dict[int, int],
    detectors: int,
) -> None:
    """Every expert leads to the detector, and some to others, in chains."""
    experts, requests, budget, executors, slots, fails = workload
    names = [e.name for e in experts if e.name != "detector"]
    chains = [Edge(f"e{n}", f"e{m}") for n, m in sorted(more) if n < m < len(names)]
    edges, all_limits = [*chains, *(Edge(name, "detector") for name in names)], {"detector": detectors}
    all_limits |= {f"e{n}": most for n, most in limits.items() if any(edge.to == f"e{n}" for edge in chains)}
    graph = compile_graph({f"c-{name}": name for name in names}, edges, [*names, "detector"], limits=all_limits)
    controller, devices = box(experts, graph, budget, executors, slots, 60, policy, PRIORITIES)
    left = dict(fails)

    def broken(action: Load | Run) -> Refusal | None:
        name = action.expert if isinstance(action, Load) else action.batch.expert
        left[name] = left.get(name, 0) - 1
        return FAILURES[left[name] % (4 if isinstance(action, Run) else 3)] if left[name] >= 0 else None

    class Limited(Noting):
        def look(self, actions: Sequence[Action], now: float) -> None:
            waiting = {name: controller.scheduler.demand("cpu", name) for name in all_limits}
            full = {name for name, count in waiting.items() if count >= all_limits[name]}
            for action in actions:
                if isinstance(action, Run):
                    assert not full & {edge.to for edge in graph.edges.get(action.batch.expert, ())}
            assert waiting["detector"] < detectors + executors * max(e.max_batch for e in experts)

    seen = Noting(controller) if policy.in_order else Limited(controller)
    world = HalfTooLate(experts, devices, lambda request, expert: (SOUND,), broken)
    report = simulate(seen, world, requests)  # type: ignore[arg-type]
    assert sorted(v.request for v in report.verdicts) == sorted(r.id for r in requests)
    assert controller.scheduler.is_idle
    for ledger in controller.ledgers.values():
        assert all(ledger.is_evictable(name) for name in ledger.resident)
    unhurried = {r.id for r in requests if r.deadline_seconds is None}
    assert not [v for v in report.verdicts if v.outcome is Outcome.LATE and v.request in unhurried]


@EVERY
@HALF
@given(workload=workloads())
def test_the_same_events_make_the_same_actions(
    policy: Policy, workload: tuple[list[Expert], list[Request], int, int, int, dict[str, int]]
) -> None:
    """Run twice; then the events that were noted are replayed."""
    experts, requests, budget, executors, slots, _ = workload
    graph = replace(inspection_graph([e.name for e in experts if e.name != "detector"]), limits={"detector": 2})
    requests = [replace(r, line=f"line{n % 2}", product=f"product{n // 7 % 3}") for n, r in enumerate(requests)]
    products = {f"product{n}": {component: 1} for n, component in enumerate(list(graph.entries)[:2])}
    events: list[tuple[float, Event]] = []
    runs = []
    devices, names = (Device("cpu", budget, slots),), tuple(Executor(f"cpu-{n}", "cpu") for n in range(executors))
    made = partial(
        Controller,
        graph,
        {e.name: e for e in experts},
        devices,
        names,
        policy=policy,
        priorities=PRIORITIES,
        products=products,
    )
    for _ in range(2):
        noted = Noting(made())
        runs.append(simulate(noted, pretend(experts, devices, DOUBTFUL), requests).actions)  # type: ignore[arg-type]
        events = noted.events
    runs.append(replay(made(), pretend(experts, devices, DOUBTFUL), events).actions)
    assert runs[0] == runs[1] == runs[2]


class Noting:
    """A controller whose events are noted, and whose actions are looked at before anybody obeys."""

    def __init__(self, controller: Controller) -> None:
        self.controller, self.events = controller, list[tuple[float, Event]]()
        self.next_wakeup, self.counts = controller.next_wakeup, controller.counts

    def handle(self, event: Event, now: float) -> list[Action]:
        self.events.append((now, event))
        actions = self.controller.handle(event, now)
        self.look(actions, now)
        return actions

    def look(self, actions: Sequence[Action], now: float) -> None:
        pass


class Sparing(Noting):
    """Ours: who is needed leaves only for one who is overdue and was due before."""

    def look(self, actions: Sequence[Action], now: float) -> None:
        scheduler, coming, event = self.controller.scheduler, None, self.events[-1][1]
        cancelled = event.expert if isinstance(event, LoadFailed) else None
        for action in reversed(actions):
            if isinstance(action, Load):
                coming = action
            elif isinstance(action, Evict) and coming is not None and action.expert != cancelled:
                needed = scheduler.due_seconds(action.device, action.expert)
                due = scheduler.due_seconds(coming.device, coming.expert)
                assert needed is None or (due is not None and due <= now and due < needed)
                assert action.rule is (Rule.LEAST_WORTH if needed is None else Rule.OVERDUE)


WISHES = st.lists(st.tuples(st.sampled_from(Verb), st.integers(0, 9)), max_size=40)
"""Commands, each about one of at most ten experts."""


class Commanding(Noting):
    """Somebody commands something after every event, as long as there are wishes."""

    def __init__(self, controller: Controller, experts: Sequence[Expert], wishes: Sequence[tuple[Verb, int]]) -> None:
        super().__init__(controller)
        self.left = [Command(n, verb, experts[e % len(experts)].name) for n, (verb, e) in enumerate(wishes)]

    def handle(self, event: Event, now: float) -> list[Action]:
        actions = super().handle(event, now)
        return actions + (super().handle(self.left.pop(0), now) if self.left else [])


@EVERY
@given(workload=workloads(), wishes=WISHES)
def test_commands_cost_nobody_a_verdict_and_each_is_acknowledged_once(
    policy: Policy,
    workload: tuple[list[Expert], list[Request], int, int, int, dict[str, int]],
    wishes: list[tuple[Verb, int]],
) -> None:
    experts, requests, budget, executors, slots, _ = workload
    graph = inspection_graph([e.name for e in experts if e.name != "detector"])
    controller, devices = box(experts, graph, budget, executors, slots, policy=policy)
    noted = Commanding(controller, experts, wishes)
    report = simulate(noted, pretend(experts, devices, DOUBTFUL), requests)  # type: ignore[arg-type]
    assert sorted(v.request for v in report.verdicts) == sorted(r.id for r in requests)
    answered = [action.command for action in report.actions if isinstance(action, Acknowledge)]
    assert sorted(answered) == list(range(len(wishes) - len(noted.left)))
    fresh, devices = box(experts, graph, budget, executors, slots, policy=policy)
    assert replay(fresh, pretend(experts, devices, DOUBTFUL), noted.events).actions == report.actions


def test_a_commanded_load_is_acknowledged_when_it_is_there() -> None:
    controller, _ = _one_expert()
    assert controller.handle(Command(7, Verb.LOAD, "a"), 0.0) == [Load("cpu", "a", (Segment("a-weights", 10),), True)]
    assert controller.handle(Command(8, Verb.LOAD, "a"), 0.1) == []
    assert controller.handle(Loaded("cpu", "a"), 0.2) == [Acknowledge(7, None), Acknowledge(8, None)]
    assert controller.handle(Command(9, Verb.LOAD, "a"), 0.3) == [Acknowledge(9, None)]


def test_a_commanded_load_that_fails_says_why() -> None:
    controller, _ = _one_expert()
    controller.handle(Command(1, Verb.LOAD, "a"), 0.0)
    assert Acknowledge(1, BROKEN) in controller.handle(LoadFailed("cpu", "a", BROKEN), 0.1)


def test_a_commanded_load_gives_way_to_pictures_that_wait_and_says_so() -> None:
    controller = _several("abc", budget=20, slots=1)
    controller.handle(Command(1, Verb.LOAD, "a"), 0.0)
    assert CancelLoad("cpu", "a") in controller.handle(Arrived(request("r", "c-b")), 0.1)
    cancelled = controller.handle(LoadFailed("cpu", "a", Refusal(CANCELLED, "")), 0.2)
    assert _refusals(cancelled)[1].reason == CANCELLED
    assert "gave way" in _refusals(cancelled)[1].detail


def test_a_commanded_load_displaces_only_whom_nobody_needs() -> None:
    controller = _several("abc", budget=20)
    for name in "ab":
        controller.handle(Command(1, Verb.LOAD, name), 0.0)
        controller.handle(Loaded("cpu", name), 0.1)
    run = _run(controller.handle(Arrived(request("r", "c-a")), 0.2))
    evict, load = controller.handle(Command(2, Verb.LOAD, "c"), 0.3)
    assert isinstance(evict, Evict)
    assert isinstance(load, Load)
    assert (evict.expert, load.expert) == ("b", "c")
    controller.handle(Loaded("cpu", "c"), 0.4)
    controller.handle(Arrived(request("s", "c-c")), 0.5)
    refusal = _refusals(controller.handle(Command(3, Verb.LOAD, "b"), 0.6))[3]
    assert (refusal.reason, run.batch.expert) == ("no-room", "a")
    assert "10 more bytes are needed, 0 could be freed" in refusal.detail


def test_who_runs_is_waited_for_or_is_pinned_is_not_evicted_by_command() -> None:
    controller = _several("ab", budget=20, executors=1)
    evict = Command(1, Verb.EVICT, "a")
    assert controller.handle(evict, 0.0) == [Acknowledge(1, None)]  # it is not there, as was wanted
    controller.handle(Arrived(request("r", "c-a")), 0.1)
    assert _refusals(controller.handle(evict, 0.2))[1] == Refusal("busy", "a is being loaded on cpu")
    run = _run(controller.handle(Loaded("cpu", "a"), 0.3))
    assert _refusals(controller.handle(evict, 0.4))[1] == Refusal("in-use", "a batch of a runs on cpu")
    controller.handle(Arrived(request("s", "c-a")), 0.5)
    assert _refusals(controller.handle(evict, 0.6))[1] == Refusal("in-use", "pictures wait for a on cpu: 1")
    run = _run(controller.handle(Finished(run.batch, ((SOUND,),), 0.1), 0.7))
    controller.handle(Finished(run.batch, ((SOUND,),), 0.1), 0.8)
    controller.handle(Command(2, Verb.PIN, "a"), 0.9)
    assert _refusals(controller.handle(evict, 1.0))[1].reason == "pinned"
    controller.handle(Command(3, Verb.UNPIN, "a"), 1.1)
    gone = controller.handle(evict, 1.2)
    assert gone == [Evict("cpu", "a", (Segment("a-weights", 10),), Rule.COMMANDED), Acknowledge(1, None)]


def test_a_pinned_expert_is_loaded_and_stays_until_it_is_unpinned() -> None:
    controller = _several("abc", budget=20)
    acknowledged, load = controller.handle(Command(1, Verb.PIN, "a"), 0.0)
    assert acknowledged == Acknowledge(1, None)
    assert isinstance(load, Load)
    controller.handle(Loaded("cpu", "a"), 0.1)
    assert not controller.ledgers["cpu"].is_evictable("a")
    assert _refusals(controller.handle(Command(2, Verb.UNPIN, "b"), 0.2))[2].reason == "not-pinned"
    assert controller.handle(Command(3, Verb.UNPIN, "a"), 0.3) == [Acknowledge(3, None)]
    assert controller.ledgers["cpu"].is_evictable("a")


def test_a_pin_that_would_shut_somebody_out_is_refused_with_numbers() -> None:
    controller = _several("abc", budget=25)
    assert Acknowledge(1, None) in controller.handle(Command(1, Verb.PIN, "a"), 0.0)
    refusal = _refusals(controller.handle(Command(2, Verb.PIN, "b"), 0.1))[2]
    assert refusal == Refusal("no-room", "c and all that are pinned would need 30 of 25 bytes on cpu")


def test_with_two_devices_a_pin_goes_to_the_first_that_has_room_and_an_eviction_is_for_all_or_none() -> None:
    devices = (Device("gpu", 15), Device("cpu", 40))
    experts = {name: expert(name, on=("gpu", "cpu")) for name in "ab"}
    executors = (Executor("gpu-0", "gpu"), Executor("cpu-0", "cpu"))
    graph = compile_graph({"c-a": "a", "c-b": "b"}, [], ["a", "b"])
    controller = Controller(graph, experts, devices, executors, residents=[("gpu", "a"), ("cpu", "a")])
    run = _run(controller.handle(Arrived(request("r", "c-a")), 0.0)).batch
    assert _refusals(controller.handle(Command(1, Verb.EVICT, "a"), 0.1))[1].reason == "in-use"
    assert all(ledger.is_ready("a") for ledger in controller.ledgers.values())
    controller.handle(Finished(run, ((SOUND,),), 0.1), 0.2)
    assert Acknowledge(2, None) in controller.handle(Command(2, Verb.PIN, "a"), 0.3)
    assert [name for name, ledger in controller.ledgers.items() if "a" in ledger.pinned] == ["cpu"]


def test_a_command_for_nobody_is_refused() -> None:
    controller, _ = _one_expert()
    assert _refusals(controller.handle(Command(1, Verb.LOAD, "ghost"), 0.0))[1].reason == "unknown-expert"


def _several(names: str, budget: int, executors: int = 2, slots: int = 2) -> Controller:
    experts = [expert(name) for name in names]
    graph = compile_graph({f"c-{name}": name for name in names}, [], list(names))
    return box(experts, graph, budget, executors, slots)[0]


def _refusals(actions: Sequence[Action]) -> dict[int, Refusal]:
    """By the command that was refused."""
    return {a.command: a.refusal for a in actions if isinstance(a, Acknowledge) and a.refusal is not None}


@given(workloads())
def test_nobody_whom_a_queued_picture_needs_leaves_for_one_who_can_wait(
    workload: tuple[list[Expert], list[Request], int, int, int, dict[str, int]],
) -> None:
    experts, requests, budget, executors, slots, _ = workload
    graph = inspection_graph([e.name for e in experts if e.name != "detector"])
    policy = replace(APPLIANCE, patience_seconds=1.0)
    controller, devices = box(experts, graph, budget, executors, slots, policy=policy, priorities=PRIORITIES)
    report = simulate(Sparing(controller), pretend(experts, devices, DOUBTFUL), requests)  # type: ignore[arg-type]
    assert len(report.verdicts) == len(requests)


@pytest.mark.parametrize("policy", PAPER, ids=lambda policy: policy.name)
def test_a_load_occupies_its_executor_where_queues_are_worked_off_in_order(policy: Policy) -> None:
    experts = _experts("a", "b", "c", size=40)
    controller, devices = box(experts, inspection_graph(["a", "b", "c"]), 100, executors=1, policy=policy)
    stream = [request(f"{n}", f"c-{name}", n * 0.05) for n, name in enumerate("abcabccbacab")]
    busy: set[str] = set()

    class Alone(Noting):
        def look(self, actions: Sequence[Action], now: float) -> None:
            event = self.events[-1][1]
            busy.difference_update(
                {"run"} if isinstance(event, Finished) else {"load"} if isinstance(event, Loaded) else ()
            )
            for action in actions:
                if isinstance(action, Load | Run):
                    assert not busy
                    busy.add("run" if isinstance(action, Run) else "load")

    simulate(Alone(controller), pretend(experts, devices, DOUBTFUL), stream)  # type: ignore[arg-type]


def test_first_come_first_served_batches_only_neighbours() -> None:
    experts = _experts("a", "b", size=10)
    order = []
    for policy in (SAMBA, EM_RA):
        controller, devices = box(experts, inspection_graph(["a", "b"]), 100, executors=1, policy=policy)
        stream = [request(f"{n}", f"c-{name}") for n, name in enumerate("aababb")]
        report = simulate(controller, pretend(experts, devices), stream)
        order.append([a.batch.requests for a in report.actions if isinstance(a, Run)])
    assert order == [[("0", "1"), ("2",), ("3",), ("4", "5")], [("0", "1", "3"), ("2", "4", "5")]]


@pytest.mark.parametrize(
    ("policy", "leaver", "rule"),
    [
        (SAMBA, "b", Rule.LEAST_WORTH),
        (SAMBA_FIFO, "b", Rule.LEAST_WORTH),
        (EM, "detector", Rule.ORPHANED),
        (COSERVE, "detector", Rule.ORPHANED),
        (replace(EM, orphans_first=False), "b", Rule.LEAST_WORTH),
    ],
)
def test_a_detector_none_of_whose_classifiers_is_here_leaves_first_however_probable(
    policy: Policy, leaver: str, rule: Rule
) -> None:
    experts = [expert("a", 40), expert("b", 40, probability=0.2), expert("detector", 40, probability=0.9)]
    graph = compile_graph({"c-a": "a", "c-b": "b"}, [Edge("a", "detector")], ["a", "b", "detector"])
    devices, executors = (Device("cpu", 100, 1),), (Executor("cpu-0", "cpu"),)
    here = [("cpu", "b"), ("cpu", "detector")]
    controller = Controller(graph, {e.name: e for e in experts}, devices, executors, policy=policy, residents=here)
    evict, load = controller.handle(Arrived(request("r", "c-a")), 0.0)
    assert isinstance(evict, Evict)
    assert (evict.expert, evict.rule) == (leaver, rule)
    assert load == Load("cpu", "a", (Segment("a-weights", 40),))


def test_room_for_a_pinned_expert_is_a_rule_of_its_own() -> None:
    devices, executors = (Device("cpu", 100, 2),), (Executor("cpu-0", "cpu"),)
    named, graph = {e.name: e for e in _experts("a", "b", size=60)}, inspection_graph(["a", "b"])
    controller = Controller(graph, named, devices, executors, pinned=["b"], residents=[("cpu", "a")])
    evict, _ = controller.handle(Tick(), 0.0)
    assert evict == Evict("cpu", "a", (Segment("a-weights", 60),), Rule.PINNED)


def test_a_shortage_of_memory_is_a_rule_of_its_own() -> None:
    experts = [expert("a", 30, activation_item=20), expert("detector", 30, probability=0.5)]
    controller, _ = box(experts, inspection_graph(["a"]), 100, executors=1)
    controller.handle(Arrived(request("a", "c-a")), 0.0)
    run = _run(controller.handle(Loaded("cpu", "a"), 0.1))
    controller.handle(Loaded("cpu", "detector"), 0.2)
    moves = controller.handle(RunFailed(run.batch, NO_MEMORY), 0.3)
    moves += controller.handle(Tick(), 0.4)  # a load for which somebody leaves is held for a moment
    assert [(m.expert, m.rule) for m in moves if isinstance(m, Evict)] == [
        ("a", Rule.WITHHELD),
        ("detector", Rule.LEAST_WORTH),
    ]


def test_evictions_are_counted_by_rule_and_tasks_by_where_their_expert_was() -> None:
    experts = _experts("a", "b", size=60)
    controller, _ = box(experts, inspection_graph(["a", "b"]), 100, executors=1)
    controller.handle(Arrived(request("a1", "c-a")), 0.0)
    controller.handle(Arrived(request("a2", "c-a")), 0.05)
    run = _run(controller.handle(Loaded("cpu", "a"), 0.1))
    controller.handle(Finished(run.batch, ((SOUND,), (SOUND,)), 0.1), 0.2)
    run = _run(controller.handle(Arrived(request("a3", "c-a")), 0.3))
    controller.handle(Finished(run.batch, ((SOUND,),), 0.1), 0.4)
    controller.handle(Arrived(request("b1", "c-b")), 0.5)
    controller.handle(Tick(), 0.6)
    assert controller.asked == {Residency.ABSENT: 2, Residency.LOADING: 1, Residency.READY: 1}
    assert controller.evictions == {Rule.LEAST_WORTH: 1}
    assert controller.counts["evictions"] == 1
    controller.handle(LoadFailed("cpu", "b", BROKEN), 0.7)
    assert controller.counts["evictions"] == 1, "who never came did not leave"


def test_while_a_step_is_full_whoever_leads_to_it_begins_nothing_and_the_others_go_on() -> None:
    controller = _limited({"slow": 1}, {"a": 10, "other": 10, "slow": 10}, 100, ["a", "other"])
    assert _moves(controller.handle(Arrived(request("s", "c-slow")), 0.0)) == ["load slow"]
    assert controller.handle(Arrived(request("a", "c-a")), 0.1) == []
    run = _run(controller.handle(Arrived(request("o", "c-other")), 0.2))
    controller.handle(Loaded("cpu", "slow"), 0.3)
    run = _run(controller.handle(Finished(run.batch, ((SOUND,),), 0.1), 0.4))
    assert run.batch.expert == "slow"
    assert _run(controller.handle(Finished(run.batch, ((SOUND,),), 0.1), 0.5)).batch.expert == "a"


def test_as_soon_as_a_full_step_takes_a_batch_the_others_go_on_beside_it() -> None:
    controller = _limited({"slow": 1}, {"a": 10, "other": 10, "slow": 10}, 100, ["a"], executors=2)
    controller.handle(Arrived(request("s", "c-slow")), 0.0)
    controller.handle(Arrived(request("a", "c-a")), 0.1)
    assert sorted(_moves(controller.handle(Loaded("cpu", "slow"), 0.2))) == ["run a", "run slow"]


def test_whom_a_full_step_holds_back_leaves_for_it_though_it_was_loaded_a_moment_ago() -> None:
    """Its claim would last until its first batch, and that would wait for the step: for ever."""
    controller = _limited({"slow": 1}, {"a": 60, "other": 30, "slow": 60}, 100, ["other"])
    controller.handle(Arrived(request("o", "c-other")), 0.0)
    controller.handle(Arrived(request("a", "c-a")), 0.1)
    controller.handle(Loaded("cpu", "a"), 0.2)
    assert _moves(controller.handle(Arrived(request("s", "c-slow")), 0.3)) == ["evict a", "load slow"]


def test_who_is_held_back_is_neither_loaded_nor_kept_when_its_load_ends() -> None:
    controller = _limited({"slow": 1}, {"a": 60, "other": 30, "slow": 60}, 100, ["other"])
    controller.handle(Arrived(request("o", "c-other")), 0.0)
    assert _moves(controller.handle(Arrived(request("a", "c-a")), 0.1)) == ["load a"]
    assert _moves(controller.handle(Arrived(request("s", "c-slow")), 0.2)) == []
    assert _moves(controller.handle(Loaded("cpu", "a"), 0.3)) == ["evict a", "load slow"]
    assert _moves(controller.handle(Arrived(request("a2", "c-a")), 0.4)) == []


def test_a_full_step_before_a_full_step_gives_way_to_it() -> None:
    """Memory for one of the two: the first is needed as urgently, but cannot go on before the second has."""
    graph = compile_graph({"c-s": "s", "c-t": "t"}, [Edge("s", "t")], ["s", "t"], limits={"t": 1})
    chained = replace(graph, limits={"s": 1, "t": 1}, before={"s": ("a",), "t": ("s",)})
    devices, executors = (Device("cpu", 60, 2),), (Executor("cpu-0", "cpu"),)
    named = {name: expert(name, 50) for name in "st"}
    controller = Controller(chained, named, devices, executors)
    controller.handle(Arrived(request("s", "c-s")), 0.0)
    controller.handle(Arrived(request("t", "c-t")), 0.1)
    assert _moves(controller.handle(Loaded("cpu", "s"), 0.2)) == ["evict s", "load t"]
    run = _run(controller.handle(Loaded("cpu", "t"), 0.3))
    assert run.batch.expert == "t"
    assert _moves(controller.handle(Finished(run.batch, ((SOUND,),), 0.1), 0.4)) == ["evict t", "load s"]


def test_a_load_that_found_no_room_is_tried_again_when_a_step_turns() -> None:
    """`s` and `t` press, and neither leaves for the other; then `t` is held back by `u`."""
    names = ("o", "s", "t", "u")
    graph = compile_graph({f"c-{name}": name for name in names}, [Edge("t", "u")], names, limits={"u": 1})
    pressing = replace(graph, limits=dict.fromkeys("stu", 1), before={"s": ("o",), "t": ("o",), "u": ("t",)})
    devices, executors = (Device("cpu", 60, 2),), (Executor("cpu-0", "cpu"),)
    named = {name: expert(name, 10 if name == "o" else 50) for name in names}
    controller = Controller(pressing, named, devices, executors, residents=[("cpu", "o"), ("cpu", "t")])
    controller.handle(Arrived(request("o", "c-o")), 0.0)
    controller.handle(Arrived(request("t", "c-t")), 0.1)
    assert controller.handle(Arrived(request("s", "c-s")), 0.2) == []
    assert _moves(controller.handle(Arrived(request("u", "c-u")), 0.3)) == ["evict t", "load s"]


@pytest.mark.parametrize("policy", PAPER, ids=lambda policy: policy.name)
def test_the_published_policies_know_no_limits(policy: Policy) -> None:
    experts = _experts("a", "b", size=60)
    graph = inspection_graph(["a", "b"])
    stream = [request(f"{n}", f"c-{name}", n * 0.05) for n, name in enumerate("abbabaabab")]
    runs = []
    for limits in ({}, {"detector": 1}):
        controller, devices = box(experts, replace(graph, limits=limits), 120, policy=policy)
        runs.append(simulate(controller, pretend(experts, devices, DOUBTFUL), stream).actions)
    assert runs[0] == runs[1]


def _limited(
    limits: dict[str, int], sizes: dict[str, int], budget_bytes: int, residents: Sequence[str], executors: int = 1
) -> Controller:
    """Everybody is asked first by its component; `a` leads to `slow`."""
    experts = {name: expert(name, size) for name, size in sizes.items()}
    graph = compile_graph({f"c-{name}": name for name in sizes}, [Edge("a", "slow")], list(sizes), limits=limits)
    names = tuple(Executor(f"cpu-{number}", "cpu") for number in range(executors))
    here = [("cpu", name) for name in residents]
    return Controller(graph, experts, (Device("cpu", budget_bytes, 2),), names, residents=here)


def _moves(actions: Sequence[Action]) -> list[str]:
    """Loads, evictions and runs in words."""
    words = []
    for action in actions:
        match action:
            case Load(expert=expert):
                words.append(f"load {expert}")
            case Evict(expert=expert):
                words.append(f"evict {expert}")
            case Run(batch):
                words.append(f"run {batch.expert}")
            case _:
                pass
    return words


def test_where_more_pictures_wait_outside_nobody_is_turned_away() -> None:
    controller, _ = box(_experts("a"), inspection_graph(["a"]), 100, most_waiting=2)
    assert controller.room(1000) == 2
    controller.handle(Arrived(request("0", "c-a")), 0.0)
    assert (controller.room(1000), controller.room(1)) == (1, 1)
    controller.handle(Arrived(request("1", "c-a")), 0.0)
    assert controller.room(1000) == 0


def test_where_the_new_picture_is_turned_away_it_hears_so_at_once_and_only_it() -> None:
    controller, _ = box(_experts("a"), inspection_graph(["a"]), 100, 1, most_waiting=2, overflow=Overflow.REJECT)
    for name in ("0", "1"):
        assert not [a for a in controller.handle(Arrived(request(name, "c-a")), 0.0) if isinstance(a, Publish)]
    assert controller.room(1000) == 1000, "all come here, to be turned away"
    (publish,) = controller.handle(Arrived(request("2", "c-a", at=0.5)), 0.75)
    assert isinstance(publish, Publish)
    assert (publish.verdict.request, publish.verdict.outcome) == ("2", Outcome.REJECTED)
    assert publish.verdict.waited_seconds == 0.25
    assert publish.verdict.refusal is not None
    assert publish.verdict.refusal.reason == QUEUE_FULL
    assert "request-id" in publish.verdict.refusal.detail
    assert controller.handle(Arrived(request("1", "c-a")), 0.8) == [], "one that is open is no new one"
    assert _run(controller.handle(Loaded("cpu", "a"), 1.0)).batch.requests == ("0", "1")


def test_where_the_oldest_is_turned_away_those_that_were_begun_stay() -> None:
    limits = {"most_waiting": 2, "overflow": Overflow.OLDEST}
    controller, _ = box(_experts("a"), inspection_graph(["a"]), 100, executors=1, **limits)  # type: ignore[arg-type]
    controller.handle(Arrived(request("0", "c-a")), 0.0)
    run = _run(controller.handle(Loaded("cpu", "a"), 0.1))
    for number in (1, 2, 3):
        moves = controller.handle(Arrived(request(f"{number}", "c-a")), 0.2)
        assert [m.verdict.request for m in moves if isinstance(m, Publish)] == ([f"{number - 1}"] if number > 1 else [])
    moves = controller.handle(Finished(run.batch, ((DOUBTFUL,),), 0.1), 0.3)
    assert _run(moves).batch.requests == ("3",)
    (publish,) = controller.handle(Arrived(request("4", "c-a")), 0.4)
    assert isinstance(publish, Publish)
    assert publish.verdict.request == "4", "both others were looked at: nobody else is left to turn away"


def test_a_prior_line_is_loaded_and_run_as_if_it_had_come_earlier() -> None:
    """Two head starts: who waits for longer than that still goes first, who does not lets it pass."""
    for waited, first in ((1.9, "prior"), (2.1, "other")):
        experts = [*_experts("a", "b", "busy", size=40)]
        graph, priorities = inspection_graph(["a", "b", "busy"]), {"prior": 1}
        controller, _ = box(experts, graph, 200, executors=1, priorities=priorities)
        controller.handle(Arrived(request("0", "c-busy")), 0.0)
        controller.handle(Arrived(request("1", "c-a", line="other")), 0.1)
        run = _run(controller.handle(Loaded("cpu", "busy"), 0.2))
        controller.handle(Arrived(request("2", "c-b", line="prior")), 0.1 + waited)
        controller.handle(Loaded("cpu", "a"), 2.3)
        controller.handle(Loaded("cpu", "b"), 2.4)
        following = _run(controller.handle(Finished(run.batch, ((SOUND,),), 2.5), 2.5))
        assert following.batch.requests == (("2",) if first == "prior" else ("1",))


def test_a_batch_takes_the_pictures_of_a_prior_line_first() -> None:
    controller, _ = box(_experts("a"), inspection_graph(["a"]), 100, executors=1, priorities={"prior": 1})
    for number in range(4):
        controller.handle(Arrived(request(str(number), "c-a", line="other")), 0.0)
    controller.handle(Arrived(request("4", "c-a", line="prior")), 0.05)
    assert _run(controller.handle(Loaded("cpu", "a"), 0.1)).batch.requests == ("4", "0", "1", "2")


@pytest.mark.parametrize("policy", PAPER, ids=lambda policy: policy.name)
def test_the_published_policies_know_no_priorities(policy: Policy) -> None:
    experts = _experts("a", "b", size=60)
    stream = [request(f"{n}", f"c-{name}", n * 0.05, line=f"line{n % 2}") for n, name in enumerate("abbabaabab")]
    graph, runs = inspection_graph(["a", "b"]), []
    for priorities in ({}, {"line1": 9}):
        controller, devices = box(experts, graph, 120, policy=policy, priorities=priorities)
        runs.append(simulate(controller, pretend(experts, devices, DOUBTFUL), stream).actions)
    assert runs[0] == runs[1]


@given(
    st.lists(st.sampled_from(["hot", "warm", "cold"]), min_size=10, max_size=60),
    st.integers(1, 9),
    st.integers(60, 130),
)
def test_of_two_equal_pictures_that_of_the_prior_line_never_waits_longer(
    asked: list[str], priority: int, budget: int
) -> None:
    """More than one executor can do, of two lines that publish the same at the same time."""
    experts = [*(expert(name, 40, item=0.1) for name in ("hot", "warm", "cold")), expert("detector", 20)]
    graph, priorities = inspection_graph(["hot", "warm", "cold"]), {"prior": priority}
    controller, devices = box(experts, graph, budget, executors=1, priorities=priorities)
    stream = [
        request(f"{line} {n}", f"c-{name}", n * 0.1, line=line)
        for n, name in enumerate(asked)
        for line in ("prior", "other")
    ]
    report = simulate(controller, pretend(experts, devices, DOUBTFUL), stream)
    waited = {verdict.request: verdict.waited_seconds for verdict in report.verdicts}
    assert all(waited[f"prior {n}"] <= waited[f"other {n}"] for n in range(len(asked)))


@given(st.lists(st.sampled_from(["hot", "warm"]), min_size=180, max_size=200), st.integers(0, 2))
def test_nobody_starves_behind_a_prior_line(arrivals: list[str], priority: int) -> None:
    """It asks for twice what the executor can do; who comes later than its head start and patience passes nobody, but
    for what runs and loads at that moment."""
    experts = [expert(name, 40, item=0.1) for name in ("hot", "warm", "cold")] + [expert("detector", 1)]
    policy = replace(APPLIANCE, patience_seconds=2.0)
    graph, priorities = inspection_graph(["hot", "warm", "cold"]), {"prior": priority}
    controller, devices = box(experts, graph, 90, 1, load_slots=1, policy=policy, priorities=priorities)
    requests = [request(f"{n}", f"c-{name}", n * 0.05, line="prior") for n, name in enumerate(arrivals)]
    cold = request("cold", "c-cold", 0.5, line="other")
    report = simulate(controller, pretend(experts, devices), sorted([*requests, cold], key=lambda r: r.arrived_seconds))
    answered = [verdict.request for verdict in report.verdicts]
    passed = [requests[int(name)].arrived_seconds for name in answered[: answered.index("cold")]]
    assert max(passed, default=0.0) < 0.5 + policy.patience_seconds + priority * HEAD_START_SECONDS + 1.0


@given(st.lists(st.sampled_from(["hot", "warm"]), min_size=50, max_size=200))
def test_nobody_starves_behind_busy_residents(arrivals: list[str]) -> None:
    """Residents are kept busy for longer than patience lasts; the cold expert's picture still gets its turn."""
    experts = [expert(name, 40, item=0.1) for name in ("hot", "warm", "cold")] + [expert("detector", 1)]
    policy = replace(APPLIANCE, patience_seconds=2.0)
    graph = inspection_graph(["hot", "warm", "cold"])
    controller, devices = box(experts, graph, 90, executors=1, load_slots=1, policy=policy)
    requests = [request(f"{n}", f"c-{name}", n * 0.05) for n, name in enumerate(arrivals)]
    cold = request("cold", "c-cold", 0.5)
    report = simulate(controller, pretend(experts, devices), sorted([*requests, cold], key=lambda r: r.arrived_seconds))
    (waited,) = [v.waited_seconds for v in report.verdicts if v.request == "cold"]
    assert waited < policy.patience_seconds + 2.0


def _experts(*names: str, size: int = 10) -> list[Expert]:
    return [expert(name, size) for name in names] + [expert("detector", size)]


def _pinning(
    experts: list[Expert], budget_bytes: int, pinned: Sequence[str] = (), preload: Sequence[str] = ()
) -> tuple[Controller, tuple[Device, ...]]:
    graph = inspection_graph([e.name for e in experts if e.name != "detector"])
    devices = (Device("cpu", budget_bytes, 2),)
    executors = (Executor("cpu-0", "cpu"),)
    named = {e.name: e for e in experts}
    return Controller(graph, named, devices, executors, pinned=pinned, preload=preload), devices


def _run(actions: Sequence[Action]) -> Run:
    (run,) = [action for action in actions if isinstance(action, Run)]
    return run


def _one_expert() -> tuple[Controller, tuple[Device, ...]]:
    return box(_experts("a"), inspection_graph(["a"]), 100, executors=1)


def test_a_load_failure_event_evicts_what_was_booked() -> None:
    controller, _ = _one_expert()
    controller.handle(Arrived(request("r", "c-a")), 0.0)
    actions = controller.handle(LoadFailed("cpu", "a", BROKEN), 0.1)
    segments = (Segment("a-weights", 10),)
    assert actions == [Evict("cpu", "a", segments, Rule.NOT_LOADED), Load("cpu", "a", segments)]
