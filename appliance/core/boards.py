"""Which pictures are of one board, when the board has its verdict, and which.

The first picture of a board opens it. It is concluded once: when all parts have their verdicts; or when its time is up
and whatever has come has its verdict. Then parts are missing. The time is that of acceptance: a box that is behind
concludes no board for want of pictures that wait in its own spool.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from appliance.core.types import BoardName, BoardOutcome, BoardVerdict, PartVerdict, Refusal

MISSING = "parts-missing"
CROWDED = "boards-full"
CONCLUDED_NAMES = 10_000
"""So many concluded boards are remembered for who comes too late: more than any line makes in the time."""

_WORST_FIRST = tuple(BoardOutcome)


def board_verdict(
    id: str,
    name: BoardName,
    expected: Sequence[str],
    verdicts: Mapping[str, PartVerdict],
    opened_seconds: float,
    crowded: Refusal | None = None,
) -> BoardVerdict:
    """What the `verdicts` of parts come to, of those that the recipe has. `crowded`: why the others are not awaited."""
    parts = {part: verdicts[part] for part in expected if part in verdicts}
    missing = tuple(part for part in expected if part not in verdicts)
    outcome = _worst(parts.values(), missing)
    return BoardVerdict(id, name, outcome, parts, missing, opened_seconds, _why(outcome, parts, missing, crowded))


def _worst(parts: Iterable[PartVerdict], missing: Sequence[str]) -> BoardOutcome:
    found = {BoardOutcome(part.outcome) for part in parts} | ({BoardOutcome.INCOMPLETE} if missing else set())
    return next(outcome for outcome in _WORST_FIRST if outcome in found)


def _why(
    outcome: BoardOutcome, parts: Mapping[str, PartVerdict], missing: Sequence[str], crowded: Refusal | None
) -> Refusal | None:
    """Of a board that neither passed nor failed."""
    if outcome is BoardOutcome.INCOMPLETE:
        of = len(parts) + len(missing)
        return crowded or Refusal(MISSING, f"of {len(missing)} of {of} parts no picture came in time")
    if outcome in (BoardOutcome.PASS, BoardOutcome.FAIL):
        return None
    for part, verdict in parts.items():
        if BoardOutcome(verdict.outcome) is outcome and verdict.refusal is not None:
            return Refusal(verdict.refusal.reason, f"{part}: {verdict.refusal.detail}")
    return None


@dataclass(frozen=True, slots=True)
class Came:
    """A part's picture, about to be inspected. `arrival` is its place in the order of acceptance."""

    request: str
    part: str
    arrival: int
    arrived_seconds: float


@dataclass(frozen=True, slots=True)
class Standing:
    """An open board as it was recorded, with the verdicts so far: arrival and verdict by part."""

    id: str
    name: BoardName
    expected: tuple[str, ...]
    opened_seconds: float
    parts: Mapping[str, tuple[int, PartVerdict]] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(slots=True)
class _Part:
    """The latest picture of a part, and its verdict when there is one."""

    arrival: int
    request: str
    verdict: PartVerdict | None = None


@dataclass(slots=True)
class _Board:
    standing: Standing
    parts: dict[str, _Part]
    in_work: int = 0
    is_due: bool = False

    @property
    def is_complete(self) -> bool:
        return not self.in_work and len(self.parts) == len(self.standing.expected)


