"""What was decided can be looked up, beside the running service or without it, and pictures stay within their quota."""

from __future__ import annotations

import csv
import io
import json
import os
import queue
import sqlite3
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from appliance.drivers.drawing import write_drawn
from appliance.drivers.records import Conclusion, New, Quota, Recorded, Records, Sort
from appliance.drivers.records.archive import PAGE_ROWS, Archive, Record, Wanted
from appliance.drivers.records.export import COLUMNS, plain, write_csv, write_lines
from appliance.drivers.records.schema import PRAGMAS
from appliance.errors import ConfigError, RecordsError
from tests import kit_box
from tests.kit_brokers import until
from tests.test_records import WAIT_SECONDS, accept, check_integrity, small_disk

__all__ = ["small_disk"]  # a fixture

DAY = 86_400.0


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def records(tmp_path: Path, clock: Clock) -> Iterator[Records]:
    with opened(tmp_path, clock) as store:
        yield store


def opened(folder: Path, clock: Clock, quota_bytes: int = 100) -> Records:
    quotas = {Sort.FAIL: Quota(quota_bytes, days=2.0)}
    return Records.open(folder, spool_bytes=10**8, verdict_days=10.0, quotas=quotas, clock=clock)


def conclude(
    records: Records, id: str, outcome: str = "pass", *, keep: Sort | None = None, reason: str | None = None
) -> None:
    answers: queue.Queue[Conclusion] = queue.Queue()
    records.conclude(id, outcome, body(id, outcome, reason), "topic", answers.put, keep=keep)
    answer = answers.get(timeout=WAIT_SECONDS)
    assert isinstance(answer, Recorded)
    for publication in answer.publications:
        records.published(publication.token)


def body(id: str, outcome: str, reason: str | None) -> bytes:
    step = {
        "expert": "e0",
        "version": "1",
        "weights_sha256": "8c01",
        "threshold": 0.5,
        "executor": "cpu-0",
        "device": "cpu",
        "milliseconds": 3.1,
    }
    finding = {"expert": "e0", "label": "open", "score": 0.91, "fails": outcome == "fail", "box": [2.0, 3.0, 9.0, 8.0]}
    known: dict[str, Any] = dict.fromkeys(COLUMNS)
    del known["experts"]
    known |= {"request_id": id, "outcome": outcome, "reason": reason, "findings": [finding], "steps": [step]}
    return json.dumps(known).encode()


def decided(records: Records, clock: Clock, count: int = 6) -> None:
    """p0, p1, …, a second apart, on two lines by turns; every third failed."""
    for number in range(count):
        clock.now += 1.0
        accept(records, f"p{number}", line=f"line{number % 2}")
        conclude(records, f"p{number}", "pass" if number % 3 else "fail", reason="run" if number == 4 else None)


@pytest.mark.parametrize(
    ("wanted", "ids"),
    [
        (Wanted(), ["p5", "p4", "p3", "p2", "p1", "p0"]),
        (Wanted(line="line1"), ["p5", "p3", "p1"]),
        (Wanted(outcome="fail"), ["p3", "p0"]),
        (Wanted(line="line0", outcome="fail"), ["p0"]),
        (Wanted(reason="run"), ["p4"]),
        (Wanted(since=1003.0, until=1005.0), ["p3", "p2"]),
        (Wanted(id="p2"), ["p2"]),
        (Wanted(id="p"), ["p5", "p4", "p3", "p2", "p1", "p0"]),
        (Wanted(part="ghost"), []),
        (Wanted(line="x' OR '1'='1"), []),
    ],
)
def test_verdicts_are_found_by_what_is_known_of_them_the_newest_first(
    records: Records, tmp_path: Path, clock: Clock, wanted: Wanted, ids: list[str]
) -> None:
    decided(records, clock)
    with Archive(tmp_path) as archive:
        assert [record.id for record in archive.find(wanted)] == ids


def test_more_than_a_page_is_found_in_pages(records: Records, tmp_path: Path) -> None:
    """All at the same second, which orders none of them."""
    answers: queue.Queue[Conclusion] = queue.Queue()
    for number in range(PAGE_ROWS + 2):
        accept(records, f"p{number}")
        records.conclude(f"p{number}", "pass", b"{}", "topic", answers.put)
    for _ in range(PAGE_ROWS + 2):
        answers.get(timeout=WAIT_SECONDS)
    with Archive(tmp_path) as archive:
        assert len({record.id for record in archive.find(Wanted())}) == PAGE_ROWS + 2


def test_it_reads_what_a_stopped_service_left(tmp_path: Path, clock: Clock) -> None:
    with opened(tmp_path, clock) as records:
        decided(records, clock, 1)
    with Archive(tmp_path) as archive:
        assert archive.one("p0").id == "p0"


