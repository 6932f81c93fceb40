"""Boards from pictures of their parts: one verdict each, in whatever order parts, repeats, time and restarts come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from appliance.core.boards import CONCLUDED_NAMES, Boards, Came, Standing, board_verdict
from appliance.core.types import BoardName, BoardOutcome, BoardVerdict, Outcome, PartVerdict, Refusal

NAME = BoardName("line1", "p1", "SN-1")
PARTS = ("R1", "R2", "R3")
SECONDS = 60.0


def came(boards: Boards, part: str, arrival: int, at: float = 0.0, name: BoardName = NAME) -> Standing | None:
    return boards.came(name, Came(f"{name.serial}:{part}:{arrival}", part, arrival, at), PARTS)


def inspected(
    boards: Boards, part: str, arrival: int, outcome: Outcome = Outcome.PASS, now: float = 1.0, name: BoardName = NAME
) -> BoardVerdict | None:
    return boards.inspected(PartVerdict(f"{name.serial}:{part}:{arrival}", outcome), now)


def collected(outcomes: Sequence[Outcome], missing: int = 0) -> BoardVerdict:
    expected = [f"R{number}" for number in range(len(outcomes) + missing)]
    parts = {
        part: PartVerdict(part, outcome, Refusal(outcome.value, "why"))
        for part, outcome in zip(expected, outcomes, strict=False)
    }
    return board_verdict("b", NAME, expected, parts, 0.0)


@pytest.mark.parametrize(
    ("outcomes", "missing", "expected"),
    [
        ([Outcome.PASS, Outcome.PASS], 0, BoardOutcome.PASS),
        ([Outcome.PASS, Outcome.PASS], 1, BoardOutcome.INCOMPLETE),
        ([Outcome.PASS, Outcome.FAIL], 1, BoardOutcome.FAIL),
        ([Outcome.PASS, Outcome.ERROR], 1, BoardOutcome.ERROR),
        ([Outcome.ERROR, Outcome.FAIL, Outcome.LATE], 0, BoardOutcome.FAIL),
        ([Outcome.LATE, Outcome.REJECTED], 1, BoardOutcome.LATE),
        ([Outcome.PASS, Outcome.REJECTED], 1, BoardOutcome.REJECTED),
    ],
)
def test_a_board_is_as_good_as_its_worst_part(
    outcomes: Sequence[Outcome], missing: int, expected: BoardOutcome
) -> None:
    verdict = collected(outcomes, missing)
    assert verdict.outcome is expected
    assert len(verdict.parts) == len(outcomes)
    assert len(verdict.missing) == missing


def test_a_board_that_neither_passed_nor_failed_says_why() -> None:
    assert collected([Outcome.PASS]).refusal is None
    assert collected([Outcome.FAIL], missing=1).refusal is None
    assert collected([Outcome.PASS, Outcome.ERROR]).refusal == Refusal("error", "R1: why")
    missing = collected([Outcome.PASS], missing=2).refusal
    assert missing == Refusal("parts-missing", "of 2 of 3 parts no picture came in time")


def test_a_board_has_its_verdict_when_all_its_parts_have_theirs() -> None:
    boards = Boards(SECONDS, 10)
    opened = came(boards, "R2", 1)
    assert opened == Standing("board/SN-1:R2:1", NAME, PARTS, 0.0)
    assert came(boards, "R1", 2) is came(boards, "R3", 3) is None
    assert boards.board_of("SN-1:R3:3") == "board/SN-1:R2:1"
    assert inspected(boards, "R3", 3) is inspected(boards, "R2", 1) is None
    verdict = inspected(boards, "R1", 2)
    assert verdict is not None
    assert (verdict.id, verdict.outcome, list(verdict.parts)) == (opened.id, BoardOutcome.PASS, ["R1", "R2", "R3"])
    assert len(boards) == 0


def test_a_board_whose_time_is_up_waits_for_what_has_come_and_for_nothing_else() -> None:
    boards = Boards(SECONDS, 10)
    came(boards, "R1", 1, at=5.0)
    came(boards, "R2", 2, at=6.0)
    inspected(boards, "R1", 1)
    assert boards.passed(5.0 + SECONDS, 500.0) == []
    verdict = inspected(boards, "R2", 2, Outcome.FAIL)
    assert verdict is not None
    assert (verdict.outcome, verdict.missing) == (BoardOutcome.FAIL, ("R3",))


def test_a_box_that_is_behind_concludes_no_board_for_pictures_in_its_own_spool() -> None:
    boards = Boards(SECONDS, 10)
    came(boards, "R1", 1)
    inspected(boards, "R1", 1)
    assert boards.passed(SECONDS - 1, now=10 * SECONDS) == []
    came(boards, "R2", 2, at=SECONDS - 1)
    assert len(boards) == 1


@pytest.mark.parametrize("first_is_quicker", [True, False])
def test_of_two_pictures_of_a_part_the_latest_counts(first_is_quicker: bool) -> None:
    boards = Boards(SECONDS, 10)
    came(boards, "R1", 1)
    came(boards, "R1", 2)
    came(boards, "R2", 3)
    came(boards, "R3", 4)
    order = [("R1", 1, Outcome.FAIL), ("R1", 2, Outcome.PASS)]
    for part, arrival, outcome in order if first_is_quicker else reversed(order):
        assert inspected(boards, part, arrival, outcome) is None
    inspected(boards, "R2", 3)
    verdict = inspected(boards, "R3", 4)
    assert verdict is not None
    assert (verdict.outcome, verdict.parts["R1"].request) == (BoardOutcome.PASS, "SN-1:R1:2")
    assert boards.counts["replaced"] == 1


def test_a_picture_that_comes_too_late_changes_nothing_and_a_later_one_opens_the_board_anew() -> None:
    boards = Boards(SECONDS, 10)
    came(boards, "R1", 1)
    inspected(boards, "R1", 1)
    assert [verdict.missing for verdict in boards.passed(SECONDS, 100.0)] == [("R2", "R3")]
    assert came(boards, "R2", 2, at=2 * SECONDS - 1) is None
    assert inspected(boards, "R2", 2) is None
    assert boards.counts["too_late"] == 1
    again = came(boards, "R2", 3, at=2 * SECONDS)
    assert again is not None
    assert again.id == "board/SN-1:R2:3"


def test_a_board_whose_time_is_up_is_joined_by_nobody_while_its_last_picture_is_inspected() -> None:
    """A box that is behind: the same board comes again long after, and is another inspection."""
    boards = Boards(SECONDS, 10)
    came(boards, "R1", 1)
    assert boards.passed(SECONDS, 500.0) == []
    assert came(boards, "R1", 2, at=2 * SECONDS - 1) is None, "too late for the first, too soon for another"
    again = came(boards, "R1", 3, at=3 * SECONDS)
    assert again is not None
    first, second = inspected(boards, "R1", 1), inspected(boards, "R1", 3)
    assert first is not None
    assert (first.id, first.missing, second) == ("board/SN-1:R1:1", ("R2", "R3"), None)
    assert len(boards) == 1
    (last,) = boards.passed(4 * SECONDS, 501.0)
    assert last.id == again.id


def test_of_too_many_boards_the_one_that_nothing_has_come_of_for_longest_is_concluded() -> None:
    boards = Boards(SECONDS, 2)
    names = [replace(NAME, serial=f"SN-{number}") for number in range(4)]
    for number, name in enumerate(names):
        came(boards, "R1", number, name=name)
    assert boards.passed(0.0, 1.0) == [], "pictures of all of them are in work"
    for number in (1, 0, 2):
        inspected(boards, "R1", number, name=names[number])
    (verdict,) = boards.passed(0.0, 1.0)
    assert (verdict.name.serial, verdict.outcome) == ("SN-1", BoardOutcome.INCOMPLETE)
    assert verdict.refusal is not None
    assert verdict.refusal.reason == "boards-full"
    assert len(boards) == 3


def test_what_is_remembered_of_concluded_boards_is_bounded() -> None:
    boards = Boards(SECONDS, 2)
    one = replace(NAME, product="single")
    for number in range(CONCLUDED_NAMES + 5):
        name = replace(one, serial=str(number))
        boards.came(name, Came(str(number), "R1", number, 0.0), ["R1"])
        boards.inspected(PartVerdict(str(number), Outcome.PASS), 0.0)
    boards.passed(0.0, 0.0)
    assert boards.came(replace(one, serial="0"), Came("x", "R1", 10**6, 1.0), ["R1"]) is not None, "forgotten"
    assert boards.came(replace(one, serial="9"), Came("y", "R1", 10**6, 1.0), ["R1"]) is None
    boards.passed(SECONDS, SECONDS)
    assert boards.came(replace(one, serial="9"), Came("y", "R1", 10**6, SECONDS), ["R1"]) is not None


def test_a_restart_knows_what_was_recorded_and_owes_what_was_not() -> None:
    boards = Boards(SECONDS, 10)
    verdicts = {part: (number, PartVerdict(part, Outcome.PASS)) for number, part in enumerate(PARTS, 5)}
    whole = Standing("board/a", NAME, PARTS, 0.0, verdicts)
    begun = Standing("board/b", replace(NAME, serial="SN-2"), PARTS, 1.0, {"R1": verdicts["R1"]})
    (owed,) = boards.resume([whole, begun], [], 9.0)
    assert (owed.id, owed.outcome) == ("board/a", BoardOutcome.PASS)
    assert came(boards, "R1", 4, name=begun.name) is None
    assert boards.board_of("SN-2:R1:4") is None, "it came before the one whose verdict is recorded"
    assert came(boards, "R1", 4, at=9.0) is None, "too late for the other board"


class Line(RuleBasedStateMachine):
    """Two boards of three parts under a service that may be killed at any moment: what it recorded is what it knows.

    The disk holds, like the real one, pictures without a verdict in order of arrival, open boards with their parts'
    verdicts, and verdicts of boards.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.arrivals = 0
        self.spool: dict[str, tuple[BoardName, Came]] = {}
        self.fed: set[str] = set()
        self.open: dict[str, Standing] = {}
        self.concluded: dict[str, tuple[BoardVerdict, float]] = {}
        self.boards = Boards(SECONDS, 1)

    @rule(part=st.sampled_from(PARTS), serial=st.sampled_from(["A", "B"]), after=st.sampled_from([0.0, 1.0, 40.0]))
    def accept(self, part: str, serial: str, after: float) -> None:
        self.now += after
        self.arrivals += 1
        request = f"{serial}:{part}:{self.arrivals}"
        self.spool[request] = replace(NAME, serial=serial), Came(request, part, self.arrivals, self.now)

    @precondition(lambda self: self.spool.keys() - self.fed)
    @rule()
    def feed(self) -> None:
        request = min(self.spool.keys() - self.fed, key=lambda request: self.spool[request][1].arrival)
        self.fed.add(request)
        name, picture = self.spool[request]
        if (opened := self.boards.came(name, picture, PARTS)) is not None:
            assert opened.id not in self.concluded, "a board would be concluded twice"
            self.open.setdefault(opened.id, opened)

    @precondition(lambda self: self.fed)
    @rule(data=st.data(), outcome=st.sampled_from(list(Outcome)))
    def inspect(self, data: st.DataObject, outcome: Outcome) -> None:
        request = data.draw(st.sampled_from(sorted(self.fed)))
        _, picture = self.spool.pop(request)
        self.fed.remove(request)
        verdict = PartVerdict(request, outcome)
        if (id := self.boards.board_of(request)) is not None:
            standing = self.open[id]
            self.open[id] = replace(standing, parts={**standing.parts, picture.part: (picture.arrival, verdict)})
        self.record([ended] if (ended := self.boards.inspected(verdict, self.now)) else [])

    @rule(after=st.sampled_from([0.0, 30.0, 61.0]))
    def look(self, after: float) -> None:
        self.now += after
        unfed = [self.spool[request][1].arrived_seconds for request in self.spool.keys() - self.fed]
        self.record(self.boards.passed(min(unfed, default=self.now), self.now))

    @rule()
    def restart(self) -> None:
        self.boards, self.fed = Boards(SECONDS, 1), set()
        concluded = [(verdict.name, at) for verdict, at in self.concluded.values()]
        self.record(self.boards.resume(self.open.values(), concluded, self.now))

    def record(self, ended: list[BoardVerdict]) -> None:
        for verdict in ended:
            assert verdict.id not in self.concluded, "two verdicts for one board"
            assert (verdict.outcome is BoardOutcome.PASS) == (
                not verdict.missing and all(part.outcome is Outcome.PASS for part in verdict.parts.values())
            )
            assert {part: known for part, (_, known) in self.open.pop(verdict.id).parts.items()} == verdict.parts
            self.concluded[verdict.id] = verdict, self.now

    @invariant()
    def open_boards_are_those_on_disk(self) -> None:
        assert len(self.boards) == len(self.open)

    def teardown(self) -> None:
        """However it went: when all pictures are inspected and the time is up, every board has its verdict."""
        while self.spool.keys() - self.fed:
            self.feed()
        for request in sorted(self.fed):
            ended = self.boards.inspected(PartVerdict(request, Outcome.PASS), self.now)
            if ended is not None:
                self.open.pop(ended.id)
        self.boards.passed(self.now + SECONDS, self.now)
        assert len(self.boards) == 0


Line.TestCase.settings = settings(max_examples=60, stateful_step_count=40)
test_every_board_has_one_verdict_whatever_happens = Line.TestCase
