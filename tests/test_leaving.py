"""Who leaves for whom, and by which rule."""

from __future__ import annotations

from dataclasses import replace

import pytest

from appliance.core.controller import Controller
from appliance.core.graph import Edge, compile_graph
from appliance.core.memory import Residency
from appliance.core.policies import (
    APPLIANCE,
    COSERVE,
    EM,
    PATIENCE_SECONDS,
    SAMBA,
    SAMBA_FIFO,
    SLACK_SHARE,
    Policy,
)
from appliance.core.types import (
    GOLDEN_MISMATCH,
    Arrived,
    Device,
    Evict,
    Executor,
    Finished,
    Load,
    Loaded,
    LoadFailed,
    Publish,
    Refusal,
    Request,
    Rule,
    Run,
    RunFailed,
    Segment,
    Tick,
)
from appliance.core.usage import STEADY_PICTURES
from appliance.lab.simulate import World, simulate
from tests.kit import SOUND, box, expert, inspection_graph, pretend, request
from tests.kit_controller import (
    BROKEN,
    NO_MEMORY,
    only_run,
    pinning,
    plain_experts,
)


def test_a_cold_expert_waits_for_residents_with_work_until_its_patience_ends() -> None:
    """`a` is idle for a moment between two batches, with more of them queued: only patience keeps it from leaving."""
    experts = [*plain_experts("a", "b", size=60), expert("c", 40)]
    controller, _ = box(experts, inspection_graph(["a", "b", "c"]), 100, executors=1)
    controller.handle(Arrived(request("a1", "c-a")), 0.0)
    run = only_run(controller.handle(Loaded("cpu", "a"), 0.1))
    controller.handle(Arrived(request("c1", "c-c")), 0.1)
    controller.handle(Loaded("cpu", "c"), 0.2)
    assert controller.handle(Arrived(request("b1", "c-b")), 0.3) == []
    assert controller.handle(Arrived(request("a2", "c-a")), 0.4) == []
    run = only_run(controller.handle(Finished(run.batch, ((SOUND,),), 0.3), 0.5))
    assert run.batch.expert == "c"
    assert controller.handle(Tick(), 1.0) == []
    assert controller.next_wakeup(1.0) == 0.3 + PATIENCE_SECONDS
    moves = controller.handle(Tick(), 0.3 + PATIENCE_SECONDS)
    assert [type(move) for move in moves] == [Evict, Load]
    evict = Evict("cpu", "a", (Segment("a-weights", 60),), Rule.OVERDUE)
    assert (moves[0], moves[1].expert) == (evict, "b")  # type: ignore[union-attr]


def test_whom_an_earlier_picture_needs_stays_however_long_a_cold_expert_waits() -> None:
    """It runs before anyway: leaving would cost a load and help nobody."""
    experts = [*plain_experts("a", "b", size=60), expert("c", 40)]
    controller, _ = box(experts, inspection_graph(["a", "b", "c"]), 100, executors=1)
    controller.handle(Arrived(request("a1", "c-a")), 0.0)
    run = only_run(controller.handle(Loaded("cpu", "a"), 0.1))
    controller.handle(Arrived(request("c1", "c-c")), 0.1)
    controller.handle(Loaded("cpu", "c"), 0.2)
    controller.handle(Arrived(request("a2", "c-a")), 0.3)
    controller.handle(Arrived(request("b1", "c-b")), 0.4)
    assert [type(a) for a in controller.handle(Finished(run.batch, ((SOUND,),), 0.3), 0.5)] == [Publish, Run]
    assert controller.handle(Tick(), 0.4 + PATIENCE_SECONDS) == []


def test_a_picture_that_is_due_soon_displaces_one_that_is_not() -> None:
    experts = [*plain_experts("a", "b", size=60), expert("c", 40)]
    controller, _ = box(experts, inspection_graph(["a", "b", "c"]), 100, executors=1)
    controller.handle(Arrived(request("a1", "c-a")), 0.0)
    run = only_run(controller.handle(Loaded("cpu", "a"), 0.1))
    controller.handle(Arrived(request("c1", "c-c")), 0.1)
    controller.handle(Loaded("cpu", "c"), 0.2)
    controller.handle(Arrived(request("a2", "c-a")), 0.3)
    controller.handle(Arrived(request("b1", "c-b", deadline=2.0)), 0.4)
    controller.handle(Finished(run.batch, ((SOUND,),), 0.3), 0.5)
    wakeup = controller.next_wakeup(0.5)
    assert wakeup is not None
    assert wakeup == pytest.approx(2.0 - SLACK_SHARE * 0.13)
    assert [type(move) for move in controller.handle(Tick(), wakeup)] == [Evict, Load]


