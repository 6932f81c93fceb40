"""`appliance bench search`: the joint search beside the paper's own two, at its tasks on its machines, in virtual time.

Every search plays the workload under CoServe's own policy, so what is gained is gained by settings alone; the joint
search may play it no more often than the two steps did.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from appliance.core.policies import COSERVE
from appliance.lab import paper
from appliance.lab.paper import CLASSIFIER_BYTES, Job, Machine
from appliance.lab.telling import Say, Target
from appliance.profiler import preset
from appliance.profiler.coserve import Found, two_steps
from appliance.profiler.joint import NO_ROOM, SHARES, Judged, Search
from appliance.profiler.settings import Settings

PRINTED_CASUAL: Mapping[str, Sequence[float]] = {
    "numa": (22.2, 23.7, 22.1, 25.7),
    "uma": (23.1, 24.4, 22.9, 24.9),
}
"""Images per second of the casual configuration, by task."""
_GPU_EXECUTORS, _CPU_EXECUTORS = range(1, 7), range(0, 3)


@dataclass(frozen=True, slots=True)
class Joint:
    """What the joint search came to, how many configurations it judged and how often it played the workload."""

    settings: Settings
    value: float
    trials: int
    played: float


def contest(seed: int = 1, say: Say = lambda line: None) -> dict[str, Any]:
    """All machines and tasks. Images per second are those of virtual time."""
    rows = []
    for machine in paper.MACHINES.values():
        for name in paper.JOBS:
            say(f"{machine.name} {name}")
            found = row(machine, name, seed)
            alone = joint_search(machine, paper.JOBS[name], found["two_steps_plays"], seed, guesses=())
            rows.append(found | {"joint_without_guesses_images_per_second": alone.value})
    return {"policy": COSERVE.name, "seed": seed, "rows": rows}


def row(machine: Machine, task: str, seed: int) -> dict[str, Any]:
    """One task on one machine: the casual configuration, the paper's two searches, and ours."""
    job, casual = paper.JOBS[task], preset.casual(machine)
    usual = preset.throughput(machine, job, COSERVE.name, casual) or 0.0
    stepped = two_searches(machine, job)
    joint = joint_search(machine, job, stepped.evaluations, seed, preset.guesses(machine))
    printed = _printed_gain(machine, task)
    return {
        "device": machine.name,
        "task": task,
        "casual_images_per_second": usual,
        "two_steps_images_per_second": stepped.value,
        "two_steps_plays": stepped.evaluations,
        "two_steps_settings": stepped.settings.told(),
        "joint_images_per_second": joint.value,
        "joint_plays": joint.played,
        "joint_trials": joint.trials,
        "joint_settings": joint.settings.told(),
        "two_steps_to_casual": stepped.value / usual,
        "joint_to_casual": joint.value / usual,
        "joint_to_two_steps": joint.value / stepped.value,
        "paper_best_to_casual": printed,
        "targets": [
            Target("joint_to_casual", joint.value / usual, "at least", printed).told(),
            Target("joint_to_two_steps", joint.value / stepped.value, "at least", 1.0).told(),
        ],
    }


def two_searches(machine: Machine, job: Job) -> Found:
    """The paper's: experts on the GPU by decaying windows, then executors one kind after the other."""
    room = preset.ROOMS[machine.name]
    return two_steps(
        lambda settings: preset.throughput(machine, job, COSERVE.name, settings),
        preset.casual(machine),
        lambda count: (count + 0.01) * CLASSIFIER_BYTES / room.gpu_bytes,  # so many, and not one less by rounding
        most_experts=room.gpu_bytes // CLASSIFIER_BYTES,
        gpu_executors=_GPU_EXECUTORS,
        cpu_executors=_CPU_EXECUTORS,
    )


def joint_search(machine: Machine, job: Job, plays: int, seed: int, guesses: Sequence[Settings]) -> Joint:
    """Ours, which plays the workload no more than so many times, the casual configuration and the guesses first."""

    def judge(settings: Settings, share: float) -> Judged:
        part = replace(job, pictures=round(job.pictures * share))
        value = preset.throughput(machine, part, COSERVE.name, settings)
        return NO_ROOM if value is None else Judged(value)

    search = Search(preset.SPACE, preset.casual(machine), judge, guesses=guesses, seed=seed)
    search.run(lambda: search.played + sum(SHARES) <= plays)
    (best,) = search.best()
    return Joint(best.settings, best.value, search.trials, search.played)


def _printed_gain(machine: Machine, task: str) -> float:
    """The best configuration's images per second to the casual one's, as printed."""
    number = list(paper.JOBS).index(task)
    best = paper.PRINTED_IMAGES_PER_SECOND[machine.name][COSERVE.name][number]
    return best / PRINTED_CASUAL[machine.name][number]
