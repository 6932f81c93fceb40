"""The spool of accepted pictures, and their verdicts, which are the outbox: what the box still owes, on disk.

A picture is committed here before it is acknowledged to the broker, and leaves in the same transaction that records
its verdict. A verdict waits in the outbox until the broker has confirmed it. So a crash at any moment loses nothing and
answers nothing differently. The store knows neither MQTT nor experts: ids, bytes and topics are given to it.

One thread writes, many requests per transaction (group commit), because a commit waits for the disk and its cost
hardly depends on what is in it. Callbacks run on that thread, after the commit, in the order of the requests.
"""

from __future__ import annotations

import fcntl
import logging
import os
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar, assert_never

from appliance.errors import NotSpooled, RecordsError

T = TypeVar("T")
log = logging.getLogger(__name__)

SCHEMA_VERSION = 1
GROUP_REQUESTS = 512
GROUP_BYTES = 8 * 1024 * 1024
"""A transaction takes no more than this, so that the first of a burst does not wait for the last."""

QUEUED_BYTES = 32 * 1024 * 1024
"""Pictures on their way to the writer; beyond it `accept` answers Full at once."""

MARK_SECONDS = 0.05
"""Marks of published verdicts wait this long for company: losing one costs a repeated message, nothing else."""

BALLAST_BYTES = 32 * 1024 * 1024
"""A file that is deleted when the disk is full. Deleting pictures needs room too: without it a full disk would keep
verdicts from being recorded, and so the spool from ever emptying. It exceeds what the log holds between checkpoints."""

TURN_SECONDS = 0.5
VACUUM_PAGES = 64
RETRY_SECONDS = 0.5
CLEAN_SECONDS = 600.0
CLEAN_ROWS = 1000

PASSING = (
    "SQLITE_FULL",
    "SQLITE_IOERR_WRITE",
    "SQLITE_IOERR_SHMSIZE",
    "SQLITE_CANTOPEN",
    "SQLITE_BUSY",
    "SQLITE_NOMEM",
)
"""What a full disk, a quota or another reader looks like. Anything else (a failed fsync above all) is not retried:
the kernel may have dropped what it could not write, and a second fsync would call that a success."""

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

SCHEMA = """
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
"""


# What is stored.


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


PICTURE_COLUMNS = tuple(f.name for f in fields(Picture))


@dataclass(frozen=True, slots=True)
class Spooled:
    """A picture in the spool; `arrival` is its place in the order of acceptance."""

    arrival: int
    picture: Picture
    picture_bytes: int


@dataclass(frozen=True, slots=True)
class Publication:
    """A recorded verdict on its way to one topic; done when `published(token)` was called."""

    token: int
    id: str
    topic: str
    correlation: bytes | None
    body: bytes


@dataclass(frozen=True, slots=True)
class Counts:
    """What the store holds, as of its last commit."""

    spooled: int
    spooled_bytes: int
    verdicts: int
    unpublished: int


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


Acceptance = New | Waiting | Answered | Conflict | Full


# How `conclude` is answered.


@dataclass(frozen=True, slots=True)
class Recorded:
    """The verdict stands and is in the outbox: publish these."""

    publications: tuple[Publication, ...]


@dataclass(frozen=True, slots=True)
class Unowed:
    """No such picture is waiting: it has its verdict already, which stands, or it was never accepted."""


Conclusion = Recorded | Unowed


