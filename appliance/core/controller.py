"""The one who decides: `handle(event, now)` returns the actions to take, in order.

Every request that arrives gets exactly one verdict. How tasks are given out and who is evicted is the policy's; ours
runs loads beside batches: executors take what is ready (here) while the loading slots bring in what is due first
(`loading`, which asks `leaving` for room). What operators want is obeyed in between (`commands`).

A device that runs out of memory, whatever the ledger says, gets less from then on: what is idle leaves, the load or
run is tried once more, then on another device, and then its requests are told.
"""

from __future__ import annotations

import heapq
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from math import inf
from types import MappingProxyType
from typing import assert_never

from appliance.core.breaker import FAILURES, Breaker
from appliance.core.commands import Commands
from appliance.core.graph import ExpertGraph, Progress, start
from appliance.core.leaving import Leaving
from appliance.core.loading import Loading
from appliance.core.memory import Ledger, Residency
from appliance.core.policies import APPLIANCE, ROOM_PATIENCE_SECONDS, Policy
from appliance.core.scheduler import Queue, Scheduler, Task
from appliance.core.steps import Steps
from appliance.core.thrash import WINDOW_SECONDS, Sliding, Thrash, Thrashing
from appliance.core.types import (
    CANCELLED,
    DEVICE,
    FAILING,
    GOLDEN_MISMATCH,
    OUT_OF_MEMORY,
    QUEUE_FULL,
    Acknowledge,
    Action,
    Arrived,
    Batch,
    CancelRun,
    Command,
    Device,
    Event,
    Executor,
    Expert,
    Finding,
    Finished,
    Loaded,
    LoadFailed,
    Outcome,
    Overflow,
    Publish,
    Quarantine,
    Refusal,
    Reinstate,
    Request,
    Rule,
    Run,
    RunFailed,
    Step,
    Tick,
    Verb,
    Verdict,
)
from appliance.core.usage import Usage

ELSEWHERE = {OUT_OF_MEMORY, DEVICE}  # what another device may do better
MOST_ANSWERED = 1000
"""Deadlines of requests that have their verdicts, beside as many as are open."""


