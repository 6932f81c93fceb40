"""Queues grouped by expert, and the backlog that assignment weighs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from appliance.core.costs import Cost
from appliance.core.memory import Ledger
from appliance.core.policies import SECOND_COPY
from appliance.core.scheduler import LOOK_AHEAD, Scheduler, Task
from appliance.core.types import Device, Executor
from tests.kit import expert

EXPERTS = {e.name: e for e in (expert("a", item=1.0, fixed=10.0, load=100.0), expert("b", item=2.0, fixed=20.0))}


def test_a_task_goes_behind_the_last_one_for_the_same_expert() -> None:
    scheduler = _scheduler(1)
    for number, name in enumerate(["a", "b", "a"]):
        scheduler.put(Task(str(number), name, number), RESIDENT)
    queue = scheduler.queues["cpu-0"]
    assert [list(group.tasks) for group in queue.groups.values()] == [["0", "2"], ["1"]]


def test_a_second_task_for_an_expert_costs_no_second_start_and_no_second_load() -> None:
    scheduler = _scheduler(1)
    totals = []
    for number in range(3):
        scheduler.put(Task(str(number), "a", 0.0), ABSENT)
        totals.append(scheduler.queues["cpu-0"].total_seconds)
    assert totals == [111.0, 112.0, 113.0]


def test_tasks_for_one_expert_meet_where_that_does_not_lengthen_the_backlog() -> None:
    scheduler = _scheduler(2)
    for name in ("b", "a", "a", "a"):
        scheduler.put(Task(name, name, 0.0), RESIDENT)
    assert [list(queue.groups) for queue in scheduler.queues.values()] == [["b"], ["a"]]


def test_a_long_group_is_split_over_executors() -> None:
    scheduler = _scheduler(2)
    for number in range(12):
        scheduler.put(Task(str(number), "a", 0.0), RESIDENT)
    assert [len(queue.groups["a"].tasks) for queue in scheduler.queues.values()] == [6, 6]


def test_the_backlog_of_a_taken_batch_is_what_its_run_costs() -> None:
    scheduler = _scheduler(1)
    scheduler.put(Task("0", "a", 0.0), RESIDENT)
    scheduler.put(Task("1", "b", 0.0), RESIDENT)
    queue = scheduler.queues["cpu-0"]
    batch = scheduler.take(queue, RESIDENT["cpu"], 0.0)
    assert batch is not None
    assert queue.total_seconds == 11.0 + 22.0
    scheduler.finished(batch)
    assert queue.total_seconds == 22.0


def test_who_has_nothing_to_run_takes_from_another_with_the_same_memory() -> None:
    """`b` was given to the first executor and two of `a` to the second, whose first batch is not over yet."""
    scheduler = _scheduler(2)
    for name, wanted in (("b", "b"), ("1", "a"), ("2", "a")):
        scheduler.put(Task(name, wanted, 0.0, alone=True), RESIDENT)
    first, second = scheduler.queues.values()
    taken = [scheduler.take(queue, RESIDENT["cpu"], 0.0) for queue in (second, first)]
    assert taken[1] is not None
    scheduler.finished(taken[1])
    relieving = scheduler.take(first, RESIDENT["cpu"], 0.0)
    assert relieving is not None
    assert (relieving.executor, relieving.requests) == ("cpu-0", ("2",))
    assert (first.total_seconds, second.total_seconds) == (11.0, 11.0)
    assert not second.groups


def test_what_is_ready_is_weighed_as_long_as_it_is() -> None:
    scheduler = _scheduler(1)
    queue = scheduler.queues["cpu-0"]
    for name in ("0", "1", "2"):
        scheduler.put(Task(name, "a", 0.0), ABSENT)
    assert queue.ready_seconds == 0.0
    scheduler.moved("cpu", "a", RESIDENT["cpu"])
    assert queue.ready_seconds == 13.0
    scheduler.put(Task("3", "a", 0.0), RESIDENT)
    scheduler.drop("0", "a", RESIDENT)
    assert queue.ready_seconds == 13.0
    scheduler.moved("cpu", "a", ABSENT["cpu"])
    assert queue.ready_seconds == 0.0


def test_dropping_the_last_task_takes_its_start_and_load_off_the_backlog() -> None:
    scheduler = _scheduler(1)
    scheduler.put(Task("0", "a", 0.0), ABSENT)
    scheduler.put(Task("1", "b", 0.0), RESIDENT)
    scheduler.drop("0", "a", ABSENT)
    assert scheduler.queues["cpu-0"].total_seconds == 22.0
    assert scheduler.demand("cpu", "a") == 0


def test_a_load_that_ended_is_no_longer_in_the_backlog() -> None:
    scheduler = _scheduler(1)
    scheduler.put(Task("0", "a", 0.0), ABSENT)
    scheduler.moved("cpu", "a", RESIDENT["cpu"])
    assert scheduler.queues["cpu-0"].total_seconds == 11.0


def test_of_the_ready_groups_the_one_that_waited_longest_runs() -> None:
    scheduler = _scheduler(1)
    scheduler.put(Task("0", "a", 0.0), ABSENT)
    scheduler.put(Task("1", "b", 1.0), ABSENT)
    queue, ledger = scheduler.queues["cpu-0"], _ledgers("b")["cpu"]
    assert scheduler.take(queue, ABSENT["cpu"], 0.0) is None
    scheduler.moved("cpu", "b", ledger)
    batch = scheduler.take(queue, ledger, 0.0)
    assert batch is not None
    assert batch.requests == ("1",)


def test_no_more_than_the_next_groups_are_looked_at_for_one_that_fits() -> None:
    """However many are ready, so that deciding takes no longer where activations are nearly full."""
    taken: str | None
    for before, taken in ((LOOK_AHEAD - 1, "small"), (LOOK_AHEAD, None)):
        large = [expert(f"large-{number}", activation_item=60) for number in range(before)]
        experts = {e.name: e for e in (*large, expert("small", activation_item=10))}
        ledger = Ledger(
            Device("cpu", 1000, 1, activation_bytes=100), {n: e.footprints["cpu"] for n, e in experts.items()}
        )
        for name in experts:
            ledger.begin_load(name)
            ledger.finish_load(name)
        scheduler = Scheduler((Executor("cpu-0", "cpu"),), experts, _evenly)
        for number, name in enumerate(experts):
            scheduler.put(Task(f"r{number}", name, float(number)), {"cpu": ledger})
        ledger.begin_run("large-0", 1, 1)
        batch = scheduler.take(scheduler.queues["cpu-0"], ledger, 0.0)
        assert (batch.expert if batch else None) == taken


def test_an_executor_that_was_not_running_cannot_finish() -> None:
    scheduler = _scheduler(1)
    scheduler.put(Task("0", "a", 0.0), RESIDENT)
    batch = scheduler.take(scheduler.queues["cpu-0"], RESIDENT["cpu"], 0.0)
    assert batch is not None
    scheduler.finished(batch)
    with pytest.raises(AssertionError, match="was not running"):
        scheduler.finished(batch)


def test_an_executor_whose_device_can_never_hold_the_expert_gets_nothing() -> None:
    """However idle it is: the task would wait there for ever."""
    executors = (Executor("gpu-0", "gpu"), Executor("cpu-0", "cpu"))
    large = expert("large", 50, on=("gpu", "cpu"))
    ledgers = {
        name: Ledger(Device(name, budget), {"large": large.footprints[name]})
        for name, budget in (("gpu", 49), ("cpu", 50))
    }
    scheduler = Scheduler(executors, {"large": large}, _evenly)
    for number in range(20):
        scheduler.put(Task(str(number), "large", 0.0), ledgers)
    assert [len(queue.groups) for queue in scheduler.queues.values()] == [0, 1]


def test_a_task_that_runs_alone_neither_takes_nor_joins_others() -> None:
    scheduler = _scheduler(1)
    for number, alone in enumerate([False, False, True, False]):
        scheduler.put(Task(str(number), "a", 0.0, alone), RESIDENT)
    queue, batches = scheduler.queues["cpu-0"], []
    while (batch := scheduler.take(queue, RESIDENT["cpu"], 0.0)) is not None:
        batches.append(batch.requests)
        scheduler.finished(batch)
    assert batches == [("0", "1"), ("2",), ("3",)]


def test_a_second_copy_is_loaded_only_where_it_saves_many_times_its_load() -> None:
    """Half a second per task where the expert is, one for its load where it is not, in two slots."""
    devices = {name: Device(name, 1000) for name in ("gpu", "cpu")}
    there = replace(expert("a", on=tuple(devices)), costs={"gpu": Cost(0.01, 0.0, 1.0), "cpu": Cost(0.5, 0.0, 1.0)})
    ledgers = {name: Ledger(device, {"a": there.footprints[name]}) for name, device in devices.items()}
    ledgers["cpu"].begin_load("a")
    ledgers["cpu"].finish_load("a")
    scheduler = Scheduler(tuple(Executor(f"{name}-0", name) for name in devices), {"a": there}, _evenly)
    where = [scheduler.put(Task(str(number), "a", 0.0), ledgers) for number in range(100)]
    assert where.index("gpu") == int(SECOND_COPY)


def test_what_was_just_loaded_for_waiting_tasks_runs_before_what_waits_as_long() -> None:
    scheduler = _scheduler(1)
    scheduler.put(Task("0", "b", 0.0), _ledgers("b"))
    scheduler.put(Task("1", "a", 1.0), _ledgers("b"))
    scheduler.moved("cpu", "a", RESIDENT["cpu"])
    batches = []
    while (batch := scheduler.take(scheduler.queues["cpu-0"], RESIDENT["cpu"], 2.0)) is not None:
        batches.append(batch.requests)
        scheduler.finished(batch)
    assert batches == [("1",), ("0",)]


def _scheduler(executors: int) -> Scheduler:
    return Scheduler(tuple(Executor(f"cpu-{n}", "cpu") for n in range(executors)), EXPERTS, _evenly)


def _evenly(expert: str) -> float:
    return 0.1


def _ledgers(*ready: str, activation_bytes: int | None = None) -> dict[str, Ledger]:
    device = Device("cpu", 1000, activation_bytes=activation_bytes)
    ledger = Ledger(device, {name: e.footprints["cpu"] for name, e in EXPERTS.items()})
    for name in ready:
        ledger.begin_load(name)
        ledger.finish_load(name)
    return {"cpu": ledger}


RESIDENT, ABSENT = _ledgers(*EXPERTS), _ledgers()
