"""What a transaction enters: accepted pictures, verdicts, marks. Knows the tables, and nothing of threads or disks."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, assert_never

from appliance.drivers.records.boards import ConcludeBoard, Open, begin_board, conclude_board, note_part
from appliance.drivers.records.schema import PICTURE_COLUMNS, ROW_BYTES
from appliance.drivers.records.values import (
    Acceptance,
    Answered,
    Conclusion,
    Conflict,
    Counts,
    Full,
    New,
    PartOf,
    Picture,
    Publication,
    Quota,
    Recorded,
    Sort,
    TurnedAway,
    Unowed,
    Waiting,
)

LEAVING_ROWS = 4


@dataclass(frozen=True, slots=True)
class Accept:
    """Commit a picture to the spool."""

    picture: Picture
    payload: bytes
    done: Callable[[Acceptance], None]
    may_enter: Callable[[str], bool]


@dataclass(frozen=True, slots=True)
class Conclude:
    """Record a verdict, put it in the outbox, for the topics in `also` too, and release the picture."""

    id: str
    outcome: str
    body: bytes
    topic: str
    keep: Sort | None
    done: Callable[[Conclusion], None]
    also: tuple[str, ...] = ()
    part_of: PartOf | None = None


@dataclass(frozen=True, slots=True)
class Published:
    """The broker has confirmed a publication."""

    token: int


@dataclass(frozen=True, slots=True)
class Forgive:
    """The expert worked: its crashes are not held against it any more, or only those while it was loaded."""

    expert: str
    only_loads: bool


@dataclass(frozen=True, slots=True)
class Limits:
    """What the store holds at most; pictures of a sort without a quota are not kept."""

    spool_bytes: int
    outbox_rows: float
    verdict_bytes: float
    quotas: Mapping[Sort, Quota]


Request = Accept | Conclude | Published | Forgive | Open | ConcludeBoard
Result = Acceptance | Conclusion | None


class Ledger:
    """One transaction's view of the store: what is entered, and what the store holds then."""

    def __init__(
        self, db: sqlite3.Connection, counts: Counts, kept: Mapping[Sort, int], limits: Limits, now: float
    ) -> None:
        self._db, self._limits, self._now = db, limits, now
        self.counts = counts
        self.kept = dict(kept)
        """Bytes of pictures."""
        self.verdict_bytes = 0
        """What was added."""

    def enter(self, request: Request) -> Result:
        match request:
            case Accept():
                return self._accept(request)
            case Conclude():
                return self._conclude(request)
            case Published(token):
                self._mark(token)
                return None
            case Forgive(expert, only_loads):
                self._db.execute(
                    "DELETE FROM crashes WHERE expert = ? AND (pictures = '[]' OR NOT ?)", (expert, only_loads)
                )
                return None
            case Open(board):
                begin_board(self._db, board)
                return None
            case ConcludeBoard():
                return self._conclude_board(request)
            case _:
                assert_never(request)

    def _accept(self, request: Accept) -> Acceptance:
        picture, payload = request.picture, request.payload
        known = self._one("SELECT line, product, board, part, picture_sha256 FROM pictures WHERE id = ?", picture.id)
        if known is not None:
            return self._wait(picture) if known == _identity(picture) else Conflict()
        known = self._one("SELECT line, product, board, part, picture_sha256 FROM verdicts WHERE id = ?", picture.id)
        if known is not None and known != _identity(picture):
            return Conflict()
        if self.counts.unpublished >= self._limits.outbox_rows:
            return Full(f"{self.counts.unpublished} verdicts wait for the broker (limits.outbox)")
        if known is not None:
            return self._repeat(picture)
        if self.counts.spooled_bytes + len(payload) > self._limits.spool_bytes:
            return Full(f"the spool holds {self.counts.spooled_bytes} of {self._limits.spool_bytes} bytes")
        if not request.may_enter(picture.line):
            return TurnedAway()
        return self._spool(picture, payload)

    def _spool(self, picture: Picture, payload: bytes) -> New:
        values = (*(getattr(picture, column) for column in PICTURE_COLUMNS), len(payload), payload)
        arrival = self._db.execute(
            f"INSERT INTO pictures ({', '.join(PICTURE_COLUMNS)}, picture_bytes, payload)"
            f" VALUES ({', '.join('?' * len(values))})",
            values,
        ).lastrowid
        assert arrival is not None
        self._add(spooled=1, spooled_bytes=len(payload))
        return New(arrival)

    def _wait(self, picture: Picture) -> Waiting:
        if picture.response_topic is not None:
            self._db.execute(
                "UPDATE pictures SET response_topic = ?, correlation = ? WHERE id = ?",
                (picture.response_topic, picture.correlation, picture.id),
            )
        return Waiting()

    def _repeat(self, picture: Picture) -> Answered:
        row = self._one("SELECT topic, body FROM verdicts WHERE id = ?", picture.id)
        assert row is not None
        reply = picture.response_topic, picture.correlation
        return Answered(self._post(picture.id, row[0], *reply, row[1], resent=True))

    def _conclude(self, request: Conclude) -> Conclusion:
        row = self._one("SELECT picture_bytes, response_topic, correlation FROM pictures WHERE id = ?", request.id)
        if row is None:
            return Unowed()
        kept = "id, line, product, board, part, picture_sha256, accepted_at, captured_at"
        self._db.execute(
            f"INSERT INTO verdicts ({kept}, outcome, body, topic, recorded_at)"
            f" SELECT {kept}, ?, ?, ?, ? FROM pictures WHERE id = ?",
            (request.outcome, request.body, request.topic, self._now, request.id),
        )
        if request.keep is not None and request.keep in self._limits.quotas:
            self._keep(request.id, request.keep, row[0])
        if request.part_of is not None:
            note_part(self._db, request.id, request.outcome, request.part_of)
        self._db.execute("DELETE FROM pictures WHERE id = ?", (request.id,))
        self._add(spooled=-1, spooled_bytes=-row[0], verdicts=1)
        self.verdict_bytes += len(request.body) + ROW_BYTES
        also = [(topic, None) for topic in request.also]
        return Recorded(self._post(request.id, request.topic, row[1], row[2], request.body, also))

    def _conclude_board(self, request: ConcludeBoard) -> Conclusion:
        if not conclude_board(self._db, request, self._now):
            return Unowed()
        self._add(verdicts=1)
        self.verdict_bytes += len(request.body) + ROW_BYTES
        return Recorded(self._post(request.board.id, request.topic, None, None, request.body))

    def _keep(self, id: str, sort: Sort, size: int) -> None:
        self._db.execute(
            "INSERT INTO kept (id, sort, kept_at, bytes, payload)"
            " SELECT id, ?, ?, picture_bytes, payload FROM pictures WHERE id = ?",
            (sort, self._now, id),
        )
        self.kept[sort] = self.kept.get(sort, 0) + size
        if self.kept[sort] > self._limits.quotas[sort].bytes:
            self._let_go(sort)

    def _let_go(self, sort: Sort) -> None:
        """The oldest, a few at a time: nobody waits long, and more leave than come."""
        oldest = self._db.execute(
            "SELECT id, bytes FROM kept WHERE sort = ? ORDER BY kept_at LIMIT ?", (sort, LEAVING_ROWS)
        ).fetchall()
        for id, size in oldest:
            if self.kept[sort] <= self._limits.quotas[sort].bytes:
                return
            self._db.execute("DELETE FROM kept WHERE id = ?", (id,))
            self.kept[sort] -= size

    def _post(
        self,
        id: str,
        topic: str,
        response_topic: str | None,
        correlation: bytes | None,
        body: bytes,
        also: Sequence[tuple[str, None]] = (),
        *,
        resent: bool = False,
    ) -> tuple[Publication, ...]:
        targets: list[tuple[str, bytes | None]] = [(topic, None), *also]
        if response_topic is not None:
            targets.append((response_topic, correlation))
        return tuple(self._publication(id, *target, body, resent) for target in targets)

    def _publication(self, id: str, topic: str, correlation: bytes | None, body: bytes, resent: bool) -> Publication:
        """One that still waits is as it was: nobody has got it yet."""
        values = (id, topic, correlation)
        there = self._db.execute(
            "SELECT token, resent FROM outbox WHERE id = ? AND topic = ? AND correlation IS ?", values
        ).fetchone()
        if there is not None:
            return Publication(there[0], *values, body, bool(there[1]))
        token = self._db.execute(
            "INSERT INTO outbox (id, topic, correlation, resent) VALUES (?, ?, ?, ?)", (*values, resent)
        ).lastrowid
        assert token is not None
        self._add(unpublished=1)
        return Publication(token, *values, body, resent)

    def _mark(self, token: int) -> None:
        self._add(unpublished=-self._db.execute("DELETE FROM outbox WHERE token = ?", (token,)).rowcount)

    def _one(self, query: str, id: str) -> tuple[Any, ...] | None:
        row: tuple[Any, ...] | None = self._db.execute(query, (id,)).fetchone()
        return row

    def _add(self, *, spooled: int = 0, spooled_bytes: int = 0, verdicts: int = 0, unpublished: int = 0) -> None:
        c = self.counts
        self.counts = Counts(
            c.spooled + spooled, c.spooled_bytes + spooled_bytes, c.verdicts + verdicts, c.unpublished + unpublished
        )


def _identity(picture: Picture) -> tuple[str, ...]:
    return (picture.line, picture.product, picture.board, picture.part, picture.picture_sha256)
