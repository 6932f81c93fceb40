"""What is stored, and how asking for it is answered. Values only."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum


@dataclass(frozen=True, slots=True)
class Picture:
    """What is known of a picture besides its bytes. Times named `_at` are wall clock, labels only.

    `deadline_seconds` counts from `accepted_at`.
    """

    id: str
    line: str
    product: str
    board: str
    part: str
    picture_sha256: str
    accepted_at: float
    captured_at: str | None = None
    deadline_seconds: float | None = None
    response_topic: str | None = None
    correlation: bytes | None = None

    @property
    def captured(self) -> datetime | None:
        return None if self.captured_at is None else datetime.fromisoformat(self.captured_at)


@dataclass(frozen=True, slots=True)
class Spooled:
    """A picture in the spool; `arrival` is its place in the order of acceptance.

    So many `attempts` to inspect it ended with the process.
    """

    arrival: int
    picture: Picture
    picture_bytes: int
    attempts: int = 0


@dataclass(frozen=True, slots=True)
class Publication:
    """A recorded verdict on its way to one topic; done when `published(token)` was called.

    `resent`: its picture came again.
    """

    token: int
    id: str
    topic: str
    correlation: bytes | None
    body: bytes
    resent: bool = False


class Sort(StrEnum):
    """Why a picture is kept beside its verdict."""

    FAIL = "fail"
    """The part failed."""
    DOUBTFUL = "doubtful"
    """It could not be inspected, or passed by little."""


@dataclass(frozen=True, slots=True)
class Quota:
    """How many bytes of pictures are kept, and for how long; the oldest leave."""

    bytes: int
    days: float


@dataclass(frozen=True, slots=True)
class Counts:
    """What the store holds, as of its last commit."""

    spooled: int
    spooled_bytes: int
    verdicts: int
    unpublished: int


@dataclass(frozen=True, slots=True)
class OpenBoard:
    """A board that is collected from pictures of its parts. What its `recipe` says is for others to read."""

    id: str
    line: str
    product: str
    board: str
    opened_at: float
    recipe: bytes


@dataclass(frozen=True, slots=True)
class BoardPart:
    """The latest picture of a part that has its verdict."""

    part: str
    arrival: int
    request: str
    outcome: str
    reason: str | None
    detail: str | None


@dataclass(frozen=True, slots=True)
class PartOf:
    """The board that a picture's verdict counts for, and why it neither passed nor failed."""

    board: str
    reason: str | None
    detail: str | None


# How `accept` is answered.


@dataclass(frozen=True, slots=True)
class New:
    """Committed: acknowledge it."""

    arrival: int


@dataclass(frozen=True, slots=True)
class Waiting:
    """In the spool already: acknowledge it, its verdict will come, to the response topic given last."""


@dataclass(frozen=True, slots=True)
class Answered:
    """Its verdict is recorded, and committed to the outbox once more: acknowledge it, publish these.

    Those that were in the outbox still keep their tokens, so a hundred repetitions make one publication.
    """

    publications: tuple[Publication, ...]


@dataclass(frozen=True, slots=True)
class Conflict:
    """The same id stands for another picture, or another place: refuse this one and acknowledge it."""


@dataclass(frozen=True, slots=True)
class Full:
    """Not committed: do not acknowledge; offer it again later."""

    why: str


@dataclass(frozen=True, slots=True)
class TurnedAway:
    """Not committed: its line sends too many. Refuse it and acknowledge it."""


Acceptance = New | Waiting | Answered | Conflict | Full | TurnedAway


# How `conclude` is answered.


@dataclass(frozen=True, slots=True)
class Recorded:
    """The verdict stands and is in the outbox: publish these."""

    publications: tuple[Publication, ...]


@dataclass(frozen=True, slots=True)
class Unowed:
    """No such picture is waiting: it has its verdict already, which stands, or it was never accepted."""


Conclusion = Recorded | Unowed
