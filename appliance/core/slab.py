"""Where in one block of memory each piece lies, so that a device is asked for memory once and never fragments its own.

It knows numbers only: offsets and sizes, no memory and no segments.

Pieces are whole pages of 4 KiB and nothing else: segments are files of whole pages, so nothing is wasted on them, and
one rule serves device addresses (256 bytes) and direct reads into pinned memory (a page). Size classes would buy
nothing: the experts of one architecture are of equal size, and of all gaps the best fitting one is taken, so where one
of them left, the next one fits exactly.
"""

from __future__ import annotations

from appliance.errors import NoRoom

PAGE_BYTES = 4096
"""Every piece begins at a multiple of it and is as many of them as hold what was asked for, at least one."""


def whole_pages(wanted_bytes: int) -> int:
    """The bytes that a piece of so many really takes."""
    return max(-(-wanted_bytes // PAGE_BYTES), 1) * PAGE_BYTES


class Slab:
    """Pieces of a block of `total_bytes`, rounded down to whole pages. Used and free bytes always add up to it."""

    def __init__(self, total_bytes: int) -> None:
        self.total_bytes = total_bytes // PAGE_BYTES * PAGE_BYTES
        self._taken: dict[int, int] = {}  # bytes by offset, as are the gaps, no two of which touch
        self._gaps: dict[int, int] = {0: self.total_bytes} if self.total_bytes else {}

    @property
    def used_bytes(self) -> int:
        return sum(self._taken.values())

    @property
    def free_bytes(self) -> int:
        return sum(self._gaps.values())

    @property
    def largest_free_bytes(self) -> int:
        """The most that can be taken in one piece."""
        return max(self._gaps.values(), default=0)

    def take(self, wanted_bytes: int) -> int:
        """The offset of a free piece: in the smallest gap that holds it, of equal ones the first.

        Raises NoRoom with the largest gap when that is too small, even if all gaps together would do.
        """
        need = whole_pages(wanted_bytes)
        fitting = [(size, offset) for offset, size in self._gaps.items() if size >= need]
        if not fitting:
            raise NoRoom(need, self.largest_free_bytes)
        size, offset = min(fitting)
        del self._gaps[offset]
        if size > need:
            self._gaps[offset + need] = size - need
        self._taken[offset] = need
        return offset

    def give_back(self, offset: int) -> None:
        """Free a piece that was taken; it becomes one gap with those beside it."""
        start, end = offset, offset + self._taken.pop(offset)
        before = next((gap for gap, size in self._gaps.items() if gap + size == start), None)
        if before is not None:
            del self._gaps[before]
            start = before
        end += self._gaps.pop(end, 0)
        self._gaps[start] = end - start
