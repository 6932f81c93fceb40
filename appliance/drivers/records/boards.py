"""Boards that are collected: open ones with the parts that have a verdict, until they have theirs.

A part is noted in the transaction that records its verdict, a board forgotten in that which records its own. So what is
here at a start is what a former process knew.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from dataclasses import dataclass

from appliance.drivers.records.readers import Readers
from appliance.drivers.records.values import BoardPart, Conclusion, OpenBoard, PartOf

WHOLE = "_board"
"""In place of a part, in a verdict's row."""


@dataclass(frozen=True, slots=True)
class Open:
    """A board's first picture has come."""

    board: OpenBoard


@dataclass(frozen=True, slots=True)
class ConcludeBoard:
    """Record a board's verdict, put it in the outbox and forget that it was open."""

    board: OpenBoard
    outcome: str
    body: bytes
    topic: str
    done: Callable[[Conclusion], None]


def begin_board(db: sqlite3.Connection, board: OpenBoard) -> None:
    """It may be known: its first picture was in the spool when a former process ended."""
    db.execute(
        "INSERT OR IGNORE INTO boards (id, line, product, board, opened_at, recipe) VALUES (?, ?, ?, ?, ?, ?)",
        (board.id, board.line, board.product, board.board, board.opened_at, board.recipe),
    )


def note_part(db: sqlite3.Connection, request: str, outcome: str, of: PartOf) -> None:
    """The verdict of a spooled picture, if the board is open and the picture the latest of its part."""
    db.execute(
        "INSERT INTO board_parts (board, part, arrival, request, outcome, reason, detail)"
        " SELECT boards.id, part, arrival, pictures.id, ?, ?, ? FROM pictures, boards"
        " WHERE pictures.id = ? AND boards.id = ?"
        " ON CONFLICT (board, part) DO UPDATE SET arrival = excluded.arrival, request = excluded.request,"
        " outcome = excluded.outcome, reason = excluded.reason, detail = excluded.detail"
        " WHERE excluded.arrival > arrival",
        (outcome, of.reason, of.detail, request, of.board),
    )


def conclude_board(db: sqlite3.Connection, request: ConcludeBoard, now: float) -> bool:
    """Whether that is its first verdict."""
    board = request.board
    is_first = db.execute(
        "INSERT OR IGNORE INTO verdicts"
        " (id, line, product, board, part, picture_sha256, accepted_at, outcome, body, topic, recorded_at)"
        " VALUES (?, ?, ?, ?, ?, '', ?, ?, ?, ?, ?)",
        (
            *(board.id, board.line, board.product, board.board, WHOLE),
            *(board.opened_at, request.outcome, request.body, request.topic, now),
        ),
    ).rowcount
    db.execute("DELETE FROM boards WHERE id = ?", (board.id,))
    return bool(is_first)


def open_boards(readers: Readers) -> list[tuple[OpenBoard, list[BoardPart]]]:
    """In the order of opening."""
    rows = readers.query("SELECT id, line, product, board, opened_at, recipe FROM boards ORDER BY opened_at, id", ())
    text = "SELECT part, arrival, request, outcome, reason, detail FROM board_parts WHERE board = ?"
    return [(OpenBoard(*row), [BoardPart(*part) for part in readers.query(text, (row[0],))]) for row in rows]


def concluded_boards(readers: Readers, since: float) -> list[tuple[tuple[str, str, str], float]]:
    """Line, product and serial of collected boards, and when their verdicts were recorded, in that order."""
    rows = readers.query(
        "SELECT line, product, board, recorded_at FROM verdicts"
        " WHERE recorded_at >= ? AND part = ? AND id BETWEEN 'board/' AND 'board/~' ORDER BY recorded_at",
        (since, WHOLE),
    )
    return [((line, product, board), at) for line, product, board, at in rows]
