"""Whether a product's experts fit a box together, and what one board after another of it comes to in virtual time.

Nothing runs: loads take what their bytes need on the profile's disk beside each other, runs what was measured when
their architecture was compiled. Cameras, decoding and the network are not in it. Every picture asks all whom it may
lead to, of a table the first: the most that can happen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from appliance.catalog import Product
from appliance.core.graph import Condition, ExpertGraph
from appliance.core.types import Expert, Finding, Load, Request, bytes_together
from appliance.lab.simulate import SharedDisk, World, simulate
from appliance.startup import CPU, Installation

WARM_BOARDS = 1
"""The first board finds nobody in memory; it is not counted."""
COUNTED_BOARDS = 3
REST_SECONDS = 600.0
"""From one board to the next, so that loads ahead have ended; they count for the board that they began at."""
UNLIKELY = 1e-9
LINE = "line1"


@dataclass(frozen=True, slots=True)
class Rates:
    loads_per_board: float
    images_per_second: float


def products(made: Installation) -> list[dict[str, Any]]:
    """Of each product: how many experts it may ask, their distinct bytes, whether they fit, and what it comes to."""
    experts, known = made.experts, dict[tuple[str, ...], Rates | None]()
    found = []
    for name, product in made.catalog.products.items():
        needed = working_set(product, made.catalog.graph)
        asked = [expert for expert in needed if expert in experts]
        components = tuple(placement.component for placement in product.recipe.placements)
        if components not in known:
            known[components] = _rates(made, experts, name, components) if asked else None
        rates = known[components]
        found.append(
            {
                "name": name,
                "experts": len(needed),
                "unavailable": [expert for expert in needed if expert not in experts],
                "working_set_bytes": bytes_together(experts[name].footprints[CPU] for name in asked),
                "fits": len(asked) == len(needed) and _fits(made, experts, asked),
                "loads_per_board": None if rates is None else rates.loads_per_board,
                "images_per_second": None if rates is None else rates.images_per_second,
            }
        )
    return found


def working_set(product: Product, graph: ExpertGraph) -> tuple[str, ...]:
    """The experts of its placements, and whoever they may lead to."""
    found = dict.fromkeys(graph.entries[placement.component] for placement in product.recipe.placements)
    left = list(found)
    while left:
        following = [expert for expert in graph.following(left.pop(0)) if expert not in found]
        found.update(dict.fromkeys(following))
        left += following
    return tuple(found)


def _fits(made: Installation, experts: Mapping[str, Expert], names: Sequence[str]) -> bool:
    """Whether all can be in memory at once beside those that are pinned, each on the first device with room for it."""
    ledgers = made.lenient_controller().ledgers
    for ledger in ledgers.values():
        for name in sorted(ledger.pinned):
            ledger.begin_load(name)
    for name in names:
        if any(not ledger.is_absent(name) for ledger in ledgers.values()):
            continue
        able = (ledger for ledger in ledgers.values() if ledger.ever_fits(name))
        roomy = next((ledger for ledger in able if ledger.missing_bytes(name) <= ledger.free_bytes(name)), None)
        if roomy is None:
            return False
        roomy.begin_load(name)
    return True


def _rates(made: Installation, experts: Mapping[str, Expert], product: str, components: Sequence[str]) -> Rates:
    """By boards whose pictures come at once, each when the one before has been answered."""
    controller, graph = made.lenient_controller(), made.catalog.graph
    answers = {name: tuple(leading_on(graph, name)) for name in experts}
    disk = SharedDisk(made.profile.disk_bytes_per_second)
    world = World(experts.values(), made.devices, lambda request, expert: answers[expert], disk=disk)
    start, loads, answered, seconds = 0.0, 0, 0, 0.0
    for board in range(WARM_BOARDS + COUNTED_BOARDS):
        requests = [
            Request(f"{board}-{number}", name, start, None, LINE, product) for number, name in enumerate(components)
        ]
        report = simulate(controller, world, requests)
        start += report.seconds + REST_SECONDS
        if board >= WARM_BOARDS:
            loads += sum(isinstance(action, Load) for action in report.actions)
            answered += report.answered
            seconds += report.seconds
    return Rates(loads / COUNTED_BOARDS, answered / seconds if seconds else 0.0)


def leading_on(graph: ExpertGraph, expert: str) -> Iterator[Finding]:
    """Findings of which every edge takes one, and a table, if there is one, its first way."""
    table = graph.tables.get(expert)
    if table is not None:
        yield Finding(next(iter(table.to), ""), table.score_at_least, fails=False)
    for edge in graph.edges.get(expert, ()):
        for condition in edge.conditions[:1]:
            yield Finding(_label(condition), _score(condition), fails=False)


def _label(condition: Condition) -> str:
    if condition.label is not None:
        return condition.label
    return f"not {condition.not_label}"


def _score(condition: Condition) -> float:
    if condition.score_at_least is not None:
        return condition.score_at_least
    return 1.0 if condition.score_below is None else condition.score_below - UNLIKELY
