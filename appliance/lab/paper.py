"""CoServe's evaluation (ASPLOS 2025, §5) as values: its two machines, its four tasks, and the numbers it prints.

Machines are described by the constants with which our simulation comes closest to the printed numbers; they were
fitted once per machine, over all tasks and policies. The paper prints neither the times of its loads and runs nor how
many experts its executors hold.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from appliance.core.costs import Cost
from appliance.core.graph import Condition, Edge, ExpertGraph, compile_graph
from appliance.core.types import Expert, Finding, Footprint, Request, Segment

CLASSIFIER_BYTES = 178_000_000  # ResNet101 in fp32
DETECTOR_BYTES = {"yolov5m": 85_000_000, "yolov5l": 186_000_000}
GAP_SECONDS = 0.004  # one component image every 4 ms


@dataclass(frozen=True, slots=True)
class Machine:
    """One of the paper's two, in its best configuration: executors on the GPU, and one on the CPU.

    `gpu_pools` are the experts that each GPU executor holds, by how many executors there are; `one_pool` those of a
    box with a single executor. `load_seconds` is what a switch of experts took there, whatever its bytes.
    Activations hold a full batch of each executor, or `activation_share` of that.
    """

    name: str
    gpu_pools: Mapping[int, tuple[int, ...]]
    cpu_pool: int
    one_pool: int
    load_seconds: float
    gpu_item_seconds: float
    gpu_fixed_seconds: float
    cpu_item_seconds: float
    cpu_fixed_seconds: float
    disk_bytes_per_second: float
    activation_share: float = 1.0

    def cost(self, device: str, loader: str, size: int, executors: int, loads_in_flight: int) -> Cost:
        """What the controller is told: a load takes what it takes when as many as may are in flight.

        Executors that share a processor share its speed: each picture takes as if all of them were at work.
        """
        load = self.load_seconds if loader == "paper" else size / self.disk_bytes_per_second * loads_in_flight
        if device == "cpu":
            return Cost(self.cpu_item_seconds * executors, self.cpu_fixed_seconds, load)
        return Cost(self.gpu_item_seconds * executors, self.gpu_fixed_seconds, load)


NUMA = Machine(
    "numa",
    gpu_pools={3: (14, 13, 13), 4: (10, 9, 9, 9)},
    cpu_pool=85,
    one_pool=128,
    load_seconds=1.06,
    gpu_item_seconds=0.008,
    gpu_fixed_seconds=0.004,
    cpu_item_seconds=0.075,
    cpu_fixed_seconds=0.03,
    disk_bytes_per_second=530e6,
)
UMA = Machine(
    "uma",
    gpu_pools={3: (13, 12, 12), 4: (8, 8, 8, 7)},
    cpu_pool=70,
    one_pool=125,
    load_seconds=1.13,
    gpu_item_seconds=0.010,
    gpu_fixed_seconds=0.002,
    cpu_item_seconds=0.075,
    cpu_fixed_seconds=0.03,
    disk_bytes_per_second=3e9,
)
MACHINES = {machine.name: machine for machine in (NUMA, UMA)}
MAX_BATCH = 16


@dataclass(frozen=True, slots=True)
class Board:
    """So many types of components, asked as Zipf's law with this exponent has it.

    `checked_share` of the pictures go on to a detector, when the classifier finds nothing wrong.
    """

    types: int
    zipf: float
    checked_share: float
    gpu_executors: int

    @property
    def probabilities(self) -> list[float]:
        weights = [rank**-self.zipf for rank in range(1, self.types + 1)]
        total = sum(weights)
        return [weight / total for weight in weights]


@dataclass(frozen=True, slots=True)
class Job:
    """One of the paper's tasks: so many pictures of a board, one every `gap_seconds`, drawn by chance from `seed`.

    The same pictures come again for each of so many `boards`. All of a board's are due so many seconds after they came.
    """

    name: str
    board: Board
    pictures: int
    seed: int
    gap_seconds: float = GAP_SECONDS
    due_seconds: float | None = None
    boards: int = 1


BOARD_A = Board(352, zipf=0.944, checked_share=0.35, gpu_executors=3)
BOARD_B = Board(342, zipf=1.0, checked_share=0.35, gpu_executors=4)
JOBS = {
    job.name: job
    for job in (
        Job("A1", BOARD_A, 2500, seed=1),
        Job("A2", BOARD_A, 3500, seed=2),
        Job("B1", BOARD_B, 2500, seed=3),
        Job("B2", BOARD_B, 3500, seed=4),
    )
}

CHECK = Finding("nothing-wrong", 0.9, fails=False)
SETTLED = Finding("missing", 0.9, fails=True)


@dataclass(frozen=True, slots=True)
class Trace:
    """A task drawn: its pictures, and which of them a detector looks at."""

    requests: tuple[Request, ...]
    checked: frozenset[str]

    def answer(self, request: str, expert: str) -> tuple[Finding, ...]:
        return (CHECK if request in self.checked else SETTLED,)

    @property
    def asked(self) -> Mapping[str, Sequence[float]]:
        """Which expert is asked when; a detector at the moment at which the picture comes, if not before."""
        found = defaultdict[str, list[float]](list)
        for request in self.requests:
            rank = int(request.component.removeprefix("type"))
            found[classifier(rank)].append(request.arrived_seconds)
            if request.id in self.checked:
                found[detector(rank)].append(request.arrived_seconds)
        return found


def drawn(job: Job) -> Trace:
    """The same pictures for the same job, whenever it is drawn."""
    chance = random.Random(job.seed)
    cumulated = list(accumulate(job.board.probabilities))
    types = chance.choices(range(job.board.types), cum_weights=cumulated, k=job.pictures)
    is_checked = [chance.random() < job.board.checked_share for _ in types]
    requests, checked = list[Request](), set[str]()
    for number in range(job.pictures * job.boards):
        at = number * job.gap_seconds
        due = None if job.due_seconds is None else at + job.due_seconds
        requests.append(Request(f"r{number}", f"type{types[number % job.pictures]:03}", at, due))
        if is_checked[number % job.pictures]:
            checked.add(f"r{number}")
    return Trace(tuple(requests), frozenset(checked))


def classifier(rank: int) -> str:
    return f"resnet101-{rank:03}"


def graph(board: Board) -> ExpertGraph:
    """Every type has its classifier; each leads on to one of the two detectors."""
    names = [classifier(rank) for rank in range(board.types)]
    edges = [Edge(name, detector(rank), (Condition(label=CHECK.label),)) for rank, name in enumerate(names)]
    return compile_graph({f"type{rank:03}": name for rank, name in enumerate(names)}, edges, [*names, *DETECTOR_BYTES])


def experts(board: Board, costs: Mapping[str, Cost]) -> list[Expert]:
    """The board's experts, most probable first, with what they cost on each device."""
    shares = board.probabilities
    found = [_expert(classifier(rank), CLASSIFIER_BYTES, share, costs) for rank, share in enumerate(shares)]
    for name, size in DETECTOR_BYTES.items():
        asked = sum(share for rank, share in enumerate(shares) if detector(rank) == name)
        found.append(_expert(name, size, asked * board.checked_share, costs))
    return sorted(found, key=lambda expert: (-expert.probability, expert.name))


