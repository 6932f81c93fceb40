"""A second product line and models that strangers made answer over MQTT like any other expert."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from export import bundle, foreign
from tests.kit_box import INFER, RESULT, Box
from tests.kit_brokers import Camera
from tests.test_export_foreign import FACES, THINGS, UPRIGHT, ZOO

MODELS = Path(__file__).parents[1] / "models_onnx"
FIGURES = Path(__file__).parent / "data" / "moulded-figure"


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    """The shipped colour expert, a face detector with its weights among the inputs, a text classifier with its weights
    in Constant nodes, and a classifier of another exporter."""
    home = tmp_path_factory.mktemp("strangers")
    catalog = home / "catalog"
    shutil.copytree(MODELS / "moulded-figure", catalog / "moulded-figure")
    for entry in (FACES, UPRIGHT, THINGS):
        bundle.write(entry, foreign.register(entry, ZOO), catalog)
    names = ("moulded-figure", "faces", "upright", "things")
    components = "\n".join(f"{name} = '{name}'" for name in names)
    (catalog / "graph.toml").write_text(f"schema = 1\nname = 'strangers'\n[components]\n{components}\n")
    with Box(home / "box", catalog) as running:
        yield running


def test_good_and_bad_figures_are_told_apart(box: Box) -> None:
    """Trained on 24 photographs: docs/measurements.md says how often it errs, on these four at most once."""
    pictures = ("normal-13.png", "normal-14.png", "anomaly-13.png", "anomaly-14.png")
    outcomes = {picture: _answer(box, "moulded-figure", FIGURES / picture)["outcome"] for picture in pictures}
    right = {p: "pass" if p.startswith("normal") else "fail" for p in pictures}
    assert set(outcomes.values()) == {"pass", "fail"}
    assert sum(outcomes[p] == right[p] for p in pictures) >= 3


@pytest.mark.parametrize(
    ("component", "labels"),
    [
        ("faces", {"face"}),
        ("upright", {"upright", "turned"}),
        ("things", set(THINGS.head.labels)),
    ],
)
def test_models_of_strangers_answer(box: Box, component: str, labels: set[str]) -> None:
    body = _answer(box, component, FIGURES / "normal-13.png")
    assert body["outcome"] in ("pass", "fail")
    findings = body["findings"]
    assert isinstance(findings, list)
    assert {finding["label"] for finding in findings} <= labels


def _answer(box: Box, component: str, picture: Path) -> dict[str, object]:
    with Camera(box.port, RESULT) as camera:
        camera.publish(INFER + component, picture.read_bytes())
        body: dict[str, object] = json.loads(camera.hear().payload)
        return body
