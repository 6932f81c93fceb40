"""Verdicts on record and the pictures kept beside them, for whoever asks later. Reads only, so it may do so beside the
running service, and without one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType

from appliance.drivers.records.readers import Readers
from appliance.drivers.records.schema import SCHEMA_VERSION
from appliance.errors import RecordsError

PAGE_ROWS = 500
"""Read at a time: one long transaction would keep the service from reusing its log."""

_LAST = "~"
"""Sorts behind every character that an id may have."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which verdicts; what is None does not matter. `id` may be how it begins; times are wall seconds of recording."""

    id: str | None = None
    line: str | None = None
    product: str | None = None
    board: str | None = None
    part: str | None = None
    outcome: str | None = None
    reason: str | None = None
    since: float | None = None
    until: float | None = None


@dataclass(frozen=True, slots=True)
class Record:
    """A verdict's body, as it was published, and what is known beside it; times `_at` in wall seconds are labels."""

    id: str
    accepted_at: float
    captured_at: str | None
    recorded_at: float
    has_picture: bool
    body: bytes


class Archive:
    """The record of one state directory."""

    def __init__(self, folder: Path) -> None:
        """Raises RecordsError when nothing that we can read was recorded there."""
        path = folder / "records.db"
        try:
            path.stat()
        except OSError as error:
            what = f"there are no records in {folder}: {error.strerror}"
            raise RecordsError(what, "see paths.state, and be root or the service's user") from error
        self._readers = Readers(path)
        ((version,),) = self._readers.query("PRAGMA user_version", ())
        if version != SCHEMA_VERSION:
            what = f"{path} is of another release (schema {version}, known here: {SCHEMA_VERSION})"
            raise RecordsError(what, "use that release, or start the service of this one: it takes over older ones")

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._readers.close()

    def find(self, wanted: Wanted) -> Iterator[Record]:
        """The newest first, a page at a time. Raises RecordsError when the store cannot be read."""
        conditions, values = _conditions(wanted)
        text = (
            "SELECT id, accepted_at, captured_at, recorded_at, id IN (SELECT id FROM kept), body FROM verdicts"
            f" WHERE {' AND '.join([*conditions, '(recorded_at, id) < (?, ?)'])}"
            f" ORDER BY recorded_at DESC, id DESC LIMIT {PAGE_ROWS}"
        )
        last: tuple[float, str] = (float("inf"), "")
        while rows := self._readers.query(text, (*values, *last)):
            for id, accepted, captured, recorded, has_picture, body in rows:
                yield Record(id, accepted, captured, recorded, bool(has_picture), bytes(body))
            last = rows[-1][3], rows[-1][0]

    def one(self, id: str) -> Record:
        """The verdict whose id is this, or begins with it. Raises RecordsError unless there is exactly one."""
        text = "SELECT id FROM verdicts WHERE id BETWEEN ? AND ? ORDER BY id LIMIT 2"  # itself sorts first
        ids = [row[0] for row in self._readers.query(text, (id, id + _LAST))]
        if not ids:
            raise RecordsError(f"there is no verdict of {id}", "see `appliance records list`")
        if len(ids) > 1 and ids[0] != id:
            raise RecordsError(f"several ids begin with {id}", "give more of it")
        return next(record for record in self.find(Wanted(id=ids[0])) if record.id == ids[0])

    def picture(self, id: str) -> bytes:
        """The encoded picture as it was published. Raises RecordsError when it was not kept, or has left."""
        for (payload,) in self._readers.query("SELECT payload FROM kept WHERE id = ?", (id,)):
            return bytes(payload)
        what = f"the picture of {id} is not kept: it passed, or has left for newer ones"
        raise RecordsError(what, "see [keep] in docs/configuration.md")


def _conditions(wanted: Wanted) -> tuple[list[str], list[str | float]]:
    columns = {
        "id": "id BETWEEN ? AND ?",
        "reason": "json_extract(CAST(body AS TEXT), '$.reason') = ?",
        "since": "recorded_at >= ?",
        "until": "recorded_at < ?",
    }
    conditions, values = list[str](), list[str | float]()
    for field in fields(wanted):
        value = getattr(wanted, field.name)
        if value is not None:
            conditions.append(columns.get(field.name, f"{field.name} = ?"))
            values += [value, value + _LAST] if field.name == "id" else [value]
    return conditions, values
