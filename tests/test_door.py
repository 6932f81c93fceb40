"""`appliance bench door` measures what it says, with the real service; no test here looks at a time."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from appliance.errors import BrokerError
from appliance.lab.door import DOOR_BYTES, Found, Lap, picture, summed_up, targets
from appliance.lab.site import kinds_here
from appliance.report import print_door

MODELS = Path(__file__).parents[1] / "models_onnx"
LAP = Lap(1000.0, 500.0, (0.002, 0.004, 0.003), 38.0, 40.0, 300.0, 400.0, 600.0, (0.001, 0.002))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    """What `bench door --quick --json` printed."""
    folder = tmp_path_factory.mktemp("door")
    asked = ["--quick", "--broker", "embedded", "--folder", str(folder), "--catalog", str(MODELS), "--json"]
    command = [sys.executable, "-m", "appliance.cli", "bench", "door", *asked]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=240, stdin=subprocess.DEVNULL)
    assert ran.returncode == 0, ran.stderr
    assert list(folder.iterdir()) == [], "broker, experts and state are gone afterwards"
    shown: dict[str, Any] = json.loads(ran.stdout)
    return shown


def test_the_door_is_described_by_its_fields(found: Mapping[str, Any]) -> None:
    promised = ("images_per_second_durable", "fraction_of_broker_rate", "goodput_fraction_of_bare_loop")
    for name in (*promised, "round_trip_p50_seconds", "fsync_p99_seconds", "demo_fraction_of_smaller"):
        assert found[name] > 0
        assert found["brokers"]["embedded"][name] == found[name]
    assert len(found["brokers"]["embedded"]["targets"]) == 4
    assert 0.01 < found["work_seconds"] < 0.1


def test_people_see_a_table(found: Mapping[str, Any]) -> None:
    console = Console(record=True, width=160)
    print_door(found, console)
    text = console.export_text()
    assert "images per second durable" in text
    assert text.count("met") + text.count("missed") == 4


def test_fractions_are_those_of_a_round_and_what_is_told_are_medians() -> None:
    laps = [LAP, replace(LAP, broker_images_per_second=2000.0), replace(LAP, images_per_second_durable=100.0)]
    found = summed_up(laps)
    assert found.images_per_second_durable == 500.0
    assert found.fraction_of_broker_rate == 0.25
    assert found.goodput_fraction_of_bare_loop == 0.95
    assert found.demo_fraction_of_smaller == 0.75
    assert found.demo_fraction_of_both == pytest.approx(1.25)
    assert (found.round_trip_p50_seconds, found.round_trip_p99_seconds, found.fsync_p99_seconds) == (
        0.003,
        0.004,
        0.002,
    )


def test_every_target_says_whether_it_was_met() -> None:
    found: Found = summed_up([LAP])
    assert [(t.name, t.met) for t in targets("embedded", found)] == [
        ("fraction_of_broker_rate", True),
        ("goodput_fraction_of_bare_loop", True),
        ("demo_fraction_of_smaller", False),
        ("round_trip_p50_seconds", True),
    ]
    rate, *_ = targets("mosquitto", replace(found, images_per_second_durable=499.0))
    assert not rate.met


def test_a_picture_has_the_size_that_is_asked_for() -> None:
    assert abs(len(picture(DOOR_BYTES)) - DOOR_BYTES) < 1000


def test_a_broker_that_is_not_here_is_refused_with_those_that_are() -> None:
    with pytest.raises(BrokerError, match="no broker hive here \\(choose from embedded"):
        kinds_here("hive")
