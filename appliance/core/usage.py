"""How likely a picture asks each expert: declared at first, then as the lines ask, and at a product change as planned.

Every line has a part: weights by expert, which are counts of pictures. To forget, older pictures do not get lighter:
newer ones count for more. Whoever is asked gains; the weights of all others, and so their order, stay as they are.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from graphlib import TopologicalSorter

from appliance.core.graph import ExpertGraph
from appliance.core.types import Request

PRIOR_PICTURES = 20_000
"""What is declared, or a recipe, counts like so many pictures: with fewer, chance alone would order the rare experts,
of which a task of CoServe asks most once or twice in 2,500 pictures."""
MEMORY_PICTURES = 20_000
"""A picture counts for half after 14,000 others: a quarter of an hour of a line with 15 pictures per second."""
PRIOR_ANSWERS = 10
"""What is declared of an edge counts like so many answers of the expert that it begins at."""
LIKELY_SHARE = 0.05
"""Of an expert's answers: to be loaded ahead, or spared, whoever so few lead to takes what others need."""
STEADY_PICTURES = 8
"""A product that a line names so often in a row is what it makes. Fewer are passing ones, a stray picture or
two products that take turns, and count like any pictures: what the line taught is worth more, and a change-over is for
thousands of pictures."""
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
    in_a_row: int = 0

    def names(self, product: str) -> bool:
        """Whether it does so steadily, and makes something else as far as was known."""
        self.in_a_row = self.in_a_row + 1 if product == self.latest else 1
        self.latest = product
        return product != self.product and self.in_a_row >= STEADY_PICTURES


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
        self._following = {expert: graph.following(expert) for expert in declared}
        self._declared_shares = {to: self._declared_share(to) for to in graph.before}

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
        begins = part.names(request.product) and bool(line) and request.product in self._products
        if begins:
            part.product = request.product
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

    def likely(self, expert: str) -> list[str]:
        """Whom an answer of the expert is likely to lead to, the likeliest first."""
        shares = [(self._share(expert, to), to) for to in self._following[expert]]
        return [to for share, to in sorted(shares, key=lambda way: -way[0]) if share >= LIKELY_SHARE]

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
        seen = self._led.get((source, to), 0)
        return (PRIOR_ANSWERS * self._declared_shares[to] + seen) / (PRIOR_ANSWERS + self._answers[source])

    def _declared_share(self, to: str) -> float:
        leading = sum(self._declared.get(name, 0.0) for name in self._graph.before[to])
        return min(1.0, self._declared.get(to, 0.0) / leading) if leading else 1.0

    def _shrink(self) -> None:
        for part in self._parts.values():
            part.total /= self._step
            part.weights = defaultdict(float, {name: w / self._step for name, w in part.weights.items()})
        self._step = 1.0
