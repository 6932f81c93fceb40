"""Ours beside CoServe on the paper's machines and tasks, with what we set out to reach: the table of
docs/measurements.md."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from appliance.core.policies import APPLIANCE, COSERVE, SAMBA
from appliance.lab import paper
from appliance.lab.contenders import ALL
from appliance.lab.paper import Job, Machine
from appliance.lab.telling import Target
from appliance.lab.trial import Trial, tried

TIMES_PRINTED = {"numa": (1.2, 7.5), "uma": (2.5, 15.0)}
"""How many times what the paper prints of CoServe and of Samba-CoE is aimed at, with our loader, by machine."""
SIMULATED_PER_SECOND = 10_000.0


def our_table(trial: Trial = tried) -> dict[str, Any]:
    """Every machine and task, under the paper's loader and under ours, and how fast it was simulated."""
    cells = [_cell(machine, job, trial) for machine in paper.MACHINES.values() for job in paper.JOBS.values()]
    speeds = [cell["requests_per_wall_second"] for cell in cells]
    slowest = Target("requests_per_wall_second", min(speeds), "at least", SIMULATED_PER_SECOND)
    return {"cells": cells, "most_requests_per_wall_second": max(speeds), "targets": [slowest.told()]}


def _cell(machine: Machine, job: Job, trial: Trial) -> dict[str, Any]:
    coserve, ours, everything = (trial(machine, job, name, "paper") for name in (COSERVE.name, APPLIANCE.name, ALL))
    same, quick, resident = (trial(machine, job, name, "segments") for name in (COSERVE.name, APPLIANCE.name, ALL))
    number = list(paper.JOBS).index(job.name)
    printed = {name: row[number] for name, row in paper.PRINTED_IMAGES_PER_SECOND[machine.name].items()}
    times_coserve, times_samba = TIMES_PRINTED[machine.name]
    rate, seconds = "images_per_second", "wait_p50_seconds"
    targets = (
        Target("times_coserve", ours[rate] / coserve[rate], "at least", 1.15),
        Target("loads_to_floor", ours["switches_total"] / ours["loads_floor"], "at most", 1.15),
        Target("wait_share", ours[seconds] / coserve[seconds], "at most", 0.2),
        Target("bound_share", quick[rate] / quick["bound_images_per_second"], "at least", 0.9),
        Target("times_printed_coserve", quick[rate] / printed[COSERVE.name], "at least", times_coserve),
        Target("times_printed_samba", quick[rate] / printed[SAMBA.name], "at least", times_samba),
    )
    return {
        "device": machine.name,
        "task": job.name,
        "coserve_images_per_second": coserve[rate],
        "images_per_second": ours[rate],
        "bound_images_per_second": ours["bound_images_per_second"],
        "loads": ours["switches_total"],
        "loads_floor": ours["loads_floor"],
        "coserve_wait_p50_seconds": coserve[seconds],
        "wait_p50_seconds": ours[seconds],
        "all_resident_wait_p50_seconds": everything[seconds],
        "segments_images_per_second": quick[rate],
        "segments_bound_images_per_second": quick["bound_images_per_second"],
        "segments_coserve_images_per_second": same[rate],
        "segments_all_resident_images_per_second": resident[rate],
        "requests_per_wall_second": ours["requests_per_wall_second"],
        "targets": [target.told() for target in targets],
    }


def lines(found: Mapping[str, Any]) -> Iterator[str]:
    """The table in Markdown, as docs/measurements.md has it."""
    cells = found["cells"]
    heads = [f"{cell['device'].upper()} {cell['task']}" for cell in cells]
    yield _line("", heads)
    yield _line("---", ["---"] * len(heads)).replace(" ", "")
    for label, of in _ROWS:
        yield _line(label, [of(cell) for cell in cells])


def _line(label: str, texts: Sequence[str]) -> str:
    return f"| {' | '.join([label, *texts])} |"


def _rate(name: str) -> Callable[[Mapping[str, Any]], str]:
    return lambda cell: f"{cell[name]:.1f}"


def _goal(name: str, digits: int) -> Callable[[Mapping[str, Any]], str]:
    def of(cell: Mapping[str, Any]) -> str:
        target = next(target for target in cell["targets"] if target["name"] == name)
        return f"{target['value']:.{digits}f} {'✓' if target['met'] else '**missed**'}"

    return of


_ROWS: Sequence[tuple[str, Callable[[Mapping[str, Any]], str]]] = (
    ("coserve, images/s", _rate("coserve_images_per_second")),
    ("appliance, images/s", _rate("images_per_second")),
    ("bound of loads, runs and arrivals", _rate("bound_images_per_second")),
    ("**times coserve** (≥ 1.15)", _goal("times_coserve", 2)),
    ("loads / floor", lambda cell: f"{cell['loads']} / {cell['loads_floor']}"),
    ("**loads to floor** (≤ 1.15)", _goal("loads_to_floor", 3)),
    (
        "median wait, coserve; appliance",
        lambda cell: f"{cell['coserve_wait_p50_seconds']:.1f} s; {cell['wait_p50_seconds']:.1f} s",
    ),
    ("the same with everything resident", lambda cell: f"{cell['all_resident_wait_p50_seconds']:.1f} s"),
    ("**median wait, share of coserve's** (≤ 0.20)", _goal("wait_share", 3)),
    ("**bytes over the disk**: appliance, images/s", _rate("segments_images_per_second")),
    ("its bound", _rate("segments_bound_images_per_second")),
    ("**share of the bound** (≥ 0.90)", _goal("bound_share", 3)),
    ("times CoServe as printed (≥ 1.2; 2.5)", _goal("times_printed_coserve", 1)),
    ("times Samba-CoE as printed (≥ 7.5; 15)", _goal("times_printed_samba", 1)),
    ("coserve on the same loader, images/s", _rate("segments_coserve_images_per_second")),
    ("everything resident, images/s", _rate("segments_all_resident_images_per_second")),
)
