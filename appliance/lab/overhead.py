"""What deciding costs: the controller's own time per request, in virtual time with everything queued at once.

The box is the paper's: one GPU with three executors, and the CPU with one. It holds a quarter of the experts; or all of
them, with activations for one picture at a time, so that whoever is ready waits for room.
"""

from __future__ import annotations

import gc
import statistics
from dataclasses import dataclass, replace
from typing import Any

from appliance.core.policies import APPLIANCE, COSERVE
from appliance.lab import paper
from appliance.lab.contenders import ALL
from appliance.lab.paper import Board, Job
from appliance.lab.telling import Say
from appliance.lab.trial import tried


@dataclass(frozen=True, slots=True)
class Case:
    """So many experts, requests queued at once, and the seconds per request that deciding may take (issue 4)."""

    policy: str
    experts: int
    queued: int
    target_seconds: float
    activation_share: float = 1.0
    gap_seconds: float = 0.0
    """Between pictures. Those of one moment are decided on together; others, however close, one by one."""


FEW, MANY = (350, 3_500, 0.05e-3), (10_000, 100_000, 0.1e-3)
TIGHT = 0.02
"""One picture at a time on each device."""
ONE_BY_ONE = 1e-6
CASES = (
    Case(APPLIANCE.name, *FEW),
    Case(APPLIANCE.name, *FEW, gap_seconds=ONE_BY_ONE),
    Case(COSERVE.name, *FEW),
    Case(ALL, *FEW, TIGHT),
    Case(APPLIANCE.name, *MANY),
    Case(COSERVE.name, *MANY),
)
_POOLS = 16
"""Four executors hold a quarter of the experts: each so many times less than there are."""


def scheduling(*, repeats: int = 5, say: Say) -> dict[str, Any]:
    return {"repeats": repeats, "rows": [measured(case, repeats, say) for case in CASES]}


def measured(case: Case, repeats: int, say: Say) -> dict[str, Any]:
    """The median of so many runs."""
    tight = "" if case.activation_share == 1 else ", tight activations"
    say(f"{case.policy}: {case.queued:,} requests for {case.experts:,} experts{tight}")
    return {
        "policy": case.policy,
        "experts": case.experts,
        "queued": case.queued,
        "activation_share": case.activation_share,
        "gap_seconds": case.gap_seconds,
        "seconds_per_request": statistics.median(_seconds(case) for _ in range(repeats)),
        "target_seconds": case.target_seconds,
    }


def _seconds(case: Case) -> float:
    pool = max(case.experts // _POOLS, 1)
    machine = replace(paper.NUMA, gpu_pools={3: (pool,) * 3}, cpu_pool=pool, activation_share=case.activation_share)
    board = Board(case.experts, paper.BOARD_A.zipf, paper.BOARD_A.checked_share, gpu_executors=3)
    gc.collect()  # what the run before left is not this one's
    found = tried(machine, Job("backlog", board, case.queued, seed=1, gap_seconds=case.gap_seconds), case.policy)
    return float(found["scheduling_seconds_per_request"])
