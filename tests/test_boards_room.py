"""Whole boards' pictures and collected boards between the core and the records."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from appliance import catalog as catalogs
from appliance.boards import LONGEST_WAIT_SECONDS, Boards, Whole, monotonic_of
from appliance.config import Config, Limits, Paths
from appliance.contract import Address
from appliance.core.types import Outcome, Verdict
from appliance.drivers.recipes import Recipes
from appliance.drivers.records import Picture, Publication, Records
from tests.kit_boards import write_board_catalog, write_product
from tests.kit_brokers import until
from tests.kit_models import SIDE
from tests.test_records import accept, opened

PARTS = {"R1": "c-good", "R2": "c-good"}
PIXELS = 2 * SIDE * SIDE


class Room:
    """What stands between, over a real store."""

    def __init__(self, folder: Path, records: Records) -> None:
        self.config = Config(
            paths=Paths(catalog=folder / "catalog"), limits=Limits(picture_pixels=2 * PIXELS, board_seconds=100.0)
        )
        self.records, self.posted = records, list[Publication]()
        self.recipes = Recipes(catalogs.load(folder / "catalog"))
        self.boards = Boards(self.config, self.recipes, records, {}, self.posted.extend)

    def whole(self, name: str) -> Whole:
        address = Address("line1", "two", name, "_board")
        return Whole(name, address, self.recipes.of(address).products["two"], 0.0)

    def begin(self, part: str, arrived_seconds: float = 0.0) -> None:
        """A picture of a part of SN-1 from the spool."""
        (spooled,) = [one for one in self.records.waiting() if one.picture.part == part]
        self.boards.join(spooled, Address("line1", "two", "SN-1", part), arrived_seconds)

    def conclude(self, part: str) -> None:
        verdict = Verdict(f"id-{part}", Outcome.PASS, (), 0.0)
        part_of = self.boards.part_of(verdict)
        self.records.conclude(verdict.request, "pass", b"{}", "t", lambda _: None, part_of=part_of)
        self.boards.inspected(verdict)

    def told(self) -> dict[str, object]:
        """The one board verdict."""
        (publication,) = until(lambda: self.posted)
        body: dict[str, object] = json.loads(publication.body)
        return body


@pytest.fixture
def room(tmp_path: Path) -> Iterator[Room]:
    write_product(write_board_catalog(tmp_path / "catalog"), "two", PARTS)
    with opened(tmp_path / "state", clock=time.time) as records:
        yield Room(tmp_path, records)


def accept_part(room: Room, part: str) -> None:
    accept(room.records, f"id-{part}", product="two", board="SN-1", part=part, accepted_at=time.time())


def test_as_many_whole_boards_are_cut_at_a_time_as_the_largest_picture_has_pixels(room: Room) -> None:
    third = Picture("c", "line1", "two", "c", "_board", "", 0.0)
    assert room.boards.has_room(replace(third, product="gone")), "it is refused"
    for name in ("a", "b"):
        assert room.boards.has_room(replace(third, id=name, board=name))
        assert [request for request, _ in room.boards.begin_whole(room.whole(name))] == [f"{name}/R1", f"{name}/R2"]
    assert not room.boards.has_room(third)
    assert room.boards.has_room(replace(third, part="R1")), "a part's picture does not wait"
    assert room.boards.cut_inspected("a", "R1", Verdict("a/R1", Outcome.PASS, (), 0.0)) is None
    assert not room.boards.has_room(third)
    done = room.boards.cut_inspected("a", "R2", Verdict("a/R2", Outcome.FAIL, (), 0.0))
    assert done is not None
    assert done.verdict().outcome == "fail"
    assert room.boards.has_room(third)


def test_a_board_that_was_complete_on_record_and_had_no_verdict_has_it_at_the_next_start(room: Room) -> None:
    """The process ended between the last part's verdict and the board's."""
    for part in PARTS:
        accept_part(room, part)
        room.begin(part)
    room.conclude("R1")
    verdict = Verdict("id-R2", Outcome.PASS, (), 0.0)
    room.records.conclude("id-R2", "pass", b"{}", "t", lambda _: None, part_of=room.boards.part_of(verdict))
    until(lambda: room.records.counts.verdicts == 2)
    again = Room(room.config.paths.catalog.parent, room.records)
    again.boards.resume()
    body = again.told()
    assert (body["request_id"], body["outcome"], body["missing"]) == ("board/id-R1", "pass", [])


def test_a_board_on_record_keeps_its_recipe_and_its_time(room: Room) -> None:
    """It came after `before`, however long ago that is by now."""
    before = time.monotonic()
    accept_part(room, "R1")
    room.begin("R1")
    room.conclude("R1")
    until(lambda: room.records.counts.verdicts == 1)
    write_product(room.config.paths.catalog, "two", {"R1": "c-good", "R7": "c-good"})
    again = Room(room.config.paths.catalog.parent, room.records)
    again.boards.resume()
    again.boards.look(before + 99.0)
    assert again.boards.numbers()["open"] == 1
    again.boards.look(time.monotonic() + 101.0)
    assert (again.told()["outcome"], again.told()["missing"]) == ("incomplete", ["R2"])


def test_a_picture_that_waited_in_the_spool_while_its_board_was_concluded_is_too_late_after_a_restart_too(
    room: Room,
) -> None:
    for part in PARTS:
        accept_part(room, part)
    room.begin("R1")
    room.conclude("R1")
    room.boards.look(1e9)
    assert room.told()["missing"] == ["R2"]
    again = Room(room.config.paths.catalog.parent, room.records)
    again.boards.resume()
    (spooled,) = room.records.waiting()
    again.begin("R2", monotonic_of(spooled.picture.accepted_at))
    assert again.boards.numbers()["open"] == 0
    assert again.boards.numbers()["too_late"] == 1


def test_a_wall_clock_that_ran_backwards_or_leapt_does_little() -> None:
    now, wall = time.monotonic(), time.time()
    assert monotonic_of(wall + 500.0) >= now
    assert monotonic_of(wall - 5.0) == pytest.approx(now - 5.0, abs=1.0)
    assert monotonic_of(wall - 1e8) == pytest.approx(now - LONGEST_WAIT_SECONDS, abs=1.0)
