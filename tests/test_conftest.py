"""Tests are skipped only for a reason, and never where the thing was promised; the longest files begin first."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import LONGEST_FIRST, NEEDS, Need, decide

ABSENT = Need("APPLIANCE_REQUIRE_THING", lambda: "not installed: thing")
PRESENT = Need("APPLIANCE_REQUIRE_THING", lambda: None)


@pytest.mark.parametrize("environment", [{}, {"APPLIANCE_REQUIRE_THING": "0"}, {"APPLIANCE_REQUIRE_THING": ""}])
def test_what_is_missing_skips_with_its_reason(environment: dict[str, str]) -> None:
    with pytest.raises(pytest.skip.Exception, match="not installed: thing"):
        decide(ABSENT, environment)


def test_what_is_missing_fails_where_it_was_promised() -> None:
    with pytest.raises(pytest.fail.Exception, match="APPLIANCE_REQUIRE_THING is set"):
        decide(ABSENT, {"APPLIANCE_REQUIRE_THING": "1"})


def test_what_is_there_runs() -> None:
    decide(PRESENT, {"APPLIANCE_REQUIRE_THING": "1"})


def test_every_marker_has_its_rule(pytestconfig: pytest.Config) -> None:
    markers = {str(line).split(":")[0] for line in pytestconfig.getini("markers")}
    assert markers >= NEEDS.keys()


def test_every_file_that_is_begun_first_is_there() -> None:
    assert [name for name in LONGEST_FIRST if not (Path(__file__).parent / name).is_file()] == []
