"""PyTorch checkpoints become bundles only when ONNX Runtime gives the same numbers and decisions; hundreds at once."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from appliance import catalog
from appliance.catalog import ClassificationHead, InputSpec
from appliance.errors import ExportError
from export import bundle, manifest, proof
from export.entries import figure_entry
from export.manifest import Entry
from tests.kit_models import run_plain

pytestmark = pytest.mark.export

if importlib.util.find_spec("torch") is not None:
    import torch

    from export import convert, nets
    from tests.kit_torch import KILL_ONCE

ROOT = Path(__file__).parent.parent
DATA = Path(__file__).parent / "data"
PICTURES = str(DATA / "moulded-figure")


def figure(folder: Path, name: str = "figure", architecture: str = "figure-classifier", seed: int = 0) -> Entry:
    """An entry for a figure expert with random weights, its checkpoint written."""
    torch.manual_seed(seed)
    net = nets.build("figure-classifier")
    torch.save(net.state_dict(), folder / f"{name}.pt")
    shipped = figure_entry()
    changes = {
        "name": name,
        "architecture": architecture,
        "checkpoint": f"{name}.pt",
        "samples": PICTURES,
        "max_batch": 4,
        "head": shipped.head.model_copy(update={"threshold": 0.5}),
    }
    return shipped.model_copy(update=changes)


def test_an_exported_expert_answers_as_its_checkpoint_does(tmp_path: Path) -> None:
    written = catalog.read_bundle(bundle.write(entry := figure(tmp_path), convert.convert(entry, tmp_path), tmp_path))
    catalog.verify(written)
    assert written.golden_path is not None
    with np.load(written.golden_path) as golden:
        found = run_plain(written.model_path, {"image": golden["image"]})
        np.testing.assert_allclose(found["logits"], golden["logits"], atol=1e-4)


def test_an_exported_file_tells_nothing_of_the_machine_it_was_made_on(tmp_path: Path) -> None:
    model = convert.convert(figure(tmp_path), tmp_path).model
    assert str(ROOT).encode() not in model
    assert b"stack_trace" not in model


def test_batch_norm_is_folded_and_the_batch_is_free(tmp_path: Path) -> None:
    model = onnx.load_from_string(convert.convert(figure(tmp_path), tmp_path).model)
    assert "BatchNormalization" not in {node.op_type for node in model.graph.node}
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param


def test_a_strangers_data_parallel_checkpoint_is_understood(tmp_path: Path) -> None:
    spec = InputSpec(name="image", size=(32, 32), scale=1 / 255, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    labels = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    entry = Entry(
        name="things",
        architecture="tests.kit_torch:ResNet20",
        checkpoint="resnet20-12fca82f.th",
        samples=PICTURES,
        inputs=(spec,),
        head=ClassificationHead(kind="classification", output="logits", labels=labels),
    )
    proven = convert.convert(entry, DATA / "zoo")
    theirs = run_plain(DATA / "zoo" / "resnet20-12fca82f.onnx", {"image": proven.golden["image"]})
    np.testing.assert_allclose(proven.golden["logits"], theirs["logits"], atol=1e-3)


def test_other_numbers_than_pytorchs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(proof.NotTheSame, match="logits differs at batch 1"):
        convert.convert(figure(tmp_path, architecture="tests.kit_torch:Fickle"), tmp_path)


def test_another_decision_than_pytorchs_is_refused_though_the_numbers_are_close(tmp_path: Path) -> None:
    with pytest.raises(proof.NotTheSame, match="decision differs"):
        convert.convert(figure(tmp_path, architecture="tests.kit_torch:Turncoat"), tmp_path)


def test_a_network_that_fixes_its_batch_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError):
        convert.convert(figure(tmp_path, architecture="tests.kit_torch:PairsOnly"), tmp_path)


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path: Path) -> None:
    entry = figure(tmp_path)
    torch.save({"state_dict": subprocess.run}, tmp_path / "figure.pt")
    with pytest.raises(ExportError, match="does not fit"):
        convert.convert(entry, tmp_path)


def test_a_checkpoint_of_another_architecture_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="does not fit cell-classifier"):
        convert.convert(figure(tmp_path, architecture="cell-classifier"), tmp_path)


@dataclass(frozen=True, slots=True)
class Run:
    """An export of many that was killed in the middle, and its repetition with --resume."""

    killed: int
    left: set[str]
    code: int
    report: dict[str, Any]
    out: Path

    def outcome(self, expert: str) -> dict[str, Any]:
        found: dict[str, Any] = next(row for row in self.report["experts"] if row["expert"] == expert)
        return found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("many")
    kit = "tests.kit_torch:"
    entries = (
        figure(folder, "first", seed=1),
        figure(folder, "killer", f"{kit}Killer", seed=2),
        figure(folder, "fickle", f"{kit}Fickle", seed=3),
        figure(folder, "dying", f"{kit}Dying", seed=4),
        figure(folder, "last", seed=5),
    )
    manifest.write(entries, folder / "manifest.toml")
    (folder / "trigger").touch()
    out = folder / "out"
    killed = _export(folder, out)
    left = {path.parent.parent.name for path in out.glob("*/1/expert.toml")}
    again = _export(folder, out, "--resume")
    return Run(killed.returncode, left, again.returncode, json.loads(again.stdout), out)


def _export(folder: Path, out: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "export", "--all", str(folder / "manifest.toml"), "--out", str(out)]
    environment = {**os.environ, KILL_ONCE: str(folder / "trigger")}
    return subprocess.run(
        [*command, "--jobs", "1", "--json", *flags],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_kill_leaves_only_complete_bundles(run: Run) -> None:
    assert run.killed == -9
    assert run.left == {"first"}


def test_resuming_skips_what_is_complete_and_does_the_rest(run: Run) -> None:
    assert run.outcome("first")["was_there"]
    assert run.outcome("killer")["passed"]
    assert not run.outcome("killer")["was_there"]


def test_a_worker_that_dies_takes_nobody_along(run: Run) -> None:
    assert "worker process died" in run.outcome("dying")["why"]
    assert run.outcome("last")["passed"]


def test_the_report_says_who_failed_and_why_and_the_exit_code_that_someone_did(run: Run) -> None:
    assert run.code == 1
    assert (run.report["passed"], run.report["failed"], run.report["already_there"]) == (3, 2, 1)
    assert "differs" in run.outcome("fickle")["why"]


def test_nothing_half_written_stays(run: Run) -> None:
    assert {path.name for path in run.out.iterdir()} == {"first", "killer", "last"}
    for expert in ("first", "killer", "last"):
        catalog.verify(catalog.read_bundle(run.out / expert / "1"))
