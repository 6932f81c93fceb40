"""Memory that segments gave back, kept for the next ones.

Fresh memory has to be cleared page by page, which takes four fifths of the processor time of a load (45 MB: 8 to 10 ms
of it, and 1.7 ms into memory already there; 2026-11-21), at the cost of the runs beside it.
"""

from __future__ import annotations

import mmap
from bisect import bisect_left, insort


class Spares:
    """Private anonymous mappings that nobody uses. Not safe to use from several threads."""

    def __init__(self) -> None:
        self.bytes = 0
        self._sizes: list[tuple[int, int]] = []  # with the number of each, in order
        self._kept: dict[int, tuple[mmap.mmap, float]] = {}  # by number, oldest first: since when it is spare
        self._next = 0

    def keep(self, memory: mmap.mmap, now: float) -> None:
        """Raises BufferError when somebody still has a view of it."""
        memory.resize(len(memory))
        insort(self._sizes, (len(memory), self._next))
        self._kept[self._next] = memory, now
        self._next += 1
        self.bytes += len(memory)

    def take(self, size: int) -> mmap.mmap | None:
        """One of `size` bytes, made of the next larger one or else of the largest, which then is cleared at its end.

        Its content is anything.
        """
        if not self._sizes:
            return None
        place = bisect_left(self._sizes, (size, 0))
        memory = self._remove(self._sizes[min(place, len(self._sizes) - 1)][1])
        if len(memory) != size:
            try:
                memory.resize(size)
            except OSError:
                memory.close()
                return None
        return memory

    def give_back(self, most_bytes: int = 0, since_seconds: float = float("inf")) -> None:
        """The oldest leave until there are no more than so many bytes, of those that are spare since then or before."""
        for number, (_, since) in list(self._kept.items()):
            if self.bytes <= most_bytes or since > since_seconds:
                return
            self._remove(number).close()

    def _remove(self, number: int) -> mmap.mmap:
        memory, _ = self._kept.pop(number)
        del self._sizes[bisect_left(self._sizes, (len(memory), number))]
        self.bytes -= len(memory)
        return memory
