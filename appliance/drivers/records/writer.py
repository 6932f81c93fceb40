"""The one thread that writes, many requests per transaction (group commit), because a commit waits for the disk and
its cost hardly depends on what is in it. Callbacks run on that thread, after the commit, in the order of the requests.
"""

from __future__ import annotations

import logging
import os
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from appliance.drivers.records.boards import ConcludeBoard
from appliance.drivers.records.fresh import Fresh
from appliance.drivers.records.ledger import Accept, Conclude, Ledger, Limits, Published, Request, Result
from appliance.drivers.records.schema import (
    BALLAST,
    ROW_BYTES,
    add_verdict_bytes,
    connect,
    count,
    kept_bytes,
    newest_at,
    transaction,
    verdict_bytes,
)
from appliance.drivers.records.values import Answered, Conflict, Full, New, Recorded, Sort, TurnedAway, Unowed, Waiting
from appliance.errors import RecordsError

T = TypeVar("T")
log = logging.getLogger(__name__)

GROUP_REQUESTS = 512
GROUP_BYTES = 8 * 1024 * 1024
"""A transaction takes no more than this, so that the first of a burst does not wait for the last."""

QUEUED_BYTES = 32 * 1024 * 1024
"""Pictures on their way to the writer; beyond it `accept` answers Full at once."""

MARK_SECONDS = 0.05
"""Marks of published verdicts wait this long for company: losing one costs a repeated message, nothing else."""

GATHER_SECONDS, DEEP_SPOOL = 0.04, 16
BUSY_SECONDS, BUSY_REQUESTS = 0.005, 6
GATHERED_REQUESTS = 16
"""Requests that come one by one cost a commit each, and wake-ups of whoever waits for it: processor time that busy
experts lack. So commits follow each other only after GATHER_SECONDS while so many pictures wait for their verdicts, or
after BUSY_SECONDS when so many requests came for the last; at once when GATHERED_REQUESTS have come. One
picture alone is not held, nor the last of a burst for long: for these somebody may be waiting."""

BALLAST_BYTES = 32 * 1024 * 1024
"""A file that is deleted when the disk is full. Deleting pictures needs room too: without it a full disk would keep
verdicts from being recorded, and so the spool from ever emptying. It exceeds what the log holds between checkpoints."""

TURN_SECONDS = 0.5
VACUUM_PAGES = 64
RETRY_SECONDS = 0.5
CLEAN_SECONDS = 600.0
CLEAN_ROWS = 1000
CLEAN_PICTURES = 32
SLACK = 0.01
DAY_SECONDS = 86_400.0
LEAP_SECONDS = 600.0

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


@dataclass(frozen=True, slots=True)
class _Close:
    pass


