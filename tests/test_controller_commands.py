"""What the controller does for an operator's command, and what it refuses."""

from __future__ import annotations

from collections.abc import Sequence

from appliance.core.controller import Controller
from appliance.core.graph import compile_graph
from appliance.core.types import (
    CANCELLED,
    Acknowledge,
    Action,
    Arrived,
    CancelLoad,
    Command,
    Device,
    Evict,
    Executor,
    Finished,
    Load,
    Loaded,
    LoadFailed,
    Refusal,
    Rule,
    Segment,
    Verb,
)
from tests.kit import SOUND, box, expert, request
from tests.kit_controller import (
    BROKEN,
    one_expert,
    only_run,
)


def test_a_commanded_load_is_acknowledged_when_it_is_there() -> None:
    controller, _ = one_expert()
    assert controller.handle(Command(7, Verb.LOAD, "a"), 0.0) == [Load("cpu", "a", (Segment("a-weights", 10),), True)]
    assert controller.handle(Command(8, Verb.LOAD, "a"), 0.1) == []
    assert controller.handle(Loaded("cpu", "a"), 0.2) == [Acknowledge(7, None), Acknowledge(8, None)]
    assert controller.handle(Command(9, Verb.LOAD, "a"), 0.3) == [Acknowledge(9, None)]


def test_a_commanded_load_that_fails_says_why() -> None:
    controller, _ = one_expert()
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
    run = only_run(controller.handle(Arrived(request("r", "c-a")), 0.2))
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
    run = only_run(controller.handle(Loaded("cpu", "a"), 0.3))
    assert _refusals(controller.handle(evict, 0.4))[1] == Refusal("in-use", "a batch of a runs on cpu")
    controller.handle(Arrived(request("s", "c-a")), 0.5)
    assert _refusals(controller.handle(evict, 0.6))[1] == Refusal("in-use", "pictures wait for a on cpu: 1")
    run = only_run(controller.handle(Finished(run.batch, ((SOUND,),), 0.1), 0.7))
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
    run = only_run(controller.handle(Arrived(request("r", "c-a")), 0.0)).batch
    assert _refusals(controller.handle(Command(1, Verb.EVICT, "a"), 0.1))[1].reason == "in-use"
    assert all(ledger.is_ready("a") for ledger in controller.ledgers.values())
    controller.handle(Finished(run, ((SOUND,),), 0.1), 0.2)
    assert Acknowledge(2, None) in controller.handle(Command(2, Verb.PIN, "a"), 0.3)
    assert [name for name, ledger in controller.ledgers.items() if "a" in ledger.pinned] == ["cpu"]


def test_a_command_for_nobody_is_refused() -> None:
    controller, _ = one_expert()
    assert _refusals(controller.handle(Command(1, Verb.LOAD, "ghost"), 0.0))[1].reason == "unknown-expert"


def _several(names: str, budget: int, executors: int = 2, slots: int = 2) -> Controller:
    experts = [expert(name) for name in names]
    graph = compile_graph({f"c-{name}": name for name in names}, [], list(names))
    return box(experts, graph, budget, executors, slots)[0]


def _refusals(actions: Sequence[Action]) -> dict[int, Refusal]:
    """By the command that was refused."""
    return {a.command: a.refusal for a in actions if isinstance(a, Acknowledge) and a.refusal is not None}
