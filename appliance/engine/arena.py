"""What the runtime's arenas for activations may have gathered, and which run has to make its arena give that back.

An arena keeps what any run needed, for the next of its kind. It tells nobody how much that is; it can only be bounded
by what is known of the runs. Sizes of pieces differ between kinds, so what one kind left may be of no use to another.
"""

from __future__ import annotations

from collections import Counter
from threading import Lock

Kind = tuple[str, int]
"""Architecture and batch size: runs of one kind ask for the same pieces."""


class Arena:
    """Counts runs by kind against a limit in bytes. Safe to use from several threads.

    What is counted is an upper bound: 36 kinds in 4,000 runs on two threads left 67 MB, reached after 1,000, of 109
    counted for one thread (1.31.1, 2026-11). So no number of runs calls for giving back. To ask the C library instead
    what it has given out (glibc's mallinfo2) was tried, and nearly as many runs had to give back.

    A run that leads beyond the limit is still run, and gives everything back when it ends: between runs at most the
    limit is kept, and while they last, that and the runs themselves. Where what runs at a time is booked within the
    same limit, twice the limit is what has to be promised.

    Where architectures do not share one arena, a run gives only its own back. The limit is that of all together: who
    leads beyond it gives back until the one that holds most has done so, too, in its next run or by being closed.
    """

    def __init__(self, limit_bytes: int, *, is_shared: bool = True) -> None:
        self._limit_bytes, self._is_shared = limit_bytes, is_shared
        self._lock = Lock()
        self._running: dict[Kind, int] = {}
        self._most_at_once: dict[Kind, int] = {}  # since its arena last gave back
        self._bytes: dict[Kind, int] = {}
        self._due: set[str] = set()  # arenas to be shrunk by the next run in them

    def begin(self, kind: Kind, size_bytes: int) -> bool:
        """Whether the run that begins has to shrink its arena when it ends; it takes `size_bytes` while it lasts."""
        with self._lock:
            running = self._running[kind] = self._running.get(kind, 0) + 1
            if running > self._most_at_once.get(kind, 0) or size_bytes != self._bytes[kind]:  # seldom, as runs repeat
                self._most_at_once[kind], self._bytes[kind] = running, size_bytes
                self._bound(kind)
            return self._arena_of(kind) in self._due

    def end(self, kind: Kind, *, has_shrunk: bool) -> None:
        """The run ended; if it has shrunk its arena, that holds no more than what is still running."""
        with self._lock:
            self._running[kind] -= 1
            if has_shrunk:
                self._forget(self._arena_of(kind))

    def left_behind(self) -> None:
        """The next run shrinks its arena, whatever its size.

        A closed session's packed weights lie in it, too; and where memory is short, nothing is kept for later.
        """
        with self._lock:
            self._due |= {self._arena_of(kind) for kind in self._bytes} | ({_SHARED} if self._is_shared else set())

    def is_due(self, architecture: str) -> bool:
        """Whether an arena of its own has to give back, were it only by being closed."""
        with self._lock:
            return not self._is_shared and architecture in self._due

    def closed(self, architecture: str) -> None:
        """The architecture's session is gone, and its arena if it had one of its own."""
        with self._lock:
            if not self._is_shared:
                self._forget(architecture)

    def _bound(self, kind: Kind) -> None:
        """A run of this kind holds more than any did: who leads beyond the limit gives back, and who holds most."""
        gathered: Counter[str] = Counter()
        for known, count in self._most_at_once.items():
            gathered[self._arena_of(known)] += self._bytes[known] * count
        if gathered.total() > self._limit_bytes:
            self._due |= {self._arena_of(kind), max(gathered, key=gathered.__getitem__)}

    def _arena_of(self, kind: Kind) -> str:
        return _SHARED if self._is_shared else kind[0]

    def _forget(self, arena: str) -> None:
        for kind in [kind for kind in self._most_at_once if self._arena_of(kind) == arena]:
            self._most_at_once[kind] = self._running[kind]
            if not self._running[kind]:
                del self._most_at_once[kind], self._running[kind]
        self._due.discard(arena)


_SHARED = ""
