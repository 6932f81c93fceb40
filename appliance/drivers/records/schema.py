"""The tables on disk, and how they are opened: what a commit means, and what the store holds."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path

from appliance.drivers.records.values import Counts, Picture, Sort

SCHEMA_VERSION = 3
BALLAST = "ballast"
"""The file beside the store that the writer sacrifices on a full disk."""

PRAGMAS = (
    "page_size = 16384",
    "auto_vacuum = INCREMENTAL",
    "journal_mode = WAL",
    "synchronous = FULL",
    "foreign_keys = ON",
    "secure_delete = OFF",
    "wal_autocheckpoint = 256",
    "journal_size_limit = 16777216",
)

KEPT = """
CREATE TABLE kept (
    id                 TEXT PRIMARY KEY REFERENCES verdicts (id) ON DELETE CASCADE,
    sort               TEXT NOT NULL,
    kept_at            REAL NOT NULL,
    bytes              INTEGER NOT NULL,
    payload            BLOB NOT NULL
);
CREATE INDEX kept_by_age ON kept (sort, kept_at, bytes);
"""

ROW_BYTES = 1000
"""What a verdict takes beside its body, its indexes included."""

THIRD = f"""
CREATE TABLE crashes (
    number             INTEGER PRIMARY KEY AUTOINCREMENT,
    expert             TEXT NOT NULL,
    pictures           TEXT NOT NULL,
    alone              INTEGER NOT NULL
);
CREATE INDEX verdicts_by_place ON verdicts (line, product, board, part, captured_at) WHERE captured_at IS NOT NULL;
ALTER TABLE outbox ADD COLUMN resent INTEGER NOT NULL DEFAULT 0;
CREATE TABLE totals (
    name               TEXT PRIMARY KEY,
    bytes              INTEGER NOT NULL
);
INSERT INTO totals SELECT 'verdicts', ifnull(sum(length(body)), 0) + {ROW_BYTES} * count(*) FROM verdicts;
CREATE INDEX suspects ON pictures (attempts, arrival) WHERE attempts > 0;
CREATE TABLE boards (
    id                 TEXT PRIMARY KEY,
    line               TEXT NOT NULL,
    product            TEXT NOT NULL,
    board              TEXT NOT NULL,
    opened_at          REAL NOT NULL,
    recipe             BLOB NOT NULL
);
CREATE TABLE board_parts (
    board              TEXT NOT NULL REFERENCES boards (id) ON DELETE CASCADE,
    part               TEXT NOT NULL,
    arrival            INTEGER NOT NULL,
    request            TEXT NOT NULL,
    outcome            TEXT NOT NULL,
    reason             TEXT,
    detail             TEXT,
    PRIMARY KEY (board, part)
) WITHOUT ROWID;
"""

SCHEMA = f"""
CREATE TABLE pictures (
    arrival            INTEGER PRIMARY KEY AUTOINCREMENT,
    id                 TEXT NOT NULL UNIQUE,
    line               TEXT NOT NULL,
    product            TEXT NOT NULL,
    board              TEXT NOT NULL,
    part               TEXT NOT NULL,
    picture_sha256     TEXT NOT NULL,
    picture_bytes      INTEGER NOT NULL,
    accepted_at        REAL NOT NULL,
    captured_at        TEXT,
    deadline_seconds   REAL,
    response_topic     TEXT,
    correlation        BLOB,
    attempts           INTEGER NOT NULL DEFAULT 0,
    payload            BLOB NOT NULL
);
CREATE TABLE verdicts (
    id                 TEXT PRIMARY KEY,
    line               TEXT NOT NULL,
    product            TEXT NOT NULL,
    board              TEXT NOT NULL,
    part               TEXT NOT NULL,
    picture_sha256     TEXT NOT NULL,
    accepted_at        REAL NOT NULL,
    captured_at        TEXT,
    outcome            TEXT NOT NULL,
    body               BLOB NOT NULL,
    topic              TEXT NOT NULL,
    recorded_at        REAL NOT NULL
);
CREATE INDEX verdicts_by_time ON verdicts (recorded_at);
CREATE TABLE outbox (
    token              INTEGER PRIMARY KEY AUTOINCREMENT,
    id                 TEXT NOT NULL REFERENCES verdicts (id),
    topic              TEXT NOT NULL,
    correlation        BLOB
);
CREATE INDEX outbox_by_id ON outbox (id);
{KEPT}{THIRD}"""
UPGRADES = {1: KEPT, 2: THIRD}
"""What makes the next version of each."""

PICTURE_COLUMNS = tuple(f.name for f in fields(Picture))


def connect(path: Path) -> sqlite3.Connection:
    """A connection for writing. With synchronous FULL a commit returns when the disk has it."""
    db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    try:
        for pragma in PRAGMAS:
            db.execute(f"PRAGMA {pragma}").fetchall()
    except BaseException:
        db.close()
        raise
    return db


@contextmanager
def transaction(db: sqlite3.Connection) -> Iterator[None]:
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        with suppress(sqlite3.Error):
            if db.in_transaction:
                db.execute("ROLLBACK")
        raise


def count(db: sqlite3.Connection) -> Counts:
    spooled, spooled_bytes = db.execute("SELECT count(*), total(picture_bytes) FROM pictures").fetchone()
    (verdicts,) = db.execute("SELECT count(*) FROM verdicts").fetchone()
    (unpublished,) = db.execute("SELECT count(*) FROM outbox").fetchone()
    return Counts(spooled, int(spooled_bytes), verdicts, unpublished)


def verdict_bytes(db: sqlite3.Connection) -> int:
    """Of all verdicts: kept as a sum, for adding it up would read the whole table."""
    return int(db.execute("SELECT bytes FROM totals WHERE name = 'verdicts'").fetchone()[0])


def add_verdict_bytes(db: sqlite3.Connection, more: int) -> None:
    db.execute("UPDATE totals SET bytes = bytes + ? WHERE name = 'verdicts'", (more,))


def kept_bytes(db: sqlite3.Connection) -> dict[Sort, int]:
    """Of the pictures kept beside their verdicts."""
    return {Sort(sort): size for sort, size in db.execute("SELECT sort, sum(bytes) FROM kept GROUP BY sort")}


def newest_at(db: sqlite3.Connection) -> float | None:
    """When the newest verdict was recorded, by the wall clock."""
    (at,) = db.execute("SELECT max(recorded_at) FROM verdicts").fetchone()
    return None if at is None else float(at)
