"""What is decided ahead of need, and on how many at once: loads for whom batches are likely to lead to, deadlines."""

from __future__ import annotations

from collections.abc import Sequence

from appliance.core.controller import MOST_ANSWERED, Controller
from appliance.core.graph import Edge, ExpertGraph, Table, compile_graph
from appliance.core.types import (
    Action,
    Arrived,
    Device,
    Executor,
    Finding,
    Finished,
    Load,
    Loaded,
    Outcome,
    Publish,
    Run,
)
from appliance.core.usage import LIKELY_SHARE, PRIOR_ANSWERS, Usage
from tests.kit import SOUND, expert, request

NAMES = ("a", "b", "c")


def test_a_table_leads_like_edges_do() -> None:
    for graph in (_graph(Edge("a", "b")), _graph(tables=[Table("a", {"short": "b"})])):
        controller = _box(graph)
        controller.handle(Arrived(request("r", "c-a")), 0.0)
        assert [load.expert for load in _loads(controller.handle(Loaded("cpu", "a"), 0.1))] == ["b"]


def test_the_likeliest_comes_first_and_the_unlikely_not_at_all() -> None:
    """Declared alike; then every answer leads to c, until b stands below the share that counts."""
    usage = Usage(_graph(Edge("a", "b"), Edge("a", "c")), dict.fromkeys(NAMES, 0.1), {})
    found = {0: usage.likely("a")}
    for answers in range(1, int(PRIOR_ANSWERS / LIKELY_SHARE) + 1):
        usage.led("a", ["c"])
        found[answers] = usage.likely("a")
    assert (found[0], found[1], found[answers]) == (["b", "c"], ["c", "b"], ["c"])


def test_whom_another_device_has_is_not_loaded_ahead() -> None:
    experts = {name: expert(name, on=("gpu", "cpu") if name == "b" else ("cpu",)) for name in NAMES}
    devices = (Device("gpu", 100, 1), Device("cpu", 100, 1))
    executors = (Executor("gpu-0", "gpu"), Executor("cpu-0", "cpu"))
    for residents, ahead in (([("gpu", "b"), ("cpu", "a")], []), ([("cpu", "a")], ["b"])):
        controller = Controller(_graph(Edge("a", "b")), experts, devices, executors, residents=residents)
        assert [x.expert for x in _loads(controller.handle(Arrived(request("r", "c-a")), 0.0))] == ahead


def test_who_comes_at_once_is_decided_on_together() -> None:
    """Alone, the first would have been loaded at once; c is the rarer, and more will come for a."""
    experts = {name: expert(name, probability={"a": 0.9, "b": 0.5, "c": 0.1}[name]) for name in NAMES}
    for together, loaded in ((False, "a"), (True, "c")):
        controller = Controller(_graph(), experts, (Device("cpu", 100, 1),), (Executor("cpu-0", "cpu"),))
        first = controller.handle(Arrived(request("first", "c-a")), 0.0, more=together)
        second = controller.handle(Arrived(request("second", "c-c")), 0.0)
        assert [load.expert for load in _loads([*first, *second])] == [loaded]


def test_deadlines_of_who_is_answered_are_forgotten() -> None:
    """Also behind one that is due sooner than they all, and waits."""
    controller = Controller(
        _graph(),
        {n: expert(n) for n in NAMES},
        (Device("cpu", 100, 2),),
        (Executor("cpu-0", "cpu"),),
        residents=[("cpu", "a")],
    )
    controller.handle(Arrived(request("waits", "c-b", 0.0, 1000.0)), 0.0)
    for number in range(3 * MOST_ANSWERED):
        _finish(controller, controller.handle(Arrived(request(str(number), "c-a", 0.0, 2000.0)), 0.0), "none")
    assert len(controller.progress) == 1
    assert len(controller._deadlines) <= MOST_ANSWERED + 2
    verdicts = [
        a.verdict for a in controller.handle(Arrived(request("last", "c-a", 1000.0)), 1000.0) if isinstance(a, Publish)
    ]
    assert [(v.request, v.outcome) for v in verdicts] == [("waits", Outcome.LATE)]


def _graph(*edges: Edge, tables: list[Table] | None = None) -> ExpertGraph:
    return compile_graph({f"c-{name}": name for name in NAMES}, edges, NAMES, tables or ())


def _box(graph: ExpertGraph) -> Controller:
    experts = {name: expert(name, max_batch=1) for name in NAMES}
    return Controller(graph, experts, (Device("cpu", 100, 1),), (Executor("cpu-0", "cpu"),))


def _loads(actions: Sequence[Action]) -> list[Load]:
    return [action for action in actions if isinstance(action, Load)]


def _finish(controller: Controller, actions: Sequence[Action], label: str) -> None:
    """End the batch that begins with these, and whatever it leads to."""
    batches = [action.batch for action in actions if isinstance(action, Run)]
    while batches:
        batch = batches.pop()
        finding = Finding(label, 0.9, fails=False) if batch.expert == "a" else SOUND
        after = controller.handle(Finished(batch, tuple((finding,) for _ in batch.requests), 0.0), 0.0)
        batches += [action.batch for action in after if isinstance(action, Run)]
        for load in _loads(after):
            batches += [a.batch for a in controller.handle(Loaded("cpu", load.expert), 0.0) if isinstance(a, Run)]
