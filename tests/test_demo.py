"""The demo on the shipped experts: the first thing a stranger runs."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from appliance import catalog as catalogs
from appliance.config import Config, Mqtt
from appliance.errors import BrokerError
from appliance.lab.boards import Part, parts_of, streams
from appliance.lab.score import Score, broken_promises, closing, compared
from appliance.lab.watch import Watch
from appliance.samples import SOUND
from tests import kit_brokers
from tests.kit_box import STATS, STATUS
from tests.kit_brokers import Nats, nats

__all__ = ["nats"]  # a fixture

MODELS = Path(__file__).parents[1] / "models_onnx"
PART = Part("line1", "P1", "SN-1", "R1", "resistor", (0, 0, 8, 8), SOUND, b"picture")


def test_the_demo_answers_every_picture_under_a_third_of_the_memory(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "appliance.cli", "demo", "--json", "--pictures", "300", "--folder", str(tmp_path)]
    ran = subprocess.run([*command, "--catalog", str(MODELS)], capture_output=True, text=True, timeout=240)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert found["broken"] == []
    assert (found["pictures"], found["verdicts"], found["different_verdicts"], found["refused"]) == (300, 300, 0, 0)
    assert found["peak_weights_bytes"] <= found["budget_bytes"]
    assert found["anonymous_peak_bytes"] <= found["anonymous_promise_bytes"]
    assert 0 < found["experts_resident_max"] <= found["experts"] // 3 + 1
    assert found["evictions"] > 0
    assert found["simulation_agrees"]
    assert found["missed_defects"] <= 0.15 * found["defective"]
    assert found["images_per_second"] > 0


def test_the_lines_interleave_their_boards_and_every_part_has_its_truth() -> None:
    products = list(catalogs.load(MODELS).products.values())
    parts = list(islice(streams(products, 4), 400))
    assert [part.line for part in parts[:4]] == ["line1", "line2", "line3", "line4"]
    assert any(part.truth == SOUND for part in parts)
    assert any(part.truth not in (SOUND, None) for part in parts)
    assert len({(p.line, p.board, p.part) for p in parts}) == 400


def test_a_sound_board_is_sound_everywhere_and_shows_what_the_golden_picture_shows() -> None:
    product = next(iter(catalogs.load(MODELS).products.values()))
    sound = list(parts_of(product, "line1", "SN-1", sound=True))
    assert {part.truth for part in sound} == {SOUND}
    assert len(sound) == len(product.recipe.placements)


GOOD = {
    **{"pictures": 3, "verdicts": 3, "refused": 0, "different_verdicts": 0, "repeated_verdicts": 2},
    **{"loads": 9, "evictions": 8, "simulation_agrees": True},
    **{"peak_weights_bytes": 100, "budget_bytes": 100},
    **{"anonymous_peak_bytes": 1_004_000_000, "anonymous_promise_bytes": 1_000_000_000},
}


@pytest.mark.parametrize(
    ("change", "broken"),
    [
        ({}, []),
        ({"pictures": 0, "verdicts": 0}, ["no picture was published"]),
        ({"verdicts": 2}, ["1 pictures got no verdict"]),
        ({"verdicts": 2, "refused": 1}, ["1 pictures were refused"]),
        ({"different_verdicts": 1}, ["1 pictures got different verdicts"]),
        ({"simulation_agrees": False}, ["the simulator replays other loads and evictions"]),
        ({"peak_weights_bytes": 101}, ["weights took 101 bytes of 100"]),
        (
            {"anonymous_peak_bytes": 1_004_000_001},
            ["the process took 1004000001 bytes, promised 1000000000"],
        ),
        ({"anonymous_peak_bytes": None}, ["the box told no memory numbers"]),
    ],
)
def test_the_demo_fails_for_each_promise_that_it_breaks(change: dict[str, Any], broken: list[str]) -> None:
    assert broken_promises({**GOOD, **change}) == broken


@pytest.mark.parametrize(("loads", "agrees"), [(9, True), (8, False)])
def test_a_replay_agrees_when_it_loads_and_evicts_as_often(loads: int, agrees: bool) -> None:
    assert compared(GOOD, {"loads": loads, "evictions": 8})["simulation_agrees"] is agrees


@pytest.mark.parametrize(
    ("messages", "verdicts", "different", "repeated", "refused"),
    [
        ([], 0, 0, 0, 0),
        ([{"outcome": "pass"}], 1, 0, 0, 0),
        ([{"outcome": "pass"}, {"outcome": "pass"}, {"outcome": "pass"}], 1, 0, 2, 0),
        ([{"outcome": "pass"}, {"outcome": "fail"}, {"outcome": "pass"}], 1, 1, 1, 0),
        ([{"reason": "unknown-component"}], 0, 0, 0, 1),
        ([{"reason": "picture-damaged", "has_verdict": True}, {"outcome": "rejected"}], 1, 0, 0, 0),
    ],
)
def test_every_message_about_a_picture_counts(
    messages: list[dict[str, Any]], verdicts: int, different: int, repeated: int, refused: int
) -> None:
    score = Score()
    score.ask("r1", PART)
    for body in messages:
        score.hear(json.dumps({"request_id": "r1", **body}).encode())
    assert len(list(score.judged())) == verdicts
    assert (score.different, score.repeated, score.refused) == (different, repeated, refused)


@pytest.mark.parametrize("payload", [b"", b"[]", b"7", b"{}", b'{"request_id": [], "outcome": "pass"}'])
def test_what_is_said_about_no_picture_of_the_demo_is_not_kept(payload: bytes) -> None:
    score = Score()
    score.ask("r1", PART)
    score.hear(payload)
    assert (score.answered, score.refused) == (0, 0)


def test_pictures_that_were_late_or_failed_are_no_images_per_second() -> None:
    score = Score()
    for outcome in ("pass", "fail", "late", "error", "rejected"):
        score.ask(outcome, PART)
        score.hear(json.dumps({"request_id": outcome, "outcome": outcome, "findings": []}).encode())
    found = closing(catalogs.load(MODELS), score, {}, 0, [0.1], seconds=2.0)
    assert (found["verdicts"], found["images_per_second"]) == (5, 1.0)


def test_the_demo_hears_answers_that_a_camera_drops(nats: Nats) -> None:
    score = Score()
    for name in ("r1", "r2"):
        score.ask(name, PART)
    with kit_brokers.Camera(nats.port, name="box") as box, Watch(Config(mqtt=Mqtt(port=nats.port)), score) as watch:
        box.publish_confirmed(STATUS, b"online", retain=True)
        watch.start(lambda: True)
        for outcome in ("pass", "fail", "fail"):
            body = {"request_id": "r1", "outcome": outcome}
            box.publish_confirmed("coe/v1/plant/result/line1/-/-/R1", json.dumps(body).encode())
        box.publish_confirmed("coe/v1/plant/error/unknown-part", b'{"request_id": "r2"}')
        box.publish_confirmed(STATS, b'{"verdicts": {"pass": 1}, "resident": 5}')
        watch.settle()
    assert (score.different, score.repeated, score.refused) == (1, 1, 1)
    assert (watch.stats["verdicts"], watch.resident_max) == ({"pass": 1}, 5)


def test_a_service_that_ends_at_once_is_not_waited_for(nats: Nats) -> None:
    watch = Watch(Config(mqtt=Mqtt(port=nats.port)), Score())
    with pytest.raises(BrokerError, match="did not come up"), watch:
        watch.start(lambda: False)


@pytest.mark.parametrize("name", ["LICENSE", "UPSTREAM-README.md"])
def test_the_licences_lie_beside_the_pictures(name: str) -> None:
    assert (MODELS / "products" / name).is_file()
    assert name in (MODELS / "NOTICE.md").read_text("utf-8")
