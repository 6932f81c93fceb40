"""What flows through the appliance: requests, batches, findings, verdicts, and the events and actions between rooms.

Everything here is a value. Times named `*_seconds` are monotonic seconds unless they are durations.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, NamedTuple

from appliance.core.costs import Cost

Precision = Literal["full", "int8"]
"""In which an expert computes: `full` is what its maker gave it."""


class Outcome(StrEnum):
    """How a request ended. Every request ends exactly once."""

    PASS = "pass"
    FAIL = "fail"
    ERROR = "error"
    LATE = "late"
    REJECTED = "rejected"

    @property
    def is_answer(self) -> bool:
        """All experts that had to see the picture have seen it, in time."""
        return self in (Outcome.PASS, Outcome.FAIL)


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
    """One picture's journey. `arrived_seconds` and `deadline_seconds` are monotonic; `line` and `product` say whose.
    No id comes again after its verdict.

    `alone`: it may be what ended a former process, and shares its batches with nobody. `picture` is the id of the one
    that it was cut from; empty where it is a picture itself.
    """

    id: str
    component: str
    arrived_seconds: float
    deadline_seconds: float | None = None
    line: str = ""
    product: str = ""
    alone: bool = False
    picture: str = ""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why one task of a batch has no findings: a bad picture, a missing reference, a model that failed."""

    reason: str
    detail: str


OUT_OF_MEMORY = "out-of-memory"
FRAGMENTED = "fragmented"
DEVICE = "device"
CANCELLED = "cancelled"
QUEUE_FULL = "queue-full"
GOLDEN_MISMATCH = "golden-mismatch"
FAILING = "failing"
"""Reasons of refusals that we give ourselves, or that decide what happens next."""


class Overflow(StrEnum):
    """What becomes of a picture that comes while as many are open as may be."""

    BLOCK = "block"
    """It waits outside, on the disk."""
    REJECT = "reject"
    """It is turned away."""
    OLDEST = "oldest"
    """It is taken, and the oldest that nobody has begun to look at is turned away."""


@dataclass(frozen=True, slots=True)
class Step:
    """One expert's part in a verdict."""

    expert: str
    findings: tuple[Finding, ...]
    executor: str
    seconds: float


@dataclass(frozen=True, slots=True)
class StandIn:
    """Another expert was asked instead of one that cannot serve, and why that cannot."""

    expert: str
    stand_in: str
    reason: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """The one answer to a request. It is degraded where others stood in for its experts."""

    request: str
    outcome: Outcome
    steps: tuple[Step, ...]
    waited_seconds: float
    refusal: Refusal | None = None
    stand_ins: tuple[StandIn, ...] = ()


class BoardOutcome(StrEnum):
    """How a board ended: as its worst part did, the worst first. It passes only if all its parts did."""

    FAIL = "fail"
    ERROR = "error"
    LATE = "late"
    REJECTED = "rejected"
    INCOMPLETE = "incomplete"
    """Parts are missing, and nothing worse."""
    PASS = "pass"


@dataclass(frozen=True, slots=True)
class BoardName:
    """Whose pictures belong together."""

    line: str
    product: str
    serial: str


@dataclass(frozen=True, slots=True)
class PartVerdict:
    """What a board wants to know of the verdict of one part's picture."""

    request: str
    outcome: Outcome
    refusal: Refusal | None = None


@dataclass(frozen=True, slots=True)
class BoardVerdict:
    """The one answer for a board. `parts` are those that have a verdict, by designator, in the recipe's order."""

    id: str
    name: BoardName
    outcome: BoardOutcome
    parts: Mapping[str, PartVerdict]
    missing: tuple[str, ...]
    opened_seconds: float
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
class Crash:
    """An expert was at work when the process ended: it ran these `pictures`, or was being loaded (none).

    `alone`: nothing else was in work.
    """

    pictures: frozenset[int]
    alone: bool


@dataclass(frozen=True, slots=True)
class Segment:
    """A contiguous piece of weights, named by its SHA-256; the unit that is read, shared and counted."""

    id: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Footprint:
    """What an expert takes of one device's memory.

    `private_bytes` are what the runtime keeps of it beside its segments, such as weights that it packed for itself.
    """

    segments: tuple[Segment, ...]
    private_bytes: int = 0
    activation_fixed_bytes: int = 0
    activation_item_bytes: int = 0

    @property
    def distinct(self) -> tuple[Segment, ...]:
        """An expert may use one segment twice; it holds it once."""
        return tuple(dict.fromkeys(self.segments))

    @property
    def weights_bytes(self) -> int:
        """Of the expert when it shares with nobody."""
        return sum(segment.bytes for segment in self.distinct) + self.private_bytes

    def activation_bytes(self, items: int) -> int:
        """Of a run of so many pictures, while it lasts."""
        return self.activation_fixed_bytes + items * self.activation_item_bytes


def bytes_together(footprints: Iterable[Footprint]) -> int:
    """What experts take of one memory: segments that several of them use, once."""
    together = tuple(footprints)
    segments = {segment.id: segment.bytes for footprint in together for segment in footprint.segments}
    return sum(segments.values()) + sum(footprint.private_bytes for footprint in together)


