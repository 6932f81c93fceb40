"""One policy at one of the paper's tasks on one of its machines, in virtual time; and the table beside the paper's."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from appliance.core import policies
from appliance.core.policies import Policy
from appliance.core.types import Device, Executor, Outcome, Verdict
from appliance.errors import ConfigError
from appliance.lab import paper
from appliance.lab.contenders import NAMES, Pool, Setup, contender, pools
from appliance.lab.paper import CLASSIFIER_BYTES, Job, Machine, Trace
from appliance.lab.simulate import SharedDisk, World, simulate
from appliance.lab.telling import quantile

Trial = Callable[[Machine, Job, str, str], Mapping[str, Any]]
"""What a policy, by name, comes to at a task on a machine with a loader."""
LOADERS = ("paper", "segments")
ITEMS = {"gpu": 16, "cpu": 8}
"""What activations hold for each executor: the batches from which on the latency per image falls no more."""


@dataclass(frozen=True, slots=True)
class Pace:
    """Pictures as they come on a line instead of all at once: one every `gap_seconds`, for so many boards."""

    gap_seconds: float = paper.GAP_SECONDS
    due_seconds: float | None = None
    boards: int = 1


def tried_by_name(machine: str, task: str, policy: str, loader: str, pace: Pace) -> dict[str, Any]:
    """What a trial comes to. Raises ConfigError naming what does not exist."""
    for what, name, known in (
        ("machine", machine, (*paper.MACHINES,)),
        ("task", task, (*paper.JOBS,)),
        ("policy", policy, NAMES),
        ("loader", loader, LOADERS),
    ):
        if name not in known:
            raise ConfigError(f"there is no {what} {name}", f"choose one of {', '.join(known)}")
    job = replace(paper.JOBS[task], gap_seconds=pace.gap_seconds, due_seconds=pace.due_seconds, boards=pace.boards)
    return tried(paper.MACHINES[machine], job, policy, loader)


def tried(machine: Machine, job: Job, name: str, loader: str = "paper") -> dict[str, Any]:
    """What a trial comes to on the machine as fitted, all times in virtual seconds but `wall` ones and `scheduling`."""
    trace = paper.drawn(job)
    return served(machine, trace, job, name, _setup(machine, job, contender(name, trace.asked), loader), loader)


def served(machine: Machine, trace: Trace, job: Job, name: str, box: Setup, loader: str) -> dict[str, Any]:
    """The same on a machine that is set up in this way. Scheduling is processor time."""
    asked = trace.asked
    policy = contender(name, asked)
    graph = paper.graph(job.board)
    controller = box.controller(graph, policy)
    disk = SharedDisk(machine.disk_bytes_per_second) if loader == "segments" else None
    world = World(box.experts.values(), box.devices, trace.answer, disk=disk, residents=box.residents)
    began = time.perf_counter()
    report = simulate(controller, world, trace.requests)
    wall_seconds = time.perf_counter() - began

    absent = asked.keys() - {expert for _, expert in box.residents}
    return {
        "policy": name,
        "device": machine.name,
        "task": job.name,
        "loader": loader,
        "images_per_second": report.images_per_second,
        "steady_images_per_second": _steady(trace, report.verdicts),
        "bound_images_per_second": len(trace.requests) / _least_seconds(machine, job, box, asked, absent, loader),
        "switches_total": report.loads,
        "switches_per_executor": report.loads / len(box.executors),
        "loads_floor": len(absent),
        "evictions": report.evictions,
        "late": sum(v.outcome is Outcome.LATE for v in report.verdicts),
        "wait_p50_seconds": quantile(report.waits_seconds, 0.5),
        "wait_p99_seconds": quantile(report.waits_seconds, 0.99),
        "seconds": report.seconds,
        "executors": len(box.executors),
        "requests_per_wall_second": len(report.verdicts) / wall_seconds,
        "scheduling_seconds_per_request": report.scheduling_seconds / len(trace.requests),
    }


def _setup(machine: Machine, job: Job, policy: Policy, loader: str) -> Setup:
    held = {"gpu": machine.gpu_pools[job.board.gpu_executors], "cpu": (machine.cpu_pool,)}

    def holds(pool: Pool) -> int:
        if policy is policies.ALL_RESIDENT:
            return job.board.types + len(paper.DETECTOR_BYTES) + 1
        if policy.assign is policies.first:
            return machine.one_pool
        return sum(held[pool.device][number] for number in pool.executors)

    def works(pool: Pool) -> int:
        return max(int(ITEMS[pool.device] * len(pool.executors) * machine.activation_share), 1)

    return setup(machine, job, policy, loader, {name: len(sizes) for name, sizes in held.items()}, holds, works)


def setup(
    machine: Machine,
    job: Job,
    policy: Policy,
    loader: str,
    executors: Mapping[str, int],
    holds: Callable[[Pool], int],
    works: Callable[[Pool], int],
) -> Setup:
    """The machine with so many executors on each of its processors. A pool `holds` so many experts, and its executors
    `work` on so many pictures at a time."""
    found = pools(policy, executors)
    devices = tuple(
        Device(pool.name, holds(pool) * CLASSIFIER_BYTES, len(pool.executors), works(pool)) for pool in found
    )
    made = tuple(Executor(f"{pool.name}-{turn}", pool.name) for pool in found for turn in range(len(pool.executors)))
    in_flight = sum(device.load_slots for device in devices)
    sharing = {name: sum(len(pool.executors) for pool in found if pool.device == name) for name in executors}
    costs = {
        pool.name: machine.cost(pool.device, loader, CLASSIFIER_BYTES, sharing[pool.device], in_flight)
        for pool in found
    }
    experts = {expert.name: expert for expert in paper.experts(job.board, costs)}
    sizes = [(name, expert.footprints[devices[0].name].weights_bytes) for name, expert in experts.items()]
    if policy is policies.ALL_RESIDENT:
        residents = [(device.name, name) for device in devices for name, _ in sizes]
    else:
        residents = policy.place(sizes, {device.name: device.budget_bytes for device in devices})
    return Setup(devices, made, experts, tuple(residents))


def _least_seconds(
    machine: Machine, job: Job, box: Setup, asked: Mapping[str, Sequence[float]], absent: Iterable[str], loader: str
) -> float:
    """No schedule on this box is quicker: arrivals, compulsory loads and runs, each as if the others cost nothing."""
    arriving = (job.pictures * job.boards - 1) * job.gap_seconds
    runs = sum(len(times) for times in asked.values())
    costs = next(iter(box.experts.values())).costs
    speed = sum(1 / costs[executor.device].item_seconds for executor in box.executors)
    absent = set(absent)
    if loader == "segments":
        sizes = (box.experts[name].footprints[box.devices[0].name].weights_bytes for name in absent)
        loading = sum(sizes) / machine.disk_bytes_per_second
    else:
        loading = len(absent) * machine.load_seconds / sum(device.load_slots for device in box.devices)
    return max(arriving, runs / speed, loading)


def _steady(trace: Trace, verdicts: Sequence[Verdict]) -> float:
    """Answers in time per second of the middle eight tenths of the time in which pictures came; zero for no time."""
    lasting = trace.requests[-1].arrived_seconds
    came = {request.id: request.arrived_seconds for request in trace.requests}
    answered = (came[v.request] + v.waited_seconds for v in verdicts if v.outcome.is_answer)
    return sum(0.1 * lasting <= at < 0.9 * lasting for at in answered) / (0.8 * lasting) if lasting else 0.0


def paper_table(trial: Trial = tried) -> dict[str, Any]:
    """Every printed cell beside ours, and how far they are apart."""
    cells = []
    for machine in paper.MACHINES.values():
        for policy, printed in paper.PRINTED_IMAGES_PER_SECOND[machine.name].items():
            switches = paper.PRINTED_SWITCHES[machine.name].get(policy)
            for number, (task, job) in enumerate(paper.JOBS.items()):
                found = trial(machine, job, policy, "paper")
                cells.append(
                    {
                        "device": machine.name,
                        "policy": policy,
                        "task": task,
                        "paper_images_per_second": printed[number],
                        "images_per_second": found["images_per_second"],
                        "off": found["images_per_second"] / printed[number] - 1,
                        "paper_switches": switches[number] if switches else None,
                        "switches_per_executor": found["switches_per_executor"],
                        "switches_off": found["switches_per_executor"] / switches[number] - 1 if switches else None,
                        "switches_total": found["switches_total"],
                        "loads_floor": found["loads_floor"],
                    }
                )
    off = [abs(cell["off"]) for cell in cells]
    switches_off = [abs(cell["switches_off"]) for cell in cells if cell["switches_off"] is not None]
    return {
        "cells": cells,
        "mean_off": fmean(off),
        "worst_off": max(off),
        "cells_beyond_a_fifth": sum(value > 0.2 for value in off),
        "mean_switches_off": fmean(switches_off),
    }
