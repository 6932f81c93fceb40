"""The benchmarks run, find what they should and say it; no test here looks at a time."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from appliance.errors import ApplianceError
from appliance.lab import bench, overhead, paper, soak, trial
from appliance.lab.bench import Switching
from appliance.lab.shapes import SHAPES
from appliance.lab.trunks import trunks
from tests.kit_process import alone

FIELDS = {
    *("shape", "weights_bytes", "disk_bytes_per_second", "cold_load_bytes_per_second", "cold_load_fraction"),
    *("activate_seconds", "first_run_penalty_seconds", "evict_seconds", "ready_cpu_seconds"),
    *("plain_ready_cpu_seconds", "plain_ready_seconds", "template_run_seconds", "plain_run_seconds", "run_ratio"),
    *("outputs_equal", "run_p99_ratio_while_loading", "python_stall_seconds", "bytes_per_second_at_once"),
    *("booked_bytes", "measured_bytes", "leftover_bytes", "targets"),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    """What `bench switch --quick --shape 14MB --json` printed."""
    folder = tmp_path_factory.mktemp("bench")
    ran = _run("switch", "--quick", "--shape", "14MB", "--folder", str(folder), "--json")
    assert ran.returncode == 0, ran.stderr
    assert list(folder.iterdir()) == [], "experts and store are gone afterwards"
    shown: dict[str, Any] = json.loads(ran.stdout)
    return shown


@pytest.mark.parametrize(
    ("name", "weights", "low", "high"),
    [
        ("14MB", 3_487_816, 13e6, 15e6),  # torchvision's mobilenet_v2 has 3,504,872 before its normalisation is folded
        ("45MB", 11_684_712, 44e6, 47e6),  # resnet18: 11,689,512
        ("170MB", 44_496_488, 170e6, 179e6),  # resnet101: 44,549,160
    ],
)
def test_the_shapes_have_the_weights_of_the_networks_they_are_like(
    name: str, weights: int, low: float, high: float
) -> None:
    graph = SHAPES[name].build(0).graph
    assert sum(int(np.prod(tensor.dims)) for tensor in graph.initializer if tensor.dims) == weights
    assert low < weights * 4 < high


def test_another_seed_gives_other_weights_in_the_same_shape() -> None:
    first, second = (SHAPES["14MB"].build(seed).graph for seed in (0, 1))
    assert [list(tensor.dims) for tensor in first.initializer] == [list(tensor.dims) for tensor in second.initializer]
    assert first.node == second.node
    assert first.initializer[2].raw_data != second.initializer[2].raw_data


def test_a_switch_is_described_by_its_fields(found: Mapping[str, Any]) -> None:
    (shape,) = found["shapes"]
    assert shape.keys() >= FIELDS
    assert shape["shape"] == "14MB"
    assert shape["outputs_equal"]
    assert 13e6 < shape["weights_bytes"] < 15e6
    assert shape["booked_bytes"] == 2 * shape["weights_bytes"]
    assert shape["runs_a_side"] >= 20


def test_what_was_booked_is_what_was_measured(found: Mapping[str, Any]) -> None:
    (shape,) = found["shapes"]
    memory = {t["name"]: t for t in shape["targets"] if t["name"] in ("booking_error", "leftover_bytes")}
    assert {name: target["met"] for name, target in memory.items()} == {"booking_error": True, "leftover_bytes": True}


def test_every_target_says_whether_it_was_met(found: Mapping[str, Any]) -> None:
    (shape,) = found["shapes"]
    result = Switching(**{name: value for name, value in shape.items() if name != "targets"})
    slow = replace(
        result,
        shape="45MB",
        cold_load_fraction=0.79,
        activate_seconds=0.003,
        plain_ready_cpu_seconds=9 * result.ready_cpu_seconds,
        run_ratio=1.04,
        outputs_difference=1e-3,
        run_p99_ratio_while_loading=1.3,
        booked_bytes=result.measured_bytes * 2,
        leftover_bytes=5 << 20,
    )
    assert [target.name for target in bench.targets(slow) if target.met] == []
    assert len(bench.targets(slow)) == 8
    fast = replace(slow, cold_load_fraction=0.8, activate_seconds=0.002, run_ratio=1.03)
    assert [t.name for t in bench.targets(fast) if t.met] == ["cold_load_fraction", "activate_seconds", "run_ratio"]


def test_fine_tunes_of_one_trunk_take_a_quarter_of_their_bytes_on_disk_and_in_memory(tmp_path: Path) -> None:
    found = trunks(30, tmp_path)
    assert found["trunk_share"] == pytest.approx(0.8, abs=0.01)
    assert [target["met"] for target in found["targets"]] == [True, True]
    assert found["unshared_bytes"] > 30 * 1_600_000
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_shape_is_refused_with_those_that_there_are(tmp_path: Path) -> None:
    with pytest.raises(ApplianceError, match=r"no shape 3MB \(choose from 14MB, 45MB, 170MB\)"):
        bench.switch(["3MB"], folder=tmp_path)


def test_a_short_soak_leaves_nothing_behind(tmp_path: Path) -> None:
    alone(soak_for_a_while, tmp_path)
    assert list(tmp_path.iterdir()) == []


def soak_for_a_while(folder: Path) -> None:
    found = soak.soak(cycles=120, experts=12, folder=folder)
    assert (found["descriptor_growth"], found["thread_growth"]) == (0, 0)
    assert [sample["cycles"] for sample in found["samples"]] == list(range(6, 121, 6))


@pytest.mark.parametrize(("policy", "share"), [("appliance", 1.0), ("coserve", 1.0), ("all-resident", overhead.TIGHT)])
def test_what_deciding_costs_is_measured_with_ample_and_with_tight_activations(policy: str, share: float) -> None:
    said = list[str]()
    row = overhead.measured(overhead.Case(policy, 20, 60, 0.05e-3, share), 1, said.append)
    assert row["seconds_per_request"] > 0
    assert (row["policy"], row["experts"], row["queued"], row["activation_share"]) == (policy, 20, 60, share)
    assert [("tight" in line) for line in said] == [share < 1]


def test_tight_activations_are_what_pictures_wait_for() -> None:
    """With everything in memory, one picture at a time takes longer than batches."""
    ample, tight = (replace(paper.NUMA, activation_share=share) for share in (1.0, overhead.TIGHT))
    job = replace(paper.JOBS["A1"], pictures=200)
    assert trial.tried(tight, job, "all-resident")["seconds"] > trial.tried(ample, job, "all-resident")["seconds"]


def test_people_see_tables(tmp_path: Path) -> None:
    ran = _run("soak", "--cycles", "20", "--experts", "4", "--folder", str(tmp_path))
    assert "memory beside the weights" in ran.stdout


@pytest.mark.parametrize("command", ["switch", "task", "soak"])
def test_all_explain_themselves(command: str) -> None:
    shown = _run(command, "--help")
    assert shown.returncode == 0
    assert "--json" in shown.stdout


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "appliance.cli", "bench", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, stdin=subprocess.DEVNULL)
