"""`appliance bench task`: one task, served live by each policy in turn, round after round, on the same experts.

Everything loads from disk for real. The bound is `all-resident` of the same round; what a user would build today, a
plain session per expert, is the other end.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import onnxruntime
import psutil

from appliance.core.policies import APPLIANCE, COSERVE, POLICIES
from appliance.drivers.devices import cores
from appliance.engine.weights import Weights
from appliance.errors import ApplianceError, ConfigError
from appliance.lab import live, paper, plain
from appliance.lab.contenders import ALL, ORACLE
from appliance.lab.fleet import Fleet, fleet, shape_named
from appliance.lab.laps import Lap, Workload, encoded_pictures
from appliance.lab.plain import PLAIN
from appliance.lab.telling import Say

NAMES = (ALL, *reversed(POLICIES), ORACLE, PLAIN)
COMPARED = (APPLIANCE.name, COSERVE.name, PLAIN)
"""Whose throughput is plotted over memory."""
_PROBES = 6
_MEMORY_BESIDE = 1 << 30
"""What this process, and the page cache for model files, should find beside the budget."""


def task(
    asked: Workload,
    names: Sequence[str] = (),
    *,
    pairs: int = 1,
    beside: Sequence[float] = (),
    folder: Path,
    say: Say = lambda line: None,
) -> tuple[dict[str, Any], list[list[Lap]]]:
    """The numbers of each policy, and the laps of each round. `all-resident` is always among them: it is the bound.

    `beside` are other budgets, as shares, at which ours, CoServe's and the plain sessions are served once more.

    Raises ConfigError for a policy that there is not, ApplianceError when disk or memory do not do, or a request gets
    no answer.
    """
    chosen = _chosen(names)
    trace = paper.drawn(asked.job)
    pictures = encoded_pictures()
    with fleet(asked.job.board, asked.shape, folder, say, plain=PLAIN in chosen) as made:
        budget_bytes = int(made.bytes * asked.budget_share)
        for share in (asked.budget_share, *beside):
            _check_memory(made, int(made.bytes * share))
        bytes_per_second = _read_speed(made)
        sizes = plain.session_bytes(made, lambda shape: shape_named(shape).side) if PLAIN in chosen else {}

        def served(name: str, share: float = asked.budget_share) -> Lap:
            say(f"{name}: {asked.requests} requests in {share:.0%} of the memory")
            budget = int(made.bytes * share)
            if name != PLAIN:
                return live.lap(name, made, trace, pictures, budget, bytes_per_second)
            laps = [plain.lap(way, made, trace, pictures, budget, sizes) for way in plain.settings()]
            return max(laps, key=lambda lap: lap.images_per_second)

        rounds = [[served(name) for name in _turned(chosen, number)] for number in range(pairs)]
        policies = [_summed_up(name, rounds) for name in chosen]
        compared = [row for row in policies if row["policy"] in COMPARED]
        here = [(row["policy"], asked.budget_share, row["images_per_second"]) for row in compared]
        elsewhere = [(name, share, served(name, share).images_per_second) for share in beside for name, *_ in here]
        found = {
            "runtime": f"onnxruntime {onnxruntime.__version__}",
            "cores": cores(),
            "load_average": round(os.getloadavg()[0], 2),
            "shape": asked.shape,
            "experts": asked.experts,
            "requests": asked.requests,
            "checked_share": asked.checked_share,
            "gap_seconds": asked.gap_seconds,
            "pairs": pairs,
            "weights_bytes": made.bytes,
            "budget_bytes": budget_bytes,
            "disk_bytes_per_second": bytes_per_second,
            "plain_session_bytes": sizes,
            "policies": policies,
            "by_budget": _by_budget((*here, *elsewhere)),
        }
    return found, rounds


def _chosen(names: Sequence[str]) -> tuple[str, ...]:
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        raise ConfigError(f"there is no policy {unknown[0]}", f"choose from {', '.join(NAMES)}")
    return tuple(name for name in NAMES if not names or name == ALL or name in names)


def _turned(names: Sequence[str], number: int) -> Sequence[str]:
    """Each round has another order: what goes first or after whom makes a difference on some disks."""
    return names if number % 2 == 0 else names[::-1]


def _check_memory(made: Fleet, budget_bytes: int) -> None:
    available = psutil.virtual_memory().available
    largest = max(compiled.bytes for compiled in made.compiled.values())
    if budget_bytes < 2 * largest * cores():
        raise ApplianceError(
            f"a budget of {budget_bytes / 1e6:.0f} MB does not hold two experts for each of {cores()} executors",
            "raise --budget or --experts",
        )
    if budget_bytes + _MEMORY_BESIDE > available:
        raise ApplianceError(
            f"the budget is {budget_bytes / 1e9:.1f} GB, and {available / 1e9:.1f} GB of memory are available",
            "choose a smaller --budget, --shape or fewer --experts",
        )


def _read_speed(made: Fleet) -> float:
    """What a load gets from this disk through our loader when it is alone: what every policy is told loads cost."""
    weights = Weights(made.segment_path)
    speeds = []
    for compiled in list(made.compiled.values())[-_PROBES:]:
        began = time.perf_counter()
        weights.load(compiled.segments)
        speeds.append(compiled.bytes / (time.perf_counter() - began))
        weights.drop(compiled.segments)
    weights.close()
    return statistics.median(speeds)


def _by_budget(points: Iterable[tuple[str, float, float]]) -> list[dict[str, Any]]:
    ordered = sorted(points, key=lambda point: (COMPARED.index(point[0]), point[1]))
    return [{"policy": name, "budget_share": share, "images_per_second": rate} for name, share, rate in ordered]


def _summed_up(name: str, rounds: Sequence[Sequence[Lap]]) -> dict[str, Any]:
    """Medians over the rounds; the fraction is of `all-resident` in the same round."""
    laps = [{lap.policy: lap for lap in round} for round in rounds]
    own = [round[name] for round in laps]

    def median(number: Callable[[Lap], float]) -> float:
        return statistics.median(number(lap) for lap in own)

    return {
        "policy": name,
        "loader": own[0].loader,
        "images_per_second": median(lambda lap: lap.images_per_second),
        "fraction_of_all_resident": statistics.median(
            lap.images_per_second / round[ALL].images_per_second for lap, round in zip(own, laps, strict=True)
        ),
        "loads": int(median(lambda lap: lap.loads)),
        "loads_floor": own[0].loads_floor,
        "wait_p50_seconds": median(lambda lap: lap.wait_seconds(0.5)),
        "wait_p99_seconds": median(lambda lap: lap.wait_seconds(0.99)),
        "cpu_seconds": median(lambda lap: lap.cpu_seconds),
        "peak_bytes": max(lap.peak_bytes for lap in own),
        "how": own[0].how,
    }
