"""Who may leave a device's memory, in which order and by which rule; and the books of who left.

Who comes is unknown here: others ask for room, and tell what became of experts and batches. What an expert is worth is
the policy's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import inf

from appliance.core.graph import ExpertGraph
from appliance.core.memory import Freed, Ledger
from appliance.core.policies import Resident
from appliance.core.ranking import Ranking
from appliance.core.scheduler import Scheduler
from appliance.core.thrash import Thrash
from appliance.core.types import Batch, Evict, Expert, Refusal, Rule, bytes_together


class Leaving:
    """Of all devices, in monotonic seconds. `weight` of an expert is in proportion to the probability of its use, and
    `likely` names whom its answers lead to.

    Whom `unavailable` has come to name leaves first. What leaves is told to `thrash` and added to `counts`.
    """

    def __init__(
        self,
        graph: ExpertGraph,
        experts: Mapping[str, Expert],
        weight: Callable[[str], float],
        likely: Callable[[str], Sequence[str]],
        unavailable: Mapping[str, Refusal],
        ledgers: Mapping[str, Ledger],
        scheduler: Scheduler,
        thrash: Mapping[str, Thrash],
        counts: Counter[str],
    ) -> None:
        self.evictions: Counter[Rule] = Counter()
        self.idle_seconds = 0.0
        """How long those who were evicted had not been used by then, together."""
        self.changes: Counter[str] = Counter()
        """By device: how often it changed who may leave or what is held."""
        self._graph, self._experts, self._weight, self._unavailable = graph, experts, weight, unavailable
        self._ledgers, self._scheduler, self._policy = ledgers, scheduler, scheduler.policy
        self._thrash, self._counts = thrash, counts
        self._subsequent = frozenset(name for name in graph.before if graph.is_subsequent(name))
        self._rankings = {device: Ranking[str, tuple[bool, float]]() for device in ledgers}
        self._loaded_seconds: dict[tuple[str, str], float] = {}
        self._used_seconds: dict[tuple[str, str], float] = {}
        self._likely = likely
        self._leads: dict[int, Sequence[str]] = {}  # batches in work, and whom they are likely to lead to
        self._led_to: Counter[str] = Counter()  # by how many of them

    # Who leaves

    def victims(self, ledger: Ledger, expert: str, needed_after: float | None) -> dict[str, Rule]:
        """Whose leaving makes room for the expert, and no more than needed, by which rule. Raises NoRoom.

        `needed_after`: who is needed by tasks due later than this alone may leave too; None: nobody queued for.
        """
        leaving = ledger.victims(self._leavers(ledger, needed_after), expert)
        return {name: self._rule(ledger, name) for name in leaving}

    def evict(self, ledger: Ledger, expert: str, rule: Rule, now: float) -> Evict:
        """The expert leaves, and nobody comes."""
        return self.left(ledger, ledger.evict(expert), rule, now)

    def evict_one(self, ledger: Ledger, rule: Rule, now: float) -> Evict | None:
        """Let the one leave that is wanted least; None if nobody can."""
        expert = next(self._leavers(ledger, -inf), None)
        return None if expert is None else self.evict(ledger, expert, rule, now)

    def withhold(self, ledger: Ledger, less_bytes: int, now: float) -> list[Evict]:
        """The device ran out of memory: it gets less from now on, and what is too much leaves, idle experts first."""
        self._counts["out_of_memory"] += 1
        ledger.withhold(less_bytes, now)
        evicted = list[Evict]()
        while ledger.excess_bytes and (one := self.evict_one(ledger, Rule.WITHHELD, now)) is not None:
            evicted.append(one)
        return evicted

    # What became of experts and batches

    def came(self, ledger: Ledger, expert: str, now: float) -> None:
        """The expert is ready; nobody has used it yet."""
        place = ledger.device.name, expert
        self._loaded_seconds[place] = self._used_seconds[place] = now
        self.moved(ledger, expert, now)

    def left(self, ledger: Ledger, freed: Freed, rule: Rule, now: float) -> Evict:
        """The ledger let this one go."""
        device = ledger.device.name
        self._counts["evictions"] += 1
        self.evictions[rule] += 1
        self.idle_seconds += now - self._used_seconds[device, freed.expert]
        self._thrash[device].left(freed.expert, rule is Rule.OVERDUE, now)
        self.moved(ledger, freed.expert, now)
        return Evict(device, freed.expert, freed.segments, rule)

    def moved(self, ledger: Ledger, expert: str, now: float) -> None:
        """The expert is loading, ready or gone: tell who waits for it, and rank who may leave."""
        self._scheduler.moved(ledger.device.name, expert, ledger)
        self.changes[ledger.device.name] += 1
        self.rank(ledger, expert, now)

    def changed_who_stays(self, ledger: Ledger, expert: str, now: float) -> None:
        """The expert was pinned, or is so no more: others may fit than before."""
        self._scheduler.forget_who_fits()
        self.changes[ledger.device.name] += 1
        self.rank(ledger, expert, now)

    def began(self, batch: Batch, now: float) -> None:
        """The batch's expert was used now, and stays until it has run."""
        self._used_seconds[batch.device, batch.expert] = now
        self.rank(self._ledgers[batch.device], batch.expert, now)
        if self._policy.spares_queued:
            self._leads[batch.id] = self._likely(batch.expert)
            self._lead(self._leads[batch.id], 1, now)

    def ended(self, batch: Batch, now: float) -> None:
        self._lead(self._leads.pop(batch.id, ()), -1, now)
        self.rank(self._ledgers[batch.device], batch.expert, now)

    def working_set_bytes(self, device: str, since_seconds: float) -> int:
        """Of those who were used after that second or are needed by queued tasks, together."""
        return bytes_together(
            expert.footprints[device]
            for name, expert in self._experts.items()
            if self._used_seconds.get((device, name), -inf) > since_seconds or self._scheduler.demand(device, name)
        )

    # The order

    def rank(self, ledger: Ledger, expert: str, now: float) -> None:
        """Whether the expert may leave by now, and how soon."""
        device = ledger.device.name
        ranking = self._rankings[device]
        if not ledger.is_evictable(expert):
            changed = ranking.drop(expert)
        else:
            changed = ranking.put(expert, self._reluctance(device, expert, now))
        self.changes[device] += changed

    def reweigh(self, expert: str, now: float) -> None:
        """Its weight changed: it is worth something else, wherever it is and nobody queues for it."""
        for device, ledger in self._ledgers.items():
            if expert in self._rankings[device] and not self._scheduler.demand(device, expert):
                self.rank(ledger, expert, now)

    def reweigh_all(self, now: float) -> None:
        """All weights changed."""
        for device, ledger in self._ledgers.items():
            for expert in tuple(self._rankings[device]):
                self.rank(ledger, expert, now)

    def _reluctance(self, device: str, expert: str, now: float) -> tuple[bool, float]:
        """Whether the expert is spared for queued tasks, whoever has to wait for them longest first; and its worth."""
        if expert in self._unavailable:
            return False, -inf
        due = self._scheduler.due_seconds(device, expert) if self._policy.spares_queued else None
        if due is not None:
            return True, -due
        return False, inf if self._led_to[expert] else self._policy.worth(self._resident(device, expert), now)

    def _resident(self, device: str, name: str) -> Resident:
        expert = self._experts[name]
        return Resident(
            name,
            self._ledgers[device].weights_bytes(name),
            expert.costs[device].load_seconds,
            self._weight(name),
            self._loaded_seconds[device, name],
            self._used_seconds[device, name],
        )

    def _lead(self, experts: Sequence[str], batches: int, now: float) -> None:
        """So many more batches run that are likely to lead to these, or fewer: of those whom no queued task needs, they
        leave last."""
        for expert in experts:
            before = self._led_to[expert]
            self._led_to[expert] += batches
            if not before or not self._led_to[expert]:
                for ledger in self._ledgers.values():
                    if ledger.is_evictable(expert):
                        self.rank(ledger, expert, now)

    def _leavers(self, ledger: Ledger, needed_after: float | None) -> Iterator[str]:
        """Who may leave, least worth first; then who is needed by queued tasks, if after that second alone."""
        device = ledger.device.name
        if self._policy.orphans_first:
            yield from self._orphans(ledger)
        for (is_needed, worth), expert in self._rankings[device].ranked():
            if is_needed:
                if needed_after is None or -worth <= needed_after:
                    return
                due = self._scheduler.due_seconds(device, expert)
                if self._scheduler.steps.is_pressing(expert) or (due is not None and due <= needed_after):
                    continue
            if not self._policy.orphans_first or not self._is_orphan(ledger, expert):
                yield expert

    def _orphans(self, ledger: Ledger) -> Iterator[str]:
        ranking = self._rankings[ledger.device.name]
        orphans = [e for e in self._subsequent if e in ranking and self._is_orphan(ledger, e)]
        yield from sorted(orphans, key=lambda e: (-self._experts[e].footprints[ledger.device.name].weights_bytes, e))

    def _is_orphan(self, ledger: Ledger, expert: str) -> bool:
        """A subsequent expert none of whose preliminary experts is there (CoServe §4.4)."""
        return expert in self._subsequent and all(ledger.is_absent(before) for before in self._graph.before[expert])

    def _rule(self, ledger: Ledger, leaving: str) -> Rule:
        """By which of its rules the policy lets the expert go; `_leavers` gives them in this order."""
        if self._policy.orphans_first and self._is_orphan(ledger, leaving):
            return Rule.ORPHANED
        reluctance = self._rankings[ledger.device.name].key(leaving)
        return Rule.OVERDUE if reluctance is not None and reluctance[0] else Rule.LEAST_WORTH
