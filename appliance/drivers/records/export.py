"""Records as rows for other programs: a JSON object or a line of CSV for each verdict, with all that traces it."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from typing import Any, TextIO

from appliance.drivers.records.archive import Record

COLUMNS = (
    *("request_id", "result_id", "outcome", "reason", "detail", "component", "line", "product", "board", "part"),
    *("picture_sha256", "has_picture", "captured_at", "accepted_at", "finished_at", "recorded_at"),
    *("waited_milliseconds", "box", "experts", "findings"),
)


def plain(record: Record) -> dict[str, Any]:
    """The verdict's body, and what is known beside it; times are ISO 8601 in UTC."""
    return {
        **json.loads(record.body),
        "captured_at": record.captured_at,
        "accepted_at": _iso(record.accepted_at),
        "recorded_at": _iso(record.recorded_at),
        "has_picture": record.has_picture,
    }


def write_lines(records: Iterable[Record], file: TextIO) -> None:
    """One JSON object a line."""
    for record in records:
        file.write(json.dumps(plain(record), separators=(",", ":")) + "\n")


def write_csv(records: Iterable[Record], file: TextIO) -> None:
    """A heading, then a line for each verdict; experts and findings are one cell each, divided by semicolons."""
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(COLUMNS)
    for record in records:
        row = plain(record)
        row["experts"] = "; ".join(f"{part}{_step(step)}" for part, step in _all(row, "steps"))
        found = [f"{part}{_finding(finding)}" for part, finding in _all(row, "findings")]
        row["findings"] = "; ".join([*found, *(f"{part} missing" for part in row.get("missing", ()))])
        writer.writerow(row.get(column, "") for column in COLUMNS)


def _all(body: dict[str, Any], key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Of the picture, or of all parts of a board: the part's name before each."""
    yield from (("", one) for one in body.get(key, ()))
    yield from ((f"{part['part']} ", one) for part in body.get("parts", ()) for one in part[key])


def _step(step: dict[str, Any]) -> str:
    """Verdicts of releases before these were recorded lack some."""
    known = ("expert", "version", "precision", "weights_sha256", "threshold", "device", "milliseconds")
    return " ".join(f"{step[key]}" for key in known if key in step)


def _finding(finding: dict[str, Any]) -> str:
    box = "" if finding["box"] is None else " " + ",".join(f"{edge:g}" for edge in finding["box"])
    return f"{finding['expert']} {finding['label']} {finding['score']:.4f}{' fails' if finding['fails'] else ''}{box}"


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
