"""The queues: tasks grouped by expert on each executor, and the backlog that assignment weighs.

A group is CoServe's arranged queue: a task goes directly behind the last one for the same expert, else to the tail.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from appliance.core.memory import Ledger
from appliance.core.policies import PATIENCE_SECONDS, Offer, assign
from appliance.core.types import Batch, Executor, Expert


@dataclass(frozen=True, slots=True)
class Task:
    """One request's question to one expert. `alone`: run it in a batch of its own, after a failed run.

    `barred` are devices that it has failed on for good.
    """

    request: str
    expert: str
    since_seconds: float
    alone: bool = False
    barred: frozenset[str] = frozenset()


@dataclass(slots=True)
class Group:
    """Tasks for one expert on one executor by request, oldest first. `load_seconds` is booked until it is ready."""

    expert: str
    tasks: OrderedDict[str, Task] = field(default_factory=OrderedDict)
    load_seconds: float = 0.0

    @property
    def since_seconds(self) -> float:
        return self.first.since_seconds

    @property
    def first(self) -> Task:
        return next(iter(self.tasks.values()))


@dataclass(slots=True)
class Queue:
    """One executor's groups in order of arrival, its running batch, and its predicted backlog."""

    executor: Executor
    groups: dict[str, Group] = field(default_factory=dict)
    running: Batch | None = None
    total_seconds: float = 0.0


class Scheduler:
    def __init__(self, executors: tuple[Executor, ...], experts: Mapping[str, Expert]) -> None:
        self.queues = {executor.name: Queue(executor) for executor in executors}
        self._experts = experts
        self._demand: dict[str, Counter[str]] = {e.device: Counter() for e in executors}
        self._next_batch = 1

    def demand(self, device: str, expert: str) -> int:
        """Queued tasks, not counting running ones, that need the expert on the device."""
        return self._demand[device][expert]

    def put(self, task: Task, ledgers: Mapping[str, Ledger]) -> None:
        """Give the task to an executor whose device can hold the expert (CoServe §4.3). One such device must exist."""
        able = [
            queue
            for queue in self.queues.values()
            if queue.executor.device not in task.barred and ledgers[queue.executor.device].ever_fits(task.expert)
        ]
        offer = assign([self._offer(queue, task.expert, ledgers) for queue in able])
        queue = self.queues[offer.executor]
        device = queue.executor.device
        group = queue.groups.get(task.expert)
        if group is None:
            group = queue.groups[task.expert] = Group(task.expert)
            group.load_seconds = self._load_seconds(device, task.expert, ledgers)
        group.tasks[task.request] = task
        queue.total_seconds += offer.extra_seconds
        self._demand[device][task.expert] += 1

    def take(self, queue: Queue, ledger: Ledger, now: float) -> Batch | None:
        """The next batch: of the groups whose expert is ready, the one whose first task has waited longest.

        Where activations do not fit beside what runs, the next group goes first; but not for longer than patience
        lasts, or small batches would keep a large one waiting for ever.
        """
        ready = [group for group in queue.groups.values() if ledger.is_ready(group.expert)]
        while ready:
            group = min(ready, key=lambda g: g.since_seconds)
            most = ledger.most_items(group.expert, self._experts[group.expert].max_batch)
            if most:
                return self._batch(queue, group, most)
            if now >= group.since_seconds + PATIENCE_SECONDS:
                break
            ready.remove(group)
        return None

    def oldest_ready_seconds(self, queue: Queue, ledger: Ledger) -> float:
        """Since when the first task of a ready expert waits; infinity if there is none."""
        ready = (group.since_seconds for group in queue.groups.values() if ledger.is_ready(group.expert))
        return min(ready, default=float("inf"))

    def _batch(self, queue: Queue, group: Group, most: int) -> Batch:
        tasks = self._split(group, most)
        self._forget(queue, group, len(tasks))
        device = queue.executor.device
        batch = Batch(self._next_batch, queue.executor.name, device, group.expert, tuple(t.request for t in tasks))
        self._next_batch += 1
        queue.running = batch
        queue.total_seconds += self._experts[group.expert].costs[device].run_seconds(len(tasks))
        return batch

    def finished(self, batch: Batch) -> None:
        """The batch's executor is free again."""
        queue = self.queues[batch.executor]
        assert queue.running == batch, f"batch {batch.id} was not running"
        queue.running = None
        queue.total_seconds -= self._experts[batch.expert].costs[batch.device].run_seconds(len(batch.requests))
        self._settle(queue)

    def loaded(self, device: str, expert: str) -> None:
        """Nobody on the device waits for this load any longer."""
        for queue in self._on(device):
            group = queue.groups.get(expert)
            if group is not None:
                queue.total_seconds -= group.load_seconds
                group.load_seconds = 0.0

    def drop(self, request: str, expert: str) -> None:
        """Take a request's task out of whichever queue holds it."""
        for queue in self.queues.values():
            group = queue.groups.get(expert)
            if group is not None and group.tasks.pop(request, None) is not None:
                self._forget(queue, group, 1)
                self._settle(queue)

    def waiting(self, device: str, expert: str) -> tuple[str, ...]:
        """The requests queued for the expert on the device, in order."""
        return tuple(
            request for queue in self._on(device) if expert in queue.groups for request in queue.groups[expert].tasks
        )

    def groups(self, device: str) -> Iterator[Group]:
        """Every group on the device."""
        for queue in self._on(device):
            yield from queue.groups.values()

    @property
    def is_idle(self) -> bool:
        return all(not queue.groups and queue.running is None for queue in self.queues.values())

    def _on(self, device: str) -> Iterator[Queue]:
        return (queue for queue in self.queues.values() if queue.executor.device == device)

    def _offer(self, queue: Queue, expert: str, ledgers: Mapping[str, Ledger]) -> Offer:
        device = queue.executor.device
        cost = self._experts[expert].costs[device]
        run = cost.item_seconds if expert in queue.groups else cost.run_seconds(1)
        return Offer(queue.executor.name, queue.total_seconds, run + self._load_seconds(device, expert, ledgers))

    def _load_seconds(self, device: str, expert: str, ledgers: Mapping[str, Ledger]) -> float:
        """What a task for the expert would cost the device in loading: nothing if it is there or another task waits."""
        if not ledgers[device].is_absent(expert) or self.demand(device, expert):
            return 0.0
        return self._experts[expert].costs[device].load_seconds

    @staticmethod
    def _split(group: Group, most: int) -> list[Task]:
        """As many of the oldest tasks as one run takes; a task that must run alone does."""
        limit = 1 if group.first.alone else most
        tasks: list[Task] = []
        while group.tasks and len(tasks) < limit and not (tasks and group.first.alone):
            tasks.append(group.tasks.popitem(last=False)[1])
        return tasks

    def _forget(self, queue: Queue, group: Group, count: int) -> None:
        """`count` tasks left the group: take their seconds off the backlog, and the group when it is empty."""
        cost = self._experts[group.expert].costs[queue.executor.device]
        queue.total_seconds -= cost.item_seconds * count
        self._demand[queue.executor.device][group.expert] -= count
        if not group.tasks:
            queue.total_seconds -= cost.fixed_seconds + group.load_seconds
            del queue.groups[group.expert]

    def _settle(self, queue: Queue) -> None:
        """Nothing left means zero, whatever rounding says."""
        if not queue.groups and queue.running is None:
            queue.total_seconds = 0.0