def test_an_id_that_means_nothing_or_several_is_named(records: Records, tmp_path: Path, clock: Clock) -> None:
    decided(records, clock, 2)
    with Archive(tmp_path) as archive:
        with pytest.raises(RecordsError, match="no verdict of q"):
            archive.one("q")
        with pytest.raises(RecordsError, match="several ids begin with p"):
            archive.one("p")
    with pytest.raises(RecordsError, match="no records in"):
        Archive(tmp_path / "elsewhere")


def test_an_id_that_is_how_another_begins_is_itself(records: Records, tmp_path: Path) -> None:
    for id in ("p1", "p10"):
        accept(records, id)
        conclude(records, id)
    with Archive(tmp_path) as archive:
        assert archive.one("p1").id == "p1"


def test_an_export_has_a_row_for_every_verdict_with_all_that_traces_it(
    records: Records, tmp_path: Path, clock: Clock
) -> None:
    decided(records, clock)
    lines, table = io.StringIO(), io.StringIO()
    with Archive(tmp_path) as archive:
        write_lines(archive.find(Wanted()), lines)
        write_csv(archive.find(Wanted()), table)
        first = plain(archive.one("p0"))
    assert [json.loads(line)["request_id"] for line in lines.getvalue().splitlines()][-1] == "p0"
    assert first["accepted_at"] == "1970-01-01T00:16:39.000+00:00"
    heading, *rows = csv.reader(io.StringIO(table.getvalue()))
    assert (tuple(heading), len(rows)) == (COLUMNS, 6)
    last = dict(zip(heading, rows[-1], strict=True))
    assert (last["request_id"], last["outcome"], last["reason"]) == ("p0", "fail", "")
    assert last["experts"] == "e0 1 8c01 0.5 cpu 3.1"
    assert last["findings"] == "e0 open 0.9100 fails 2,3,9,8"


# The pictures beside them.


def test_a_picture_stays_with_its_verdict_when_it_is_asked_for(records: Records, tmp_path: Path) -> None:
    accept(records, "a", b"a picture")
    conclude(records, "a", "fail", keep=Sort.FAIL)
    accept(records, "b", b"b picture")
    conclude(records, "b")
    with Archive(tmp_path) as archive:
        assert archive.picture("a") == b"a picture"
        assert [record.has_picture for record in archive.find(Wanted())] == [False, True]
        with pytest.raises(RecordsError, match="the picture of b is not kept"):
            archive.picture("b")
    assert records.counts.spooled == 0


def test_the_oldest_pictures_leave_when_they_exceed_their_quota(records: Records, tmp_path: Path, clock: Clock) -> None:
    for number in range(8):
        clock.now += 1.0
        accept(records, f"p{number}", bytes([number]) * 40)
        conclude(records, f"p{number}", "fail", keep=Sort.FAIL)
    assert _kept(tmp_path) == ["p7", "p6"]


def test_a_sort_without_a_quota_is_not_kept(records: Records, tmp_path: Path) -> None:
    accept(records, "a")
    conclude(records, "a", "error", keep=Sort.DOUBTFUL)
    assert _kept(tmp_path) == []


def test_a_smaller_quota_is_reached_step_by_step(tmp_path: Path, clock: Clock) -> None:
    with opened(tmp_path, clock, 1000) as records:
        for number in range(12):
            accept(records, f"p{number}", bytes(40))
            conclude(records, f"p{number}", "fail", keep=Sort.FAIL)
    with opened(tmp_path, clock, 40) as records:
        for number in range(12, 16):
            clock.now += 1.0
            accept(records, f"p{number}", bytes(40))
            conclude(records, f"p{number}", "fail", keep=Sort.FAIL)
    assert _kept(tmp_path) == ["p15"]


def test_pictures_leave_after_their_days_and_verdicts_take_theirs_along(tmp_path: Path, clock: Clock) -> None:
    with opened(tmp_path, clock) as records:
        for number in range(2):
            accept(records, f"p{number}")
            conclude(records, f"p{number}", "fail", keep=Sort.FAIL)
            clock.now += 1.5 * DAY
        until(lambda: not records.counts.unpublished)
    with opened(tmp_path, clock):
        until(lambda: _kept(tmp_path) == ["p1"])
    clock.now += 20 * DAY
    with opened(tmp_path, clock) as records:
        accept(records, "p2")
        conclude(records, "p2")
        assert records.counts.verdicts == 3, "the clock may have leapt"
    with opened(tmp_path, clock) as records:
        until(lambda: records.counts.verdicts == 1)
        assert records.verdict("p2") is not None
    assert _kept(tmp_path) == []
    check_integrity(tmp_path)


