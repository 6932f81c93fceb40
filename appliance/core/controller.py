"""The one who decides: `handle(event, now)` returns the actions to take, in order.

Every request that arrives gets exactly one verdict. Loads run beside batches: executors take what is ready while the
loading slots bring in what has waited longest. An expert loaded for waiting tasks is *claimed*, that is pinned until
its first batch starts, so that every load leads to a run. A slot that nobody needs loads *ahead*, into free memory
alone, whom the running batch may lead to.

A device that runs out of memory, whatever the ledger says, gets less from then on: what is idle leaves, the load or
run is tried once more, then on another device, and then its requests are told.
"""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from math import inf
from types import MappingProxyType
from typing import assert_never

from appliance.core import policies
from appliance.core.graph import ExpertGraph, Progress, start
from appliance.core.memory import Ledger
from appliance.core.policies import Resident
from appliance.core.scheduler import Group, Queue, Scheduler, Task
from appliance.core.types import (
    CANCELLED,
    DEVICE,
    FRAGMENTED,
    GOLDEN_MISMATCH,
    OUT_OF_MEMORY,
    Action,
    Arrived,
    Batch,
    CancelLoad,
    CancelRun,
    Device,
    Event,
    Evict,
    Executor,
    Expert,
    Finding,
    Finished,
    HurryLoad,
    Load,
    Loaded,
    LoadFailed,
    Outcome,
    Publish,
    Quarantine,
    Refusal,
    Request,
    Run,
    RunFailed,
    Step,
    Tick,
    Verdict,
)
from appliance.errors import NoRoom

ELSEWHERE = {OUT_OF_MEMORY, DEVICE}  # what another device may do better
LOAD_ATTEMPTS = 2  # a load that failed twice in a row fails everyone who waits for it


