"""Pictures that were given up are kept within a quota, and nobody waits for that."""

from __future__ import annotations

import json
import os
from pathlib import Path

from appliance.drivers.deadletters import DeadLetters
from appliance.drivers.records import Picture


def picture(name: str) -> Picture:
    return Picture(name, "line1", "-", "-", "R1", "77ab", 999.0, correlation=b"\0")


def test_a_dead_letter_is_kept_as_it_came_beside_what_is_known_of_it(tmp_path: Path) -> None:
    letters = DeadLetters(tmp_path / "quarantine", 1000)
    letters.keep(picture("a:1.b"), b"bytes", 3)
    assert (tmp_path / "quarantine" / "a:1.b.picture").read_bytes() == b"bytes"
    known = json.loads((tmp_path / "quarantine" / "a:1.b.json").read_text("utf-8"))
    assert (known["id"], known["picture_sha256"], known["picture_bytes"], known["attempts"]) == ("a:1.b", "77ab", 5, 3)


def test_the_oldest_leave_when_there_are_too_many(tmp_path: Path) -> None:
    letters = DeadLetters(tmp_path, 25)
    for number in range(4):
        letters.keep(picture(f"p{number}"), bytes(10), 3)
        os.utime(tmp_path / f"p{number}.picture", (number, number))
    assert {path.name for path in tmp_path.iterdir()} == {"p2.json", "p2.picture", "p3.json", "p3.picture"}
    assert letters.numbers() == {"kept": 4, "dropped": 2, "failed": 0}


def test_one_that_exceeds_the_quota_alone_is_not_kept(tmp_path: Path) -> None:
    letters = DeadLetters(tmp_path, 5)
    letters.keep(picture("large"), bytes(10), 3)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_takes_nothing_stops_nobody(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    letters = DeadLetters(tmp_path / "file" / "quarantine", 1000)
    letters.keep(picture("a"), b"bytes", 3)
    assert letters.numbers() == {"kept": 0, "dropped": 0, "failed": 1}
