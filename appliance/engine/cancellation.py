"""A word that a batch or a load is no longer wanted, given on one thread and heard on another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock

from appliance.errors import Cancelled


class Cancellation:
    """Given once, it stays given. Whatever is under way says how it can be ended."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._is_cancelled = False
        self._ends: list[Callable[[], None]] = []

    def cancel(self) -> None:
        """End what is under way, and whatever would begin. Does no harm when repeated."""
        with self._lock:
            self._is_cancelled = True
            for end in self._ends:
                end()

    @property
    def is_cancelled(self) -> bool:
        return self._is_cancelled

    def check(self, doing: str) -> None:
        """Raises Cancelled."""
        if self._is_cancelled:
            raise Cancelled(f"{doing} was given up")

    @contextmanager
    def ended_by(self, end: Callable[[], None]) -> Iterator[None]:
        """Within, cancelling calls `end`, at once if it came before; afterwards, never."""
        with self._lock:
            self._ends.append(end)
            if self._is_cancelled:
                end()
        try:
            yield
        finally:
            with self._lock:
                self._ends.remove(end)
