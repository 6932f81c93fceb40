"""Builders of the values that tests speak of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from appliance.core.controller import Controller
from appliance.core.costs import Cost
from appliance.core.graph import Condition, Edge, ExpertGraph, compile_graph
from appliance.core.policies import APPLIANCE, Policy
from appliance.core.types import Box, Device, Executor, Expert, Finding, Footprint, Overflow, Request, Segment
from appliance.lab.simulate import World

SOUND = Finding("sound", 0.99, fails=False)
DOUBTFUL = Finding("sound", 0.7, fails=False)
OPEN = Finding("open", 0.9, fails=True)
BOXED = Finding("short", 0.8, fails=True, box=Box(1, 2, 3, 4))


def expert(name: str, segments: Mapping[str, int] | int = 10, on: Sequence[str] = ("cpu",), **kwargs: float) -> Expert:
    """An expert with its own segment of so many bytes, or with the named ones, the same on each of the devices."""
    named = {f"{name}-weights": segments} if isinstance(segments, int) else segments
    cost = Cost(kwargs.pop("item", 0.01), kwargs.pop("fixed", 0.02), kwargs.pop("load", 0.1))
    footprint = Footprint(
        tuple(Segment(key, size) for key, size in named.items()),
        int(kwargs.pop("private", 0)),
        int(kwargs.pop("activation_fixed", 0)),
        int(kwargs.pop("activation_item", 0)),
    )
    return Expert(
        name,
        dict.fromkeys(on, footprint),
        dict.fromkeys(on, cost),
        int(kwargs.pop("max_batch", 4)),
        kwargs.pop("probability", 0.1),
    )


def request(name: str, component: str, at: float = 0.0, deadline: float | None = None, line: str = "line1") -> Request:
    return Request(name, component, at, deadline, line)


def inspection_graph(classifiers: Sequence[str], detector: str = "detector") -> ExpertGraph:
    """Component `c-<expert>` asks its classifier; the detector is asked unless it is surely sound."""
    doubtful = (Condition(not_label="sound"), Condition(label="sound", score_below=0.8))
    edges = [Edge(name, detector, doubtful) for name in classifiers]
    return compile_graph({f"c-{name}": name for name in classifiers}, edges, [*classifiers, detector])


def box(
    experts: Sequence[Expert],
    graph: ExpertGraph,
    budget_bytes: int,
    executors: int = 2,
    load_slots: int = 2,
    activation_bytes: int | None = None,
    policy: Policy = APPLIANCE,
    priorities: Mapping[str, int] = MappingProxyType({}),
    most_waiting: int | None = None,
    overflow: Overflow = Overflow.BLOCK,
) -> tuple[Controller, tuple[Device, ...]]:
    """A controller of one CPU with so many executors."""
    devices = (Device("cpu", budget_bytes, load_slots, activation_bytes),)
    names = tuple(Executor(f"cpu-{number}", "cpu") for number in range(executors))
    controller = Controller(
        graph,
        {e.name: e for e in experts},
        devices,
        names,
        policy=policy,
        priorities=priorities,
        most_waiting=most_waiting,
        overflow=overflow,
    )
    return controller, devices


def pretend(experts: Sequence[Expert], devices: Sequence[Device], finding: Finding = SOUND) -> World:
    """A world in which every expert finds the same."""
    return World(experts, devices, lambda request, expert: (finding,))


def is_idle(controller: Controller) -> bool:
    """Whether nothing is queued and nothing runs."""
    return all(not queue.groups and queue.running is None for queue in controller.scheduler.queues.values())