class Boards:
    """Boards that are collected from pictures of their parts.

    A board waits for `seconds` after its first picture. At most `most` wait for nothing but pictures: of more, the one
    of which nothing has come for longest is concluded as it is. Of several pictures of a part the latest counts.
    What comes when its time is up or it has its verdict, but no later than `seconds` after that, changes nothing; what
    is later opens it anew.
    """

    def __init__(self, seconds: float, most: int) -> None:
        self._seconds, self._most = seconds, most
        self._boards: dict[str, _Board] = {}  # by id
        self._open: dict[BoardName, _Board] = {}  # those that a picture may join
        self._waiting: OrderedDict[str, _Board] = OrderedDict()  # whose time is not up, in the order of opening
        self._idle: OrderedDict[str, _Board] = OrderedDict()  # of whom nothing is in work, longest first
        self._members: dict[str, tuple[_Board, str]] = {}  # pictures in work: board and part
        self._closed: OrderedDict[BoardName, float] = OrderedDict()
        self.counts: Counter[str] = Counter()

    def __len__(self) -> int:
        """How many have no verdict yet."""
        return len(self._boards)

    def board_of(self, request: str) -> str | None:
        """The board that waits for this picture's verdict."""
        found = self._members.get(request)
        return None if found is None else found[0].standing.id

    def came(self, name: BoardName, picture: Came, expected: Iterable[str]) -> Standing | None:
        """A picture of one of the `expected` parts, which are those of the recipe. The board, if this opened it."""
        opened = None
        if name not in self._open:
            if self._is_too_late(name, picture.arrived_seconds):
                self.counts["too_late"] += 1
                return None
            opened = Standing(f"board/{picture.request}", name, tuple(expected), picture.arrived_seconds)
            self._begin(opened)
        self._join(self._open[name], picture)
        return opened

    def inspected(self, verdict: PartVerdict, now: float) -> BoardVerdict | None:
        """The picture has its verdict. The board's, if that was the last that it waited for."""
        if verdict.request not in self._members:
            return None
        board, part = self._members.pop(verdict.request)
        board.parts[part].verdict = verdict
        board.in_work -= 1
        if board.is_complete or (board.is_due and not board.in_work):
            return self._conclude(board, now)
        if not board.in_work:
            self._idle[board.standing.id] = board
        return None

    def is_over(self, now: float) -> bool:
        """Whether some board's time is up by then."""
        return bool(self._waiting) and self._is_over(next(iter(self._waiting.values())), now)

    def passed(self, accepted_seconds: float, now: float) -> list[BoardVerdict]:
        """All pictures accepted until then have come. The verdicts of boards whose time is up, or that are too many.

        A board whose time is up takes no more pictures: the next opens another.
        """
        ended = []
        while self.is_over(accepted_seconds):
            _, board = self._waiting.popitem(last=False)
            board.is_due = True
            self._close(board, board.standing.opened_seconds + self._seconds)
            if not board.in_work:
                ended.append(self._conclude(board, now))
        while len(self._idle) > self._most:
            detail = f"more than {self._most} boards waited for their parts (limits.boards)"
            ended.append(self._conclude(next(iter(self._idle.values())), now, Refusal(CROWDED, detail)))
        self._forget_closed(accepted_seconds)
        return ended

    def resume(
        self, boards: Iterable[Standing], concluded: Iterable[tuple[BoardName, float]], now: float
    ) -> list[BoardVerdict]:
        """What a former process knew, in the order of opening and concluding. The verdicts that it still owed."""
        self._closed.update(concluded)
        ended = []
        for standing in boards:
            board = self._begin(standing)
            board.parts.update(
                {part: _Part(arrival, known.request, known) for part, (arrival, known) in standing.parts.items()}
            )
            if board.is_complete:
                ended.append(self._conclude(board, now))
        return ended

    def _begin(self, standing: Standing) -> _Board:
        board = self._open[standing.name] = self._boards[standing.id] = _Board(standing, {})
        self._waiting[standing.id] = self._idle[standing.id] = board
        return board

    def _close(self, board: _Board, at_seconds: float) -> None:
        """No picture joins it any more; who comes soon after that is too late."""
        name = board.standing.name
        if self._open.get(name) is board:
            del self._open[name]
            self._closed[name] = at_seconds
            self._closed.move_to_end(name)

    def _join(self, board: _Board, picture: Came) -> None:
        known = board.parts.get(picture.part)
        if known is not None and known.arrival >= picture.arrival:
            return
        if known is not None:
            self.counts["replaced"] += 1
        if known is None or known.verdict is not None:
            board.in_work += 1
        else:
            del self._members[known.request]
        board.parts[picture.part] = _Part(picture.arrival, picture.request)
        self._members[picture.request] = board, picture.part
        self._idle.pop(board.standing.id, None)

    def _is_over(self, board: _Board, accepted_seconds: float) -> bool:
        return board.standing.opened_seconds + self._seconds <= accepted_seconds

    def _is_too_late(self, name: BoardName, arrived_seconds: float) -> bool:
        return name in self._closed and arrived_seconds < self._closed[name] + self._seconds

    def _conclude(self, board: _Board, now: float, refusal: Refusal | None = None) -> BoardVerdict:
        standing, name = board.standing, board.standing.name
        del self._boards[standing.id]
        self._close(board, now)
        self._waiting.pop(standing.id, None)
        self._idle.pop(standing.id, None)
        verdicts = {part: known.verdict for part, known in board.parts.items() if known.verdict is not None}
        verdict = board_verdict(standing.id, name, standing.expected, verdicts, standing.opened_seconds, refusal)
        self.counts[verdict.outcome] += 1
        return verdict

    def _forget_closed(self, accepted_seconds: float) -> None:
        """Those for which nobody can be too late any more."""
        while self._closed:
            name, at = next(iter(self._closed.items()))
            if at + self._seconds > accepted_seconds and len(self._closed) <= CONCLUDED_NAMES:
                return
            del self._closed[name]
