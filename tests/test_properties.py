"""What holds for every policy, whatever comes and whatever fails."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.core.controller import Controller
from appliance.core.graph import Edge, compile_graph
from appliance.core.policies import (
    APPLIANCE,
    POLICIES,
    Policy,
    oracle,
)
from appliance.core.types import (
    QUEUE_FULL,
    Acknowledge,
    Action,
    Device,
    Evict,
    Executor,
    Expert,
    Finding,
    Heard,
    Load,
    LoadFailed,
    Outcome,
    Overflow,
    Refusal,
    Request,
    Rule,
    Run,
    Verb,
)
from appliance.lab.simulate import replay, simulate
from tests.kit import DOUBTFUL, OPEN, SOUND, box, inspection_graph, is_idle, pretend
from tests.kit_controller import (
    FAILURES,
    HALF,
    WISHES,
    Commanding,
    HalfTooLate,
    Noting,
    workloads,
)

PRIORITIES = {"line1": 1, "line2": 9}
EVERY = pytest.mark.parametrize("policy", [*POLICIES.values(), oracle({})], ids=lambda policy: policy.name)


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
    assert is_idle(controller)
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
    assert is_idle(controller)


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
    assert is_idle(controller)
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
    assert is_idle(controller)
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
    events: list[Heard] = []
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
