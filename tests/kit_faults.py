"""What every test of a fault needs: a small catalogue, a line that keeps its pictures, and the audit at the end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from appliance.lab.audit import Line
from tests.kit_box import Box, compiled, picture, write_catalog

EXPERTS = 2


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(write_catalog(tmp_path_factory.mktemp("faults") / "catalog", EXPERTS))


def impatient(box: Box) -> Box:
    """The same box, that gives its broker two seconds."""
    box.config.write_text(box.config.read_text().replace("keepalive_seconds = 5", "keepalive_seconds = 2"))
    return box


@contextmanager
def audited(box: Box, port: int) -> Iterator[Line]:
    """A line at this port. At the end everything it published has been answered, and once: nothing is lost."""
    with Line(port, resend_seconds=1.0) as line:
        yield line
        assert line.wait(120.0), f"{line.camera.waiting} pictures were never answered: {box.log_text}"
        assert box.stop() == 0, box.log_text
        found = line.audit(box.folder / "state")
    assert found.is_clean, found
    assert found.published == found.verdicts == found.records
    assert not any(answer.is_rejected for answer in line.answers.values())


def publish(line: Line, count: int, first: int = 0) -> None:
    """So many different pictures, the experts by turns."""
    for number in range(first, first + count):
        line.publish(f"c-e{number % EXPERTS}", picture(number))
