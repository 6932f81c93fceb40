"""The queues: tasks grouped by expert on each executor, and the backlog that assignment weighs.

A group holds an executor's tasks for one expert. Arranged (CoServe §4.3), a task goes directly behind the last one for
the same expert, else to the tail: the queue is then its groups in order. Not arranged, it is its tasks in order.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import islice
from math import inf
from typing import NamedTuple

from appliance.core.memory import Ledger
from appliance.core.policies import (
    APPLIANCE,
    PLENTY_LOADS,
    PLENTY_RUNS,
    ROOM_PATIENCE_SECONDS,
    SECOND_COPY,
    Offer,
    Policy,
)
from appliance.core.ranking import Ranking
from appliance.core.steps import Steps
from appliance.core.types import Batch, Executor, Expert

LOOK_AHEAD = 16
"""So many ready groups of a queue are looked at for one whose activations fit beside what runs."""


class Task(NamedTuple):
    """One request's question to one expert. `alone`: run it in a batch of its own, after a failed run or a crash.

    `barred` are devices that it has failed on for good. The seconds are those by which it is ranked: both are earlier
    by its line's head start.
    """

    request: str
    expert: str
    since_seconds: float
    alone: bool = False
    barred: frozenset[str] = frozenset()
    deadline_seconds: float | None = None


Turn = tuple[float, int, Task]
"""When it is a task's turn among those of its group, as which of all tasks it came, and the task: in this order."""


@dataclass(slots=True)
class Group:
    """Tasks for one expert on one executor: `turns` in the order in which they run, `tasks` the same by request.

    `load_seconds` is booked until the expert is ready. `fresh` are how many of them it was loaded for and has not run
    yet; none after its first batch, except where the device thrashes.
    """

    expert: str
    number: int
    tasks: dict[str, Turn] = field(default_factory=dict)
    turns: list[Turn] = field(default_factory=list)
    load_seconds: float = 0.0
    fresh: int = 0
    _dues: list[tuple[float, str]] = field(default_factory=list)

    def put(self, task: Task, due_seconds: float, turn_seconds: float, number: int) -> bool:
        """Whether the task is the first by its turn, or the one due first."""
        turn, turns = (turn_seconds, number, task), self.turns
        is_first = not turns or due_seconds < self.due_seconds or turn_seconds < turns[0][0]
        self.tasks[task.request] = turn
        if is_first or turn < turns[-1]:
            insort(turns, turn)
        else:
            turns.append(turn)
        heappush(self._dues, (due_seconds, task.request))
        return is_first

    def pop(self, request: str) -> Task:
        turn = self.tasks.pop(request)
        del self.turns[bisect_left(self.turns, turn)]
        return turn[2]

    def pop_first(self, count: int) -> list[Task]:
        popped = [task for _, _, task in self.turns[:count]]
        del self.turns[:count]
        for task in popped:
            del self.tasks[task.request]
        return popped

    @property
    def first(self) -> Task:
        return self.turns[0][2]

    @property
    def turn_seconds(self) -> float:
        """When it is the turn of its first task."""
        return self.turns[0][0]

    @property
    def due_seconds(self) -> float:
        """When the first of its tasks is overdue."""
        while self._dues[0][1] not in self.tasks:
            heappop(self._dues)
        return self._dues[0][0]


@dataclass(slots=True)
class Queue:
    """One executor's groups in order of arrival, its running batch, and its predicted backlog.

    `line` has (request, expert) of every task in order where tasks are not arranged; `ready` the groups whose expert
    is, by when they are due, and `ready_seconds` what running these takes. `loading_seconds` is the part of the backlog
    that is loading.
    """

    executor: Executor
    groups: dict[str, Group] = field(default_factory=dict)
    line: OrderedDict[tuple[str, str], None] = field(default_factory=OrderedDict)
    ready: Ranking[str, tuple[float, int]] = field(default_factory=Ranking)
    running: Batch | None = None
    total_seconds: float = 0.0
    loading_seconds: float = 0.0
    ready_seconds: float = 0.0


