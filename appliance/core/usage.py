"""How likely a picture asks each expert: declared at first, then as the lines ask, and at a product change as planned.

Every line has a part: weights by expert, which are counts of pictures. To forget, older pictures do not get lighter:
newer ones count for more. Whoever is asked gains; the weights of all others, and so their order, stay as they are.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from graphlib import TopologicalSorter
from math import inf

from appliance.core.graph import ExpertGraph
from appliance.core.types import Request

PRIOR_PICTURES = 20_000
"""What is declared, or a recipe, counts like so many pictures: with fewer, chance alone would order the rare experts,
of which a task of CoServe asks most once or twice in 2,500 pictures."""
MEMORY_PICTURES = 20_000
"""A picture counts for half after 14,000 others: a quarter of an hour of a line with 15 pictures per second."""
PRIOR_ANSWERS = 10
"""What is declared of an edge counts like so many answers of the expert that it begins at."""
STEADY_PICTURES = 8
"""A product that a line names so often in a row is what it makes. Two that take turns more quickly are mixed on it, and
count like any pictures."""
MOST_LINES = 32
"""More lines than these share one part, without products of its own: a topic costs nothing, a part does."""
LARGEST_STEP = 1e100
"""Then all weights are made smaller, once in some five million pictures."""


@dataclass(slots=True)
class _Part:
    """What one line asks. `product` is what it makes; it has named `latest` so many times `in_a_row` by now."""

    total: float
    weights: defaultdict[str, float]
    product: str | None = None
    latest: str | None = None
    in_a_row: float = inf

    def turns_to(self, product: str) -> bool:
        """Whether this picture begins another product: the former was no passing one, or this one is none."""
        if product == self.latest:
            self.in_a_row += 1
            was_steady = False
        else:
            was_steady = self.in_a_row >= STEADY_PICTURES
            self.latest, self.in_a_row = product, 1
        if product == self.product or not (was_steady or self.in_a_row >= STEADY_PICTURES):
            return False
        self.product = product
        return True


class Usage:
    """`declared` are probabilities of use by expert, `products` have how many placements of each component."""

    def __init__(
        self, graph: ExpertGraph, declared: Mapping[str, float], products: Mapping[str, Mapping[str, int]]
    ) -> None:
        self._graph, self._declared, self._products = graph, declared, products
        self._step = 1.0
        self._parts: dict[str, _Part] = {}
        self._weights: dict[str, float] = self._prior()
        self._answers: Counter[str] = Counter()
        self._led: Counter[tuple[str, str]] = Counter()

    def weight(self, expert: str) -> float:
        """In proportion to the expert's probability. What was asked for a weight stays in proportion to the others
        until a picture `changes` everything."""
        return self._weights[expert]

    def changes(self, request: Request) -> bool:
        """Note that the picture came. Whether that changes the weights also of experts that it does not ask."""
        self._step *= 1 + 1 / MEMORY_PICTURES
        line = self._line(request)
        is_new = line not in self._parts
        if is_new:
            self._parts[line] = _Part(PRIOR_PICTURES * self._step, self._prior())
        part = self._parts[line]
        begins = bool(line) and part.turns_to(request.product) and request.product in self._products
        if begins:
            part.weights = self._weights_of(self._products[request.product], part.total)
        part.total += self._step
        has_outgrown = self._step > LARGEST_STEP
        if has_outgrown:
            self._shrink()
        if not (is_new or begins or has_outgrown):
            return False
        parts = self._parts.values()
        self._weights = {name: sum(part.weights.get(name, 0.0) for part in parts) for name in self._declared}
        return True

    def asked(self, request: Request, expert: str) -> None:
        """The picture asks the expert."""
        self._parts[self._line(request)].weights[expert] += self._step
        self._weights[expert] += self._step

    def led(self, expert: str, following: Iterable[str]) -> None:
        """An answer of the expert led to these."""
        self._answers[expert] += 1
        for to in following:
            self._led[expert, to] += 1

    def _line(self, request: Request) -> str:
        """Whose part it is; that of all lines together is nobody's."""
        return request.line if request.line in self._parts or len(self._parts) < MOST_LINES else ""

    def _prior(self) -> defaultdict[str, float]:
        scale = PRIOR_PICTURES * self._step
        return defaultdict(float, {name: scale * chance for name, chance in self._declared.items()})

    def _weights_of(self, demand: Mapping[str, int], total: float) -> defaultdict[str, float]:
        """What a product asks, for pictures that weigh so much: its placements, and whom their experts lead to."""
        chances = defaultdict[str, float](float)
        for component, count in demand.items():
            chances[self._graph.entries[component]] += count / sum(demand.values())
        for expert in TopologicalSorter(self._graph.before).static_order():
            led = sum(chances[source] * self._share(source, expert) for source in self._graph.before.get(expert, ()))
            chances[expert] = min(1.0, chances[expert] + led)
        return defaultdict(float, {name: total * chance for name, chance in chances.items()})

    def _share(self, source: str, to: str) -> float:
        """Of the answers of `source`, how many lead to `to`: as declared for all who may, then as it was seen."""
        leading = sum(self._declared.get(name, 0.0) for name in self._graph.before[to])
        declared = min(1.0, self._declared.get(to, 0.0) / leading) if leading else 1.0
        return (PRIOR_ANSWERS * declared + self._led[source, to]) / (PRIOR_ANSWERS + self._answers[source])

    def _shrink(self) -> None:
        for part in self._parts.values():
            part.total /= self._step
            part.weights = defaultdict(float, {name: w / self._step for name, w in part.weights.items()})
        self._step = 1.0
