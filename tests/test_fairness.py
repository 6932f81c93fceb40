"""Lines with a priority go first, and nobody starves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.core.policies import (
    APPLIANCE,
    HEAD_START_SECONDS,
    PAPER,
    POLICIES,
    Policy,
)
from appliance.core.types import (
    Arrived,
    Finished,
    Loaded,
    Request,
    Verdict,
)
from appliance.lab.simulate import simulate
from tests.kit import DOUBTFUL, SOUND, box, expert, inspection_graph, pretend, request
from tests.kit_controller import (
    only_run,
    plain_experts,
)


def _lets_starve(policy: Policy) -> bool:
    """Queues worked off in order, into which later pictures are put in front of others."""
    return policy.in_order and policy.groups


def _name_of(policy: Policy) -> str:
    return policy.name


def test_a_prior_line_is_loaded_and_run_as_if_it_had_come_earlier() -> None:
    """Two head starts: who waits for longer than that still goes first, who does not lets it pass."""
    for waited, first in ((1.9, "prior"), (2.1, "other")):
        experts = [*plain_experts("a", "b", "busy", size=40)]
        graph, priorities = inspection_graph(["a", "b", "busy"]), {"prior": 1}
        controller, _ = box(experts, graph, 200, executors=1, priorities=priorities)
        controller.handle(Arrived(request("0", "c-busy")), 0.0)
        controller.handle(Arrived(request("1", "c-a", line="other")), 0.1)
        run = only_run(controller.handle(Loaded("cpu", "busy"), 0.2))
        controller.handle(Arrived(request("2", "c-b", line="prior")), 0.1 + waited)
        controller.handle(Loaded("cpu", "a"), 2.3)
        controller.handle(Loaded("cpu", "b"), 2.4)
        following = only_run(controller.handle(Finished(run.batch, ((SOUND,),), 2.5), 2.5))
        assert following.batch.requests == (("2",) if first == "prior" else ("1",))


def test_a_batch_takes_the_pictures_of_a_prior_line_first() -> None:
    controller, _ = box(plain_experts("a"), inspection_graph(["a"]), 100, executors=1, priorities={"prior": 1})
    for number in range(4):
        controller.handle(Arrived(request(str(number), "c-a", line="other")), 0.0)
    controller.handle(Arrived(request("4", "c-a", line="prior")), 0.05)
    assert only_run(controller.handle(Loaded("cpu", "a"), 0.1)).batch.requests == ("4", "0", "1", "2")


@pytest.mark.parametrize("policy", PAPER, ids=lambda policy: policy.name)
def test_the_published_policies_know_no_priorities(policy: Policy) -> None:
    experts = plain_experts("a", "b", size=60)
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


@pytest.mark.parametrize("policy", [policy for policy in POLICIES.values() if not _lets_starve(policy)], ids=_name_of)
@given(arrivals=st.lists(st.sampled_from(["hot", "warm"]), min_size=50, max_size=200))
def test_nobody_starves_behind_busy_residents(policy: Policy, arrivals: list[str]) -> None:
    """Residents are kept busy for longer than patience lasts; the cold expert's picture still gets its turn: with ours
    by patience, and where a queue is worked off as pictures came because they do not pass each other."""
    cold, others = _behind_busy_residents(policy, arrivals)
    assert cold.waited_seconds < _SHORT_PATIENCE_SECONDS + 2.0
    assert max((one.arrived_seconds for one in others), default=0.0) < 0.5 + _SHORT_PATIENCE_SECONDS + 1.0


@pytest.mark.parametrize("policy", [policy for policy in POLICIES.values() if _lets_starve(policy)], ids=_name_of)
@pytest.mark.parametrize("flood", [100, 200])
def test_coserves_groups_let_a_picture_wait_as_long_as_others_come_for_the_expert_in_front(
    policy: Policy, flood: int
) -> None:
    """As published (§4.3): whoever comes for the expert in front stands before all behind it, so that its group never
    ends while more come than run. Our policy's patience is there for that."""
    cold, others = _behind_busy_residents(policy, ["hot"] * flood)
    assert len(others) == flood, "all of them are answered before it, and it is answered, too"
    assert cold.waited_seconds > 0.05 * flood


_SHORT_PATIENCE_SECONDS = 2.0


def _behind_busy_residents(policy: Policy, arrivals: Sequence[str]) -> tuple[Verdict, list[Request]]:
    """The verdict on the cold expert's picture, which comes at half a second, and which pictures got theirs before."""
    experts = [expert(name, 40, item=0.1) for name in ("hot", "warm", "cold")] + [expert("detector", 1)]
    patient = replace(policy, patience_seconds=_SHORT_PATIENCE_SECONDS)
    graph = inspection_graph(["hot", "warm", "cold"])
    controller, devices = box(experts, graph, 90, executors=1, load_slots=1, policy=patient)
    requests = [request(f"{n}", f"c-{name}", n * 0.05) for n, name in enumerate(arrivals)]
    cold = request("cold", "c-cold", 0.5)
    report = simulate(controller, pretend(experts, devices), sorted([*requests, cold], key=lambda r: r.arrived_seconds))
    place = next(n for n, verdict in enumerate(report.verdicts) if verdict.request == "cold")
    return report.verdicts[place], [requests[int(verdict.request)] for verdict in report.verdicts[:place]]
