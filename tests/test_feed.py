"""From the spool to who decides, in one process without a broker: in order, in time, and nothing is left behind."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from appliance import catalog as catalogs
from appliance.boards import written
from appliance.config import Config, Limits, Paths
from appliance.contract import Message
from appliance.core.types import Tick
from appliance.drivers.records import OpenBoard, PartOf, Records
from appliance.drivers.systemd import Supervisor
from appliance.service import Service
from appliance.startup import install
from tests.kit_boards import board_pixels, encoded, infer, part_of, write_board_catalog, write_product
from tests.kit_box import compiled
from tests.kit_brokers import until
from tests.kit_models import SIDE
from tests.test_records import WAIT_SECONDS, accept

PROFILE = Path(__file__).parents[1] / "profiles" / "default.json"
PIXELS = board_pixels(2)


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_board_catalog(tmp_path_factory.mktemp("feed") / "catalog")
    write_product(folder, "two", {"R1": "c-good", "R2": "c-good"})
    compiled(folder)
    return folder


class Feed:
    """A service that is turned by hand."""

    def __init__(self, config: Config, records: Records) -> None:
        self.records = records
        self.service = Service(install(config), records, Supervisor(None, None), None)
        self._packets = 0

    def deliver(self, topic: str, payload: bytes, name: str) -> None:
        self._packets += 1
        user = {"request-id": name}
        self.service._intake.deliver(
            Message(
                topic=topic,
                payload=payload,
                qos=1,
                retain=False,
                duplicate=False,
                packet_id=self._packets,
                generation=0,
                response_topic=None,
                correlation=None,
                user=user,
            )
        )

    def turn_until(self, holds: Callable[[], bool]) -> None:
        ends = time.monotonic() + WAIT_SECONDS
        while not holds():
            assert time.monotonic() < ends, "the condition did not come true in time"
            self.service._turn()

    def boards(self) -> dict[str, Any]:
        """The verdicts of collected boards by their ids."""
        with closing(sqlite3.connect(self.records.folder / "records.db")) as store:
            rows = store.execute("SELECT id, body FROM verdicts WHERE id LIKE 'board/%'").fetchall()
        return {name: json.loads(body) for name, body in rows}


def configured(tmp_path: Path, catalog: Path, **limits: float) -> Config:
    paths = Paths(catalog=catalog, state=tmp_path, store=catalog.with_name("store"), profile=PROFILE)
    return Config(paths=paths, limits=Limits.model_validate(limits))


@contextmanager
def fed(config: Config) -> Iterator[Feed]:
    with Records.open(config.paths.state, spool_bytes=10**9, verdict_days=1) as records:
        feed = Feed(config, records)
        try:
            yield feed
        finally:
            feed.service.close()


def test_nothing_stays_of_pictures_that_are_answered(tmp_path: Path, catalog: Path) -> None:
    """Whoever reads the spool may be quicker than who tells that a picture was committed."""
    with fed(configured(tmp_path, catalog)) as feed:
        feed.service._intake.start()
        for number in range(1000):
            feed.deliver(infer("-", "-", "c-good"), part_of(PIXELS, 0), f"q{number}")
            if number % 100 == 0:
                feed.service._turn()
        feed.turn_until(lambda: feed.records.counts.verdicts == 1000)
        until(lambda: feed.records.counts.spooled == 0)
        assert len(feed.service._inspections) == 0
        assert feed.service._feed._accepted_seconds == {}


def test_a_part_that_came_in_time_counts_however_late_the_box_looks(
    tmp_path: Path, catalog: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is accepted before the board's time is up, and its wake-up stands behind another event until after that."""
    with fed(configured(tmp_path, catalog, board_seconds=60.0)) as feed:
        feed.service._intake.start()
        feed.deliver(infer("two", "S1", "R1"), part_of(PIXELS, 0), "p1")
        feed.turn_until(lambda: feed.records.counts.verdicts == 1)
        feed.service._inbox.tell(Tick())
        feed.deliver(infer("two", "S1", "R2"), part_of(PIXELS, 1), "p2")
        until(lambda: feed.records.counts.spooled == 1)
        clock = time.monotonic
        monkeypatch.setattr(time, "monotonic", lambda: clock() + 60.0)
        assert feed.service._boards.is_over(time.monotonic()), "and nobody has looked"
        feed.turn_until(lambda: feed.records.counts.verdicts == 3)
        assert feed.boards()["board/p1"]["missing"] == []


