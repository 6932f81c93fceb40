"""`appliance bench profile`: the profiler's answer beside the best of a grid, all of it served live.

Every configuration plays the same beginning of the workload. The two winners and the default are then served again, by
turns; and what the simulator says of every configuration stands beside what came of it.
"""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Sequence
from typing import Any

from appliance import __version__
from appliance.lab.telling import Say, Target
from appliance.profiler.measurements import Measured
from appliance.profiler.profiled import Plan, profiled, told
from appliance.profiler.rig import Rig
from appliance.profiler.settings import Settings, grid

COUNTS = {"cpu_executors": 3, "batch_cap": 2, "weights_share": 4}
"""24 configurations, less those that the memory does not hold: weights in four steps, since the best split of memory
lies between the ends."""
PAIRS = 3


def against_grid(rig: Rig, default: Settings, plan: Plan, say: Say) -> dict[str, Any]:
    """The numbers. Raises ApplianceError when a picture gets no answer."""
    found = profiled(rig, default, plan, say)
    began = time.monotonic()
    asked = [settings for settings in _grid(rig, default) if rig.holds(settings)]
    live = {}
    for number, settings in enumerate(asked):
        live[settings] = rig.served(settings, found.measured, found.share).images_per_second
        say(f"grid, {number + 1} of {len(asked)}: {live[settings]:.1f} images/s with {told(settings, default)}")
    grid_seconds = time.monotonic() - began
    best = max(live, key=lambda settings: live[settings])
    again = _again(rig, found.measured, found.share, [found.settings, best, default], say)
    compared = {**live, **{lap.settings: lap.outcome.images_per_second for lap in found.laps}}
    table = _predictions(rig, found.measured, found.share, compared, default)
    shutil.rmtree(found.home, ignore_errors=True)
    errors = [abs(row["off"]) for row in table]
    ratio = statistics.median(a / b for a, b in zip(again[found.settings], again[best], strict=True))
    targets = [
        Target("found beside the best of the grid", ratio, "at least", 0.97),
        Target("time beside the grid's", found.seconds / grid_seconds, "at most", 0.25),
        Target("predicted beside live, median off", statistics.median(errors), "at most", 0.1),
        Target(
            "found beside the default",
            statistics.median(a / b for a, b in zip(again[found.settings], again[default], strict=True)),
            "at least",
            1.0,
        ),
    ]
    return {
        "version": __version__,
        "workload": rig.workload.name,
        "requests_per_lap": round(len(rig.workload.requests) * found.share),
        "search_seconds": found.seconds,
        "grid_seconds": grid_seconds,
        "grid_configurations": len(asked),
        "trials": found.trials,
        "found": told(found.settings, default),
        "best_of_grid": told(best, default),
        "found_images_per_second": statistics.median(again[found.settings]),
        "best_of_grid_images_per_second": statistics.median(again[best]),
        "default_images_per_second": statistics.median(again[default]),
        "predictions": table,
        "targets": [target.told() for target in targets],
    }


def _grid(rig: Rig, default: Settings) -> list[Settings]:
    space = rig.space()
    return list(dict.fromkeys(grid(space, {name: COUNTS[name] for name in COUNTS if name in space}, default)))


def _again(
    rig: Rig, known: Measured, share: float, settings: Sequence[Settings], say: Say
) -> dict[Settings, list[float]]:
    """Each so often, by turns: what slows the box down for a while slows all."""
    found: dict[Settings, list[float]] = {one: [] for one in settings}
    for number in range(PAIRS):
        for one in found if number % 2 == 0 else reversed(found):
            found[one].append(rig.served(one, known, share).images_per_second)
            say(f"again, {number + 1} of {PAIRS}: {found[one][-1]:.1f} images/s")
    return found


def _predictions(
    rig: Rig, known: Measured, share: float, live: dict[Settings, float], default: Settings
) -> list[dict[str, Any]]:
    rows = []
    for settings, rate in live.items():
        predicted = rig.predicted(settings, known, share).images_per_second
        row = {"changed": told(settings, default), "predicted": predicted, "live": rate, "off": predicted / rate - 1}
        rows.append(row)
    return rows
