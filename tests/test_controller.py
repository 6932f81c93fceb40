"""The controller, in a pretend world that refuses illegal moves: pictures, batches and verdicts."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from appliance.core.controller import Controller
from appliance.core.policies import (
    EM_RA,
    ROOM_PATIENCE_SECONDS,
    SAMBA,
)
from appliance.core.types import (
    CANCELLED,
    GOLDEN_MISMATCH,
    Arrived,
    Batch,
    CancelRun,
    Device,
    Evict,
    Executor,
    Finished,
    Load,
    Loaded,
    Outcome,
    Publish,
    Quarantine,
    Refusal,
    Run,
    RunFailed,
    Segment,
    Tick,
)
from appliance.lab.simulate import IllegalMove, PretendDevice, World, simulate
from tests.kit import BOXED, DOUBTFUL, OPEN, SOUND, box, expert, inspection_graph, is_idle, pretend, request
from tests.kit_controller import (
    one_expert,
    only_run,
    plain_experts,
)


def test_a_picture_of_an_absent_expert_is_loaded_run_and_answered() -> None:
    controller, _ = one_expert()
    (load,) = controller.handle(Arrived(request("r", "c-a")), 0.0)
    assert load == Load("cpu", "a", (Segment("a-weights", 10),))
    run = only_run(controller.handle(Loaded("cpu", "a"), 0.1))
    (publish,) = controller.handle(Finished(run.batch, ((SOUND,),), 0.03), 0.2)
    assert isinstance(publish, Publish)
    assert publish.verdict.outcome is Outcome.PASS
    assert publish.verdict.waited_seconds == 0.2


def test_many_pictures_of_a_cold_expert_cause_one_load_and_go_in_batches() -> None:
    controller, devices = one_expert()
    report = simulate(controller, pretend(plain_experts("a"), devices), [request(str(n), "c-a") for n in range(10)])
    assert [a.expert for a in report.actions if isinstance(a, Load)] == ["a", "detector"]
    assert [len(a.batch.requests) for a in report.actions if isinstance(a, Run)] == [4, 4, 2]


def test_a_request_that_has_to_be_alone_shares_none_of_its_batches() -> None:
    experts = plain_experts("a")
    controller, devices = box(experts, inspection_graph(["a"]), 100)
    requests = [replace(request(str(n), "c-a"), alone=n in (2, 3)) for n in range(6)]
    report = simulate(controller, pretend(experts, devices, DOUBTFUL), requests)
    batches = [a.batch.requests for a in report.actions if isinstance(a, Run)]
    assert [batch for batch in batches if set(batch) & {"2", "3"}] == [("2",), ("3",)] * 2


def test_a_doubtful_part_is_asked_again_and_keeps_its_place_in_the_verdict() -> None:
    experts = plain_experts("a")
    controller, devices = box(experts, inspection_graph(["a"]), 100)
    world = World(experts, devices, lambda r, e: (BOXED,) if e == "detector" else (DOUBTFUL,))
    (verdict,) = simulate(controller, world, [request("r", "c-a")]).verdicts
    assert [step.expert for step in verdict.steps] == ["a", "detector"]
    assert verdict.outcome is Outcome.FAIL


def test_an_unknown_component_is_rejected_at_once() -> None:
    controller, _ = one_expert()
    (publish,) = controller.handle(Arrived(request("r", "nobody")), 0.0)
    assert isinstance(publish, Publish)
    assert publish.verdict.outcome is Outcome.REJECTED


def test_the_same_request_while_it_is_answered_is_not_asked_twice() -> None:
    controller, _ = one_expert()
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
    experts = plain_experts("a")
    controller, devices = box(experts, inspection_graph(["a"]), 100)
    bad = Refusal("picture-damaged", "truncated")
    world = World(experts, devices, lambda r, e: bad if r == "2" else (SOUND,))
    verdicts = simulate(controller, world, [request(str(n), "c-a") for n in range(4)]).verdicts
    assert {v.request: v.outcome for v in verdicts} == {"0": "pass", "1": "pass", "2": "error", "3": "pass"}


def test_a_failed_run_is_repeated_one_picture_at_a_time() -> None:
    experts = plain_experts("a")
    controller, devices = box(experts, inspection_graph(["a"]), 100, executors=1)

    def fails(action: Load | Run) -> Refusal | None:
        return Refusal("run", "crash") if isinstance(action, Run) and "2" in action.batch.requests else None

    report = simulate(
        controller, World(experts, devices, lambda r, e: (SOUND,), fails), [request(str(n), "c-a") for n in range(4)]
    )
    assert Counter(v.outcome for v in report.verdicts) == {Outcome.PASS: 3, Outcome.ERROR: 1}
    assert [len(a.batch.requests) for a in report.actions if isinstance(a, Run)] == [4, 1, 1, 1, 1]


def test_a_request_past_its_deadline_is_late_at_once_and_only_once() -> None:
    controller, _ = one_expert()
    controller.handle(Arrived(request("r", "c-a", deadline=1.0)), 0.0)
    assert controller.next_wakeup(0.0) == 1.0
    (publish,) = controller.handle(Tick(), 1.0)
    assert isinstance(publish, Publish)
    assert publish.verdict.outcome is Outcome.LATE
    assert controller.handle(Loaded("cpu", "a"), 1.1) == []
    assert is_idle(controller)


def test_a_late_request_ignores_the_answer_that_comes_after_it() -> None:
    controller, _ = one_expert()
    controller.handle(Arrived(request("r", "c-a", deadline=1.0)), 0.0)
    run = only_run(controller.handle(Loaded("cpu", "a"), 0.5))
    assert controller.handle(Tick(), 1.0)[1:] == [CancelRun(run.batch)]
    assert controller.handle(Finished(run.batch, ((OPEN,),), 0.7), 1.2) == []


def test_a_batch_whose_pictures_are_all_late_is_cancelled_once_and_not_repeated() -> None:
    controller, _ = one_expert()
    controller.handle(Arrived(request("r1", "c-a", deadline=1.0)), 0.0)
    controller.handle(Arrived(request("r2", "c-a", deadline=2.0)), 0.0)
    run = only_run(controller.handle(Loaded("cpu", "a"), 0.5))
    assert [type(action) for action in controller.handle(Tick(), 1.0)] == [Publish]
    assert controller.handle(Tick(), 2.0)[1:] == [CancelRun(run.batch)]
    assert controller.handle(Tick(), 2.1) == []
    assert controller.handle(RunFailed(run.batch, Refusal(CANCELLED, "")), 2.2) == []
    assert is_idle(controller)
    assert controller.counts["run_failures"] == 0


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


def test_an_expert_that_fails_its_golden_samples_serves_no_more() -> None:
    why = Refusal(GOLDEN_MISMATCH, "output logits is 3 off")
    controller, _ = box(plain_experts("a"), inspection_graph(["a"]), 100, executors=1)
    controller.handle(Arrived(request("r1", "c-a")), 0.0)
    run = only_run(controller.handle(Loaded("cpu", "a"), 0.1))
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


def test_first_come_first_served_batches_only_neighbours() -> None:
    experts = plain_experts("a", "b", size=10)
    order = []
    for policy in (SAMBA, EM_RA):
        controller, devices = box(experts, inspection_graph(["a", "b"]), 100, executors=1, policy=policy)
        stream = [request(f"{n}", f"c-{name}") for n, name in enumerate("aababb")]
        report = simulate(controller, pretend(experts, devices), stream)
        order.append([a.batch.requests for a in report.actions if isinstance(a, Run)])
    assert order == [[("0", "1"), ("2",), ("3",), ("4", "5")], [("0", "1", "3"), ("2", "4", "5")]]
