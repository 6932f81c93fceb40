"""The expert graph: who is asked first, who is asked next, compiled to dictionaries; and one request's way through it.

The graph is checked once, when it is compiled; deciding uses dictionaries only.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from types import MappingProxyType

from appliance.core.types import Finding, Outcome, Refusal, Request, StandIn, Step
from appliance.errors import GraphError


@dataclass(frozen=True, slots=True)
class Condition:
    """Holds for a finding that satisfies every part that is given."""

    label: str | None = None
    not_label: str | None = None
    score_at_least: float | None = None
    score_below: float | None = None

    def holds(self, finding: Finding) -> bool:
        return (
            (self.label is None or finding.label == self.label)
            and (self.not_label is None or finding.label != self.not_label)
            and (self.score_at_least is None or finding.score >= self.score_at_least)
            and (self.score_below is None or finding.score < self.score_below)
        )


@dataclass(frozen=True, slots=True)
class Edge:
    """`to` is asked after `source` when any condition holds for a finding, or always when there is none."""

    source: str
    to: str
    conditions: tuple[Condition, ...] = ()

    def taken(self, findings: Sequence[Finding]) -> bool:
        for condition in self.conditions:
            for finding in findings:
                if condition.holds(finding):
                    return True
        return not self.conditions


@dataclass(frozen=True, slots=True)
class Table:
    """After `source`, each of its findings asks the expert that stands in `to` at its label, if it scores enough."""

    source: str
    to: Mapping[str, str]
    score_at_least: float = 0.0

    def taken(self, findings: Iterable[Finding]) -> list[str]:
        return [self.to[f.label] for f in findings if f.label in self.to and f.score >= self.score_at_least]


@dataclass(frozen=True, slots=True)
class ExpertGraph:
    """`entries`: component → expert asked first. `edges` and `tables`: expert → ways on. `before`: expert → who may
    lead to it. `limits`: expert → how many pictures may wait for it before those who lead to it are held back.
    `stand_ins`: expert → who is asked while it cannot serve.
    """

    entries: Mapping[str, str]
    edges: Mapping[str, tuple[Edge, ...]]
    before: Mapping[str, tuple[str, ...]]
    tables: Mapping[str, Table] = field(default_factory=dict)
    limits: Mapping[str, int] = field(default_factory=dict)
    stand_ins: Mapping[str, str] = field(default_factory=dict)

    def next_experts(self, expert: str, findings: Sequence[Finding]) -> tuple[str, ...]:
        """Who is asked after `expert` found this, each once."""
        edges, table = self.edges.get(expert), self.tables.get(expert)
        if edges is None and table is None:
            return ()
        following = [edge.to for edge in edges or () if edge.taken(findings)]
        if table is not None:
            following += table.taken(findings)
        return tuple(dict.fromkeys(following)) if following else ()

    def following(self, expert: str) -> tuple[str, ...]:
        """Whom the expert may lead to, each once."""
        table = self.tables.get(expert)
        ways = [edge.to for edge in self.edges.get(expert, ())]
        return tuple(dict.fromkeys(ways if table is None else [*ways, *table.to.values()]))

    def is_subsequent(self, expert: str) -> bool:
        """Whether the expert is reached only through others (CoServe's subsequent expert)."""
        return bool(self.before.get(expert)) and expert not in self.entries.values()


def compile_graph(
    entries: Mapping[str, str],
    edges: Sequence[Edge],
    experts: Sequence[str],
    tables: Sequence[Table] = (),
    limits: Mapping[str, int] = MappingProxyType({}),
    stand_ins: Mapping[str, str] = MappingProxyType({}),
) -> ExpertGraph:
    """Check the graph and turn it into dictionaries. Raises GraphError that names the expert or the cycle."""
    known = set(experts)
    ways = [(edge.source, edge.to) for edge in edges]
    ways += [(table.source, to) for table in tables for to in table.to.values()]
    for component, expert in entries.items():
        if expert not in known:
            raise GraphError(
                f"component {component} asks {expert}, which has no bundle", "add the bundle or correct it"
            )
    for way in ways:
        for expert in way:
            if expert not in known:
                raise GraphError(f"an edge names {expert}, which has no bundle", "add the bundle or correct the edge")
    for source, count in Counter(table.source for table in tables).items():
        if count > 1:
            raise GraphError(f"{source} has {count} tables", "make one of them")
    for expert in limits.keys() - {to for _, to in ways}:
        raise GraphError(f"[limits] names {expert}, to which no edge leads", "correct it, or limit who is asked next")
    for expert in {*stand_ins, *stand_ins.values()} - known:
        raise GraphError(f"[stand_ins] names {expert}, which has no bundle", "add the bundle or correct it")
    _check_acyclic("the graph has", ways)
    _check_acyclic("[stand_ins] have", list(stand_ins.items()))
    after, before = defaultdict[str, list[Edge]](list), defaultdict[str, dict[str, None]](dict)
    for edge in edges:
        after[edge.source].append(edge)
    for source, to in ways:
        before[to][source] = None
    return ExpertGraph(
        dict(entries),
        {source: tuple(edges) for source, edges in after.items()},
        {to: tuple(sources) for to, sources in before.items()},
        {table.source: table for table in tables},
        dict(limits),
        dict(stand_ins),
    )


def _check_acyclic(what: str, ways: Sequence[tuple[str, str]]) -> None:
    leading = TopologicalSorter[str]()
    for source, to in ways:
        leading.add(to, source)
    try:
        leading.prepare()
    except CycleError as error:
        cycle = _beginning_first(error.args[1][:-1], ways)
        raise GraphError(f"{what} a cycle: {' → '.join([*cycle, cycle[0]])}", "remove one of these edges") from error


def _beginning_first(cycle: list[str], ways: Sequence[tuple[str, str]]) -> list[str]:
    """The cycle from whoever of it is named first on."""
    begin = next(cycle.index(source) for source, _ in ways if source in cycle)
    return [*cycle[begin:], *cycle[:begin]]


def draw(graph: ExpertGraph) -> str:
    """The graph as Mermaid text, experts with the same ways on drawn as one node, so that hundreds stay readable."""
    families: dict[tuple[_Way, ...], list[str]] = {}
    for expert in dict.fromkeys([*graph.entries.values(), *graph.edges, *graph.tables]):
        families.setdefault(tuple(_ways(graph, expert)), []).append(expert)
    lines = ["flowchart LR"]
    for number, (ways, members) in enumerate(families.items()):
        lines.append(f'  family{number}["{_many(members)}"]')
        lines += [f'  family{number} -->|"{words}"| {to.replace("-", "_")}["{label}"]' for to, label, words in ways]
    return "\n".join(lines)


_Way = tuple[str, str, str]


def _ways(graph: ExpertGraph, expert: str) -> Iterator[_Way]:
    """As they are drawn: a node, what stands in it, and when it is asked."""
    for edge in graph.edges.get(expert, ()):
        yield edge.to, edge.to, _words(edge.conditions)
    if expert in graph.tables:
        yield (
            f"table of {expert}".replace(" ", "_"),
            _many([*dict.fromkeys(graph.tables[expert].to.values())]),
            "by label",
        )


def _many(experts: Sequence[str]) -> str:
    return experts[0] if len(experts) == 1 else f"{experts[0]} … {experts[-1]} ({len(experts)} experts)"


def _words(conditions: Sequence[Condition]) -> str:
    return " or ".join(_phrase(condition) for condition in conditions) or "always"


def _phrase(condition: Condition) -> str:
    parts = [
        condition.label,
        f"not {condition.not_label}" if condition.not_label else None,
        f"score ≥ {condition.score_at_least}" if condition.score_at_least is not None else None,
        f"score < {condition.score_below}" if condition.score_below is not None else None,
    ]
    return " and ".join(part for part in parts if part)


@dataclass(slots=True)
class Progress:
    """One request's way through the graph: what is still asked, and what was answered so far.

    There is one for each open picture, and a tuple of a few is smaller than a set or a list.
    """

    request: Request
    waiting_for: set[str]
    asked: tuple[str, ...] = ()
    steps: tuple[Step, ...] = ()
    stand_ins: tuple[StandIn, ...] = ()

    def answered(self, step: Step, graph: ExpertGraph) -> tuple[str, ...]:
        """Note an expert's answer; returns the experts to ask next, none of them asked before."""
        self.waiting_for.discard(step.expert)
        self.steps += (step,)
        following = graph.next_experts(step.expert, step.findings)
        if not following:
            return ()
        following = tuple(expert for expert in following if expert not in self.asked)
        self.asked += following
        self.waiting_for.update(following)
        return following

    def replaced(self, expert: str, stand_in: str, refusal: Refusal) -> bool:
        """Ask another one instead. Whether it still has to be asked: it may have been, for its own sake."""
        self.waiting_for.discard(expert)
        self.stand_ins += (StandIn(expert, stand_in, refusal.reason),)
        if stand_in in self.asked:
            return False
        self.asked += (stand_in,)
        self.waiting_for.add(stand_in)
        return True

    @property
    def is_complete(self) -> bool:
        return not self.waiting_for

    def outcome(self) -> Outcome:
        """The verdict of a complete request: it fails if any expert's finding fails it."""
        return Outcome.FAIL if any(f.fails for step in self.steps for f in step.findings) else Outcome.PASS


def start(request: Request, graph: ExpertGraph) -> Progress | Refusal:
    """The first expert to ask, or why nobody can be asked."""
    expert = graph.entries.get(request.component)
    if expert is None:
        return Refusal("unknown-component", f"no expert is assigned to component {request.component}")
    return Progress(request, {expert}, (expert,))
