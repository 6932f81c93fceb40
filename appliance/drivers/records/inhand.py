"""What is in work at this moment, in a file that outlives the process: who may have ended it.

It names the pictures of each batch behind a mark of its expert, which says whether that is at work or its pictures are
being decoded, and the experts that are being loaded. It is written before a batch or load begins and when it has ended,
without waiting for the disk: what a process has written stays with the kernel, however that process ends (7 µs instead
of the 1 ms of a commit). Only the machine's own end loses it. So after an end that was not clean, pictures that were
there then are noted on the disk itself: one that takes the whole machine down is found at its second time.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from appliance.core.types import Crash
from appliance.errors import RecordsError

_LINE_BYTES = 16
"""Of a fixed width, so that what is written over older lines leaves whole ones, and a page holds whole ones."""
_FILE_BYTES = 4096 * _LINE_BYTES
"""Allocated at once: a full disk must not keep a picture from being noted."""
_OPEN, _CLEAN, _END = "open", "clean", "end"
_DECODES, _RUNS, _LOADS = "d", "r", "l"
MARK_CHARACTERS = _LINE_BYTES - 2
"""Of what names an expert."""


@dataclass(frozen=True, slots=True)
class Former:
    """How the last process of a state directory ended, the arrivals that it had in hand then, and the experts that
    were at work."""

    was_clean: bool
    arrivals: frozenset[int]
    at_work: tuple[tuple[str, Crash], ...] = ()


def former(path: Path) -> Former:
    """What the file says of it. Raises OSError when it cannot be read."""
    found = path.read_text("ascii", "replace").split() if path.exists() else []
    if found[:1] != [_OPEN]:
        return Former(True, frozenset())
    ended = found.index(_END) if _END in found else len(found)
    works = list(_works(found[1:ended]))
    return Former(
        False,
        frozenset().union(*(arrivals for _, _, arrivals in works)),
        tuple(
            (expert, Crash(arrivals, alone=len(works) == 1)) for doing, expert, arrivals in works if doing != _DECODES
        ),
    )


def _works(lines: Collection[str]) -> Iterator[tuple[str, str, frozenset[int]]]:
    """What was done, with which expert, and the arrivals behind that. What stands before the first mark is a batch
    whose mark is lost."""
    doing, expert, arrivals = _DECODES, "", set[int]()
    for line in lines:
        if line[:1] in (_DECODES, _RUNS, _LOADS):
            if expert or arrivals:
                yield doing, expert, frozenset(arrivals)
            doing, expert, arrivals = line[0], line[1:], set()
        elif _is_arrival(line):
            arrivals.add(int(line))
    if expert or arrivals:
        yield doing, expert, frozenset(arrivals)


class InHand:
    """The file of one state directory. Arrivals up to `synced_through` are noted on the disk itself.

    Safe from several threads.
    """

    def __init__(self, path: Path, synced_through: int) -> None:
        """Nothing is in hand yet. Raises OSError or RecordsError when the file cannot be made, allocated or written."""
        self._lock = threading.Lock()
        self._held: dict[int, tuple[str, bytes]] = {}
        self._loads: dict[tuple[str, str], bytes] = {}
        self._synced_through = synced_through
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            os.posix_fallocate(self._file, 0, _FILE_BYTES)
            self._write(_OPEN, is_synced=True)
        except BaseException:
            os.close(self._file)
            raise

    def take(self, batch: int, expert: str, arrivals: Collection[int]) -> None:
        """Note the pictures of a batch, before anybody touches their bytes. Raises RecordsError: then nobody may."""
        with self._lock:
            self._held[batch] = expert, b"".join((_line(_DECODES + expert), *map(_line, arrivals)))
            self._write(_OPEN, is_synced=min(arrivals, default=self._synced_through + 1) <= self._synced_through)

    def put_back(self, batch: int) -> None:
        """The batch has ended, and with it what its pictures can do, or it never began. Raises RecordsError."""
        with self._lock:
            self._held.pop(batch, None)
            self._write(_OPEN)

    def work(self, batch: int, *, runs: bool) -> None:
        """The batch's expert is at work now (`runs`), or its pictures are decoded. Raises RecordsError."""
        with self._lock:
            expert, lines = self._held[batch]
            self._held[batch] = expert, _line((_RUNS if runs else _DECODES) + expert) + lines[_LINE_BYTES:]
            self._write(_OPEN)

    def take_load(self, device: str, expert: str) -> None:
        """Note that the expert is about to be loaded. Raises RecordsError."""
        with self._lock:
            self._loads[device, expert] = _line(_LOADS + expert)
            self._write(_OPEN)

    def put_back_load(self, device: str, expert: str) -> None:
        """The load has ended, or it never began. Raises RecordsError."""
        with self._lock:
            self._loads.pop((device, expert), None)
            self._write(_OPEN)

    def close(self) -> None:
        """Nobody touches anything any more: a clean end."""
        try:
            self._held.clear()
            self._loads.clear()
            self._write(_CLEAN)
        finally:
            os.close(self._file)

    def _write(self, state: str, *, is_synced: bool = False) -> None:
        try:
            batches = (lines for _, lines in self._held.values())
            os.pwrite(self._file, b"".join((_line(state), *batches, *self._loads.values(), _line(_END))), 0)
            if is_synced:
                os.fdatasync(self._file)
        except OSError as error:
            what = f"the pictures in hand cannot be noted: {error.strerror}"
            raise RecordsError(what, "check the disk, then start again") from error


def _line(word: str | int) -> bytes:
    return b"%-*b\n" % (_LINE_BYTES - 1, str(word).encode("ascii"))


def _is_arrival(line: str) -> bool:
    return line.isdecimal() and len(line) < _LINE_BYTES