def test_a_full_disk_keeps_no_picture_and_records_the_verdict(
    small_disk: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("appliance.drivers.records.writer.BALLAST_BYTES", 800_000)
    monkeypatch.setattr("appliance.drivers.records.schema.PRAGMAS", (*PRAGMAS, "wal_autocheckpoint = 8"))
    with opened(small_disk, clock, 10**9) as records:
        taken = 0
        while isinstance(accept(records, f"p{taken}", bytes(50_000)), New):
            taken += 1
        conclude(records, "p0", "fail", keep=Sort.FAIL)
        assert records.verdict("p0") is not None
        assert _kept(small_disk) == []


def make_former(folder: Path) -> None:
    with closing(sqlite3.connect(folder / "records.db")) as db:
        db.executescript(
            "DROP TABLE kept; DROP TABLE crashes; DROP TABLE totals; DROP INDEX suspects; DROP INDEX verdicts_by_place;"
            "DROP TABLE board_parts; DROP TABLE boards;"
            "ALTER TABLE outbox DROP COLUMN resent; PRAGMA user_version = 1;"
        )


@pytest.mark.parametrize("is_former", [False, True], ids=["of this release", "of the former release"])
def test_a_store_on_a_full_disk_is_opened_at_the_cost_of_its_ballast(
    small_disk: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch, is_former: bool
) -> None:
    monkeypatch.setattr("appliance.drivers.records.writer.BALLAST_BYTES", 800_000)
    with opened(small_disk, clock) as records:
        decided(records, clock, 2)
        accept(records, "a")
    if is_former:
        make_former(small_disk)
    with suppress(OSError), (small_disk / "other").open("wb", buffering=0) as other:
        while other.write(bytes(4096)):
            pass
    assert os.statvfs(small_disk).f_bavail == 0
    with opened(small_disk, clock) as records:
        assert records.trouble
        conclude(records, "a", "fail")
        assert records.verdict("a") is not None
        (small_disk / "other").unlink()
        until(lambda: records.trouble is None)


def test_a_store_of_the_former_release_is_taken_over(tmp_path: Path, clock: Clock) -> None:
    with opened(tmp_path, clock) as records:
        decided(records, clock, 2)
    make_former(tmp_path)
    with pytest.raises(RecordsError, match="another release"):
        Archive(tmp_path)
    with opened(tmp_path, clock) as records:
        assert records.counts.verdicts == 2
        assert accept(records, "a") == New(3)
        conclude(records, "a", "fail", keep=Sort.FAIL)
    assert _kept(tmp_path) == ["a"]


def test_boxes_are_drawn_where_they_were_found(tmp_path: Path) -> None:
    finding = {"label": "open", "score": 0.9, "fails": True, "box": [2.0, 3.0, 9.0, 8.0]}
    sound = {"label": "sound", "score": 0.9, "fails": False, "box": None}
    plain_picture = kit_box.picture(1, 16)
    write_drawn(plain_picture, {"findings": [finding, sound]}, tmp_path / "out.png", max_pixels=1000)
    with Image.open(tmp_path / "out.png") as drawn:
        assert drawn.size == (400, 400), "enlarged, so that its label can be read"
        assert drawn.getpixel((2 * 25, 5 * 25)) == (230, 30, 30)
    with pytest.raises(ConfigError, match="cannot be written"):
        write_drawn(plain_picture, {"findings": []}, tmp_path / "out.nothing", max_pixels=1000)


def test_of_a_whole_board_the_parts_that_did_not_pass_are_drawn_with_what_was_found(tmp_path: Path) -> None:
    finding = {"label": "open", "score": 0.9, "fails": True, "box": [230.0, 230.0, 250.0, 250.0]}
    parts = [
        {"part": "R1", "outcome": "pass", "rect": [10, 10, 50, 50], "findings": []},
        {"part": "R2", "outcome": "fail", "rect": [200, 200, 100, 90], "findings": [finding]},
    ]
    write_drawn(kit_box.picture(1, 400), {"parts": parts}, tmp_path / "out.png", max_pixels=400 * 400)
    with Image.open(tmp_path / "out.png") as drawn:
        assert drawn.getpixel((200, 270)) == drawn.getpixel((300, 270)) == (230, 30, 30)
        assert drawn.getpixel((230, 245)) == (230, 30, 30)
        assert drawn.getpixel((10, 40)) != (230, 30, 30)


def test_a_board_is_exported_with_the_experts_and_findings_of_all_its_parts(tmp_path: Path, clock: Clock) -> None:
    finding = {"expert": "e", "label": "open", "score": 0.9, "fails": True, "box": None}
    step = {"expert": "e", "version": "1"}
    part = {"part": "R1", "outcome": "fail", "findings": [finding], "steps": [step]}
    other = {"part": "R2", "outcome": "pass", "findings": [], "steps": []}
    known = dict.fromkeys(COLUMNS, "-") | {"outcome": "fail", "parts": [part, other], "missing": ["R3"]}
    del known["component"], known["findings"], known["experts"]
    out = io.StringIO()
    write_csv([Record("b", 0.0, None, 0.0, False, json.dumps(known).encode())], out)
    (row,) = csv.DictReader(io.StringIO(out.getvalue()))
    assert (row["component"], row["experts"]) == ("", "R1 e 1")
    assert row["findings"] == "R1 e open 0.9000 fails; R3 missing"


def _kept(folder: Path) -> list[str]:
    with Archive(folder) as archive:
        return [record.id for record in archive.find(Wanted()) if record.has_picture]
