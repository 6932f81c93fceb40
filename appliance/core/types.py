"""What flows through the appliance: requests, batches, findings, verdicts, and the events and actions between rooms.

Everything here is a value. Times named `*_seconds` are monotonic seconds unless they are durations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from appliance.core.costs import Cost


class Outcome(StrEnum):
    """How a request ended. Every request ends exactly once."""

    PASS = "pass"
    FAIL = "fail"
    ERROR = "error"
    LATE = "late"
    REJECTED = "rejected"


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle in pixels of the published picture, top-left to bottom-right."""

    x1: float
    y1: float
    x2: float
    y2: float


@dataclass(frozen=True, slots=True)
class Finding:
    """What one expert saw. `fails` says whether it fails the part by that expert's own threshold."""

    label: str
    score: float
    fails: bool
    box: Box | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """One picture's journey. `arrived_seconds` and `deadline_seconds` are monotonic."""

    id: str
    component: str
    arrived_seconds: float
    deadline_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why one task of a batch has no findings: a bad picture, a missing reference, a model that failed."""

    reason: str
    detail: str


@dataclass(frozen=True, slots=True)
class Step:
    """One expert's part in a verdict."""

    expert: str
    findings: tuple[Finding, ...]
    executor: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """The one answer to a request."""

    request: str
    outcome: Outcome
    steps: tuple[Step, ...]
    waited_seconds: float
    refusal: Refusal | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """Pictures for one run of one expert on one executor."""

    id: int
    executor: str
    device: str
    expert: str
    requests: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Segment:
    """A contiguous piece of weights, named by its SHA-256; the unit that is read, shared and counted."""

    id: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Expert:
    """What deciding needs to know of an expert. `costs` by device; `probability` of use by a request, 0..1."""

    name: str
    segments: tuple[Segment, ...]
    costs: Mapping[str, Cost]
    max_batch: int
    probability: float = 0.0

    @property
    def bytes(self) -> int:
        return sum(segment.bytes for segment in self.segments)


@dataclass(frozen=True, slots=True)
class Device:
    """A memory with a budget for weights, and how many loads it takes at a time."""

    name: str
    budget_bytes: int
    load_slots: int = 2


@dataclass(frozen=True, slots=True)
class Executor:
    """One who runs one batch at a time, on a device."""

    name: str
    device: str


# Events: what the drivers report.


@dataclass(frozen=True, slots=True)
class Arrived:
    request: Request


@dataclass(frozen=True, slots=True)
class Loaded:
    device: str
    expert: str


@dataclass(frozen=True, slots=True)
class LoadFailed:
    device: str
    expert: str
    refusal: Refusal


@dataclass(frozen=True, slots=True)
class Finished:
    """A batch ended; `answers` stand in the order of `batch.requests`."""

    batch: Batch
    answers: tuple[tuple[Finding, ...] | Refusal, ...]
    seconds: float


@dataclass(frozen=True, slots=True)
class RunFailed:
    """A batch ended without any answer: the run itself failed."""

    batch: Batch
    refusal: Refusal


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passed."""


Event = Arrived | Loaded | LoadFailed | Finished | RunFailed | Tick


# Actions: what the controller wants done, in this order.


@dataclass(frozen=True, slots=True)
class Load:
    """Bring `segments` (those not yet held on the device) into memory; then the expert is ready.

    `ahead` of any task for it, and so after every load that a task waits for.
    """

    device: str
    expert: str
    segments: tuple[Segment, ...]
    ahead: bool = False


@dataclass(frozen=True, slots=True)
class Evict:
    """Drop the expert; `segments` are those that no other expert on the device still holds."""

    device: str
    expert: str
    segments: tuple[Segment, ...]


@dataclass(frozen=True, slots=True)
class Run:
    batch: Batch


@dataclass(frozen=True, slots=True)
class Publish:
    verdict: Verdict


Action = Load | Evict | Run | Publish
