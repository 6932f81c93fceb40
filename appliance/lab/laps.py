"""What a task of `appliance bench task` is, what its cameras send, and what serving it once came to."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from appliance.core.types import Action, Batch, Event, Finished, Load, Loaded, LoadFailed, Run, RunFailed
from appliance.drivers.album import Album, Subject
from appliance.lab import paper
from appliance.lab.paper import Board, Job
from appliance.lab.telling import quantile

Pictures = Sequence[bytes]

_SEED = 1
_PICTURES, _PICTURE_SIZE = 16, (320, 240)
MAX_BYTES, MAX_PIXELS = 1 << 24, 1 << 24
"""Of a picture."""


@dataclass(frozen=True, slots=True)
class Workload:
    """A task as it is asked for: so many requests for so many types of components, one every `gap_seconds`.

    `checked_share` of them go on to a detector. The budget is a share of all experts' bytes.
    """

    shape: str = "45MB"
    experts: int = 352
    requests: int = 2500
    budget_share: float = 0.25
    gap_seconds: float = paper.GAP_SECONDS
    checked_share: float = paper.BOARD_A.checked_share

    @property
    def job(self) -> Job:
        board = Board(self.experts, paper.BOARD_A.zipf, self.checked_share, gpu_executors=0)
        return Job("task", board, self.requests, _SEED, self.gap_seconds)


@dataclass(frozen=True, slots=True)
class Stay:
    """An expert in memory, from when to when, in seconds since the first picture."""

    expert: str
    began_seconds: float
    ended_seconds: float


@dataclass(frozen=True, slots=True)
class Ran:
    """A batch that ran, for so long, and what was at work by device when it began: batches, itself among them, and
    loads."""

    batch: Batch
    running: Mapping[str, int]
    loading: Mapping[str, int]
    seconds: float


@dataclass(frozen=True, slots=True)
class Lap:
    """What serving the task once came to."""

    policy: str
    loader: str
    seconds: float
    cpu_seconds: float
    waits_seconds: tuple[float, ...]
    loads: int
    loads_floor: int
    peak_bytes: int
    stays: tuple[Stay, ...]
    how: str
    late_requests: tuple[str, ...] = ()
    ran: tuple[Ran, ...] = ()
    handovers: tuple[tuple[int, float], ...] = ()
    """From the end of a batch of so many pictures until its executor had the next one: answering and deciding."""

    @property
    def late(self) -> int:
        return len(self.late_requests)

    @property
    def images_per_second(self) -> float:
        return (len(self.waits_seconds) - self.late) / self.seconds

    def wait_seconds(self, share: float) -> float:
        return quantile(self.waits_seconds, share)


class Work:
    """What ran beside what, and what passed between two batches of an executor, as it is told."""

    def __init__(self) -> None:
        self.ran: list[Ran] = []
        self.handovers: list[tuple[int, float]] = []
        self._running, self._loading = Counter[str](), Counter[str]()
        self._beside: dict[int, tuple[Mapping[str, int], Mapping[str, int]]] = {}

    def begins(self, action: Action) -> None:
        if isinstance(action, Load):
            self._loading[action.device] += 1
        elif isinstance(action, Run):
            self._running[action.batch.device] += 1
            self._beside[action.batch.id] = Counter(self._running), Counter(self._loading)

    def ends(self, event: Event) -> None:
        if isinstance(event, Loaded | LoadFailed):
            self._loading[event.device] -= 1
        elif isinstance(event, Finished | RunFailed):
            self._running[event.batch.device] -= 1
            beside = self._beside.pop(event.batch.id)
            if isinstance(event, Finished):
                self.ran.append(Ran(event.batch, *beside, event.seconds))

    def goes_on(self, before: Finished, seconds: float) -> None:
        """The executor of that batch has the next one so many seconds after its end."""
        self.handovers.append((len(before.batch.requests), seconds))


class Stays:
    """Who has been in memory when, as it is told."""

    def __init__(self) -> None:
        self._since: dict[tuple[str, str], float] = {}
        self._over: list[Stay] = []

    def came(self, device: str, expert: str, at: float) -> None:
        self._since[device, expert] = at

    def left(self, device: str, expert: str, at: float) -> None:
        since = self._since.pop((device, expert), None)
        if since is not None:  # not so after a load that failed
            self._over.append(Stay(expert, since, at))

    def until(self, at: float) -> tuple[Stay, ...]:
        return (*self._over, *(Stay(expert, since, at) for (_, expert), since in self._since.items()))


def encoded_pictures() -> Pictures:
    """Small photographs of nothing, as a camera would send them."""
    made = []
    for seed in range(_PICTURES):
        coarse = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), np.uint8)
        to = io.BytesIO()
        Image.fromarray(coarse).resize(_PICTURE_SIZE).save(to, "JPEG")
        made.append(to.getvalue())
    return made


def album(pictures: Pictures) -> Album:
    """Decodes a request's picture when it is first looked at, as a service does."""

    def payload(request: str) -> bytes:
        return pictures[int(request.removeprefix("r")) % len(pictures)]

    return Album(payload, lambda request: Subject(None, request), MAX_BYTES, MAX_PIXELS)
