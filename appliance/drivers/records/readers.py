"""Reading beside the writer: one read-only connection for each thread that asks."""

from __future__ import annotations

import sqlite3
import threading
from pathlib import Path
from typing import Any

from appliance.errors import RecordsError


class Readers:
    """Opened when a thread first asks, closed together."""

    def __init__(self, path: Path) -> None:
        self._address = f"{path.resolve().as_uri()}?mode=ro"
        self._own = threading.local()
        self._lock = threading.Lock()
        self._all: list[sqlite3.Connection] = []

    def query(self, text: str, values: tuple[str | float, ...]) -> list[tuple[Any, ...]]:
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
