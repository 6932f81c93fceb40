"""A bundle appears whole or not at all, says what it was made from, and stays small."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from appliance import catalog
from appliance.catalog import ClassificationHead, InputSpec
from appliance.errors import CatalogError, DigestMismatch, ExportError
from export import bundle, manifest, proof
from export.bundle import SOURCE_KEY, Proven
from export.manifest import Entry
from tests.kit_models import LABELS, SIDE, conv_net

ENTRY = Entry(
    name="small",
    onnx="small.onnx",
    max_batch=4,
    inputs=(InputSpec(name="image", size=(SIDE, SIDE)),),
    head=ClassificationHead(kind="classification", output="logits", labels=LABELS, normal="sound", threshold=0.5),
)


def proven(seed: int = 0, samples: int = 6) -> Proven:
    rng = np.random.default_rng(seed)
    golden = {
        "image": rng.random((samples, 3, SIDE, SIDE), np.float32),
        "logits": rng.random((samples, len(LABELS)), np.float32),
    }
    return Proven(conv_net(seed).SerializeToString(), 17, 8, 4, golden, {SOURCE_KEY: f"{seed:064d}"})


def test_a_written_bundle_is_one_that_the_catalogue_accepts(tmp_path: Path) -> None:
    written = catalog.read_bundle(bundle.write(ENTRY, proven(), tmp_path))
    catalog.verify(written)
    assert written.manifest.inputs == ENTRY.inputs
    assert written.manifest.head == ENTRY.head


def test_a_bundle_replaces_the_one_before_it_and_leaves_nothing_beside(tmp_path: Path) -> None:
    bundle.write(ENTRY, proven(0), tmp_path)
    written = catalog.read_bundle(bundle.write(ENTRY, proven(1), tmp_path))
    catalog.verify(written)
    assert written.manifest.provenance[SOURCE_KEY] == f"{1:064d}"
    assert [path.name for path in tmp_path.iterdir()] == ["small"]
    assert [path.name for path in (tmp_path / "small").iterdir()] == ["1"]


def test_a_bundle_is_done_when_entry_weights_and_bytes_are_the_same(tmp_path: Path) -> None:
    folder = bundle.write(ENTRY, proven(), tmp_path)
    assert bundle.is_done(ENTRY, f"{0:064d}", tmp_path)
    assert not bundle.is_done(ENTRY, f"{1:064d}", tmp_path)
    assert not bundle.is_done(ENTRY.model_copy(update={"tolerance": 0.1}), f"{0:064d}", tmp_path)
    (folder / "model.onnx").write_bytes(b"other")
    assert not bundle.is_done(ENTRY, f"{0:064d}", tmp_path)


def test_changed_bytes_are_noticed(tmp_path: Path) -> None:
    folder = bundle.write(ENTRY, proven(), tmp_path)
    (folder / "golden.npz").write_bytes(b"other")
    with pytest.raises(DigestMismatch, match=r"golden\.npz"):
        catalog.verify(catalog.read_bundle(folder))


def test_the_same_work_gives_the_same_bytes(tmp_path: Path) -> None:
    one, other = (bundle.write(ENTRY, proven(), tmp_path / name) for name in ("one", "other"))
    for name in ("model.onnx", "golden.npz", "expert.toml"):
        assert (one / name).read_bytes() == (other / name).read_bytes()


def test_golden_samples_are_as_many_as_fit_and_at_least_one(tmp_path: Path) -> None:
    bundle.write(ENTRY, proven(samples=64), tmp_path)
    stored = tmp_path / "small" / "1" / "golden.npz"
    assert stored.stat().st_size <= bundle.GOLDEN_BYTES
    with np.load(stored) as golden:
        assert 1 <= len(golden["image"]) == len(golden["logits"]) <= bundle.GOLDEN_SAMPLES


def test_what_a_killed_export_left_is_swept_away_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / ".exporting-x1").mkdir()
    (tmp_path / ".my-notes").mkdir()
    (tmp_path / "small").mkdir()
    bundle.sweep(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {".my-notes", "small"}


def test_a_manifest_reads_back_as_it_was_written(tmp_path: Path) -> None:
    manifest.write((ENTRY,), tmp_path / "manifest.toml")
    assert manifest.read(tmp_path / "manifest.toml").experts == (ENTRY,)


def test_a_misspelt_key_is_named(tmp_path: Path) -> None:
    manifest.write((ENTRY,), tmp_path / "manifest.toml")
    text = (tmp_path / "manifest.toml").read_text().replace("max_batch", "max_bach")
    (tmp_path / "manifest.toml").write_text(text)
    with pytest.raises(CatalogError, match="max_bach"):
        manifest.read(tmp_path / "manifest.toml")


def test_one_of_several_experts_must_be_named(tmp_path: Path) -> None:
    manifest.write((ENTRY, ENTRY.model_copy(update={"name": "other"})), tmp_path / "manifest.toml")
    with pytest.raises(ExportError, match="--name"):
        manifest.entry_of(tmp_path / "manifest.toml", None)
    assert manifest.entry_of(tmp_path / "manifest.toml", "other").name == "other"


def outputs(*rows: list[float]) -> proof.Arrays:
    return {"logits": np.array(rows, np.float32)}


def test_numbers_within_tolerance_and_the_same_decision_pass() -> None:
    samples = proof.noise(ENTRY).batch(1)
    proof.compare(ENTRY, samples, outputs([2.0, 0, 0, 0, 0, 0, 0]), outputs([2.0005, 0, 0, 0, 0, 0, 0]))


@pytest.mark.parametrize(
    ("found", "expected", "what"),
    [
        pytest.param([2.0] * 7, [2.01] * 7, "logits", id="numbers"),
        pytest.param([float("nan")] * 7, [0.0] * 7, "logits", id="not finite"),
        pytest.param([1.0, 1.0002, 0, 0, 0, 0, 0], [1.0002, 1.0, 0, 0, 0, 0, 0], "", id="close, same decision"),
        pytest.param([1.7918, 0, 0, 0, 0, 0, 0], [1.7917, 0, 0, 0, 0, 0, 0], "decision", id="threshold between them"),
    ],
)
def test_another_answer_is_a_typed_error(found: list[float], expected: list[float], what: str) -> None:
    samples = proof.noise(ENTRY).batch(1)
    if not what:
        proof.compare(ENTRY, samples, outputs(found), outputs(expected))
        return
    with pytest.raises(proof.NotTheSame) as caught:
        proof.compare(ENTRY, samples, outputs(found), outputs(expected))
    assert caught.value.output == what
