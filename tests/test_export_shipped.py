"""The shipped catalogue: whole, small, of real distinct experts, and as good as the documents say. Needs no torch."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest

from appliance import catalog
from appliance.catalog import Bundle, Catalog
from export import proof
from export.evaluate import evaluate
from export.products import DETECTOR, FIGURE
from tests.kit_models import run_plain

FOLDER = Path(__file__).parent.parent / "models_onnx"
PICTURES = Path(__file__).parent / "data" / "moulded-figure"
MOST_BYTES = 45_000_000


@pytest.fixture(scope="module")
def shipped() -> Catalog:
    return catalog.load(FOLDER)


def cell_experts(shipped: Catalog) -> list[Bundle]:
    return [bundle for name, bundle in shipped.bundles.items() if name.startswith("pcb-")]


def test_every_bundle_has_the_bytes_that_its_manifest_names(shipped: Catalog) -> None:
    for bundle in shipped.bundles.values():
        catalog.verify(bundle)


def test_there_are_48_types_one_detector_and_a_second_product_line(shipped: Catalog) -> None:
    assert len(cell_experts(shipped)) == 48
    assert shipped.bundles.keys() - {b.manifest.name for b in cell_experts(shipped)} == {DETECTOR, FIGURE}
    assert len(shipped.products) == 48


def test_no_two_experts_share_their_weights(shipped: Catalog) -> None:
    assert max(Counter(bundle.manifest.model.sha256 for bundle in shipped.bundles.values()).values()) == 1


def test_experts_of_one_architecture_differ_in_their_numbers_only(shipped: Catalog) -> None:
    """So that a box can serve them all from one template."""
    assert len({_skeleton(bundle.model_path) for bundle in cell_experts(shipped)}) == 1


def _skeleton(path: Path) -> bytes:
    """The graph without the values of its larger tensors."""
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        if len(tensor.raw_data) >= 64:
            tensor.ClearField("raw_data")
    return bytes(model.SerializeToString(deterministic=True))


def test_every_expert_gives_its_golden_answers_again(shipped: Catalog) -> None:
    for bundle in shipped.bundles.values():
        assert bundle.golden_path is not None
        assert bundle.manifest.golden is not None
        with np.load(bundle.golden_path, allow_pickle=False) as golden:
            found = run_plain(bundle.model_path, {spec.name: golden[spec.name] for spec in bundle.manifest.inputs})
            for name, values in found.items():
                np.testing.assert_allclose(values, golden[name], rtol=0, atol=bundle.manifest.golden.tolerance)


def test_every_component_is_placed_somewhere_or_the_moulded_figure(shipped: Catalog) -> None:
    placed = {placement.component for product in shipped.products.values() for placement in product.recipe.placements}
    assert placed | {FIGURE} == set(shipped.graph.entries)


def test_the_licences_lie_beside_what_they_are_about() -> None:
    for path in ("NOTICE.md", "LICENSE-CC-BY-SA-4.0", "products/LICENSE", "products/UPSTREAM-README.md"):
        assert (FOLDER / path).stat().st_size > 100


def test_the_catalogue_stays_small() -> None:
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) < MOST_BYTES


def test_the_chain_finds_the_defects_of_unseen_tiles_and_passes_sound_boards(shipped: Catalog) -> None:
    report = evaluate(shipped, figures=None)
    assert report.chain.recall >= 0.97
    assert report.chain.false_alarm_rate <= 0.01
    assert report.sound_boards.false_alarm_rate <= 0.01
    assert report.localisation["f"] >= 0.85
    assert report.detector_runs <= 0.25


def test_the_moulded_figure_is_told_from_a_broken_one(shipped: Catalog) -> None:
    """Learned from 24 photographs: it misses the missing hand of `anomaly-13`, and says so in docs/measurements.md."""
    judged = {path.stem: _is_defective(path, shipped.bundles[FIGURE]) for path in sorted(PICTURES.glob("*.png"))}
    assert not judged["normal-13"]
    assert not judged["normal-14"]
    assert judged["anomaly-14"]


def _is_defective(picture: Path, bundle: Bundle) -> bool:
    decoded = proof.decoded(picture.read_bytes())
    feeds = {spec.name: proof.prepared([decoded], spec) for spec in bundle.manifest.inputs}
    outputs = run_plain(bundle.model_path, feeds)
    ((finding,),) = proof.decisions(bundle.manifest, outputs, [(decoded.shape[1], decoded.shape[0])])
    return finding.fails
