"""The one who decides: `handle(event, now)` returns the actions to take, in order.

Every request that arrives gets exactly one verdict. Loads run beside batches: executors take what is ready while the
loading slots bring in what has waited longest. An expert loaded for waiting tasks is *claimed*, that is pinned until
its first batch starts, so that every load leads to a run.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import assert_never

from appliance.core import policies
from appliance.core.graph import ExpertGraph, Progress, start
from appliance.core.memory import Ledger
from appliance.core.policies import Resident
from appliance.core.scheduler import Group, Scheduler, Task
from appliance.core.types import (
    Action,
    Arrived,
    Batch,
    Device,
    Event,
    Evict,
    Executor,
    Expert,
    Finding,
    Finished,
    Load,
    Loaded,
    LoadFailed,
    Outcome,
    Publish,
    Refusal,
    Request,
    Run,
    RunFailed,
    Step,
    Tick,
    Verdict,
)
from appliance.errors import NoRoom

LOAD_ATTEMPTS = 2  # a load that failed twice in a row fails everyone who waits for it


class Controller:
    """`experts` can serve; a request that needs one of `unavailable` gets its refusal as verdict."""

    def __init__(
        self,
        graph: ExpertGraph,
        experts: Mapping[str, Expert],
        devices: Sequence[Device],
        executors: Sequence[Executor],
        unavailable: Mapping[str, Refusal] = MappingProxyType({}),
    ) -> None:
        self._graph = graph
        self._experts = experts
        self._unavailable = unavailable
        segments = {name: expert.segments for name, expert in experts.items()}
        self.ledgers = {device.name: Ledger(device, segments) for device in devices}
        self.scheduler = Scheduler(tuple(executors), experts)
        self.counts: Counter[str] = Counter()
        self.progress: dict[str, Progress] = {}
        self._claimed: set[tuple[str, str]] = set()
        self._failed_loads: Counter[tuple[str, str]] = Counter()
        self._retried: set[tuple[str, str]] = set()
        self._deadlines: list[tuple[float, str]] = []

    def handle(self, event: Event, now: float) -> list[Action]:
        """Decide what follows from `event`, at monotonic second `now`."""
        actions: list[Action] = []
        match event:
            case Arrived(request):
                self._arrived(request, now, actions)
            case Loaded(device, expert):
                self._loaded(device, expert)
            case LoadFailed(device, expert, refusal):
                self._load_failed(device, expert, refusal, now, actions)
            case Finished(batch, answers, seconds):
                self._finished(batch, answers, seconds, now, actions)
            case RunFailed(batch, refusal):
                self._run_failed(batch, refusal, now, actions)
            case Tick():
                pass
            case _:
                assert_never(event)
        self._expire(now, actions)
        self._start_runs(actions)
        self._start_loads(now, actions)
        return actions

    def next_wakeup(self, now: float) -> float | None:
        """When to send a Tick if nothing else happens: a deadline, or a cold expert's patience. None: never."""
        times = [deadline for deadline, _ in self._deadlines[:1]]
        for name, ledger in self.ledgers.items():
            if ledger.loading_count < ledger.device.load_slots:
                until = (_patient_until(g) for g in self.scheduler.groups(name) if ledger.is_absent(g.expert))
                times += [when for when in until if when > now]
        return min(times, default=None)

    # Events

    def _arrived(self, request: Request, now: float, actions: list[Action]) -> None:
        if request.id in self.progress:  # the same question again, still being answered
            return
        self.counts["arrived"] += 1
        begun = start(request, self._graph)
        if isinstance(begun, Refusal):
            self.counts[Outcome.REJECTED] += 1
            actions.append(Publish(Verdict(request.id, Outcome.REJECTED, (), now - request.arrived_seconds, begun)))
            return
        self.progress[request.id] = begun
        if request.deadline_seconds is not None:
            heapq.heappush(self._deadlines, (request.deadline_seconds, request.id))
        self._ask(begun, tuple(begun.waiting_for), now, actions)

    def _loaded(self, device: str, expert: str) -> None:
        ledger = self.ledgers[device]
        ledger.finish_load(expert)
        self._failed_loads.pop((device, expert), None)
        self.scheduler.loaded(device, expert)
        if self.scheduler.demand(device, expert):
            ledger.pin(expert)
            self._claimed.add((device, expert))

    def _load_failed(self, device: str, expert: str, refusal: Refusal, now: float, actions: list[Action]) -> None:
        actions.append(Evict(device, expert, self.ledgers[device].abort_load(expert)))
        self.counts["load_failures"] += 1
        self._failed_loads[device, expert] += 1
        if self._failed_loads[device, expert] < LOAD_ATTEMPTS:
            return
        del self._failed_loads[device, expert]
        for request in self.scheduler.waiting(device, expert):
            self._conclude(request, Outcome.ERROR, now, actions, refusal)

    def _finished(
        self,
        batch: Batch,
        answers: tuple[tuple[Finding, ...] | Refusal, ...],
        seconds: float,
        now: float,
        actions: list[Action],
    ) -> None:
        self._free(batch)
        for request, answer in zip(batch.requests, answers, strict=True):
            self._retried.discard((request, batch.expert))
            progress = self.progress.get(request)
            if progress is None:  # it was late, and has its verdict
                continue
            if isinstance(answer, Refusal):
                self._conclude(request, Outcome.ERROR, now, actions, answer)
                continue
            following = progress.answered(Step(batch.expert, answer, batch.executor, seconds), self._graph)
            self._ask(progress, following, now, actions)
            if progress.is_complete and request in self.progress:
                self._conclude(request, progress.outcome(), now, actions)

    def _run_failed(self, batch: Batch, refusal: Refusal, now: float, actions: list[Action]) -> None:
        """Once more, each alone, so that one bad picture cannot fail its neighbours; then it is an error."""
        self._free(batch)
        self.counts["run_failures"] += 1
        for request in batch.requests:
            if request not in self.progress:
                continue
            if (request, batch.expert) in self._retried:
                self._conclude(request, Outcome.ERROR, now, actions, refusal)
            else:
                self._retried.add((request, batch.expert))
                self.scheduler.put(Task(request, batch.expert, now, alone=True), self.ledgers)

    # Steps

    def _ask(self, progress: Progress, experts: Sequence[str], now: float, actions: list[Action]) -> None:
        for expert in experts:
            refusal = self._unavailable.get(expert) or self._too_large(expert)
            if refusal is not None:
                self._conclude(progress.request.id, Outcome.ERROR, now, actions, refusal)
                return
            self.scheduler.put(Task(progress.request.id, expert, now), self.ledgers)

    def _too_large(self, expert: str) -> Refusal | None:
        if any(ledger.ever_fits(expert) for ledger in self.ledgers.values()):
            return None
        return Refusal(
            "no-room", f"{expert} needs {self._experts[expert].bytes} bytes, more than the budget for weights"
        )

    def _conclude(
        self, request: str, outcome: Outcome, now: float, actions: list[Action], refusal: Refusal | None = None
    ) -> None:
        """The request's one verdict. Whatever is still queued for it is dropped."""
        progress = self.progress.pop(request)
        for expert in progress.waiting_for:
            self.scheduler.drop(request, expert)
            self._retried.discard((request, expert))
            self._release_idle_claims(expert)
        self.counts[outcome] += 1
        waited = now - progress.request.arrived_seconds
        actions.append(Publish(Verdict(request, outcome, tuple(progress.steps), waited, refusal)))

    def _expire(self, now: float, actions: list[Action]) -> None:
        while self._deadlines and (self._deadlines[0][0] <= now or self._deadlines[0][1] not in self.progress):
            _, request = heapq.heappop(self._deadlines)
            if request in self.progress:
                detail = f"not finished {now - self.progress[request].request.arrived_seconds:.3f} s after it arrived"
                self._conclude(request, Outcome.LATE, now, actions, Refusal("deadline", detail))

    def _start_runs(self, actions: list[Action]) -> None:
        for queue in self.scheduler.queues.values():
            if queue.running is not None:
                continue
            ledger = self.ledgers[queue.executor.device]
            batch = self.scheduler.take(queue, ledger.is_ready)
            if batch is not None:
                ledger.pin(batch.expert)
                self._release_claim(batch.device, batch.expert)
                self.counts["runs"] += 1
                actions.append(Run(batch))

    def _start_loads(self, now: float, actions: list[Action]) -> None:
        for name, ledger in self.ledgers.items():
            while ledger.loading_count < ledger.device.load_slots:
                wanted = [group for group in self.scheduler.groups(name) if ledger.is_absent(group.expert)]
                if not wanted or not self._load(min(wanted, key=lambda g: g.since_seconds), ledger, now, actions):
                    break

    def _load(self, group: Group, ledger: Ledger, now: float, actions: list[Action]) -> bool:
        """Make room for the group's expert and load it; False when it has to wait for its turn."""
        device, expert = ledger.device.name, group.expert
        ranked = policies.eviction_order(self._leavable(ledger), spare_queued=now < _patient_until(group))
        try:
            freed, missing = ledger.begin_load(expert, ledger.victims(ranked, expert))
        except NoRoom:
            return False
        self.counts["evictions"] += len(freed)
        self.counts["loads"] += 1
        actions.extend(Evict(device, left.expert, left.segments) for left in freed)
        actions.append(Load(device, expert, missing))
        return True

    def _leavable(self, ledger: Ledger) -> list[Resident]:
        device = ledger.device.name
        return [
            Resident(
                name,
                self._experts[name].bytes,
                self._experts[name].probability,
                self._graph.is_subsequent(name)
                and all(ledger.is_absent(before) for before in self._graph.before[name]),
                self.scheduler.demand(device, name),
            )
            for name in ledger.resident
            if ledger.is_evictable(name)
        ]

    def _free(self, batch: Batch) -> None:
        self.scheduler.finished(batch)
        self.ledgers[batch.device].unpin(batch.expert)

    def _release_claim(self, device: str, expert: str) -> None:
        if (device, expert) in self._claimed:
            self._claimed.remove((device, expert))
            self.ledgers[device].unpin(expert)

    def _release_idle_claims(self, expert: str) -> None:
        """Nobody queues for the expert any more: let it go when memory is needed."""
        for device in self.ledgers:
            if not self.scheduler.demand(device, expert):
                self._release_claim(device, expert)


def _patient_until(group: Group) -> float:
    """From when the group's cold expert may displace one that queued requests still need."""
    return group.since_seconds + policies.PATIENCE_SECONDS