def test_suspects_that_go_first_hasten_no_board(tmp_path: Path, catalog: Path) -> None:
    """R2 came two seconds after R1; the picture that was in hand at a crash came long after both."""
    whole = encoded(board_pixels(2, 5))
    config = configured(tmp_path, catalog, board_seconds=30.0, picture_pixels=int(SIDE * SIDE * 2 * 1.5))
    now, recipe = time.time(), written(catalogs.load(catalog).products["two"])
    with Records.open(tmp_path, spool_bytes=10**9, verdict_days=1) as records:
        for name, board, part, payload, ago in (
            ("p1", "S1", "R1", part_of(PIXELS, 0), 100),
            ("w1", "S2", "_board", whole, 99),
            ("p2", "S1", "R2", part_of(PIXELS, 1), 98),
            ("w2", "S3", "_board", whole, 10),
        ):
            accept(records, name, payload, line="line1", product="two", board=board, part=part, accepted_at=now - ago)
        records.open_board(OpenBoard("board/p1", "line1", "two", "S1", now - 100, recipe))
        part_one = PartOf("board/p1", None, None)
        records.conclude("p1", "pass", b"{}", "t", lambda answer: None, part_of=part_one)
    with closing(sqlite3.connect(tmp_path / "records.db")) as store, store:
        store.execute("UPDATE pictures SET attempts = 1 WHERE id = 'w2'")
    with fed(config) as feed:
        feed.service._boards.resume()
        feed.service._take_in(feed.service._feed.suspects())
        feed.service._decide(Tick())
        feed.turn_until(lambda: feed.records.counts.verdicts == 5)
        assert feed.boards()["board/p1"]["missing"] == []


def test_suspected_whole_boards_come_one_by_one_where_two_have_no_room(tmp_path: Path, catalog: Path) -> None:
    """Three were in hand at a crash. They go before the one that came first, which nobody suspects."""
    names = ("w0", "w1", "w2", "w3")
    with Records.open(tmp_path, spool_bytes=10**9, verdict_days=1) as records:
        for seed, name in enumerate(names):
            whole = encoded(board_pixels(2, seed))
            accept(records, name, whole, line="line1", product="two", board=name, part="_board")
    with closing(sqlite3.connect(tmp_path / "records.db")) as store, store:
        store.execute("UPDATE pictures SET attempts = 1 WHERE id != 'w0'")
    most = 0

    def is_answered() -> bool:
        nonlocal most
        most = max(most, feed.service._boards.numbers()["whole"])
        return feed.records.counts.verdicts == len(names)

    with fed(configured(tmp_path, catalog, picture_pixels=int(SIDE * SIDE * 2 * 1.5))) as feed:
        feed.service._take_in(feed.service._feed.suspects())
        feed.turn_until(is_answered)
    with closing(sqlite3.connect(tmp_path / "records.db")) as store:
        order = [name for (name,) in store.execute("SELECT id FROM verdicts ORDER BY rowid")]
    assert (most, order) == (1, ["w1", "w2", "w3", "w0"])


def test_a_box_that_is_behind_mixes_no_two_inspections_of_a_board(tmp_path: Path, catalog: Path) -> None:
    """R1 came alone; much later the same board came again, whole. All of it lies in the spool."""
    now = time.time()
    with Records.open(tmp_path, spool_bytes=10**9, verdict_days=1) as records:
        for name, part, ago in (("p1", "R1", 100), ("q1", "R1", 20), ("q2", "R2", 19)):
            payload = part_of(PIXELS, int(part[1]) - 1)
            accept(records, name, payload, line="line1", product="two", board="S1", part=part, accepted_at=now - ago)
    with fed(configured(tmp_path, catalog, board_seconds=30.0)) as feed:
        feed.service._boards.resume()
        feed.turn_until(lambda: feed.records.counts.verdicts == 5)
        found = {name: (board["outcome"], board["missing"]) for name, board in feed.boards().items()}
    assert found == {"board/p1": ("incomplete", ["R2"]), "board/q1": ("pass", [])}