class Calendar:
    """Wall time, to tell what is too old: a clock that leaps ahead must not take what nobody can give back.

    At first it is at most a day later than the newest verdict, and passes no faster than time does. Wall time counts
    again when it has not leapt for a day, of this process: so a box that was off for months catches up.
    """

    def __init__(
        self, clock: Callable[[], float], newest_at: float | None, steady: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock, self._steady = clock, steady
        self._wall, self._monotonic = clock(), steady()
        self._steady_since = self._monotonic
        self._believed = self._wall if newest_at is None else min(self._wall, newest_at + DAY_SECONDS)

    def now(self) -> float:
        wall, monotonic = self._clock(), self._steady()
        passed = monotonic - self._monotonic
        if abs(wall - self._wall - passed) > LEAP_SECONDS:
            self._steady_since = monotonic
        is_right = monotonic - self._steady_since >= DAY_SECONDS
        self._believed = wall if is_right else min(wall, self._believed + passed)
        self._wall, self._monotonic = wall, monotonic
        return self._believed


class Writer:
    """The one thread that writes."""

    def __init__(
        self,
        path: Path,
        limits: Limits,
        verdict_seconds: float,
        clock: Callable[[], float],
    ) -> None:
        self._limits, self._verdict_seconds, self._clock = limits, verdict_seconds, clock
        self._queue: queue.SimpleQueue[Request | _Close] = queue.SimpleQueue()
        self._has_gathered = threading.Event()
        self._last_group, self._is_leaving = 0, False
        self._queued_lock = threading.Lock()
        self._queued_bytes = self._group_bytes = 0
        self._clean_at_seconds = self._crowded_at_seconds = 0.0
        self._is_closing = False
        self.turned_seconds = self._committed_seconds = time.monotonic()
        self.trouble: str | None = None
        self.broken: RecordsError | None = None
        self._ballast = path.with_name(BALLAST)
        self._db = connect(path)
        self.counts = count(self._db)
        self._kept = kept_bytes(self._db)
        self._verdict_bytes = verdict_bytes(self._db)
        self._calendar = Calendar(clock, newest_at(self._db))
        self.fresh = Fresh()
        self._recover()
        self._thread = threading.Thread(target=self._live, name="records", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def put(self, request: Request) -> None:
        if isinstance(request, Accept):
            size = len(request.payload)
            with self._queued_lock:
                is_too_much = self._queued_bytes + size > QUEUED_BYTES
                self._queued_bytes += 0 if is_too_much else size
            if is_too_much:
                return _call(request.done, Full("more pictures come than the disk can take"))
        self._queue.put(request)
        if self._queue.qsize() >= GATHERED_REQUESTS:
            self._has_gathered.set()

    @property
    def held_bytes(self) -> int:
        """Of the pictures that wait, and of those that are being written."""
        with self._queued_lock:
            return self._queued_bytes + self._group_bytes

    def hurry(self) -> None:
        """From now on no request waits for company."""
        self._is_leaving = True
        self._has_gathered.set()

    def close(self) -> None:
        self._queue.put(_Close())
        self.hurry()
        self._thread.join()
        self._db.close()

    def _live(self) -> None:
        kept: list[Request] = []
        while not self._is_closing:
            self._clean()
            kept = self._write([*kept, *self._collect(self._patience_seconds(kept))])
            self._group_bytes = sum(len(request.payload) for request in kept if isinstance(request, Accept))
        if kept := self._write(kept):
            log.error("records gave_up=%d why=%s: made again from their pictures", len(kept), self.trouble)

    def _patience_seconds(self, kept: Sequence[Request]) -> float:
        return RETRY_SECONDS if kept or self.trouble or self.broken else min(self._idle_seconds(), TURN_SECONDS)

    def _collect(self, wait_seconds: float) -> list[Request]:
        """Whatever is asked for by now; if nothing is, the first to come within `wait_seconds`."""
        group: list[Request] = []
        size, only_marks = 0, True
        self._gather()
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
            only_marks = only_marks and isinstance(request, Published)
            size += len(request.payload) if isinstance(request, Accept) else 0
            group.append(request)
        with self._queued_lock:
            self._queued_bytes -= size
            self._group_bytes += size
        return group

    def _gather(self) -> None:
        """Let requests come together, while that keeps nobody waiting."""
        self._has_gathered.clear()
        left = self._committed_seconds + self._gather_seconds() - time.monotonic()
        if left > 0 and self._queue.qsize() < GATHERED_REQUESTS and not self._is_leaving:
            self._has_gathered.wait(left)

    def _gather_seconds(self) -> float:
        if self.counts.spooled >= DEEP_SPOOL:
            return GATHER_SECONDS
        return BUSY_SECONDS if self._last_group >= BUSY_REQUESTS else 0.0

    def _write(self, group: list[Request]) -> list[Request]:
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
            self._note_fresh(request, result)
            _answer(request, result)
        return []

    def _note_fresh(self, request: Request, result: Result) -> None:
        match request, result:
            case Accept(), New():
                self.fresh.keep(request.picture.id, request.payload)
            case Conclude(), _:
                self.fresh.drop(request.id)

    def _refuse(self, group: Sequence[Request], why: str) -> list[Request]:
        """Nobody may rely on these pictures; verdicts and marks are kept for later."""
        for request in group:
            if isinstance(request, Accept):
                _call(request.done, Full(why))
        return [request for request in group if not isinstance(request, Accept)]

    def _commit(self, group: Sequence[Request]) -> list[Result]:
        with transaction(self._db):
            ledger = Ledger(self._db, self.counts, self._kept, self._limits_now(), self._clock())
            results = [ledger.enter(request) for request in group]
            if ledger.verdict_bytes:
                add_verdict_bytes(self._db, ledger.verdict_bytes)
        self._committed_seconds, self._last_group = time.monotonic(), len(group)
        self.counts, self._kept = ledger.counts, ledger.kept
        self._verdict_bytes += ledger.verdict_bytes
        return results

    def _limits_now(self) -> Limits:
        """While the disk is full, what room there is belongs to verdicts, and no picture is kept."""
        return replace(self._limits, quotas={}) if self.trouble else self._limits

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
        """Forget verdicts and pictures that are older than asked for, or verdicts that take more than they may, a few
        at a time so that nobody waits long."""
        is_crowded = self._verdict_bytes > self._limits.verdict_bytes and time.monotonic() >= self._crowded_at_seconds
        if (self._idle_seconds() and not is_crowded) or self.trouble or self.broken:
            return
        self._clean_at_seconds = time.monotonic() + CLEAN_SECONDS
        now, quotas = self._calendar.now(), self._limits.quotas
        try:
            with transaction(self._db):
                left = sum(self._forget_pictures(sort, now - q.days * DAY_SECONDS) for sort, q in quotas.items())
                leaving = self._leaving(now - self._verdict_seconds)
                self._db.executemany("DELETE FROM verdicts WHERE id = ?", [(id,) for id, _ in leaving])
                freed_bytes = sum(size for _, size in leaving)
                add_verdict_bytes(self._db, -freed_bytes)
            self._kept = kept_bytes(self._db)  # pictures leave with their verdicts
        except sqlite3.Error as error:
            return self._note(error)
        self._verdict_bytes -= freed_bytes
        self.counts = replace(self.counts, verdicts=self.counts.verdicts - len(leaving))
        if is_crowded and not leaving:  # all of them wait for the broker
            self._crowded_at_seconds = time.monotonic() + RETRY_SECONDS
        if len(leaving) == CLEAN_ROWS or left:
            self._clean_at_seconds = 0.0

    def _leaving(self, too_old: float) -> list[tuple[str, int]]:
        """Of the oldest verdicts that the broker has, those that are too old, or above what all may take; and their
        bytes. Where there are too many, some more leave at once: each time costs a commit."""
        most_bytes = self._limits.verdict_bytes
        excess = self._verdict_bytes - (1 - SLACK) * most_bytes if self._verdict_bytes > most_bytes else 0.0
        leaving = list[tuple[str, int]]()
        for id, recorded_at, size in self._db.execute(
            f"SELECT id, recorded_at, length(body) + {ROW_BYTES} FROM verdicts"
            " WHERE NOT EXISTS (SELECT 1 FROM outbox WHERE outbox.id = verdicts.id) ORDER BY recorded_at LIMIT ?",
            (CLEAN_ROWS,),
        ):
            if recorded_at >= too_old and excess <= 0:
                break
            leaving.append((id, size))
            excess -= size
        return leaving

    def _forget_pictures(self, sort: Sort, too_old: float) -> int:
        return self._db.execute(
            "DELETE FROM kept WHERE id IN"
            " (SELECT id FROM kept WHERE sort = ? AND kept_at < ? ORDER BY kept_at LIMIT ?)",
            (sort, too_old, CLEAN_PICTURES),
        ).rowcount


def _answer(request: Request, result: Result) -> None:
    match request, result:
        case Accept(done=done), New() | Waiting() | Answered() | Conflict() | Full() | TurnedAway():
            _call(done, result)
        case Conclude(done=done) | ConcludeBoard(done=done), Recorded() | Unowed():
            _call(done, result)


def _call(done: Callable[[T], None], result: T) -> None:
    try:
        done(result)
    except Exception:  # the writer serves everybody: one caller's fault must not end it
        log.exception("records callback failed")
