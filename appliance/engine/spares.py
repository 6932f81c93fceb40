"""Memory that segments gave back, kept for the next ones.

Fresh memory has to be cleared page by page, which takes four fifths of the processor time of a load (45 MB: 8 to 10 ms
of it, and 1.7 ms into memory already there; 2026-11-21), at the cost of the runs beside it.
"""

from __future__ import annotations

import mmap
from bisect import bisect_left, insort

MOST_TIMES = 4
"""A spare becomes a segment of at most so many times more or fewer bytes. Of 45, 14 and 100 MB that come and go within
450, a quarter has to be cleared so, with 2 a third; a head of 80 KB spoils no spare of 45 MB (2026-11)."""


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
        """One of `size` bytes, made of the one nearest to it, which is cut, or cleared where it is lengthened.

        Its content is anything. None where all are smaller or larger by far: a small segment would waste a large
        spare, and a large one gain nothing by a small spare.
        """
        place = bisect_left(self._sizes, (size, 0))
        neighbours = self._sizes[max(place - 1, 0) : place + 1]
        near = [one for one in neighbours if one[0] <= MOST_TIMES * size and size <= MOST_TIMES * one[0]]
        if not near:
            return None
        memory = self._remove(min(near, key=lambda one: abs(one[0] - size))[1])
        if len(memory) != size and not _is_resized(memory, size):
            memory.close()
            return None
        return memory

    def give_back(self, most_bytes: int = 0, since_seconds: float = float("inf")) -> None:
        """The oldest leave until there are no more than so many bytes, of those that are spare since then or before.

        The last of them only in part: so what lacks little, for a small segment, costs little.
        """
        for number, (memory, since) in list(self._kept.items()):
            excess = self.bytes - most_bytes
            if excess <= 0 or since > since_seconds:
                return
            self._cut(number, (len(memory) - excess) // mmap.PAGESIZE * mmap.PAGESIZE)

    def _cut(self, number: int, size: int) -> None:
        """To nothing, it may be; what is left keeps its age."""
        memory, _ = self._kept[number]
        before = len(memory)
        if size <= 0 or not _is_resized(memory, size):
            self._remove(number).close()
            return
        del self._sizes[bisect_left(self._sizes, (before, number))]
        insort(self._sizes, (size, number))
        self.bytes += size - before

    def _remove(self, number: int) -> mmap.mmap:
        memory, _ = self._kept.pop(number)
        del self._sizes[bisect_left(self._sizes, (len(memory), number))]
        self.bytes -= len(memory)
        return memory


def _is_resized(memory: mmap.mmap, size: int) -> bool:
    try:
        memory.resize(size)
    except OSError:
        return False
    return True
