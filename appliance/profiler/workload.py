"""What a configuration is tried on: pictures as they come, and what each expert finds in them.

From a recorded journal, as it was or faster; from a product's bill of materials, board after board; or from the
components' usage, drawn by chance. What experts find there is drawn too: `checked_share` of the pictures lead on.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

from appliance.catalog import Catalog
from appliance.core.graph import Condition, ExpertGraph
from appliance.core.types import Arrived, Finding, Finished, Refusal, Request
from appliance.drivers import images, journal
from appliance.errors import CatalogError, ConfigError, PictureError
from appliance.lab import laps
from appliance.lab.paper import Trace
from appliance.lab.simulate import Answer

_SEED = 1
_SURE = 0.9
_MOST_PICTURES = 32
"""That are shown by turns: all are held in memory, and more tell nothing new about decoding."""


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests in order of time, from second 0 on, named r0, r1, …; and what an expert answers to each."""

    name: str
    requests: tuple[Request, ...]
    answer: Answer

    def played(self, share: float) -> Workload:
        """The first requests of it; with a share above 1 all of them, and then again from the first one on."""
        once = len(self.requests)
        count = max(round(once * share), 1)
        if count <= once:
            return replace(self, requests=self.requests[:count])
        whole_seconds = self.requests[-1].arrived_seconds * once / max(once - 1, 1)
        requests = (
            _moved(self.requests[number % once], number, number // once * whole_seconds) for number in range(count)
        )
        return Workload(self.name, tuple(requests), lambda request, expert: self.answer(_first(request, once), expert))


def _moved(request: Request, number: int, seconds: float) -> Request:
    due = request.deadline_seconds
    return replace(
        request,
        id=f"r{number}",
        arrived_seconds=request.arrived_seconds + seconds,
        deadline_seconds=None if due is None else due + seconds,
    )


def _first(request: str, once: int) -> str:
    """The request of which this one is a repetition."""
    return f"r{int(request.removeprefix('r')) % once}"


def servable(work: Workload, graph: ExpertGraph, able: Collection[str]) -> Workload:
    """What is left of it where only these experts can serve: pictures whose component has another expert are not in it,
    and what leads on to another is not found. Raises CatalogError where nothing is left.
    """

    def is_served(expert: str) -> bool:
        """By it or a stand-in, and by all whom that one always leads to."""
        asked: str | None = expert
        while asked is not None and asked not in able:
            asked = graph.stand_ins.get(asked)
        return asked is not None and all(map(is_served, graph.next_experts(asked, ())))

    kept = [request for request in work.requests if is_served(graph.entries[request.component])]
    if not kept:
        raise CatalogError("no expert that this workload asks can be served", "see `appliance check`")
    names = {f"r{number}": request.id for number, request in enumerate(kept)}

    def answer(request: str, expert: str) -> tuple[Finding, ...] | Refusal:
        found = work.answer(names[request], expert)
        is_sound = isinstance(found, Refusal) or all(map(is_served, graph.next_experts(expert, found)))
        return found if is_sound else ()

    return Workload(work.name, tuple(replace(one, id=name) for name, one in zip(names, kept, strict=True)), answer)


def pictures_in(folder: Path) -> list[bytes]:
    """What cameras send, for example: the first files there, by name. Decoding them is part of what runs take.

    Raises ConfigError where there is none, or one that is no picture.
    """
    try:
        files = sorted(path for path in folder.iterdir() if path.is_file())[:_MOST_PICTURES]
        found = {path: path.read_bytes() for path in files}
    except OSError as error:
        raise ConfigError(f"{folder} cannot be read: {error.strerror}", "give a folder with --pictures") from error
    if not found:
        raise ConfigError(f"{folder} has no picture", "put some there that the cameras have sent")
    for path, payload in found.items():
        try:
            images.decode(payload, max_bytes=laps.MAX_BYTES, max_pixels=laps.MAX_PIXELS)
        except PictureError as error:
            raise ConfigError(f"{path}: {error.what}", "take it out of the folder") from error
    return list(found.values())


def of_trace(name: str, trace: Trace) -> Workload:
    return Workload(name, trace.requests, trace.answer)


def of_usage(catalog: Catalog, count: int, checked_share: float, gap_seconds: float) -> Workload:
    """So many pictures of components drawn by their usage. Raises ConfigError where there is no component."""
    components = list(catalog.graph.entries)
    if not components:
        raise ConfigError("the catalogue has no component", "add [components] to graph.toml")
    weights = [catalog.usage.get(name, 0.0) for name in components]
    chance = random.Random(_SEED)
    drawn = chance.choices(
        components, cum_weights=list(accumulate(weights if any(weights) else [1.0] * len(weights))), k=count
    )
    requests = tuple(Request(f"r{n}", name, n * gap_seconds) for n, name in enumerate(drawn))
    return Workload("usage", requests, _Drawn(catalog.graph, checked_share))


def of_product(
    catalog: Catalog,
    product: str,
    boards: int,
    checked_share: float,
    gap_seconds: float,
    due_seconds: float | None = None,
) -> Workload:
    """The placements of a product in their order, for so many boards, each due so many seconds after its first picture.
    A board counts like a picture of all of it: late with any of its parts.

    Raises ConfigError when there is no such product.
    """
    parts = _parts(catalog, product)
    requests = []
    for board in range(boards):
        begins = board * len(parts) * gap_seconds
        due = None if due_seconds is None else begins + due_seconds
        for number, part in enumerate(parts):
            name = f"r{board * len(parts) + number}"
            came = begins + number * gap_seconds
            requests.append(Request(name, part, came, due, product=product, picture=f"board{board}"))
    return Workload(product, tuple(requests), _Drawn(catalog.graph, checked_share))


def parts_of(catalog: Catalog, product: str) -> int:
    """How many pictures a board of it has. Raises ConfigError when there is no such product."""
    return len(_parts(catalog, product))


def _parts(catalog: Catalog, product: str) -> list[str]:
    if product not in catalog.products:
        known = ", ".join(sorted(catalog.products)) or "none"
        raise ConfigError(f"the catalogue has no product {product}", f"choose one of: {known}")
    return [placement.component for placement in catalog.products[product].recipe.placements]


def of_journal(path: Path, graph: ExpertGraph, speed: float = 1.0) -> Workload:
    """What was recorded, with the answers that were given, at so many times its speed; a picture has as long as it had
    then. Where an expert refused, for the picture was damaged that day, it finds nothing here: the profiler's pictures
    are sound.

    Raises RecordsError when it cannot be read, ConfigError when it is of other components, or of no picture.
    """
    _, recorded = journal.read(path)
    arrived, found, began = list[Request](), dict[tuple[str, str], tuple[Finding, ...]](), 0.0
    for _, event, _ in recorded:
        if isinstance(event, Arrived):
            arrived.append(event.request)
        elif isinstance(event, Finished):
            found.update(
                ((request, event.batch.expert), answer)
                for request, answer in zip(event.batch.requests, event.answers, strict=True)
                if not isinstance(answer, Refusal)
            )
    unknown = sorted({request.component for request in arrived} - graph.entries.keys())
    if unknown:
        raise ConfigError(
            f"{path} has pictures of {unknown[0]}, which the catalogue lacks", "use a journal of this box"
        )
    if not arrived:
        raise ConfigError(f"{path} has no picture", "record while pictures come")
    began = arrived[0].arrived_seconds
    names = {request.id: f"r{number}" for number, request in enumerate(arrived)}
    answers = {(names[request], expert): answer for (request, expert), answer in found.items() if request in names}

    def moved(request: Request) -> Request:
        came, due = (request.arrived_seconds - began) / speed, request.deadline_seconds
        due = None if due is None else came + due - request.arrived_seconds
        return replace(request, id=names[request.id], arrived_seconds=came, deadline_seconds=due)

    requests = tuple(map(moved, arrived))
    return Workload(path.name, requests, lambda request, expert: answers.get((request, expert), ()))


class _Drawn:
    """Says of each picture, always the same, what an expert finds: something that leads on, or nothing."""

    def __init__(self, graph: ExpertGraph, checked_share: float) -> None:
        self._share = checked_share
        self._leading = {expert: _leading_on(graph, expert) for expert in {*graph.edges, *graph.tables}}

    def __call__(self, request: str, expert: str) -> tuple[Finding, ...]:
        chance = random.Random(f"{request}/{expert}")
        leading = self._leading.get(expert, ())
        return (chance.choice(leading),) if leading and chance.random() < self._share else ()


def _leading_on(graph: ExpertGraph, expert: str) -> Sequence[Finding]:
    """Findings of which each leads on to somebody."""
    found = [_satisfying(condition) for edge in graph.edges.get(expert, ()) for condition in edge.conditions]
    table = graph.tables.get(expert)
    if table is not None:
        found += [Finding(label, max(_SURE, table.score_at_least), fails=False) for label in table.to]
    return found


def _satisfying(condition: Condition) -> Finding:
    score = _SURE if condition.score_below is None else min(_SURE, condition.score_below / 2)
    return Finding(
        condition.label or f"not {condition.not_label}", max(score, condition.score_at_least or 0.0), fails=False
    )