class Records:
    """The store of one state directory; `Records.open` makes it. All methods may be called from any thread."""

    @classmethod
    def open(
        cls, folder: Path, *, spool_bytes: int, verdict_days: float, clock: Callable[[], float] = time.time
    ) -> Records:
        """Open or create the store in `folder`. `clock` is wall time, for labels and the age of verdicts.

        A damaged store is moved aside (`moved_aside` says where) and a new one begun. Raises RecordsError: the folder
        cannot be written, another process uses it, or a newer release wrote it.
        """
        lock = _lock(folder)
        try:
            moved_aside = _prepare(folder / "records.db")
            return cls(folder, lock, moved_aside, spool_bytes, verdict_days, clock)
        except BaseException:
            os.close(lock)
            raise

    def __init__(
        self,
        folder: Path,
        lock: int,
        moved_aside: Path | None,
        spool_bytes: int,
        verdict_days: float,
        clock: Callable[[], float],
    ) -> None:
        self.folder, self.moved_aside = folder, moved_aside
        self._path, self._lock_file = folder / "records.db", lock
        self._readers = _Readers(self._path)
        self._writer = _Writer(self._path, spool_bytes, verdict_days * 86_400.0, clock)
        self._writer.start()

    def __enter__(self) -> Records:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def accept(self, picture: Picture, payload: bytes, done: Callable[[Acceptance], None]) -> None:
        """Commit a picture to the spool, unless it is known or there is no room; `done` hears which."""
        self._writer.put(_Accept(picture, payload, done))

    def conclude(self, id: str, outcome: str, body: bytes, topic: str, done: Callable[[Conclusion], None]) -> None:
        """Record a verdict, put it in the outbox and release the picture: all or nothing.

        It goes to `topic`, now and when the picture comes again, and to the picture's response topic. While the disk
        refuses to write, this waits and tries again; `done` is called when it is recorded.
        """
        self._writer.put(_Conclude(id, outcome, body, topic, done))

    def published(self, token: int) -> None:
        """The broker has confirmed this publication."""
        self._writer.put(_Published(token))

    def waiting(self, after: int = 0, limit: int = 1000) -> list[Spooled]:
        """Pictures without a verdict in order of acceptance, from behind the arrival `after`; payloads stay on disk."""
        columns = ", ".join(PICTURE_COLUMNS)
        rows = self._readers.query(
            f"SELECT arrival, picture_bytes, {columns} FROM pictures WHERE arrival > ? ORDER BY arrival LIMIT ?",
            (after, limit),
        )
        return [Spooled(arrival, Picture(*known), size) for arrival, size, *known in rows]

    def payload(self, id: str) -> bytes:
        """A spooled picture's bytes. Raises NotSpooled when it is not in the spool."""
        for (payload,) in self._readers.query("SELECT payload FROM pictures WHERE id = ?", (id,)):
            return bytes(payload)
        raise NotSpooled(id)

    def unpublished(self, after: int = 0, limit: int = 1000) -> list[Publication]:
        """The outbox in order, from behind the token `after`."""
        rows = self._readers.query(
            "SELECT token, id, o.topic, correlation, body FROM outbox AS o JOIN verdicts USING (id)"
            " WHERE token > ? ORDER BY token LIMIT ?",
            (after, limit),
        )
        return [Publication(*row) for row in rows]

    def verdict(self, id: str) -> bytes | None:
        """The recorded verdict's body, None when there is none."""
        for (body,) in self._readers.query("SELECT body FROM verdicts WHERE id = ?", (id,)):
            return bytes(body)
        return None

    @property
    def counts(self) -> Counts:
        return self._writer.counts

    @property
    def queued_bytes(self) -> int:
        """Of the pictures that the writer has, and the disk has not."""
        return self._writer.held_bytes

    @property
    def turned_seconds(self) -> float:
        """Monotonic time of the writer's last turn: it is older than a few seconds only if it hangs, say in fsync."""
        return self._writer.turned_seconds

    @property
    def trouble(self) -> str | None:
        """Why the disk does not take what it is given, None while it does. It may pass: a full disk is emptied."""
        return self._writer.trouble

    @property
    def broken(self) -> RecordsError | None:
        """Set when the disk lied or the store is damaged: nothing is written any more, and the process should end."""
        return self._writer.broken

    def close(self) -> None:
        """Write what was asked for, then end the writer and release the folder.

        What the disk still refuses is given up: unrecorded verdicts are made again from their pictures.
        """
        self._writer.close()
        self._readers.close()
        os.close(self._lock_file)


