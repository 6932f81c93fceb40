"""The store of one state directory, as the rest of the box sees it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from math import inf
from pathlib import Path
from types import MappingProxyType, TracebackType

from appliance.core.types import Crash
from appliance.drivers.records.boards import ConcludeBoard, Open, concluded_boards, open_boards
from appliance.drivers.records.inhand import InHand
from appliance.drivers.records.ledger import Accept, Conclude, Forgive, Limits, Published
from appliance.drivers.records.opening import lock, prepare, take_stock
from appliance.drivers.records.readers import Readers
from appliance.drivers.records.schema import PICTURE_COLUMNS
from appliance.drivers.records.values import (
    Acceptance,
    BoardPart,
    Conclusion,
    Counts,
    OpenBoard,
    PartOf,
    Picture,
    Publication,
    Quota,
    Sort,
    Spooled,
)
from appliance.drivers.records.writer import Writer
from appliance.errors import NotSpooled, RecordsError


class Records:
    """The store of one state directory; `Records.open` makes it. All methods may be called from any thread."""

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        spool_bytes: int,
        verdict_days: float,
        outbox_rows: float = inf,
        verdict_bytes: float = inf,
        quotas: Mapping[Sort, Quota] = MappingProxyType({}),
        clock: Callable[[], float] = time.time,
    ) -> Records:
        """Open or create the store in `folder`. `clock` is wall time, for labels and the age of verdicts.

        A spool of `spool_bytes` or an outbox of `outbox_rows` takes no more pictures; what was accepted is concluded
        all the same. Verdicts take about `verdict_bytes` at most: the oldest leave before their time, but none that
        waits in the outbox. `quotas` bound the pictures that are kept with their verdicts; without one of its sort, a
        picture is not.

        A damaged store is moved aside (`moved_aside` says where) and a new one begun. Raises RecordsError: the folder
        cannot be written, another process uses it, or a newer release wrote it.
        """
        path = folder / "records.db"
        with ExitStack() as undo:
            lock_file = lock(folder)
            undo.callback(os.close, lock_file)
            moved_aside = prepare(path)
            in_hand = take_stock(path, is_new=moved_aside is not None)
            undo.callback(in_hand.close)
            limits = Limits(spool_bytes, outbox_rows, verdict_bytes, quotas)
            records = cls(folder, lock_file, in_hand, moved_aside, limits, verdict_days, clock)
            undo.pop_all()
        return records

    def __init__(
        self,
        folder: Path,
        lock_file: int,
        in_hand: InHand,
        moved_aside: Path | None,
        limits: Limits,
        verdict_days: float,
        clock: Callable[[], float],
    ) -> None:
        self.folder, self.moved_aside = folder, moved_aside
        self._path, self._lock_file, self._in_hand = folder / "records.db", lock_file, in_hand
        self._readers = Readers(self._path)
        self._writer = Writer(self._path, limits, verdict_days * 86_400.0, clock)
        self._writer.start()

    def __enter__(self) -> Records:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def accept(
        self,
        picture: Picture,
        payload: bytes,
        done: Callable[[Acceptance], None],
        *,
        may_enter: Callable[[str], bool] = lambda line: True,
    ) -> None:
        """Commit a picture to the spool, unless it is known or there is no room; `done` hears which.

        One that is new and has room may be turned away: `may_enter` is asked with its line, on the writer's thread.
        """
        self._writer.put(Accept(picture, payload, done, may_enter))

    def conclude(
        self,
        id: str,
        outcome: str,
        body: bytes,
        topic: str,
        done: Callable[[Conclusion], None],
        *,
        keep: Sort | None = None,
        also: tuple[str, ...] = (),
        part_of: PartOf | None = None,
    ) -> None:
        """Record a verdict, put it in the outbox and release the picture: all or nothing.

        `also` are further topics for it. It counts for the board that it is `part_of`.

        With `keep` the picture stays with its verdict, as far as its quota and the disk have room.

        It goes to `topic`, now and when the picture comes again, and to the picture's response topic. While the disk
        refuses to write, this waits and tries again; `done` is called when it is recorded.
        """
        self._writer.put(Conclude(id, outcome, body, topic, keep, done, also, part_of))

    def open_board(self, board: OpenBoard) -> None:
        """A board's first picture has come: parts that are concluded after this may count for it."""
        self._writer.put(Open(board))

    def conclude_board(
        self, board: OpenBoard, outcome: str, body: bytes, topic: str, done: Callable[[Conclusion], None]
    ) -> None:
        """Record a board's verdict and put it in the outbox, unless it has one. It is open no more."""
        self._writer.put(ConcludeBoard(board, outcome, body, topic, done))

    def open_boards(self) -> list[tuple[OpenBoard, list[BoardPart]]]:
        """In the order of opening, with the parts that have a verdict."""
        return open_boards(self._readers)

    def concluded_boards(self, since: float) -> list[tuple[tuple[str, str, str], float]]:
        """Line, product and serial of collected boards concluded since that wall second, and when, in that order."""
        return concluded_boards(self._readers, since)

    def published(self, token: int) -> None:
        """The broker has confirmed this publication."""
        self._writer.put(Published(token))

    def waiting(self, after: int = 0, limit: int = 1000) -> list[Spooled]:
        """Pictures without a verdict in order of acceptance, from behind the arrival `after`; payloads stay on disk."""
        return self._spooled("arrival > ? ORDER BY arrival LIMIT ?", (after, limit))

    def _spooled(self, which: str, values: tuple[str | float, ...]) -> list[Spooled]:
        columns = ", ".join(PICTURE_COLUMNS)
        rows = self._readers.query(
            f"SELECT arrival, picture_bytes, attempts, {columns} FROM pictures WHERE {which}", values
        )
        return [Spooled(arrival, Picture(*known), size, attempts) for arrival, size, attempts, *known in rows]

    def newest_arrival(self) -> int:
        """That of the picture in the spool that was accepted last; 0 if it is empty."""
        ((arrival,),) = self._readers.query("SELECT ifnull(max(arrival), 0) FROM pictures", ())
        return int(arrival)

    def suspects(self) -> list[Spooled]:
        """The pictures that were in hand at a crash, those first that were at the fewest."""
        return self._spooled("attempts > 0 ORDER BY attempts, arrival", ())

    def crashes(self) -> dict[str, tuple[Crash, ...]]:
        """By the mark of an expert, those at which it was at work and after which it has not worked yet."""
        found: dict[str, tuple[Crash, ...]] = {}
        for mark, pictures, alone in self._readers.query(
            "SELECT expert, pictures, alone FROM crashes ORDER BY number", ()
        ):
            found[mark] = (*found.get(mark, ()), Crash(frozenset(json.loads(pictures)), bool(alone)))
        return found

    def forgive(self, expert: str, *, only_loads: bool = False) -> None:
        """The expert of this mark has worked, or shall be tried again."""
        self._writer.put(Forgive(expert, only_loads))

    def take(self, batch: int, expert: str, arrivals: Collection[int]) -> None:
        """These pictures are about to be decoded and run, as this batch, by the expert of this mark. If the process
        crashes before it has ended, one attempt is counted for each. Raises RecordsError when that cannot be noted:
        then nobody may touch them. The mark has at most MARK_CHARACTERS of 0-9 a-f.
        """
        self._in_hand.take(batch, expert, arrivals)

    def work(self, batch: int, *, runs: bool) -> None:
        """The batch's expert is at work now, or (not `runs`) pictures are decoded: a crash is no fault of the expert.
        Raises RecordsError when that cannot be noted."""
        self._in_hand.work(batch, runs=runs)

    def take_load(self, device: str, expert: str) -> None:
        """The expert of this mark is about to be loaded. Raises RecordsError when that cannot be noted."""
        self._in_hand.take_load(device, expert)

    def put_back_load(self, device: str, expert: str) -> None:
        """The load has ended. Raises RecordsError when that cannot be noted."""
        self._in_hand.put_back_load(device, expert)

    def put_back(self, batch: int) -> None:
        """The batch has ended. Raises RecordsError when that cannot be noted."""
        self._in_hand.put_back(batch)

    def payload(self, id: str) -> bytes:
        """A spooled picture's bytes. Raises NotSpooled when it is not in the spool."""
        if (fresh := self._writer.fresh.get(id)) is not None:
            return fresh
        for (payload,) in self._readers.query("SELECT payload FROM pictures WHERE id = ?", (id,)):
            return bytes(payload)
        raise NotSpooled(id)

    def unpublished(self, after: int = 0, limit: int = 1000) -> list[Publication]:
        """The outbox in order, from behind the token `after`."""
        rows = self._readers.query(
            "SELECT token, id, o.topic, correlation, body, resent FROM outbox AS o JOIN verdicts USING (id)"
            " WHERE token > ? ORDER BY token LIMIT ?",
            (after, limit),
        )
        return [Publication(*row) for row in rows]

    def last_token(self) -> int:
        """Of the outbox as it is now."""
        ((token,),) = self._readers.query("SELECT ifnull(max(token), 0) FROM outbox", ())
        return int(token)

    def verdict(self, id: str) -> bytes | None:
        """The recorded verdict's body, None when there is none."""
        for (body,) in self._readers.query("SELECT body FROM verdicts WHERE id = ?", (id,)):
            return bytes(body)
        return None

    def newest_capture(self, line: str, product: str, board: str, part: str) -> str | None:
        """When the newest picture of this place that has its verdict was taken, None when no sender has said."""
        ((newest,),) = self._readers.query(
            "SELECT max(captured_at) FROM verdicts"
            " WHERE line = ? AND product = ? AND board = ? AND part = ? AND captured_at IS NOT NULL",
            (line, product, board, part),
        )
        return None if newest is None else str(newest)

    @property
    def counts(self) -> Counts:
        return self._writer.counts

    @property
    def queued_bytes(self) -> int:
        """Of the pictures that the writer has, and the disk has not."""
        return self._writer.held_bytes

    @property
    def fresh_bytes(self) -> int:
        """Of the pictures that the disk has, and memory still."""
        return self._writer.fresh.bytes

    @property
    def turned_seconds(self) -> float:
        """Monotonic time of the writer's last turn: it is older than a few seconds only if it hangs, say in fsync."""
        return self._writer.turned_seconds

    @property
    def trouble(self) -> str | None:
        """Why the disk does not take what it is given, None while it does. It may pass: a full disk is emptied."""
        return self._writer.trouble

    @property
    def broken(self) -> RecordsError | None:
        """Set when the disk lied or the store is damaged: nothing is written any more, and the process should end."""
        return self._writer.broken

    def hurry(self) -> None:
        """The box is leaving: from now on each verdict is recorded at once, to be published before it has left."""
        self._writer.hurry()

    def close(self) -> None:
        """Write what was asked for, then end the writer and release the folder. Nobody runs a picture any more.

        What the disk still refuses is given up: unrecorded verdicts are made again from their pictures.
        """
        self._writer.close()
        self._readers.close()
        self._in_hand.close()
        os.close(self._lock_file)
