"""The paper's machines as a search may configure them: executors, and how the memories are split.

The paper prints no bytes per picture and none per executor. Ours are chosen so that the best configurations have the
memories that its table was fitted with (`lab/paper.py`): an executor and a full batch of it together take what each
executor more takes away from the experts there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

from appliance.core.policies import Policy
from appliance.lab import paper, trial
from appliance.lab.contenders import Pool, Setup, contender
from appliance.lab.paper import CLASSIFIER_BYTES, Job, Machine
from appliance.profiler.settings import Knob, Settings, Space

CPU_ITEMS = trial.ITEMS["cpu"]


@dataclass(frozen=True, slots=True)
class Room:
    """A machine's memories, in bytes: what there is, what an executor takes for itself, and what a picture takes."""

    gpu_bytes: int
    gpu_executor_bytes: int
    cpu_bytes: int
    cpu_executor_bytes: int
    item_bytes: int = 25_000_000

    def gpu_experts(self, settings: Settings) -> int:
        """How many classifiers the GPU holds."""
        return int(self.gpu_bytes * settings.gpu_weights_share) // CLASSIFIER_BYTES

    def gpu_items(self, settings: Settings) -> int:
        """How many pictures its executors may have in work together; none or less: there is no room."""
        taken = self.gpu_experts(settings) * CLASSIFIER_BYTES + settings.gpu_executors * self.gpu_executor_bytes
        return (self.gpu_bytes - taken) // self.item_bytes

    def cpu_experts(self, settings: Settings) -> int:
        """What the largest batches leave is for experts (CoServe §4.4)."""
        taken = settings.cpu_executors * (self.cpu_executor_bytes + CPU_ITEMS * self.item_bytes)
        return (self.cpu_bytes - taken) // CLASSIFIER_BYTES

    def holds(self, settings: Settings) -> bool:
        """Whether each executor has an expert and a picture."""
        return (
            self.gpu_items(settings) >= settings.gpu_executors
            and self.gpu_experts(settings) >= settings.gpu_executors
            and self.cpu_experts(settings) >= settings.cpu_executors
        )


ROOMS: Mapping[str, Room] = {
    "numa": Room(49 * CLASSIFIER_BYTES, 134_000_000, 90 * CLASSIFIER_BYTES, 690_000_000),
    "uma": Room(55 * CLASSIFIER_BYTES, 668_000_000, 75 * CLASSIFIER_BYTES, 690_000_000),
}
SPACE: Space = {
    "gpu_executors": Knob(1, 6),
    "cpu_executors": Knob(0, 2),
    "gpu_weights_share": Knob(0.05, 0.95),
    "batch_cap": Knob(1, 16, is_log=True),
}


def casual(machine: Machine) -> Settings:
    """Three quarters of the GPU's memory for experts; three GPU executors, on UMA two, and one of the CPU (§5.1)."""
    return Settings(cpu_executors=1, gpu_executors=3 if machine.name == "numa" else 2, gpu_weights_share=0.75)


def guesses(machine: Machine) -> list[Settings]:
    """What experience says: as many executors as there may be, with room for batches of one size or another."""
    room, found, count = ROOMS[machine.name], [], int(SPACE["gpu_executors"].high)
    for items in (10, 5, trial.ITEMS["gpu"]):
        share = 1 - count * (room.gpu_executor_bytes + items * room.item_bytes) / room.gpu_bytes
        found.append(Settings(cpu_executors=1, gpu_executors=count, gpu_weights_share=share))
    return found


def throughput(machine: Machine, job: Job, policy: str, settings: Settings) -> float | None:
    """Images per second of the job under a policy; None where the memories do not hold these settings."""
    room = ROOMS[machine.name]
    if not room.holds(settings):
        return None
    trace = _drawn(job)
    box = _setup(machine, room, job, contender(policy, trace.asked), settings)
    return float(trial.served(machine, trace, job, policy, box, "paper")["images_per_second"])


_drawn = lru_cache(maxsize=16)(paper.drawn)


def _setup(machine: Machine, room: Room, job: Job, policy: Policy, settings: Settings) -> Setup:
    executors = {"gpu": settings.gpu_executors, "cpu": settings.cpu_executors}
    experts = {"gpu": room.gpu_experts(settings), "cpu": room.cpu_experts(settings)}
    items = {"gpu": room.gpu_items(settings), "cpu": CPU_ITEMS * settings.cpu_executors}

    def part(whole: Mapping[str, int], pool: Pool) -> int:
        """Each executor has an even part; what is left over goes to the first ones."""
        each, more = divmod(whole[pool.device], executors[pool.device])
        return sum(each + (number < more) for number in pool.executors)

    made = trial.setup(
        machine,
        job,
        policy,
        "paper",
        {name: count for name, count in executors.items() if count},
        lambda pool: part(experts, pool),
        lambda pool: part(items, pool),
    )
    capped = {n: replace(e, max_batch=min(e.max_batch, settings.batch_cap)) for n, e in made.experts.items()}
    return replace(made, experts=capped)
