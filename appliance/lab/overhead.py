"""What deciding costs: the controller's own time per request, in virtual time with everything queued at once.

The box holds a quarter of the experts, on one GPU with three executors and on the CPU with one, as the paper's does.
"""

from __future__ import annotations

import gc
import statistics
from dataclasses import replace
from typing import Any

from appliance.core.policies import APPLIANCE, COSERVE
from appliance.lab import paper
from appliance.lab.paper import Board, Job
from appliance.lab.telling import Say
from appliance.lab.trial import tried

SIZES = ((350, 3_500, 0.05e-3), (10_000, 100_000, 0.1e-3))
"""Experts, requests queued at once, and the seconds per request that deciding may take (issue 4)."""
_POOLS = 16
"""Four executors hold a quarter of the experts: each so many times less than there are."""


def scheduling(*, repeats: int = 5, sizes: tuple[tuple[int, int, float], ...] = SIZES, say: Say) -> dict[str, Any]:
    """Medians of so many runs, of ours and of CoServe's."""
    rows = []
    for experts, queued, target in sizes:
        for policy in (APPLIANCE.name, COSERVE.name):
            say(f"{policy}: {queued:,} requests for {experts:,} experts")
            seconds = statistics.median(_seconds(policy, experts, queued) for _ in range(repeats))
            rows.append(
                {
                    "policy": policy,
                    "experts": experts,
                    "queued": queued,
                    "seconds_per_request": seconds,
                    "target_seconds": target,
                }
            )
    return {"repeats": repeats, "rows": rows}


def _seconds(policy: str, experts: int, queued: int) -> float:
    pool = max(experts // _POOLS, 1)
    machine = replace(paper.NUMA, gpu_pools={3: (pool,) * 3}, cpu_pool=pool)
    board = Board(experts, paper.BOARD_A.zipf, paper.BOARD_A.checked_share, gpu_executors=3)
    gc.collect()  # what the run before left is not this one's
    found = tried(machine, Job("backlog", board, queued, seed=1, gap_seconds=0.0), policy)
    return float(found["scheduling_seconds_per_request"])