@dataclass(frozen=True, slots=True)
class Expert:
    """What deciding needs to know of an expert; `probability` of use by a request, 0..1.

    `footprints` and `costs` have the devices that can serve it: compiled weights differ from one kind to the other.
    """

    name: str
    footprints: Mapping[str, Footprint]
    costs: Mapping[str, Cost]
    max_batch: int
    probability: float = 0.0


@dataclass(frozen=True, slots=True)
class Device:
    """A memory with budgets for weights and for the activations of what runs, and how many loads it takes at a time.

    Without a budget for activations, they are not counted. `batch_sizes` are the batches that run well, in ascending
    order; where there are none, any does.
    """

    name: str
    budget_bytes: int
    load_slots: int = 2
    activation_bytes: int | None = None
    batch_sizes: tuple[int, ...] = ()

    def filled(self, items: int, most: int) -> int:
        """How many pictures really run when so many shall: up to the next batch that runs well, or the expert's
        largest if that is less."""
        if not self.batch_sizes:
            return items
        return min(next((size for size in self.batch_sizes if size >= items), items), max(items, most))


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


class Verb(StrEnum):
    """What an operator may want done with an expert."""

    LOAD = "load"
    """Bring it into memory now, for whom it will be needed. It leaves again like any other."""
    PIN = "pin"
    """Load it, and never let it leave."""
    UNPIN = "unpin"
    """Let it leave like any other."""
    EVICT = "evict"
    """Drop it from every device, unless somebody needs it."""
    REINSTATE = "reinstate"
    """Let it serve again, although it failed."""


@dataclass(frozen=True, slots=True)
class Command:
    """An operator wants something done; `number` comes back with its Acknowledge, exactly once."""

    number: int
    verb: Verb
    expert: str


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passed."""


Event = Arrived | Loaded | LoadFailed | Finished | RunFailed | Command | Tick


class Heard(NamedTuple):
    """An event as the controller was told of it, at that monotonic second; with `more`, others came at once."""

    seconds: float
    event: Event
    more: bool = False


# Actions: what the controller wants done, in this order.


@dataclass(frozen=True, slots=True)
class Load:
    """Bring `segments` (those not yet held on the device) into memory; then the expert is ready.

    What is loaded `ahead` nobody waits for yet: it gives way to other loads.
    """

    device: str
    expert: str
    segments: tuple[Segment, ...]
    ahead: bool = False


@dataclass(frozen=True, slots=True)
class CancelLoad:
    """End a load that began ahead, soon: it ends with LoadFailed, or with Loaded if it was quicker."""

    device: str
    expert: str


@dataclass(frozen=True, slots=True)
class HurryLoad:
    """A load that began ahead is needed now: it gives way no more."""

    device: str
    expert: str


class Rule(StrEnum):
    """Why an expert left. The first three are the policy's, in the order in which it lets somebody go."""

    ORPHANED = "orphaned"
    """It is asked only after others, none of whom is there (CoServe §4.4)."""
    LEAST_WORTH = "least-worth"
    """No queued task needs it, or the policy does not mind, and it is worth least."""
    OVERDUE = "overdue"
    """Queued tasks need it, but one that is due before them has run out of patience or slack."""
    PINNED = "pinned"
    """Room was made for an expert that stays for good."""
    WITHHELD = "withheld"
    """The device refused memory and makes do with less."""
    FRAGMENTED = "fragmented"
    """Memory was free, but in pieces."""
    QUARANTINED = "quarantined"
    """It keeps failing, or answers its golden samples wrongly."""
    COMMANDED = "commanded"
    """An operator wanted it, and nobody needed the expert."""
    NOT_LOADED = "not-loaded"
    """Its load failed or was given up: it never came."""


@dataclass(frozen=True, slots=True)
class Evict:
    """Drop the expert; `segments` are those that no other expert on the device still holds. `rule` says why."""

    device: str
    expert: str
    segments: tuple[Segment, ...]
    rule: Rule = Rule.LEAST_WORTH


@dataclass(frozen=True, slots=True)
class Run:
    batch: Batch


@dataclass(frozen=True, slots=True)
class CancelRun:
    """End a batch whose requests all have their verdicts: it ends with RunFailed, or Finished if it was quicker."""

    batch: Batch


@dataclass(frozen=True, slots=True)
class Publish:
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class Quarantine:
    """The expert serves no more, and why."""

    expert: str
    refusal: Refusal


@dataclass(frozen=True, slots=True)
class Reinstate:
    """The expert serves again: on trial, or for good because its trial went well or an operator says so."""

    expert: str
    on_trial: bool


@dataclass(frozen=True, slots=True)
class Acknowledge:
    """The command of this number is done, or was refused, and why."""

    command: int
    refusal: Refusal | None


Action = Load | CancelLoad | HurryLoad | Evict | Run | CancelRun | Publish | Quarantine | Reinstate | Acknowledge
