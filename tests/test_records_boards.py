"""Boards on record: what a former process knew of them, and one verdict each."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from appliance.drivers.records import BoardPart, Conclusion, OpenBoard, PartOf, Publication, Recorded, Records, Unowed
from tests.test_records import TOPIC, WAIT_SECONDS, accept, opened, publications

BOARD = OpenBoard("board/a", "line1", "p1", "SN-1", 999.0, b"recipe")
BOARD_TOPIC = "coe/v1/plant/board/line1/p1/SN-1"


@pytest.fixture
def records(tmp_path: Path) -> Iterator[Records]:
    with opened(tmp_path) as store:
        yield store


def conclude(records: Records, id: str, of: str, outcome: str = "pass") -> Conclusion:
    answers: queue.Queue[Conclusion] = queue.Queue()
    records.conclude(id, outcome, b"{}", TOPIC, answers.put, part_of=PartOf(of, None, None))
    return answers.get(timeout=WAIT_SECONDS)


def conclude_board(records: Records, board: OpenBoard, body: bytes) -> Conclusion:
    answers: queue.Queue[Conclusion] = queue.Queue()
    records.conclude_board(board, "pass", body, BOARD_TOPIC, answers.put)
    return answers.get(timeout=WAIT_SECONDS)


def test_an_open_board_and_its_parts_are_there_after_a_restart(tmp_path: Path) -> None:
    other = replace(BOARD, id="board/b", board="SN-2", opened_at=998.0)
    with opened(tmp_path) as records:
        for board in (BOARD, other, BOARD):
            records.open_board(board)
        for number, part in enumerate(("R1", "R2")):
            accept(records, part, product="p1", board="SN-1", part=part)
            conclude(records, part, BOARD.id, ("pass", "fail")[number])
        accept(records, "waits", product="p1", board="SN-1", part="R3")
    with opened(tmp_path) as records:
        assert [board for board, _ in records.open_boards()] == [other, BOARD]
        parts = dict(records.open_boards())[BOARD]
        assert parts == [
            BoardPart("R1", 1, "R1", "pass", None, None),
            BoardPart("R2", 2, "R2", "fail", None, None),
        ]


def test_of_two_pictures_of_a_part_the_latest_counts_whichever_is_concluded_first(records: Records) -> None:
    records.open_board(BOARD)
    for name in ("first", "second"):
        accept(records, name, part="R1")
    conclude(records, "second", BOARD.id, "fail")
    conclude(records, "first", BOARD.id, "pass")
    ((_, (part,)),) = records.open_boards()
    assert (part.request, part.outcome) == ("second", "fail")


def test_a_board_is_concluded_once_and_published_until_the_broker_has_it(records: Records) -> None:
    records.open_board(BOARD)
    (sent,) = publications(conclude_board(records, BOARD, b"first"))
    assert conclude_board(records, BOARD, b"second") == Unowed()
    assert sent == Publication(sent.token, BOARD.id, BOARD_TOPIC, None, b"first")
    assert records.unpublished() == [sent]
    assert records.verdict(BOARD.id) == b"first"
    assert records.counts.verdicts == 1
    assert records.open_boards() == []
    assert records.concluded_boards(999.0) == [(("line1", "p1", "SN-1"), 1000.0)]
    assert records.concluded_boards(1000.5) == []


def test_a_part_of_a_board_that_is_not_open_has_its_verdict_and_counts_for_nobody(records: Records) -> None:
    accept(records, "a")
    assert isinstance(conclude(records, "a", "board/nobody"), Recorded)
    assert records.open_boards() == []


def test_a_verdict_goes_to_further_topics_and_again_to_its_own(records: Records) -> None:
    accept(records, "a", response_topic="mine")
    answers: queue.Queue[Conclusion] = queue.Queue()
    records.conclude("a", "pass", b"{}", TOPIC, answers.put, also=(BOARD_TOPIC,))
    sent = publications(answers.get(timeout=WAIT_SECONDS))
    assert [publication.topic for publication in sent] == [TOPIC, BOARD_TOPIC, "mine"]
    for publication in sent:
        records.published(publication.token)
    assert [publication.topic for publication in publications(accept(records, "a"))] == [TOPIC]
