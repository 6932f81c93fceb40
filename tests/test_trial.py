"""The paper's tasks on its machines: its numbers come out, ours are better, and the same every time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from appliance.core.policies import PAPER
from appliance.errors import ConfigError
from appliance.lab import paper, trial
from appliance.lab.contenders import NAMES
from appliance.lab.paper import JOBS, MACHINES, NUMA, UMA

A1, B2 = JOBS["A1"], JOBS["B2"]
MEASURED = {"requests_per_wall_second", "scheduling_seconds_per_request"}


def test_the_same_trial_comes_to_the_same_numbers() -> None:
    first, again = (trial.tried(NUMA, A1, "appliance") for _ in range(2))
    assert _virtual(first) == _virtual(again)


def test_the_35_most_used_experts_serve_60_percent_as_in_the_paper() -> None:
    assert sum(paper.BOARD_A.probabilities[:35]) == pytest.approx(0.602, abs=0.001)


@pytest.mark.parametrize("machine", MACHINES.values(), ids=lambda machine: machine.name)
@pytest.mark.parametrize("policy", [policy.name for policy in PAPER])
def test_the_printed_numbers_come_out_within_a_fifth(machine: paper.Machine, policy: str) -> None:
    """One task of four; `appliance simulate --paper-table` has them all."""
    found = trial.tried(machine, A1, policy)
    assert found["images_per_second"] == pytest.approx(
        paper.PRINTED_IMAGES_PER_SECOND[machine.name][policy][0], rel=0.2
    )
    printed = paper.PRINTED_SWITCHES[machine.name].get(policy)
    assert printed is None or found["switches_per_executor"] == pytest.approx(printed[0], rel=0.2)


def test_ours_needs_hardly_more_loads_than_there_must_be_and_answers_most_much_sooner() -> None:
    ours, coserve = (trial.tried(NUMA, A1, policy) for policy in ("appliance", "coserve"))
    assert ours["images_per_second"] >= 1.15 * coserve["images_per_second"]
    assert ours["switches_total"] <= 1.15 * ours["loads_floor"]
    assert ours["wait_p50_seconds"] <= coserve["wait_p50_seconds"] / 5


@pytest.mark.parametrize("machine", MACHINES.values(), ids=lambda machine: machine.name)
def test_ours_is_near_the_bound_when_a_load_takes_what_its_bytes_take(machine: paper.Machine) -> None:
    """The bound takes loads, runs and arrivals each as if the others cost nothing; all cells are in the docs."""
    found = trial.tried(machine, B2, "appliance", "segments")
    assert found["images_per_second"] >= 0.88 * found["bound_images_per_second"]


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


def _virtual(found: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in found.items() if name not in MEASURED}