class Controller:
    """`experts` can serve; a request that needs one of `unavailable` gets its refusal as verdict.

    `pinned` experts are loaded at the start and stay, each on the first device that has room for it; those of `preload`
    are loaded at the start as far as memory is free. `residents` are (device, expert) of those that are in memory
    before the first event, in the order in which they came. `priorities` are those of lines that have one, 0 to 9.
    At most `most_waiting` pictures are open at once: `overflow` says what becomes of more. `products` have how many
    placements of each component.
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
        policy: Policy = APPLIANCE,
        residents: Sequence[tuple[str, str]] = (),
        priorities: Mapping[str, int] = MappingProxyType({}),
        most_waiting: int | None = None,
        overflow: Overflow = Overflow.BLOCK,
        products: Mapping[str, Mapping[str, int]] = MappingProxyType({}),
    ) -> None:
        self._graph = graph
        self._experts = experts
        self.unavailable = dict(unavailable)
        self._breaker = Breaker()
        self.on_trial: dict[str, Refusal] = {}
        """Experts that failed and may try again, and why they were unavailable."""
        self._unpinned = {name for name in pinned if name in unavailable}  # who stays again when it serves again
        self.ledgers = ledgers_of(experts, devices, [name for name in pinned if name not in self._unpinned])
        declared = {name: expert.probability for name, expert in experts.items()}
        self._usage = Usage(graph, declared, products)
        weight = self._usage.weight if policy.learns else declared.__getitem__
        # Where queues are worked off in order, a step may stand behind the very experts that it would hold back.
        steps = Steps({} if policy.in_order else graph.limits, graph.before)
        self.scheduler = Scheduler(tuple(executors), experts, weight, policy, steps)
        self._policy = policy
        self._head_starts = {line: policy.head_start_seconds(priority) for line, priority in priorities.items()}
        self.counts: Counter[str] = Counter()
        self.asked: Counter[Residency] = Counter()
        """Tasks, by where their expert was when they were queued: ready is a hit, absent a miss."""
        self._thrash = {device.name: Thrash(device.load_slots) for device in devices}
        # What these are given they read as it is at the time: who is unavailable, what ledgers and queues hold.
        self._leaving = Leaving(
            graph,
            experts,
            weight,
            self._usage.likely,
            self.unavailable,
            self.ledgers,
            self.scheduler,
            self._thrash,
            self.counts,
        )
        self._loading = Loading(
            self._usage.likely,
            self.unavailable,
            self.ledgers,
            self.scheduler,
            self._leaving,
            self._thrash,
            self.counts,
            (*pinned, *preload),
        )
        self._commands = Commands(self.ledgers, self.scheduler, self._leaving, self._loading)
        self.evictions, self.load_waits = self._leaving.evictions, self._loading.waits
        self._answered = Sliding()
        self.progress: dict[str, Progress] = {}
        self._most_waiting, self._overflow = most_waiting, overflow
        # Of `progress`, those for which no run has begun, where the oldest of them may have to give way.
        self._untouched: OrderedDict[str, None] = OrderedDict()
        self._cancelled_runs: set[int] = set()
        self._pictures: dict[int, tuple[str, ...]] = {}  # of batches that run: a request that is late is forgotten
        self._retried: dict[tuple[str, str], frozenset[str]] = {}  # request and expert: where it is barred by now
        self._deadlines: list[tuple[float, str]] = []
        self._decided_seconds = inf
        for number, (device, name) in enumerate(residents):
            self._loading.was_there(device, name, float(number - len(residents)))

    def handle(self, event: Event, now: float, *, more: bool = False) -> list[Action]:
        """Decide what follows from `event`, at monotonic second `now`.

        `more`: others come at once, and what runs and is loaded is decided with the first that is not told so.
        """
        actions: list[Action] = []
        self._decided_seconds = now
        if not more:
            self._look_at_devices(now)
        match event:
            case Arrived(request):
                self._arrived(request, now, actions)
            case Loaded(device, expert):
                self._loading.loaded(device, expert, now)
                self._commands.ended(device, expert, None, actions)
            case LoadFailed(device, expert, refusal):
                self._load_failed(device, expert, refusal, now, actions)
                self._commands.ended(device, expert, refusal, actions)
            case Finished(batch, answers, seconds):
                self._finished(batch, answers, seconds, now, actions)
            case RunFailed(batch, refusal):
                self._run_failed(batch, refusal, now, actions)
            case Command():
                self._obey(event, now, actions)
            case Tick():
                pass
            case _:
                assert_never(event)
        if more:
            return actions
        if self._deadlines:
            self._expire(now, actions)
        if self.scheduler.steps.have_turned:
            self._mind_steps(now)
        begun = self._start_runs(now, actions)
        while self.scheduler.steps.have_turned:  # a step took a batch, and is full no more
            self._mind_steps(now)
            begun += self._start_runs(now, actions)
        self._loading.begin(now, actions)
        if begun and not self._policy.in_order:
            self._loading.begin_behind(begun, now, actions)
        if self._loading.coming:
            self._loading.begin_coming(now, actions)
        return actions

    def room(self, wanted: int) -> int:
        """How many of so many more pictures may come now; the others have to wait outside, or are turned away here."""
        if self._most_waiting is None or self._overflow is not Overflow.BLOCK:
            return wanted
        return min(wanted, self._most_waiting - len(self.progress))

    def next_wakeup(self, now: float) -> float | None:
        """When to send a Tick if nothing else happens: a deadline, or when a load may displace more. None: never.

        It has passed already when it came after the last decision and before `now`.
        """
        times = [self._deadlines[0][0]] if self._deadlines else []
        for name, ledger in self.ledgers.items():
            for at in (ledger.recovers_at, self._thrash[name].ends_at):
                if at is not None:
                    times.append(at)
            if self._policy.spares_queued and ledger.loading_count < ledger.device.load_slots:
                turn = self.scheduler.next_turn_seconds(name, min(now, self._decided_seconds))
                if turn is not None:
                    times.append(turn)
        return min(times) if times else None

    def thrashing(self, now: float) -> dict[str, Thrashing]:
        """Of each device that spends its loading on experts that it has just evicted, what that comes to."""
        return {name: self._thrashing(name, now) for name, thrash in self._thrash.items() if thrash.is_thrashing}

    def _thrashing(self, device: str, now: float) -> Thrashing:
        thrash, pictures = self._thrash[device], max(self._answered.sum(now), 1.0)
        return Thrashing(
            thrash.loads.sum(now) / pictures,
            thrash.came_back.sum(now) / pictures,
            self._leaving.working_set_bytes(device, now - WINDOW_SECONDS),
            self.ledgers[device].device.budget_bytes,
        )

    @property
    def idle_seconds(self) -> float:
        """How long those who were evicted had not been used by then, together."""
        return self._leaving.idle_seconds

    # Events

    def _obey(self, command: Command, now: float, actions: list[Action]) -> None:
        expert = command.expert
        is_set_aside = expert in self._experts and (expert in self.unavailable or expert in self.on_trial)
        if command.verb is Verb.REINSTATE and is_set_aside:
            self._breaker.forget(expert)
            self._reinstate(expert, now, actions, on_trial=False)
            actions.append(Acknowledge(command.number, None))
        else:
            self._commands.obey(command, self._unservable(expert), now, actions)

    def _arrived(self, request: Request, now: float, actions: list[Action]) -> None:
        if request.id in self.progress:  # the same question again, still being answered
            return
        self.counts["arrived"] += 1
        begun = start(request, self._graph)
        if isinstance(begun, Progress) and not self._has_place(now, actions):
            begun = self._queue_full()
        if isinstance(begun, Refusal):
            self.counts[Outcome.REJECTED] += 1
            actions.append(Publish(Verdict(request.id, Outcome.REJECTED, (), now - request.arrived_seconds, begun)))
            return
        self.progress[request.id] = begun
        if self._overflow is Overflow.OLDEST:
            self._untouched[request.id] = None
        if request.deadline_seconds is not None:
            self._remember_deadline(request.deadline_seconds, request.id)
        if self._policy.learns and self._usage.changes(request):
            self.scheduler.reweigh_all()
            self._leaving.reweigh_all(now)
        self._ask(begun, begun.asked, now, actions)

    def _has_place(self, now: float, actions: list[Action]) -> bool:
        """Whether one more picture may be open, if need be instead of the oldest for which no run has begun."""
        if self._most_waiting is None or len(self.progress) < self._most_waiting:
            return True
        if self._untouched:
            self._conclude(next(iter(self._untouched)), Outcome.REJECTED, now, actions, self._queue_full())
            return True
        return self._overflow is Overflow.BLOCK  # then whoever feeds us asks for room first

    def _queue_full(self) -> Refusal:
        detail = f"{self._most_waiting} pictures were open (limits.waiting_pictures)"
        return Refusal(QUEUE_FULL, f"{detail}: send it again later, under another request-id")

    def _load_failed(self, device: str, expert: str, refusal: Refusal, now: float, actions: list[Action]) -> None:
        is_given_up = self._loading.failed(device, expert, refusal, now, actions)
        if self._breaker.failed(expert, refusal.reason, now):
            self._quarantine(expert, _failing(expert, refusal), (), now, actions)
        elif is_given_up:
            self._fail_waiting(device, expert, refusal, now, actions)

    def _fail_waiting(self, device: str, expert: str, refusal: Refusal, now: float, actions: list[Action]) -> None:
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
        pictures = self._free(batch, now)
        for request, answer in zip(batch.requests, answers, strict=True):
            self._retried.pop((request, batch.expert), None)
            progress = self.progress.get(request)
            if progress is None:  # it was late, and has its verdict
                continue
            if isinstance(answer, Refusal):
                self._conclude(request, Outcome.ERROR, now, actions, answer)
                continue
            following = progress.answered(Step(batch.expert, answer, batch.executor, seconds), self._graph)
            if self._policy.learns:
                self._usage.led(batch.expert, following)
            if following:
                self._ask(progress, following, now, actions)
            if progress.is_complete and request in self.progress:
                self._conclude(request, progress.outcome(), now, actions)
        self._judge(batch, answers, pictures, now, actions)

    def _judge(
        self,
        batch: Batch,
        answers: Sequence[tuple[Finding, ...] | Refusal],
        pictures: Sequence[str],
        now: float,
        actions: list[Action],
    ) -> None:
        """Whether the expert works, by a batch that it ran: it does if it answered one picture of it."""
        refused = [(one, answer) for one, answer in zip(pictures, answers, strict=True) if isinstance(answer, Refusal)]
        if len(refused) < len(batch.requests):
            if self._breaker.worked(batch.expert):
                self._reinstate(batch.expert, now, actions, on_trial=False)
            return
        for picture, refusal in refused:
            if self._breaker.failed(batch.expert, refusal.reason, now, picture):
                self._quarantine(batch.expert, _failing(batch.expert, refusal), (), now, actions)

    def _run_failed(self, batch: Batch, refusal: Refusal, now: float, actions: list[Action]) -> None:
        """Once more, each alone, so that one bad picture cannot fail its neighbours; then it is an error.

        An expert that fails its golden samples, or picture after picture, serves no more. Whom a device fails a second
        time asks elsewhere.
        """
        pictures = dict(zip(batch.requests, self._free(batch, now), strict=True))
        if refusal.reason == CANCELLED:
            self.counts["cancelled_runs"] += 1
        else:
            self.counts["run_failures"] += 1
        if refusal.reason == OUT_OF_MEMORY:
            footprint = self._experts[batch.expert].footprints[batch.device]
            less_bytes = footprint.activation_bytes(len(batch.requests))
            actions.extend(self._leaving.withhold(self.ledgers[batch.device], less_bytes, now))
        open_requests = [request for request in batch.requests if request in self.progress]
        if refusal.reason == GOLDEN_MISMATCH or batch.expert in self.unavailable:
            why = self.unavailable.get(batch.expert, refusal)
            self._quarantine(batch.expert, why, open_requests, now, actions)
            return
        is_failing = False
        for request in open_requests:
            if (request, batch.expert) not in self._retried:
                self._retried[request, batch.expert] = frozenset()
                self._put(self._task(self.progress[request].request, batch.expert, now, alone=True), now)
            elif refusal.reason not in ELSEWHERE or not self._ask_elsewhere(request, batch.expert, batch.device, now):
                self._conclude(request, Outcome.ERROR, now, actions, refusal)
                is_failing |= self._breaker.failed(batch.expert, refusal.reason, now, pictures[request])
        if is_failing:
            self._quarantine(batch.expert, _failing(batch.expert, refusal), (), now, actions)

    def _quarantine(
        self, expert: str, refusal: Refusal, asked: Sequence[str], now: float, actions: list[Action]
    ) -> None:
        """The expert serves no more for now; whoever waits for it asks its stand-in or is told why, and its memory is
        anybody's."""
        if expert not in self.unavailable:
            self.unavailable[expert] = refusal
            self.on_trial.pop(expert, None)
            self._breaker.open(expert, now)
            actions.append(Quarantine(expert, refusal))
        waiting = [request for device in self.ledgers for request in self.scheduler.waiting(device, expert)]
        for request in dict.fromkeys([*asked, *waiting]):
            self._ask_another(request, expert, now, actions)
        self.scheduler.forget_who_fits()
        for ledger in self.ledgers.values():
            self._unpinned |= ledger.pinned & {expert}
            ledger.give_up(expert)
            if ledger.is_evictable(expert):
                actions.append(self._leaving.evict(ledger, expert, Rule.QUARANTINED, now))

    def _reinstate(self, expert: str, now: float, actions: list[Action], *, on_trial: bool) -> None:
        refusal = self.unavailable.pop(expert, None) or self.on_trial[expert]
        self.on_trial.pop(expert, None)
        if on_trial:
            self.on_trial[expert] = refusal
        actions.append(Reinstate(expert, on_trial))
        if expert in self._unpinned:
            self._unpinned.remove(expert)
            self._commands.pin(expert, now)

    def _ask_another(self, request: str, expert: str, now: float, actions: list[Action]) -> None:
        """The expert answers nobody any more: the request goes on without it, or has its verdict."""
        progress = self.progress[request]
        self._drop(request, expert, now)
        self._retried.pop((request, expert), None)
        self._ask(progress, (expert,), now, actions)
        if progress.is_complete and request in self.progress:
            self._conclude(request, progress.outcome(), now, actions)

    def _ask_elsewhere(self, request: str, expert: str, device: str, now: float) -> bool:
        """Give the request's task to another device that can hold the expert, if there is one."""
        barred = self._retried.get((request, expert), frozenset()) | {device}
        if not any(ledger.ever_fits(expert) for name, ledger in self.ledgers.items() if name not in barred):
            return False
        self._drop(request, expert, now)
        self._retried[request, expert] = barred
        self.counts["fallbacks"] += 1
        self._put(self._task(self.progress[request].request, expert, now, alone=True, barred=barred), now)
        return True

    # Steps

    def _ask(self, progress: Progress, experts: Sequence[str], now: float, actions: list[Action]) -> None:
        request = progress.request
        for name in experts:
            expert = name
            if (refusal := self._refusal(name, now, actions)) is not None:
                stand_in = self._stand_in(name, now, actions)
                if stand_in is None:
                    self._conclude(request.id, Outcome.ERROR, now, actions, refusal)
                    return
                if not progress.replaced(name, stand_in, refusal):
                    continue
                expert = stand_in
            self._put(self._task(request, expert, now, alone=request.alone), now)
            if self._policy.learns:
                self._usage.asked(request, expert)
                self.scheduler.reweigh(expert)
                self._leaving.reweigh(expert, now)

    def _put(self, task: Task, now: float) -> None:
        device = self.scheduler.put(task, self.ledgers)
        self.asked[self.ledgers[device].residency(task.expert)] += 1
        if self.scheduler.demand(device, task.expert) == 1:
            self._leaving.rank(self.ledgers[device], task.expert, now)

    def _drop(self, request: str, expert: str, now: float) -> None:
        """Nobody waits for this answer. Whom nobody queues for any more may go when memory is needed."""
        self.scheduler.drop(request, expert, self.ledgers)
        for device, ledger in self.ledgers.items():
            if not self.scheduler.demand(device, expert):
                self._loading.release(device, expert)
            self._leaving.rank(ledger, expert, now)

    def _task(
        self, request: Request, expert: str, now: float, *, alone: bool, barred: frozenset[str] = frozenset()
    ) -> Task:
        """The request's question to the expert; a prior line's counts as having come earlier, and as due earlier."""
        head_start, deadline = self._head_starts.get(request.line, 0.0), request.deadline_seconds
        due = None if deadline is None else deadline - head_start
        return Task(request.id, expert, now - head_start, alone, barred, due)

    def _refusal(self, expert: str, now: float, actions: list[Action]) -> Refusal | None:
        """Why the expert cannot be asked. One that failed may be on trial from now on."""
        refusal = self._unservable(expert)
        if refusal is not None and expert in self.unavailable and self._breaker.try_again(expert, now):
            self._reinstate(expert, now, actions, on_trial=True)
            return self._unservable(expert)
        return refusal

    def _stand_in(self, expert: str, now: float, actions: list[Action]) -> str | None:
        """Who is asked instead, or instead of that one."""
        stand_in = self._graph.stand_ins.get(expert)
        while stand_in is not None and self._refusal(stand_in, now, actions) is not None:
            stand_in = self._graph.stand_ins.get(stand_in)
        return stand_in

    def _unservable(self, expert: str) -> Refusal | None:
        """Why the expert can answer nobody."""
        if expert in self.unavailable:
            return self.unavailable[expert]
        if expert not in self._experts:
            return Refusal("unknown-expert", f"there is no expert {expert}")
        if self.scheduler.able(expert, self.ledgers):
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
        self._untouched.pop(request, None)
        for expert in sorted(progress.waiting_for):  # a set has another order in another process
            self._drop(request, expert, now)
            self._retried.pop((request, expert), None)
        self.counts[outcome] += 1
        self._answered.add(1, now)
        waited = now - progress.request.arrived_seconds
        actions.append(Publish(Verdict(request, outcome, progress.steps, waited, refusal, progress.stand_ins)))

    def _remember_deadline(self, deadline_seconds: float, request: str) -> None:
        """Whoever is answered stays behind one that is due sooner, until these are many."""
        heapq.heappush(self._deadlines, (deadline_seconds, request))
        if len(self._deadlines) > 2 * len(self.progress) + MOST_ANSWERED:
            self._deadlines = [due for due in self._deadlines if self._is_open(*due)]
            heapq.heapify(self._deadlines)

    def _is_open(self, deadline_seconds: float, request: str) -> bool:
        """Whether the request waits for its verdict, and that is when it is due."""
        progress = self.progress.get(request)
        return progress is not None and progress.request.deadline_seconds == deadline_seconds

    def _look_at_devices(self, now: float) -> None:
        """Time alone gives memory back that a device refused, and ends thrashing."""
        for ledger in self.ledgers.values():
            ledger.recover(now)
        for device, thrash in self._thrash.items():
            if thrash.is_thrashing:
                self._loading.look_for_thrash(device, now)

    def _expire(self, now: float, actions: list[Action]) -> None:
        anybody = False
        while self._deadlines and (self._deadlines[0][0] <= now or not self._is_open(*self._deadlines[0])):
            due = heapq.heappop(self._deadlines)
            if self._is_open(*due):
                _, request = due
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

    def _mind_steps(self, now: float) -> None:
        """A step became full, or is so no more: others may begin than before."""
        self.scheduler.mind_steps(self.ledgers)
        self._loading.mind_steps(now)

    def _start_runs(self, now: float, actions: list[Action]) -> list[Batch]:
        """Executors take work, who has what is due first in front. Where that finds no room beside what runs and has no
        patience left, nobody else on its device begins: else small batches would keep a large one waiting for ever."""
        begun, held = list[Batch](), set[str]()
        for queue in self._free_queues():
            ledger = self.ledgers[queue.executor.device]
            if queue.executor.device in held:
                continue
            batch = self.scheduler.take(queue, ledger, now)
            if batch is None and self.scheduler.ready_since_seconds(queue, ledger) + ROOM_PATIENCE_SECONDS <= now:
                held.add(queue.executor.device)
            if batch is not None:
                ledger.begin_run(batch.expert, len(batch.requests), self._experts[batch.expert].max_batch)
                if not self.scheduler.is_fresh(batch.device, batch.expert):
                    self._loading.release(batch.device, batch.expert)
                self._leaving.began(batch, now)
                self.counts["runs"] += 1
                for request in batch.requests if self._untouched else ():
                    self._untouched.pop(request, None)
                self._pictures[batch.id] = tuple(self.progress[r].request.picture or r for r in batch.requests)
                actions.append(Run(batch))
                begun.append(batch)
        return begun

    def _free_queues(self) -> list[Queue]:
        """Those without a batch and with work, whose ready work is due first in front."""
        idle = [queue for queue in self.scheduler.queues.values() if queue.running is None]
        free = [queue for queue in idle if self.scheduler.has_work(queue)]
        if len(free) < 2 or len(self.ledgers) >= len(self.scheduler.queues):  # nobody shares a device
            return free
        urgency = self.scheduler.urgency_seconds
        return sorted(free, key=lambda queue: urgency(queue, self.ledgers[queue.executor.device]))

    def _free(self, batch: Batch, now: float) -> tuple[str, ...]:
        """The pictures that its requests were cut from, or are."""
        self.scheduler.finished(batch)
        self._cancelled_runs.discard(batch.id)
        ledger = self.ledgers[batch.device]
        ledger.end_run(batch.expert, len(batch.requests), self._experts[batch.expert].max_batch)
        self._leaving.ended(batch, now)
        return self._pictures.pop(batch.id)


def _failing(expert: str, refusal: Refusal) -> Refusal:
    detail = f"{expert} failed {FAILURES} times in a row, or on trial; the last time with {refusal.reason}"
    return Refusal(FAILING, f"{detail}: {refusal.detail}")


def ledgers_of(experts: Mapping[str, Expert], devices: Sequence[Device], pinned: Sequence[str]) -> dict[str, Ledger]:
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