class Controller:
    """`experts` can serve; a request that needs one of `unavailable` gets its refusal as verdict.

    `pinned` experts are loaded at the start and stay, each on the first device that has room for it; those of `preload`
    are loaded at the start as far as memory is free.
    """

    def __init__(
        self,
        graph: ExpertGraph,
        experts: Mapping[str, Expert],
        devices: Sequence[Device],
        executors: Sequence[Executor],
        unavailable: Mapping[str, Refusal] = MappingProxyType({}),
        *,
        pinned: Sequence[str] = (),
        preload: Sequence[str] = (),
    ) -> None:
        self._graph = graph
        self._experts = experts
        self.unavailable = dict(unavailable)
        self.ledgers = _ledgers(experts, devices, pinned)
        self._coming = deque([*pinned, *preload])
        self.scheduler = Scheduler(tuple(executors), experts)
        self.counts: Counter[str] = Counter()
        self.progress: dict[str, Progress] = {}
        self._claimed: set[tuple[str, str]] = set()
        self._failed_loads: Counter[tuple[str, str]] = Counter()
        self._ahead: set[tuple[str, str]] = set()  # loads in work that began ahead
        self._cancelled_loads: set[tuple[str, str]] = set()
        self._cancelled_runs: set[int] = set()
        self._retried: dict[tuple[str, str], frozenset[str]] = {}  # request and expert: where it is barred by now
        self._deadlines: list[tuple[float, str]] = []

    def handle(self, event: Event, now: float) -> list[Action]:
        """Decide what follows from `event`, at monotonic second `now`."""
        actions: list[Action] = []
        for ledger in self.ledgers.values():
            ledger.recover(now)
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
        begun = self._start_runs(now, actions)
        self._start_loads(now, actions)
        self._load_ahead(begun, actions)
        self._preload(actions)
        return actions

    def next_wakeup(self, now: float) -> float | None:
        """When to send a Tick if nothing else happens: a deadline, or a cold expert's patience. None: never."""
        times = [deadline for deadline, _ in self._deadlines[:1]]
        times += [ledger.recovers_at for ledger in self.ledgers.values() if ledger.recovers_at is not None]
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
        self._forget_ahead(device, expert)
        self.scheduler.loaded(device, expert)
        if self.scheduler.demand(device, expert):
            ledger.pin(expert)
            self._claimed.add((device, expert))

    def _load_failed(self, device: str, expert: str, refusal: Refusal, now: float, actions: list[Action]) -> None:
        ledger = self.ledgers[device]
        actions.append(Evict(device, expert, ledger.abort_load(expert)))
        self._forget_ahead(device, expert)
        if refusal.reason == CANCELLED:
            self.counts["cancelled_loads"] += 1
            if expert in ledger.pinned:
                self._coming.append(expert)
            return
        is_wanted = self.scheduler.demand(device, expert) > 0
        if refusal.reason == FRAGMENTED:
            self.counts["fragmented"] += 1
            if is_wanted and self._evict_one(ledger, actions):  # and it is tried again
                return
        self.counts["load_failures"] += 1
        if refusal.reason == OUT_OF_MEMORY:
            self._make_do_with_less(ledger, 0, now, actions)
        if not is_wanted and expert not in ledger.pinned:
            return
        self._failed_loads[device, expert] += 1
        if self._failed_loads[device, expert] < LOAD_ATTEMPTS:
            self._coming.extend([expert] if expert in ledger.pinned else [])
            return
        del self._failed_loads[device, expert]
        for request in self.scheduler.waiting(device, expert):
            if refusal.reason in ELSEWHERE and self._ask_elsewhere(request, expert, device, now):
                continue
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
            self._retried.pop((request, batch.expert), None)
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
        """Once more, each alone, so that one bad picture cannot fail its neighbours; then it is an error.

        An expert that fails its golden samples serves no more. Whom a device fails a second time asks elsewhere.
        """
        self._free(batch)
        if refusal.reason == CANCELLED:
            self.counts["cancelled_runs"] += 1
        else:
            self.counts["run_failures"] += 1
        if refusal.reason == OUT_OF_MEMORY:
            footprint = self._experts[batch.expert].footprints[batch.device]
            ledger = self.ledgers[batch.device]
            self._make_do_with_less(ledger, footprint.activation_bytes(len(batch.requests)), now, actions)
        open_requests = [request for request in batch.requests if request in self.progress]
        if refusal.reason == GOLDEN_MISMATCH:
            self._quarantine(batch.expert, refusal, open_requests, now, actions)
            return
        for request in open_requests:
            if (request, batch.expert) not in self._retried:
                self._retried[request, batch.expert] = frozenset()
                self.scheduler.put(Task(request, batch.expert, now, alone=True), self.ledgers)
            elif refusal.reason not in ELSEWHERE or not self._ask_elsewhere(request, batch.expert, batch.device, now):
                self._conclude(request, Outcome.ERROR, now, actions, refusal)

    def _quarantine(
        self, expert: str, refusal: Refusal, asked: Sequence[str], now: float, actions: list[Action]
    ) -> None:
        """The expert serves no more; whoever waits for it is told why, and its memory is anybody's."""
        if expert not in self.unavailable:
            self.unavailable[expert] = refusal
            actions.append(Quarantine(expert, refusal))
        waiting = [request for device in self.ledgers for request in self.scheduler.waiting(device, expert)]
        for request in dict.fromkeys([*asked, *waiting]):
            self._conclude(request, Outcome.ERROR, now, actions, refusal)
        for ledger in self.ledgers.values():
            ledger.give_up(expert)
            if ledger.is_evictable(expert):
                self._evict(ledger, expert, actions)

    def _ask_elsewhere(self, request: str, expert: str, device: str, now: float) -> bool:
        """Give the request's task to another device that can hold the expert, if there is one."""
        barred = self._retried.get((request, expert), frozenset()) | {device}
        if not any(ledger.ever_fits(expert) for name, ledger in self.ledgers.items() if name not in barred):
            return False
        self.scheduler.drop(request, expert)
        self._release_idle_claims(expert)
        self._retried[request, expert] = barred
        self.counts["fallbacks"] += 1
        self.scheduler.put(Task(request, expert, now, alone=True, barred=barred), self.ledgers)
        return True

    def _make_do_with_less(self, ledger: Ledger, less_bytes: int, now: float, actions: list[Action]) -> None:
        """The device ran out of memory: it gets less from now on, and what is too much leaves, idle experts first."""
        self.counts["out_of_memory"] += 1
        ledger.withhold(less_bytes, now)
        while ledger.excess_bytes and self._evict_one(ledger, actions):
            pass

    def _evict_one(self, ledger: Ledger, actions: list[Action]) -> bool:
        """Let the one leave that is wanted least; False if nobody can."""
        for expert in policies.eviction_order(self._leavable(ledger), spare_queued=False):
            self._evict(ledger, expert, actions)
            return True
        return False

    def _evict(self, ledger: Ledger, expert: str, actions: list[Action]) -> None:
        self.counts["evictions"] += 1
        actions.append(Evict(ledger.device.name, expert, ledger.evict(expert).segments))

    # Steps

    def _ask(self, progress: Progress, experts: Sequence[str], now: float, actions: list[Action]) -> None:
        for expert in experts:
            refusal = self.unavailable.get(expert) or self._too_large(expert)
            if refusal is not None:
                self._conclude(progress.request.id, Outcome.ERROR, now, actions, refusal)
                return
            self.scheduler.put(Task(progress.request.id, expert, now), self.ledgers)

    def _too_large(self, expert: str) -> Refusal | None:
        if any(ledger.ever_fits(expert) for ledger in self.ledgers.values()):
            return None
        needs = ", ".join(
            f"{f.weights_bytes} bytes of weights and {f.activation_bytes(1)} of activations on {device}"
            for device, f in self._experts[expert].footprints.items()
        )
        return Refusal("no-room", f"{expert} needs {needs}: more than there is (raise memory.weights or .activations)")

    def _conclude(
        self, request: str, outcome: Outcome, now: float, actions: list[Action], refusal: Refusal | None = None
    ) -> None:
        """The request's one verdict. Whatever is still queued for it is dropped."""
        progress = self.progress.pop(request)
        for expert in progress.waiting_for:
            self.scheduler.drop(request, expert)
            self._retried.pop((request, expert), None)
            self._release_idle_claims(expert)
        self.counts[outcome] += 1
        waited = now - progress.request.arrived_seconds
        actions.append(Publish(Verdict(request, outcome, tuple(progress.steps), waited, refusal)))

    def _expire(self, now: float, actions: list[Action]) -> None:
        anybody = False
        while self._deadlines and (self._deadlines[0][0] <= now or self._deadlines[0][1] not in self.progress):
            _, request = heapq.heappop(self._deadlines)
            if request in self.progress:
                detail = f"not finished {now - self.progress[request].request.arrived_seconds:.3f} s after it arrived"
                self._conclude(request, Outcome.LATE, now, actions, Refusal("deadline", detail))
                anybody = True
        if anybody:
            self._cancel_runs(actions)

    def _cancel_runs(self, actions: list[Action]) -> None:
        """Nobody reads what a batch finds when all its requests became late."""
        for queue in self.scheduler.queues.values():
            batch = queue.running
            if batch is None or batch.id in self._cancelled_runs or any(r in self.progress for r in batch.requests):
                continue
            self._cancelled_runs.add(batch.id)
            actions.append(CancelRun(batch))

    def _start_runs(self, now: float, actions: list[Action]) -> list[Batch]:
        """Executors take work, who has what waits longest first. Where that finds no room beside what runs and has no
        patience left, nobody else on its device begins: else small batches would keep a large one waiting for ever."""
        begun, held = list[Batch](), set[str]()
        for queue, oldest in self._free_queues():
            ledger = self.ledgers[queue.executor.device]
            if queue.executor.device in held:
                continue
            batch = self.scheduler.take(queue, ledger, now)
            if batch is None and oldest + policies.PATIENCE_SECONDS <= now:
                held.add(queue.executor.device)
            if batch is not None:
                ledger.begin_run(batch.expert, len(batch.requests), self._experts[batch.expert].max_batch)
                self._release_claim(batch.device, batch.expert)
                self.counts["runs"] += 1
                actions.append(Run(batch))
                begun.append(batch)
        return begun

    def _free_queues(self) -> list[tuple[Queue, float]]:
        """Those without a batch and with work that is ready, and since when it waits, longest first."""
        free = [
            (queue, self.scheduler.oldest_ready_seconds(queue, self.ledgers[queue.executor.device]))
            for queue in self.scheduler.queues.values()
            if queue.running is None
        ]
        return sorted(((queue, oldest) for queue, oldest in free if oldest < inf), key=lambda pair: pair[1])

    def _start_loads(self, now: float, actions: list[Action]) -> None:
        self._hurry(actions)
        for name, ledger in self.ledgers.items():
            while wanted := [group for group in self.scheduler.groups(name) if ledger.is_absent(group.expert)]:
                has_slot = ledger.loading_count < ledger.device.load_slots
                if not has_slot or not self._load(min(wanted, key=lambda g: g.since_seconds), ledger, now, actions):
                    self._cancel_ahead(ledger, actions)
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

    def _load_ahead(self, begun: Sequence[Batch], actions: list[Action]) -> None:
        """While a batch runs, bring whom it may lead to, as far as slots and memory are free anyway."""
        for batch in begun:
            ledger = self.ledgers[batch.device]
            if self._is_wanted(ledger):
                continue
            for expert in (edge.to for edge in self._graph.edges.get(batch.expert, ())):
                if (
                    expert not in self.unavailable
                    and ledger.ever_fits(expert)
                    and ledger.is_absent(expert)
                    and ledger.loading_count < ledger.device.load_slots
                    and ledger.missing_bytes(expert) <= ledger.free_bytes(expert)
                ):
                    self._begin_ahead(ledger, expert, [], actions)

    def _preload(self, actions: list[Action]) -> None:
        """One after the other, while nobody waits; for a pinned one what is idle leaves, as it will stay."""
        while self._coming:
            expert = self._coming[0]
            able = [ledger for ledger in self.ledgers.values() if ledger.ever_fits(expert)]
            ledger = next((ledger for ledger in able if expert in ledger.pinned), able[0] if able else None)
            if ledger is None or expert in self.unavailable or not ledger.is_absent(expert):
                self._coming.popleft()
                continue
            if ledger.loading_count >= ledger.device.load_slots or self._is_wanted(ledger):
                return
            is_pinned = expert in ledger.pinned
            ranked = policies.eviction_order(self._leavable(ledger), spare_queued=True) if is_pinned else []
            try:
                self._begin_ahead(ledger, expert, ledger.victims(ranked, expert), actions)
            except NoRoom:
                if is_pinned:  # what runs now will end
                    return
            self._coming.popleft()

    def _is_wanted(self, ledger: Ledger) -> bool:
        return any(ledger.is_absent(group.expert) for group in self.scheduler.groups(ledger.device.name))

    def _begin_ahead(self, ledger: Ledger, expert: str, leaving: Sequence[str], actions: list[Action]) -> None:
        device = ledger.device.name
        freed, missing = ledger.begin_load(expert, leaving)
        self._ahead.add((device, expert))
        self.counts["evictions"] += len(freed)
        self.counts["loads"] += 1
        self.counts["loads_ahead"] += 1
        actions.extend(Evict(device, left.expert, left.segments) for left in freed)
        actions.append(Load(device, expert, missing, ahead=True))

    def _hurry(self, actions: list[Action]) -> None:
        for device, expert in sorted(self._ahead - self._cancelled_loads):
            if self.scheduler.demand(device, expert):
                self._ahead.remove((device, expert))
                actions.append(HurryLoad(device, expert))

    def _cancel_ahead(self, ledger: Ledger, actions: list[Action]) -> None:
        """Somebody waits for a slot or for memory: what is loaded ahead gives way."""
        for device, expert in sorted(self._ahead - self._cancelled_loads):
            if device == ledger.device.name:
                self._cancelled_loads.add((device, expert))
                actions.append(CancelLoad(device, expert))

    def _forget_ahead(self, device: str, expert: str) -> None:
        self._ahead.discard((device, expert))
        self._cancelled_loads.discard((device, expert))

    def _leavable(self, ledger: Ledger) -> list[Resident]:
        device = ledger.device.name
        return [
            Resident(
                name,
                self._experts[name].footprints[device].weights_bytes,
                self._experts[name].probability,
                name in self.unavailable
                or (
                    self._graph.is_subsequent(name)
                    and all(ledger.is_absent(before) for before in self._graph.before[name])
                ),
                self.scheduler.demand(device, name),
            )
            for name in ledger.resident
            if ledger.is_evictable(name)
        ]

    def _free(self, batch: Batch) -> None:
        self.scheduler.finished(batch)
        self._cancelled_runs.discard(batch.id)
        limit = self._experts[batch.expert].max_batch
        self.ledgers[batch.device].end_run(batch.expert, len(batch.requests), limit)

    def _release_claim(self, device: str, expert: str) -> None:
        if (device, expert) in self._claimed:
            self._claimed.remove((device, expert))
            self.ledgers[device].unpin(expert)

    def _release_idle_claims(self, expert: str) -> None:
        """Nobody queues for the expert any more: let it go when memory is needed."""
        for device in self.ledgers:
            if not self.scheduler.demand(device, expert):
                self._release_claim(device, expert)


def _ledgers(experts: Mapping[str, Expert], devices: Sequence[Device], pinned: Sequence[str]) -> dict[str, Ledger]:
    """One per device, of the experts that it can serve. Each pinned expert stays on the first that has room for it."""
    ledgers, left = dict[str, Ledger](), [name for name in pinned if name in experts]
    for device in devices:
        footprints = {name: e.footprints[device.name] for name, e in experts.items() if device.name in e.footprints}
        staying = frozenset[str]()
        for name in left:
            if Ledger(device, footprints, staying).ever_fits(name):
                staying |= {name}
        left = [name for name in left if name not in staying]
        ledgers[device.name] = Ledger(device, footprints, staying)
    return ledgers


def _patient_until(group: Group) -> float:
    """From when the group's cold expert may displace one that queued requests still need."""
    return group.since_seconds + policies.PATIENCE_SECONDS