def test_an_expert_whose_pictures_are_all_late_may_leave() -> None:
    controller, _ = box(plain_experts("a", "b", size=100), inspection_graph(["a", "b"]), 100, executors=1)
    controller.handle(Arrived(request("a1", "c-a")), 0.0)
    run = only_run(controller.handle(Loaded("cpu", "a"), 0.1))
    controller.handle(Finished(run.batch, ((SOUND,),), 0.1), 0.2)
    controller.handle(Arrived(request("b1", "c-b", deadline=1.0)), 0.3)
    controller.handle(Arrived(request("b2", "c-b", deadline=1.0)), 0.3)
    controller.handle(Tick(), 0.35)
    run = only_run(controller.handle(Loaded("cpu", "b"), 0.4))
    controller.handle(Arrived(request("b3", "c-b", deadline=1.0)), 0.5)
    controller.handle(Tick(), 1.0)
    controller.handle(Finished(run.batch, ((SOUND,),) * 2, 0.1), 1.1)
    assert controller.ledgers["cpu"].is_evictable("b")


def test_a_quarantined_expert_gives_its_memory_back_even_if_it_was_pinned() -> None:
    controller, _ = pinning(plain_experts("a", "b", size=70), 100, pinned=["b"])
    controller.handle(Tick(), 0.0)
    controller.handle(Loaded("cpu", "b"), 0.1)
    run = only_run(controller.handle(Arrived(request("r", "c-b")), 0.2))
    moves = controller.handle(RunFailed(run.batch, Refusal(GOLDEN_MISMATCH, "3 off")), 0.3)
    assert Evict("cpu", "b", (Segment("b-weights", 70),), Rule.QUARANTINED) in moves
    (load,) = controller.handle(Arrived(request("r2", "c-a")), 0.4)
    assert load == Load("cpu", "a", (Segment("a-weights", 70),))


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
    """`old` is asked for 2,000 pictures; after a few of the other product it is worth less than whoever that will ask,
    although most of these were not asked before."""
    experts = [expert(name, 40) for name in ("new", "new-too", "old", "other")]
    graph = compile_graph({f"c-{e.name}": e.name for e in experts}, [], [e.name for e in experts])
    products = {"former": {"c-old": 8}, "next": {"c-new": 1, "c-new-too": 1, "c-other": 1}}
    devices, executors = (Device("cpu", 120),), (Executor("cpu-0", "cpu"),)
    here = [("cpu", name) for name in ("new", "new-too", "old")]
    controller = Controller(graph, {e.name: e for e in experts}, devices, executors, residents=here, products=products)
    made = [("old", "former")] * 2000 + [("new", "next")] * STEADY_PICTURES + [("other", "next")]
    requests = [Request(str(n), f"c-{name}", n * 0.5, None, "line1", product) for n, (name, product) in enumerate(made)]
    world = World(experts, devices, lambda request, expert: (SOUND,), residents=here)
    report = simulate(controller, world, requests)
    assert [move.expert for move in report.actions if isinstance(move, Evict)] == ["old"]


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
    named, graph = {e.name: e for e in plain_experts("a", "b", size=60)}, inspection_graph(["a", "b"])
    controller = Controller(graph, named, devices, executors, pinned=["b"], residents=[("cpu", "a")])
    evict, _ = controller.handle(Tick(), 0.0)
    assert evict == Evict("cpu", "a", (Segment("a-weights", 60),), Rule.PINNED)


def test_a_shortage_of_memory_is_a_rule_of_its_own() -> None:
    experts = [expert("a", 30, activation_item=20), expert("detector", 30, probability=0.5)]
    controller, _ = box(experts, inspection_graph(["a"]), 100, executors=1)
    controller.handle(Arrived(request("a", "c-a")), 0.0)
    run = only_run(controller.handle(Loaded("cpu", "a"), 0.1))
    controller.handle(Loaded("cpu", "detector"), 0.2)
    moves = controller.handle(RunFailed(run.batch, NO_MEMORY), 0.3)
    moves += controller.handle(Tick(), 0.4)  # a load for which somebody leaves is held for a moment
    assert [(m.expert, m.rule) for m in moves if isinstance(m, Evict)] == [
        ("a", Rule.WITHHELD),
        ("detector", Rule.LEAST_WORTH),
    ]


def test_evictions_are_counted_by_rule_and_tasks_by_where_their_expert_was() -> None:
    experts = plain_experts("a", "b", size=60)
    controller, _ = box(experts, inspection_graph(["a", "b"]), 100, executors=1)
    controller.handle(Arrived(request("a1", "c-a")), 0.0)
    controller.handle(Arrived(request("a2", "c-a")), 0.05)
    run = only_run(controller.handle(Loaded("cpu", "a"), 0.1))
    controller.handle(Finished(run.batch, ((SOUND,), (SOUND,)), 0.1), 0.2)
    run = only_run(controller.handle(Arrived(request("a3", "c-a")), 0.3))
    controller.handle(Finished(run.batch, ((SOUND,),), 0.1), 0.4)
    controller.handle(Arrived(request("b1", "c-b")), 0.5)
    controller.handle(Tick(), 0.6)
    assert controller.asked == {Residency.ABSENT: 2, Residency.LOADING: 1, Residency.READY: 1}
    assert controller.evictions == {Rule.LEAST_WORTH: 1}
    assert controller.counts["evictions"] == 1
    controller.handle(LoadFailed("cpu", "b", BROKEN), 0.7)
    assert controller.counts["evictions"] == 1, "who never came did not leave"
