"""Limits on steps: while one is full, whoever leads to it is held back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from appliance.core.controller import Controller
from appliance.core.graph import Edge, compile_graph
from appliance.core.policies import (
    PAPER,
    Policy,
)
from appliance.core.types import (
    Action,
    Arrived,
    Device,
    Evict,
    Executor,
    Finished,
    Load,
    Loaded,
    Run,
)
from appliance.lab.simulate import simulate
from tests.kit import DOUBTFUL, SOUND, box, expert, inspection_graph, pretend, request
from tests.kit_controller import (
    only_run,
    plain_experts,
)


def test_while_a_step_is_full_whoever_leads_to_it_begins_nothing_and_the_others_go_on() -> None:
    controller = _limited({"slow": 1}, {"a": 10, "other": 10, "slow": 10}, 100, ["a", "other"])
    assert _moves(controller.handle(Arrived(request("s", "c-slow")), 0.0)) == ["load slow"]
    assert controller.handle(Arrived(request("a", "c-a")), 0.1) == []
    run = only_run(controller.handle(Arrived(request("o", "c-other")), 0.2))
    controller.handle(Loaded("cpu", "slow"), 0.3)
    run = only_run(controller.handle(Finished(run.batch, ((SOUND,),), 0.1), 0.4))
    assert run.batch.expert == "slow"
    assert only_run(controller.handle(Finished(run.batch, ((SOUND,),), 0.1), 0.5)).batch.expert == "a"


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
    run = only_run(controller.handle(Loaded("cpu", "t"), 0.3))
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
    experts = plain_experts("a", "b", size=60)
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
