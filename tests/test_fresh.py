"""Pictures that were just spooled are handed out from memory, within a bound; the disk has them all the same."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from appliance.drivers.records.fresh import FRESH_BYTES, Fresh
from appliance.errors import NotSpooled
from tests.test_records import accept, conclude, opened


def test_a_picture_that_was_just_spooled_is_not_read_from_the_disk(tmp_path: Path) -> None:
    with opened(tmp_path) as records:
        accept(records, "a", b"bytes")
        _lose_payloads(tmp_path)
        assert records.payload("a") == b"bytes"
        assert records.fresh_bytes == 5


def test_after_a_restart_it_comes_from_the_disk(tmp_path: Path) -> None:
    with opened(tmp_path) as records:
        accept(records, "a", b"bytes")
    with opened(tmp_path) as records:
        assert records.payload("a") == b"bytes"
        assert records.fresh_bytes == 0


def test_nothing_stays_in_memory_of_a_picture_that_has_its_verdict(tmp_path: Path) -> None:
    with opened(tmp_path) as records:
        accept(records, "a", b"bytes")
        conclude(records, "a", b"{}")
        assert records.fresh_bytes == 0
        with pytest.raises(NotSpooled):
            records.payload("a")


def test_a_picture_that_repeats_one_in_the_spool_is_kept_once(tmp_path: Path) -> None:
    with opened(tmp_path) as records:
        accept(records, "a", b"bytes")
        accept(records, "a", b"bytes")
        assert records.fresh_bytes == 5


def test_the_oldest_leave_for_new_ones_and_come_from_the_disk() -> None:
    fresh, third = Fresh(), bytes(FRESH_BYTES // 3)
    for id in "abcd":
        fresh.keep(id, third)
    assert fresh.get("a") is None
    assert [fresh.get(id) for id in "bcd"] == [third] * 3
    assert fresh.bytes == 3 * len(third)


def test_one_that_is_larger_than_all_may_be_is_not_kept() -> None:
    fresh = Fresh()
    fresh.keep("a", bytes(FRESH_BYTES + 1))
    assert fresh.get("a") is None
    assert fresh.bytes == 0


def _lose_payloads(folder: Path) -> None:
    with closing(sqlite3.connect(folder / "records.db")) as db, db:
        db.execute("UPDATE pictures SET payload = 'lost'")