def _expert(name: str, size: int, probability: float, costs: Mapping[str, Cost]) -> Expert:
    footprint = Footprint((Segment(name, size),), activation_item_bytes=1)
    return Expert(name, dict.fromkeys(costs, footprint), costs, MAX_BATCH, probability)


def detector(rank: int) -> str:
    return list(DETECTOR_BYTES)[rank % len(DETECTOR_BYTES)]


PRINTED_IMAGES_PER_SECOND: Mapping[str, Mapping[str, tuple[float, ...]]] = {
    "numa": {
        "samba": (3.5, 3.5, 4.3, 4.2),
        "samba-fifo": (2.8, 2.7, 3.0, 3.1),
        "samba-parallel": (5.4, 5.2, 6.0, 6.3),
        "none": (4.5, 4.7, 5.5, 5.2),
        "em": (5.8, 6.0, 6.8, 6.7),
        "em+ra": (11.8, 13.6, 12.6, 14.5),
        "coserve": (26.3, 28.7, 27.2, 29.6),
    },
    "uma": {
        "samba": (3.7, 3.6, 4.3, 4.1),
        "samba-fifo": (2.4, 2.3, 2.6, 2.6),
        "samba-parallel": (5.1, 4.8, 5.2, 5.2),
        "none": (4.3, 4.3, 4.4, 4.4),
        "em": (6.0, 5.8, 5.9, 5.7),
        "em+ra": (10.9, 11.6, 12.5, 13.2),
        "coserve": (24.5, 27.6, 24.1, 27.6),
    },
}
"""Figures 13 and 15 of the paper, by machine and policy, for A1, A2, B1 and B2; baselines are Best ÷ speed-up."""
PRINTED_SWITCHES: Mapping[str, Mapping[str, tuple[int, ...]]] = {
    "numa": {
        "samba": (598, 909, 485, 725),
        "samba-fifo": (817, 1226, 736, 1060),
        "samba-parallel": (364, 513, 287, 414),
        "none": (413, 630, 371, 520),
        "em": (321, 460, 270, 387),
        "em+ra": (173, 208, 157, 191),
        "coserve": (64, 77, 54, 65),
    },
    "uma": {
        "samba": (625, 867, 521, 720),
        "samba-fifo": (866, 1241, 724, 1083),
        "samba-parallel": (372, 534, 293, 416),
        "coserve": (76, 86, 63, 73),
    },
}
"""As printed; they behave like averages per executor. The ablation's are printed for NUMA alone."""
