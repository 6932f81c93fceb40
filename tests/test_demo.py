"""The demo on the shipped experts: the first thing a stranger runs."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest

from appliance import catalog as catalogs
from appliance.lab.demo import parts_of, streams
from appliance.samples import SOUND

MODELS = Path(__file__).parents[1] / "models_onnx"


def test_the_demo_answers_every_picture_under_a_third_of_the_memory(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "appliance.cli", "demo", "--json", "--pictures", "300", "--folder", str(tmp_path)]
    ran = subprocess.run([*command, "--catalog", str(MODELS)], capture_output=True, text=True, timeout=240)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert (found["pictures"], found["verdicts"], found["repeated_verdicts"]) == (300, 300, 0)
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


@pytest.mark.parametrize("name", ["LICENSE", "UPSTREAM-README.md"])
def test_the_licences_lie_beside_the_pictures(name: str) -> None:
    assert (MODELS / "products" / name).is_file()
    assert name in (MODELS / "NOTICE.md").read_text("utf-8")
