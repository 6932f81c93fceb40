"""The audit finds what it is there to find, `bench faults` runs, and docs/faults.md names tests that there are."""

from __future__ import annotations

import ast
import json
import re
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from appliance.drivers.records.schema import connect
from appliance.lab.audit import Audit, audited
from appliance.lab.faults import Sample, is_flat

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "faults.md"
LEAST_ROWS = 40
GOOD = Audit(2, 2, 2, lost=0, conflicting=0, phantom=0, damage=None)
A, B = {"request_id": "a", "outcome": "pass"}, {"request_id": "b", "outcome": "fail"}
HEARD = {"a": {b'{"request_id": "a", "outcome": "pass"}'}}


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """A store in which a and b have their verdicts."""
    with closing(connect(tmp_path / "records.db")) as db:
        db.execute("CREATE TABLE verdicts (id TEXT, body BLOB)")
        rows = [(body["request_id"], json.dumps(body).encode()) for body in (A, B)]
        db.executemany("INSERT INTO verdicts VALUES (?, ?)", rows)
    return tmp_path


def test_what_was_published_answered_and_recorded_alike_is_clean(state: Path) -> None:
    assert audited(state, {"a", "b"}, {"a": A, "b": B}, HEARD) == GOOD
    assert GOOD.is_clean


@pytest.mark.parametrize(
    ("published", "answers", "heard", "count"),
    [
        ({"a", "b", "c"}, {"a": A, "b": B}, HEARD, "lost"),
        ({"a", "b", "c"}, {"a": A, "b": B, "c": A}, HEARD, "lost"),
        ({"a", "b"}, {"a": A}, HEARD, "lost"),
        ({"a", "b"}, {"a": A, "b": A}, HEARD, "conflicting"),
        ({"a", "b"}, {"a": A, "b": B}, {"b": {b"another"}}, "conflicting"),
        ({"a"}, {"a": A}, HEARD, "phantom"),
    ],
)
def test_what_is_lost_or_told_otherwise_is_found(
    state: Path, published: set[str], answers: dict[str, Any], heard: dict[str, set[bytes]], count: str
) -> None:
    found = audited(state, published, answers, heard)
    assert getattr(found, count) == 1
    assert not found.is_clean


def test_a_damaged_store_is_found(state: Path) -> None:
    with closing(sqlite3.connect(state / "records.db")) as db:
        db.execute("PRAGMA writable_schema = ON")
        db.execute("UPDATE sqlite_schema SET rootpage = 99 WHERE name = 'verdicts'")
        db.commit()
    with pytest.raises(sqlite3.DatabaseError):
        audited(state, set(), {}, {})


@pytest.mark.parametrize(
    ("last", "flat"), [(Sample(104, 10, 9), True), (Sample(120, 10, 9), False), (Sample(100, 12, 9), False)]
)
def test_a_service_that_grew_is_found(last: Sample, flat: bool) -> None:
    assert is_flat([Sample(100, 10, 9)] * 3 + [last] * 3) is flat


def test_a_few_seconds_of_faults_lose_nothing(tmp_path: Path) -> None:
    asked = ["--minutes", "0.1", "--broker", "embedded", "--folder", str(tmp_path), "--json"]
    command = [sys.executable, "-m", "appliance.cli", "bench", "faults", *asked]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=240, stdin=subprocess.DEVNULL)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert found["published"] == found["verdicts"] == found["records"] > 0
    assert (found["lost"], found["conflicting"]) == (0, 0)
    assert sum(found["kills"].values()) > 0
    assert list(tmp_path.iterdir()) == []


def test_every_row_of_the_table_names_a_test_that_is_there_or_says_why_there_is_none() -> None:
    rows = _rows()
    assert [row[0] for row in rows] == [str(number) for number in range(1, len(rows) + 1)]
    named = {row[0]: re.findall(r"`(test_\w+\.py)::(test_\w+)`", row[-1]) for row in rows}
    missing = {(file, test) for tests in named.values() for file, test in tests if test not in _tests_of(file)}
    assert missing == set()
    assert [
        number for number, row in ((r[0], r) for r in rows) if not named[number] and "not automated:" not in row[-1]
    ] == []
    assert sum(bool(tests) for tests in named.values()) >= LEAST_ROWS


def _rows() -> list[list[str]]:
    lines = PAGE.read_text("utf-8").splitlines()
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines if re.match(r"\| \d+ \|", line)]


def _tests_of(file: str) -> set[str]:
    path = ROOT / "tests" / file
    tree = ast.parse(path.read_text("utf-8")) if path.is_file() else ast.Module([], [])
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
