"""Taking a state directory: whose it is, and whether what lies there is sound and ours."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import TypeVar

from appliance.drivers.records.inhand import Former, InHand, former
from appliance.drivers.records.schema import BALLAST, SCHEMA, SCHEMA_VERSION, UPGRADES, connect, transaction
from appliance.errors import RecordsError

T = TypeVar("T")
log = logging.getLogger(__name__)

CRASHES_KEPT = 1000
"""Of experts, the latest: bundles come and go, and nobody asks for the crashes of those that went."""


def lock(folder: Path) -> int:
    """An open lock file that says whose folder this is. Two processes on one spool would answer everything twice."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = os.open(folder / "records.lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise _unwritable(folder, str(error.strerror)) from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(file, 0)
        os.pwrite(file, str(os.getpid()).encode(), 0)
    except BlockingIOError as error:
        owner = os.pread(file, 20, 0).decode("ascii", "replace") or "unknown"
        os.close(file)
        what = f"{folder} is in use by process {owner}"
        raise RecordsError(what, "stop that one, or give this one its own paths.state") from error
    except OSError as error:
        os.close(file)
        raise _unwritable(folder, str(error.strerror)) from error
    return file


def prepare(path: Path) -> Path | None:
    """See that there is a sound store of our version. Returns where a damaged one was moved to."""
    moved_aside = None
    try:
        if (damage := _on_a_full_disk_too(_damage, path)) is not None:
            moved_aside = _move_aside(path)
            log.error("records damaged=%s moved_aside=%s: cameras send unanswered pictures again", damage, moved_aside)
        _on_a_full_disk_too(_create_or_refuse, path)
    except (OSError, sqlite3.Error) as error:
        raise _unwritable(path.parent, str(error)) from error
    return moved_aside


def take_stock(path: Path, *, is_new: bool) -> InHand:
    """What a former process had in hand when it crashed is counted, and this one has nothing in hand yet.

    In a new store (`is_new`) no arrival means what it meant. Raises RecordsError when the folder cannot be written.
    """
    try:
        last = former(path.with_name("in-hand"))
        with closing(connect(path)) as db:
            if not is_new and (last.arrivals or last.at_work):
                _count_crash(db, path, last)
            (newest,) = db.execute("SELECT ifnull(max(arrival), 0) FROM pictures").fetchone()
        return InHand(path.with_name("in-hand"), 0 if last.was_clean else newest)
    except (OSError, sqlite3.Error) as error:
        raise _unwritable(path.parent, str(error)) from error


def _count_crash(db: sqlite3.Connection, path: Path, last: Former) -> None:
    """On a full disk too: the writer makes the ballast anew."""
    path.with_name(BALLAST).unlink(missing_ok=True)
    with transaction(db):
        db.executemany("UPDATE pictures SET attempts = attempts + 1 WHERE arrival = ?", [(a,) for a in last.arrivals])
        db.executemany(
            "INSERT INTO crashes (expert, pictures, alone) VALUES (?, ?, ?)",
            [(expert, json.dumps(sorted(crash.pictures)), crash.alone) for expert, crash in last.at_work],
        )
        db.execute("DELETE FROM crashes WHERE number <= (SELECT max(number) FROM crashes) - ?", (CRASHES_KEPT,))
    log.warning(
        "records crashed in_hand=%d experts_at_work=%d: each of these runs alone", len(last.arrivals), len(last.at_work)
    )


def _on_a_full_disk_too(do: Callable[[Path], T], path: Path) -> T:
    """Opening takes room, and an upgrade more: that of the ballast, if need be. The writer makes it anew."""
    ballast = path.with_name(BALLAST)
    try:
        return do(path)
    except sqlite3.Error:
        if not ballast.exists():
            raise
        ballast.unlink()
        return do(path)


def _damage(path: Path) -> str | None:
    """What is wrong with the file, None when nothing is. Raises sqlite3.Error when it cannot be read at all."""
    if not path.exists():
        return None
    try:
        with closing(connect(path)) as db:
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


def _create_or_refuse(path: Path) -> None:
    with closing(connect(path)) as db:
        (version,) = db.execute("PRAGMA user_version").fetchone()
        if version > SCHEMA_VERSION:
            what = f"{path} was written by a newer release (schema {version}, known here: {SCHEMA_VERSION})"
            raise RecordsError(what, "install that release again, or move the file away")
        steps = [SCHEMA] if version == 0 else [UPGRADES[older] for older in range(version, SCHEMA_VERSION)]
        if steps:
            db.executescript(f"BEGIN; {' '.join(steps)} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")


def _unwritable(folder: Path, why: str) -> RecordsError:
    return RecordsError(f"the state directory {folder} cannot be used: {why}", "make it writable, or set paths.state")