# Requests to the writer.


@dataclass(frozen=True, slots=True)
class _Accept:
    picture: Picture
    payload: bytes
    done: Callable[[Acceptance], None]


@dataclass(frozen=True, slots=True)
class _Conclude:
    id: str
    outcome: str
    body: bytes
    topic: str
    done: Callable[[Conclusion], None]


@dataclass(frozen=True, slots=True)
class _Published:
    token: int


@dataclass(frozen=True, slots=True)
class _Close:
    pass


_Request = _Accept | _Conclude | _Published
_Result = Acceptance | Conclusion | None


class _Writer:
    """The one thread that writes."""

    def __init__(self, path: Path, spool_bytes: int, verdict_seconds: float, clock: Callable[[], float]) -> None:
        self._spool_bytes, self._verdict_seconds, self._clock = spool_bytes, verdict_seconds, clock
        self._queue: queue.SimpleQueue[_Request | _Close] = queue.SimpleQueue()
        self._queued_lock = threading.Lock()
        self._queued_bytes = self._group_bytes = 0
        self._clean_at_seconds = 0.0
        self._is_closing = False
        self.turned_seconds = time.monotonic()
        self.trouble: str | None = None
        self.broken: RecordsError | None = None
        self._ballast = path.with_name("ballast")
        self._db = _connect(path)
        self.counts = _count(self._db)
        self._recover()
        self._thread = threading.Thread(target=self._live, name="records", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def put(self, request: _Request) -> None:
        if isinstance(request, _Accept):
            size = len(request.payload)
            with self._queued_lock:
                is_too_much = self._queued_bytes + size > QUEUED_BYTES
                self._queued_bytes += 0 if is_too_much else size
            if is_too_much:
                return _call(request.done, Full("more pictures come than the disk can take"))
        self._queue.put(request)

    @property
    def held_bytes(self) -> int:
        """Of the pictures that wait, and of those that are being written."""
        with self._queued_lock:
            return self._queued_bytes + self._group_bytes

    def close(self) -> None:
        self._queue.put(_Close())
        self._thread.join()
        self._db.close()

    def _live(self) -> None:
        kept: list[_Request] = []
        while not self._is_closing:
            self._clean()
            kept = self._write([*kept, *self._collect(self._patience_seconds(kept))])
            self._group_bytes = sum(len(request.payload) for request in kept if isinstance(request, _Accept))
        if kept := self._write(kept):
            log.error("records gave_up=%d why=%s: made again from their pictures", len(kept), self.trouble)

    def _patience_seconds(self, kept: Sequence[_Request]) -> float:
        return RETRY_SECONDS if kept or self.trouble or self.broken else min(self._idle_seconds(), TURN_SECONDS)

    def _collect(self, wait_seconds: float) -> list[_Request]:
        """Whatever is asked for by now; if nothing is, the first to come within `wait_seconds`."""
        group: list[_Request] = []
        size, only_marks = 0, True
        while len(group) < GROUP_REQUESTS and size < GROUP_BYTES:
            self.turned_seconds = time.monotonic()
            patience = wait_seconds if not group else MARK_SECONDS if only_marks else 0.0
            try:
                request = self._queue.get(timeout=patience)
            except queue.Empty:
                break
            if isinstance(request, _Close):
                self._is_closing = True
                break
            only_marks = only_marks and isinstance(request, _Published)
            size += len(request.payload) if isinstance(request, _Accept) else 0
            group.append(request)
        with self._queued_lock:
            self._queued_bytes -= size
            self._group_bytes += size
        return group

    def _write(self, group: list[_Request]) -> list[_Request]:
        """Commit a group and answer it. Returns what must be tried again: the disk refused it."""
        if self.broken:
            return self._refuse(group, str(self.broken))
        if self.trouble and not self._recover():
            group = self._refuse(group, self.trouble)  # what room there is belongs to verdicts: they make more
        if not group:
            return []
        try:
            results = self._commit(group)
        except sqlite3.Error as error:
            self._note(error)
            return self._refuse(group, self.trouble or "")
        for request, result in zip(group, results, strict=True):
            _answer(request, result)
        return []

    def _refuse(self, group: Sequence[_Request], why: str) -> list[_Request]:
        """Nobody may rely on these pictures; verdicts and marks are kept for later."""
        for request in group:
            if isinstance(request, _Accept):
                _call(request.done, Full(why))
        return [request for request in group if not isinstance(request, _Accept)]

    def _commit(self, group: Sequence[_Request]) -> list[_Result]:
        with _transaction(self._db):
            ledger = _Ledger(self._db, self.counts, self._spool_bytes, self._clock())
            results = [ledger.enter(request) for request in group]
        self.counts = ledger.counts
        return results

    def _note(self, error: sqlite3.Error) -> None:
        name = getattr(error, "sqlite_errorname", "")
        if name in PASSING:
            self._ballast.unlink(missing_ok=True)
            self._suffer(f"the disk takes nothing: {error} ({name})")
        else:
            self.trouble = f"the store cannot be trusted: {error}"
            self.broken = RecordsError(f"{self.trouble} ({name})", "check the disk, then start again")
            log.critical("records broken: %s", self.broken)

    def _suffer(self, trouble: str) -> None:
        if not self.trouble:
            log.error("records trouble: %s; pictures are not acknowledged until it has passed", trouble)
        self.trouble = trouble

    def _recover(self) -> bool:
        """Whether there is room for the ballast, and so for pictures. After a trouble twice its size must be free."""
        if self.trouble:
            self._give_back()
        try:
            disk = os.statvfs(self._ballast.parent)
            if self.trouble and disk.f_bavail * disk.f_frsize < 2 * BALLAST_BYTES:
                return False
            with self._ballast.open("ab") as file:
                os.posix_fallocate(file.fileno(), 0, BALLAST_BYTES)
        except OSError as error:
            with suppress(OSError):
                self._ballast.unlink(missing_ok=True)
            self._suffer(f"less than {BALLAST_BYTES >> 20} MiB are free: {error.strerror}")
            return False
        if self.trouble:
            log.warning("records recovered from: %s", self.trouble)
        self.trouble = None
        return True

    def _give_back(self) -> None:
        """Return room that pictures have left to the disk, a little at a time: moving pages needs room too."""
        with suppress(sqlite3.Error):
            self._db.execute(f"PRAGMA incremental_vacuum({VACUUM_PAGES})").fetchall()
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def _idle_seconds(self) -> float:
        return max(0.0, self._clean_at_seconds - time.monotonic())

    def _clean(self) -> None:
        """Forget verdicts that are older than asked for, a few at a time so that nobody waits long."""
        if self._idle_seconds() or self.trouble or self.broken:
            return
        self._clean_at_seconds = time.monotonic() + CLEAN_SECONDS
        try:
            with _transaction(self._db):
                forgotten = self._db.execute(
                    "DELETE FROM verdicts WHERE id IN (SELECT id FROM verdicts WHERE recorded_at < ?"
                    " AND id NOT IN (SELECT id FROM outbox) LIMIT ?)",
                    (self._clock() - self._verdict_seconds, CLEAN_ROWS),
                ).rowcount
        except sqlite3.Error as error:
            return self._note(error)
        self.counts = replace(self.counts, verdicts=self.counts.verdicts - forgotten)
        if forgotten == CLEAN_ROWS:
            self._clean_at_seconds = 0.0


class _Ledger:
    """One transaction's view of the store: what is entered, and what the store holds then."""

    def __init__(self, db: sqlite3.Connection, counts: Counts, spool_bytes: int, now: float) -> None:
        self._db, self._spool_bytes, self._now = db, spool_bytes, now
        self.counts = counts

    def enter(self, request: _Request) -> _Result:
        match request:
            case _Accept(picture, payload):
                return self._accept(picture, payload)
            case _Conclude():
                return self._conclude(request)
            case _Published(token):
                self._mark(token)
                return None
            case _:
                assert_never(request)

    def _accept(self, picture: Picture, payload: bytes) -> Acceptance:
        known = self._one("SELECT line, product, board, part, picture_sha256 FROM pictures WHERE id = ?", picture.id)
        if known is not None:
            return self._wait(picture) if known == _identity(picture) else Conflict()
        known = self._one("SELECT line, product, board, part, picture_sha256 FROM verdicts WHERE id = ?", picture.id)
        if known is not None:
            return self._repeat(picture) if known == _identity(picture) else Conflict()
        if self.counts.spooled_bytes + len(payload) > self._spool_bytes:
            return Full(f"the spool holds {self.counts.spooled_bytes} of {self._spool_bytes} bytes")
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
        return Answered(self._post(picture.id, row[0], picture.response_topic, picture.correlation, row[1]))

    def _conclude(self, request: _Conclude) -> Conclusion:
        row = self._one("SELECT picture_bytes, response_topic, correlation FROM pictures WHERE id = ?", request.id)
        if row is None:
            return Unowed()
        kept = "id, line, product, board, part, picture_sha256, accepted_at, captured_at"
        self._db.execute(
            f"INSERT INTO verdicts ({kept}, outcome, body, topic, recorded_at)"
            f" SELECT {kept}, ?, ?, ?, ? FROM pictures WHERE id = ?",
            (request.outcome, request.body, request.topic, self._now, request.id),
        )
        self._db.execute("DELETE FROM pictures WHERE id = ?", (request.id,))
        self._add(spooled=-1, spooled_bytes=-row[0], verdicts=1)
        return Recorded(self._post(request.id, request.topic, row[1], row[2], request.body))

    def _post(
        self, id: str, topic: str, response_topic: str | None, correlation: bytes | None, body: bytes
    ) -> tuple[Publication, ...]:
        targets: list[tuple[str, bytes | None]] = [(topic, None)]
        if response_topic is not None:
            targets.append((response_topic, correlation))
        return tuple(Publication(self._token(id, *target), id, *target, body) for target in targets)

    def _token(self, id: str, topic: str, correlation: bytes | None) -> int:
        values = (id, topic, correlation)
        there = self._db.execute(
            "SELECT token FROM outbox WHERE id = ? AND topic = ? AND correlation IS ?", values
        ).fetchone()
        if there is not None:
            return int(there[0])
        token = self._db.execute("INSERT INTO outbox (id, topic, correlation) VALUES (?, ?, ?)", values).lastrowid
        assert token is not None
        self._add(unpublished=1)
        return token

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


class _Readers:
    """One read-only connection for each thread that asks."""

    def __init__(self, path: Path) -> None:
        self._address = f"{path.resolve().as_uri()}?mode=ro"
        self._own = threading.local()
        self._lock = threading.Lock()
        self._all: list[sqlite3.Connection] = []

    def query(self, text: str, values: tuple[str | int, ...]) -> list[tuple[Any, ...]]:
        try:
            return self._connection().execute(text, values).fetchall()
        except sqlite3.Error as error:
            raise RecordsError(f"the store cannot be read: {error}", "check the disk, then start again") from error

    def close(self) -> None:
        with self._lock:
            for db in self._all:
                db.close()
            self._all.clear()

    def _connection(self) -> sqlite3.Connection:
        db: sqlite3.Connection | None = getattr(self._own, "db", None)
        if db is None:
            db = sqlite3.connect(self._address, uri=True, isolation_level=None, check_same_thread=False)
            self._own.db = db
            with self._lock:
                self._all.append(db)
        return db


def _answer(request: _Request, result: _Result) -> None:
    match request, result:
        case _Accept(done=done), New() | Waiting() | Answered() | Conflict() | Full():
            _call(done, result)
        case _Conclude(done=done), Recorded() | Unowed():
            _call(done, result)


def _call(done: Callable[[T], None], result: T) -> None:
    try:
        done(result)
    except Exception:  # the writer serves everybody: one caller's fault must not end it
        log.exception("records callback failed")


def _identity(picture: Picture) -> tuple[str, ...]:
    return (picture.line, picture.product, picture.board, picture.part, picture.picture_sha256)


@contextmanager
def _transaction(db: sqlite3.Connection) -> Iterator[None]:
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        with suppress(sqlite3.Error):
            if db.in_transaction:
                db.execute("ROLLBACK")
        raise


def _count(db: sqlite3.Connection) -> Counts:
    spooled, spooled_bytes = db.execute("SELECT count(*), total(picture_bytes) FROM pictures").fetchone()
    (verdicts,) = db.execute("SELECT count(*) FROM verdicts").fetchone()
    (unpublished,) = db.execute("SELECT count(*) FROM outbox").fetchone()
    return Counts(spooled, int(spooled_bytes), verdicts, unpublished)


# Opening.


def _lock(folder: Path) -> int:
    """An open lock file that says whose folder this is. Two processes on one spool would answer everything twice."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / "records.lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise _unwritable(folder, str(error.strerror)) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(lock, 0)
        os.pwrite(lock, str(os.getpid()).encode(), 0)
    except BlockingIOError as error:
        owner = os.pread(lock, 20, 0).decode("ascii", "replace") or "unknown"
        os.close(lock)
        what = f"{folder} is in use by process {owner}"
        raise RecordsError(what, "stop that one, or give this one its own paths.state") from error
    except OSError as error:
        os.close(lock)
        raise _unwritable(folder, str(error.strerror)) from error
    return lock


def _prepare(path: Path) -> Path | None:
    """See that there is a sound store of our version. Returns where a damaged one was moved to."""
    moved_aside = None
    try:
        if (damage := _damage(path)) is not None:
            moved_aside = _move_aside(path)
            log.error("records damaged=%s moved_aside=%s: cameras send unanswered pictures again", damage, moved_aside)
        with closing(_connect(path)) as db:
            _create_or_refuse(db, path)
    except sqlite3.Error as error:
        raise _unwritable(path.parent, str(error)) from error
    return moved_aside


def _damage(path: Path) -> str | None:
    """What is wrong with the file, None when nothing is. Raises sqlite3.Error when it cannot be read at all."""
    if not path.exists():
        return None
    try:
        with closing(_connect(path)) as db:
            (finding,) = db.execute("PRAGMA quick_check(1)").fetchone()
            return None if finding == "ok" else str(finding)
    except sqlite3.DatabaseError as error:
        if getattr(error, "sqlite_errorname", "").startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
            return str(error)
        raise


def _move_aside(path: Path) -> Path:
    aside = path.with_name(f"{path.name}.damaged-{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}")
    for suffix in ("", "-wal", "-shm"):
        with suppress(FileNotFoundError):
            path.with_name(path.name + suffix).rename(aside.with_name(aside.name + suffix))
    return aside


def _create_or_refuse(db: sqlite3.Connection, path: Path) -> None:
    (version,) = db.execute("PRAGMA user_version").fetchone()
    if version > SCHEMA_VERSION:
        what = f"{path} was written by a newer release (schema {version}, known here: {SCHEMA_VERSION})"
        raise RecordsError(what, "install that release again, or move the file away")
    if version == 0:
        db.executescript(f"BEGIN; {SCHEMA}; PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")


def _connect(path: Path) -> sqlite3.Connection:
    """A connection for writing. With synchronous FULL a commit returns when the disk has it."""
    db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    try:
        for pragma in PRAGMAS:
            db.execute(f"PRAGMA {pragma}").fetchall()
    except BaseException:
        db.close()
        raise
    return db


def _unwritable(folder: Path, why: str) -> RecordsError:
    return RecordsError(f"the state directory {folder} cannot be used: {why}", "make it writable, or set paths.state")
