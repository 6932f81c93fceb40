"""The paper's tasks on its machines: its numbers come out, ours are better, and the same every time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from appliance.core.policies import PAPER
from appliance.errors import ConfigError
from appliance.lab import paper, trial
from appliance.lab.contenders import NAMES
from appliance.lab.ours import lines, our_table
from appliance.lab.paper import JOBS, MACHINES, NUMA, UMA

A1 = JOBS["A1"]
CELLS = [(machine, task) for machine in MACHINES for task in JOBS]
MEASUREMENTS = Path(__file__).parents[1] / "docs" / "measurements.md"
MEASURED = {"requests_per_wall_second", "scheduling_seconds_per_request"}


def test_the_same_trial_comes_to_the_same_numbers() -> None:
    first, again = (trial.tried(NUMA, A1, "appliance") for _ in range(2))
    assert _virtual(first) == _virtual(again)


def test_the_35_most_used_experts_serve_60_percent_as_in_the_paper() -> None:
    assert sum(paper.BOARD_A.probabilities[:35]) == pytest.approx(0.602, abs=0.001)


@pytest.fixture(scope="module")
def papers() -> dict[str, Any]:
    return trial.paper_table(_once)


@pytest.fixture(scope="module")
def ours() -> dict[str, Any]:
    return our_table(_once)


def test_the_printed_throughput_comes_out_within_a_fifth_and_within_a_tenth_on_average(papers: dict[str, Any]) -> None:
    assert len(papers["cells"]) == len(PAPER) * len(CELLS)
    assert papers["worst_off"] <= 0.20
    assert papers["mean_off"] <= 0.10


def test_the_printed_switches_come_out_within_a_fifth_on_average(papers: dict[str, Any]) -> None:
    assert papers["mean_switches_off"] <= 0.20


RUNS_ALONE = "250 pictures come per second and the GPU does 100 to 125: with everything resident they wait as long"
MISSED = {
    ("numa", "A2", "bound_share"): "0.879: the disk sets the bound, and 232 loads are made where 205 must be",
    ("numa", "B2", "bound_share"): "0.894: the disk sets the bound, and 223 loads are made where 202 must be",
    ("numa", "B1", "wait_share"): f"0.227: {RUNS_ALONE}",
    ("numa", "B2", "wait_share"): f"0.227: {RUNS_ALONE}",
    ("uma", "A2", "wait_share"): f"0.268: {RUNS_ALONE}",
    ("uma", "B1", "wait_share"): f"0.261: {RUNS_ALONE}",
    ("uma", "B2", "wait_share"): f"0.264: {RUNS_ALONE}",
}
"""What was aimed at and is not reached, with the measured number; whoever reaches it takes it out of here."""
EVERYWHERE = {"times_coserve": 1.15, "loads_to_floor": 1.15, "wait_share": 0.2, "bound_share": 0.9}
TARGETS: Mapping[str, Mapping[str, float]] = {
    "numa": {**EVERYWHERE, "times_printed_coserve": 1.2, "times_printed_samba": 7.5},
    "uma": {**EVERYWHERE, "times_printed_coserve": 2.5, "times_printed_samba": 15.0},
}


@pytest.mark.parametrize(
    ("cell", "target"),
    [
        pytest.param(
            cell,
            target,
            marks=[pytest.mark.xfail(strict=True, reason=MISSED[*cell, target])] if (*cell, target) in MISSED else [],
            id=f"{'-'.join(cell)}-{target}",
        )
        for cell in CELLS
        for target in TARGETS[cell[0]]
    ],
)
def test_ours_reaches_what_was_aimed_at(ours: dict[str, Any], cell: tuple[str, str], target: str) -> None:
    (row,) = (row for row in ours["cells"] if (row["device"], row["task"]) == cell)
    (found,) = (one for one in row["targets"] if one["name"] == target)
    assert found["bound"] == TARGETS[cell[0]][target]
    assert found["met"], found["value"]


def test_the_measurements_have_the_table_that_the_simulator_makes(ours: dict[str, Any]) -> None:
    """`appliance simulate --our-table` prints it as it stands there."""
    page = MEASUREMENTS.read_text("utf-8").splitlines()
    assert [line for line in lines(ours) if line not in page] == []


@pytest.mark.parametrize("policy", NAMES)
@pytest.mark.parametrize("loader", trial.LOADERS)
def test_nobody_is_quicker_than_the_bound(policy: str, loader: str) -> None:
    found = trial.tried(UMA, replace(A1, pictures=600), policy, loader)
    assert found["images_per_second"] <= found["bound_images_per_second"]


def test_with_everything_resident_nothing_is_loaded() -> None:
    found = trial.tried(NUMA, replace(A1, pictures=600), "all-resident")
    assert (found["switches_total"], found["loads_floor"]) == (0, 0)


def test_a_line_that_the_box_can_follow_is_followed_and_no_picture_is_late() -> None:
    """A picture every 40 ms of the same board again and again, due in a minute, as the paper's 1.1 s per load allow."""
    pace = trial.Pace(gap_seconds=0.04, due_seconds=60.0, boards=3)
    found = trial.tried_by_name("numa", "A1", "appliance", "paper", pace)
    assert found["steady_images_per_second"] >= 0.95 * 25
    assert found["late"] == 0


@pytest.mark.parametrize("wrong", ["machine", "task", "policy", "loader"])
def test_what_does_not_exist_is_named(wrong: str) -> None:
    names = {"machine": "numa", "task": "A1", "policy": "coserve", "loader": "paper", wrong: "nothing"}
    with pytest.raises(ConfigError, match=f"no {wrong} nothing"):
        trial.tried_by_name(**names, pace=trial.Pace())


_DONE: dict[tuple[str, str, str, str], Mapping[str, Any]] = {}


def _once(machine: paper.Machine, job: paper.Job, policy: str, loader: str) -> Mapping[str, Any]:
    """A trial that several tests ask for."""
    key = (machine.name, job.name, policy, loader)
    if key not in _DONE:
        _DONE[key] = trial.tried(machine, job, policy, loader)
    return _DONE[key]


def _virtual(found: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in found.items() if name not in MEASURED}