class Scheduler:
    """`weight` of an expert is in proportion to the probability of its use."""

    def __init__(
        self,
        executors: tuple[Executor, ...],
        experts: Mapping[str, Expert],
        weight: Callable[[str], float],
        policy: Policy = APPLIANCE,
        steps: Steps | None = None,
    ) -> None:
        self.queues = {executor.name: Queue(executor) for executor in executors}
        self.policy = policy
        self.steps = steps or Steps({}, {})
        self.thrashing: set[str] = set()
        """Devices where who was loaded for waiting tasks stays for all of them, not just for the first batch."""
        self.cold: dict[str, Ranking[tuple[str, str], tuple[float, int]]] = {e.device: Ranking() for e in executors}
        """By device: (expert, executor) of the groups whose expert is absent, by when it is their turn to be loaded."""
        self._rare: dict[str, Ranking[tuple[str, str], tuple[float, int]]] = {e.device: Ranking() for e in executors}
        self._reweighed: set[str] = set()
        """Experts whose groups may have another place there, as soon as somebody looks."""
        self._experts, self._weight = experts, weight
        self._demand: dict[str, Counter[str]] = {e.device: Counter() for e in executors}
        self._loading = dict.fromkeys(self._demand, 0.0)
        self._on = {device: [q for q in self.queues.values() if q.executor.device == device] for device in self._demand}
        self._able: dict[str, dict[str, list[Queue]]] = {}
        self._next_batch = self._next_group = 1
        self._turn = 0

    def demand(self, device: str, expert: str) -> int:
        """Queued tasks, not counting running ones, that need the expert on the device."""
        return self._demand[device].get(expert, 0)

    def due_seconds(self, device: str, expert: str) -> float | None:
        """When the first of the tasks that need the expert on the device is overdue; None if there is none."""
        return min((q.groups[expert].due_seconds for q in self._on[device] if expert in q.groups), default=None)

    def group_due_seconds(self, group: Group) -> float:
        """The same of the group's own tasks; if its step is pressing, since ever."""
        return -inf if self.steps.is_pressing(group.expert) else group.due_seconds

    def put(self, task: Task, ledgers: Mapping[str, Ledger]) -> str:
        """Give the task to an executor whose device can hold the expert; returns the device. One such must exist."""
        able = self.able(task.expert, ledgers)
        if task.barred:
            able = {device: queues for device, queues in able.items() if device not in task.barred}
        lacking = self._lacking(task.expert, ledgers)
        offers = (self._offers_in_order if self.policy.in_order else self._offers)(able, task.expert, lacking, ledgers)
        offer = self.policy.assign(offers, self._turn)
        self._turn += 1
        queue = self.queues[offer.executor]
        device = queue.executor.device
        cost = self._experts[task.expert].costs[device]
        group = queue.groups.get(task.expert)
        if group is None:
            group = queue.groups[task.expert] = Group(task.expert, self._next_group)
            self._next_group += 1
            if device in lacking:
                group.load_seconds = cost.load_seconds
                self._book(queue, cost.load_seconds)
            queue.total_seconds += cost.fixed_seconds
        if task.alone:  # it may be put once more: then nobody is reweighed for it
            self._rank_reweighed(task.expert)
        due = self.policy.due_seconds(task.since_seconds, task.deadline_seconds, cost)
        is_first = group.put(task, due, self.policy.turn_seconds(task.since_seconds, due), self._turn)
        queue.total_seconds += cost.item_seconds
        if task.expert in queue.ready:
            queue.ready_seconds += cost.item_seconds
        self._demand[device][task.expert] += 1
        self.steps.add(task.expert, 1)
        if not self.policy.groups:
            queue.line[task.request, task.expert] = None
        if is_first:
            self._rank(queue, group, ledgers[device])
        return device

    def reweigh(self, expert: str) -> None:
        """Its weight changed, or how many wait for it: so may the turn of groups that wait for its load."""
        self._reweighed.add(expert)

    def reweigh_all(self) -> None:
        """All weights changed."""
        self._reweighed.update(expert for rare in self._rare.values() for expert, _ in rare)

    def able(self, expert: str, ledgers: Mapping[str, Ledger]) -> dict[str, list[Queue]]:
        """The executors whose device can hold the expert, by device."""
        able = self._able.get(expert)
        if able is None:
            able = {device: queues for device, queues in self._on.items() if ledgers[device].ever_fits(expert)}
            self._able[expert] = able
        return able

    def forget_who_fits(self) -> None:
        """An expert that was pinned is so no more: others may fit where they did not."""
        self._able.clear()

    def has_work(self, queue: Queue) -> bool:
        """Whether the executor might take something: of its own, or of others on its device."""
        if self.policy.in_order:
            return bool(queue.groups)
        return any(other.ready for other in self._on[queue.executor.device])

    def urgency_seconds(self, queue: Queue, ledger: Ledger) -> float:
        """When the work is due that a free executor would take, in order of which several take theirs."""
        if self.policy.in_order:
            return self.ready_since_seconds(queue, ledger)
        first = queue.ready.least()
        return inf if first is None else first[0]

    def ready_since_seconds(self, queue: Queue, ledger: Ledger) -> float:
        """Since when the first task waits of the ready expert whose turn it is; infinity if there is none."""
        expert = next(iter(self._takeable(queue, ledger)), None)
        return inf if expert is None else queue.groups[expert].first.since_seconds

    def on(self, device: str) -> list[Queue]:
        return self._on[device]

    def head(self, queue: Queue) -> Group | None:
        """The group whose turn it is where queues are worked off in order."""
        if self.policy.groups:
            return next(iter(queue.groups.values()), None)
        for _, expert in queue.line:
            return queue.groups[expert]
        return None

    def take(self, queue: Queue, ledger: Ledger, now: float) -> Batch | None:
        """The next batch: the head's, or of the groups whose expert is ready, that of the one due first; the executor's
        own, or else another's on its device.

        Where activations do not fit beside what runs, one of the next groups goes first; but not for longer than
        patience lasts, or small batches would keep a large one waiting for ever.
        """
        if not ledger.has_room_to_run:
            return None
        for source in self._sources(queue):
            for expert in islice(self._takeable(source, ledger), LOOK_AHEAD):
                group = source.groups[expert]
                most = ledger.most_items(expert, self._experts[expert].max_batch)
                if most:
                    return self._batch(queue, source, group, most, ledger)
                if now >= group.first.since_seconds + ROOM_PATIENCE_SECONDS:
                    return None
        return None

    def _sources(self, queue: Queue) -> Iterator[Queue]:
        """An executor that has nothing to run takes from those with which it shares memory, the busiest first: tasks
        were given out by predictions, which err."""
        yield queue
        if not self.policy.in_order:
            others = (other for other in self._on[queue.executor.device] if other is not queue and other.ready)
            yield from sorted(others, key=lambda other: -other.total_seconds)

    def _takeable(self, queue: Queue, ledger: Ledger) -> Iterable[str]:
        if not self.policy.in_order:
            return queue.ready
        head = self.head(queue)
        return [head.expert] if head is not None and ledger.is_ready(head.expert) else []

    def _batch(self, queue: Queue, source: Queue, group: Group, most: int, ledger: Ledger) -> Batch:
        """A batch for the executor of `queue`, of tasks that were given to that of `source`."""
        tasks = self._split(source, group, most)
        device = queue.executor.device
        group.fresh = max(group.fresh - len(tasks), 0) if device in self.thrashing else 0
        self._forget(source, group, tasks, ledger)
        self._settle(source)
        batch = Batch(self._next_batch, queue.executor.name, device, group.expert, tuple(t.request for t in tasks))
        self._next_batch += 1
        queue.running = batch
        queue.total_seconds += self._experts[group.expert].costs[device].run_seconds(len(tasks))
        return batch

    def next_cold(self, device: str, now: float) -> Group | None:
        """Whose expert to load next: the first whose turn has come; else whom it costs least to load again.

        Likely more tasks will come for the others: while somebody waits for a load anyway, they can, and spend their
        slack, so that one load serves more of them. Dividing this by who waits would answer some sooner, by more loads.
        """
        turn = self.cold[device].least()
        if turn is not None and turn[0] <= now:
            return self._group(self.cold[device].first())
        for expert in tuple(self._reweighed):
            self._rank_reweighed(expert)
        return self._group(self._rare[device].first())

    def next_turn_seconds(self, device: str, now: float) -> float | None:
        """When the next turn to be loaded comes, that group is overdue, or the next to be loaded is held no more.

        None: nothing of that will happen.
        """
        cold = self.cold[device]
        turn, group, following = cold.least(), self._group(cold.first()), self.next_cold(device, now)
        if turn is None or group is None or following is None:
            return None
        times = (turn[0], self.group_due_seconds(group), self.held_until(device, following))
        return min([when for when in times if when > now], default=None)

    def have_plenty(self, device: str, expert: str, slots: int) -> bool:
        """Whether the expert's load may as well wait, for more tasks to need it: executors have work for longer than it
        takes, however the disk is shared, and runs, not loads, are what the backlog takes its time for."""
        queues, load_seconds = self._on[device], self._experts[expert].costs[device].load_seconds
        ready = sum(queue.ready_seconds for queue in queues)
        running = sum(queue.total_seconds - queue.loading_seconds for queue in queues)
        return (
            ready > PLENTY_LOADS * load_seconds * len(queues)
            and running / len(queues) > PLENTY_RUNS * self._loading[device] / slots
        )

    def held_until(self, device: str, group: Group) -> float:
        """From when somebody may leave for the group's expert."""
        load_seconds = self._experts[group.expert].costs[device].load_seconds
        return group.first.since_seconds + self.policy.hold_share * load_seconds

    def _group(self, place: tuple[str, str] | None) -> Group | None:
        return None if place is None else self.queues[place[1]].groups[place[0]]

    def finished(self, batch: Batch) -> None:
        """The batch's executor is free again."""
        queue = self.queues[batch.executor]
        assert queue.running == batch, f"batch {batch.id} was not running"
        queue.running = None
        queue.total_seconds -= self._experts[batch.expert].costs[batch.device].run_seconds(len(batch.requests))
        self._settle(queue)

    def moved(self, device: str, expert: str, ledger: Ledger) -> None:
        """The expert is loading, ready or gone: nobody waits any longer for a load that ended."""
        is_ready = ledger.is_ready(expert)
        for queue in self._on[device]:
            group = queue.groups.get(expert)
            if group is None:
                continue
            if is_ready:
                self._book(queue, -group.load_seconds)
                group.load_seconds = 0.0
                group.fresh = len(group.tasks)
            self._rank(queue, group, ledger)

    def mind_steps(self, ledgers: Mapping[str, Ledger]) -> None:
        """Rank whom full steps hold back or press on, and whom they do so no more."""
        turned = self.steps.turned()
        for queue in self.queues.values():
            for expert in sorted(turned & queue.groups.keys()):
                self._rank(queue, queue.groups[expert], ledgers[queue.executor.device])

    def drop(self, request: str, expert: str, ledgers: Mapping[str, Ledger]) -> None:
        """Take a request's task out of whichever queue holds it."""
        self._rank_reweighed(expert)
        for queue in self.queues.values():
            group = queue.groups.get(expert)
            if group is not None and request in group.tasks:
                self._forget(queue, group, [group.pop(request)], ledgers[queue.executor.device])
                self._settle(queue)

    def waiting(self, device: str, expert: str) -> tuple[str, ...]:
        """The requests queued for the expert on the device, in order."""
        return tuple(
            task.request
            for queue in self._on[device]
            if expert in queue.groups
            for _, _, task in queue.groups[expert].turns
        )

    def is_fresh(self, device: str, expert: str) -> bool:
        """Whether tasks that the expert was loaded for are still to be run."""
        return any(queue.groups[expert].fresh for queue in self._on[device] if expert in queue.groups)

    def since_seconds(self, device: str, expert: str) -> list[float]:
        """Since when each of the tasks queued for the expert on the device is."""
        groups = (queue.groups[expert] for queue in self._on[device] if expert in queue.groups)
        return [task.since_seconds for group in groups for _, _, task in group.tasks.values()]

    def queue_of(self, request: str, expert: str) -> Queue | None:
        """Whose queue holds the request's task; None when nobody's does."""
        for queue in self.queues.values():
            group = queue.groups.get(expert)
            if group is not None and request in group.tasks:
                return queue
        return None

    def _offers(
        self, able: Mapping[str, list[Queue]], expert: str, lacking: list[str], ledgers: Mapping[str, Ledger]
    ) -> list[Offer]:
        """Loads go on beside runs, in the device's slots: a backlog ends with the later of the two; and a second copy
        counts for more."""
        offers, costs = list[Offer](), self._experts[expert].costs
        times = 1.0 if len(lacking) == len(ledgers) else SECOND_COPY
        for device, queues in able.items():
            cost, loading, slots = costs[device], self._loading[device], ledgers[device].device.load_slots
            load = cost.load_seconds * times if device in lacking else 0.0
            loaded, will_be_loaded = loading / slots, (loading + load) / slots
            for queue in queues:
                ran = queue.total_seconds - queue.loading_seconds
                total = ran if ran > loaded else loaded
                run = cost.item_seconds if expert in queue.groups else cost.run_seconds(1)
                end = ran + run
                answer = (ran if ran > will_be_loaded else will_be_loaded) + run if load else end
                extra = (end if end > will_be_loaded else will_be_loaded) - total
                offers.append(Offer(queue.executor.name, total, extra, answer))
        return offers

    def _offers_in_order(
        self, able: Mapping[str, list[Queue]], expert: str, lacking: list[str], ledgers: Mapping[str, Ledger]
    ) -> list[Offer]:
        """What CoServe weighs: K where requests for the expert wait, else K + B, and L where it has to be loaded."""
        offers = list[Offer]()
        for device, queues in able.items():
            cost = self._experts[expert].costs[device]
            load = cost.load_seconds if device in lacking else 0.0
            for queue in queues:
                run = cost.item_seconds if expert in queue.groups else cost.run_seconds(1)
                offers.append(Offer(queue.executor.name, queue.total_seconds, run + load))
        return offers

    def _book(self, queue: Queue, seconds: float) -> None:
        """So much more loading is ahead of the queue, or less."""
        queue.total_seconds += seconds
        queue.loading_seconds += seconds
        self._loading[queue.executor.device] += seconds

    def is_at_hand(self, expert: str, ledgers: Mapping[str, Ledger]) -> bool:
        """Whether some device has the expert, or will."""
        return len(self._lacking(expert, ledgers)) < len(ledgers)

    def _lacking(self, expert: str, ledgers: Mapping[str, Ledger]) -> list[str]:
        """The devices that would have to load the expert for a task more: it is not there, and no other task waits."""
        demand = self._demand
        return [name for name, ledger in ledgers.items() if not demand[name].get(expert) and ledger.is_absent(expert)]

    def _split(self, queue: Queue, group: Group, most: int) -> list[Task]:
        """As many of the tasks as one run takes, by their turns; a task that must run alone does."""
        limit = 1 if group.first.alone else most
        if not self.policy.groups:
            limit = min(limit, _in_a_row(queue, group.expert, limit))
        others = enumerate(group.turns[1:limit], start=1)
        return group.pop_first(next((place for place, (_, _, task) in others if task.alone), limit))

    def _forget(self, queue: Queue, group: Group, tasks: list[Task], ledger: Ledger) -> None:
        """The tasks left the group: take their seconds off the backlog, and the group when it is empty."""
        cost = self._experts[group.expert].costs[queue.executor.device]
        queue.total_seconds -= cost.item_seconds * len(tasks)
        if group.expert in queue.ready:
            queue.ready_seconds -= cost.item_seconds * len(tasks)
        self._demand[queue.executor.device][group.expert] -= len(tasks)
        self.steps.add(group.expert, -len(tasks))
        for task in () if self.policy.groups else tasks:
            del queue.line[task.request, task.expert]
        if not group.tasks:
            queue.total_seconds -= cost.fixed_seconds
            self._book(queue, -group.load_seconds)
            del queue.groups[group.expert]
        self._rank(queue, group, ledger)

    def _rank(self, queue: Queue, group: Group, ledger: Ledger) -> None:
        """Where the group stands among those that can run, or that wait for a load."""
        expert, device = group.expert, queue.executor.device
        cold = self.cold[device]
        waits = bool(group.tasks) and not self.steps.is_held(expert)
        key = (self.group_due_seconds(group), group.number) if waits else None
        if key is not None and ledger.is_ready(expert):
            # Who was loaded for waiting tasks goes before others who wait as long: then it may leave for the next.
            was_ready = expert in queue.ready
            queue.ready.put(expert, (key[0] - self.policy.patience_seconds, key[1]) if group.fresh else key)
            queue.ready_seconds += 0.0 if was_ready else self._run_seconds(device, group)
        elif queue.ready.drop(expert):
            queue.ready_seconds -= self._run_seconds(device, group)
        if key is not None and ledger.is_absent(expert):
            cold.put((expert, queue.executor.name), (min(key[0], group.turn_seconds), group.number))
            self._rank_rare(queue, group)
        else:
            cold.drop((expert, queue.executor.name))
            self._rare[device].drop((expert, queue.executor.name))

    def _run_seconds(self, device: str, group: Group) -> float:
        cost = self._experts[group.expert].costs[device]
        return cost.fixed_seconds + cost.item_seconds * len(group.tasks)

    def _rank_reweighed(self, expert: str) -> None:
        """Where it was reweighed, rank its groups that wait for a load by what that comes to."""
        if expert not in self._reweighed:
            return
        self._reweighed.remove(expert)
        for device, rare in self._rare.items():
            if not rare or not self._demand[device].get(expert):
                continue
            for queue in self._on[device]:
                if expert in queue.groups and (expert, queue.executor.name) in rare:
                    self._rank_rare(queue, queue.groups[expert])

    def _rank_rare(self, queue: Queue, group: Group) -> None:
        expert, device = group.expert, queue.executor.device
        self._rare[device].put((expert, queue.executor.name), (self._regret(device, expert), group.number))

    def _regret(self, device: str, expert: str) -> float:
        """In proportion to the seconds of loading that more tasks for the expert will cost if it is loaded now, and
        has left by then: the less, the sooner its turn. None if the load takes no longer than the runs that wait for
        it: executors have more to do from it than others lose by letting it go first."""
        cost, waiting = self._experts[expert].costs[device], self._demand[device][expert]
        return self._weight(expert) * cost.load_seconds if cost.load_seconds > cost.run_seconds(waiting) else 0.0

    def _settle(self, queue: Queue) -> None:
        """Nothing left means zero, whatever rounding says."""
        if not queue.groups and queue.running is None:
            self._loading[queue.executor.device] -= queue.loading_seconds
            queue.total_seconds = queue.loading_seconds = queue.ready_seconds = 0.0


def _in_a_row(queue: Queue, expert: str, limit: int) -> int:
    """How many of the first `limit` tasks of a queue that is not arranged are for this expert, one after the other."""
    count = 0
    for _, wanted in queue.line:
        if wanted != expert or count == limit:
            break
        count += 1
    return count
