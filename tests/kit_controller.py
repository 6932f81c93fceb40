"""What tests of the controller share: plain boxes, what can fail, and any workload with who looks on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from hypothesis import settings
from hypothesis import strategies as st

from appliance.core.controller import Controller
from appliance.core.types import (
    FRAGMENTED,
    GOLDEN_MISMATCH,
    OUT_OF_MEMORY,
    Action,
    Command,
    Device,
    Event,
    Executor,
    Expert,
    Heard,
    Refusal,
    Request,
    Run,
    Segment,
    Verb,
)
from appliance.lab.simulate import World
from tests.kit import box, expert, inspection_graph

BROKEN = Refusal("load", "unreadable")
FAILURES = (
    BROKEN,
    Refusal(OUT_OF_MEMORY, "cudaMalloc"),
    Refusal(FRAGMENTED, "in pieces"),
    Refusal(GOLDEN_MISMATCH, "3 off"),
)
NO_MEMORY = Refusal(OUT_OF_MEMORY, "cudaMalloc")
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


HALF = settings(max_examples=settings().max_examples // 2)
"""For what is tried with every policy: nine times as many runs in all."""


class Noting:
    """A controller whose events are noted, and whose actions are looked at before anybody obeys."""

    def __init__(self, controller: Controller) -> None:
        self.controller, self.events = controller, list[Heard]()
        self.next_wakeup, self.counts = controller.next_wakeup, controller.counts

    def handle(self, event: Event, now: float, *, more: bool = False) -> list[Action]:
        self.events.append(Heard(now, event, more))
        actions = self.controller.handle(event, now, more=more)
        self.look(actions, now)
        return actions

    def look(self, actions: Sequence[Action], now: float) -> None:
        pass


WISHES = st.lists(st.tuples(st.sampled_from(Verb), st.integers(0, 9)), max_size=40)
"""Commands, each about one of at most ten experts."""


class Commanding(Noting):
    """Somebody commands something after every event, as long as there are wishes."""

    def __init__(self, controller: Controller, experts: Sequence[Expert], wishes: Sequence[tuple[Verb, int]]) -> None:
        super().__init__(controller)
        self.left = [Command(n, verb, experts[e % len(experts)].name) for n, (verb, e) in enumerate(wishes)]

    def handle(self, event: Event, now: float, *, more: bool = False) -> list[Action]:
        actions = super().handle(event, now, more=more)
        return actions + (super().handle(self.left.pop(0), now) if self.left else [])


def plain_experts(*names: str, size: int = 10) -> list[Expert]:
    return [expert(name, size) for name in names] + [expert("detector", size)]


def pinning(
    experts: list[Expert], budget_bytes: int, pinned: Sequence[str] = (), preload: Sequence[str] = ()
) -> tuple[Controller, tuple[Device, ...]]:
    graph = inspection_graph([e.name for e in experts if e.name != "detector"])
    devices = (Device("cpu", budget_bytes, 2),)
    executors = (Executor("cpu-0", "cpu"),)
    named = {e.name: e for e in experts}
    return Controller(graph, named, devices, executors, pinned=pinned, preload=preload), devices


def only_run(actions: Sequence[Action]) -> Run:
    (run,) = [action for action in actions if isinstance(action, Run)]
    return run


def one_expert() -> tuple[Controller, tuple[Device, ...]]:
    return box(plain_experts("a"), inspection_graph(["a"]), 100, executors=1)
