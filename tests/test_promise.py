"""Sums of settings: what the process may hold, and what the machine has for it."""

from __future__ import annotations

from appliance.config import Config, Memory
from appliance.engine.pinned import WINDOW_BYTES, WINDOWS
from appliance.promise import AT_START_BYTES, WORKING_BYTES, passing_bytes, promised_bytes, weights_budget

SETTINGS = Config(memory=Memory.model_validate({"weights": "1GB", "activations": "100MB", "gpu_host_tier": "200MB"}))
TAKEN = AT_START_BYTES + WORKING_BYTES + 2 * 100_000_000


def test_a_machine_with_memory_enough_gives_what_is_asked() -> None:
    assert weights_budget(SETTINGS, 1_000_000_000 + TAKEN) == 1_000_000_000


def test_a_smaller_machine_or_cgroup_gives_what_it_has_left() -> None:
    assert weights_budget(SETTINGS, 600_000_000 + TAKEN) == 600_000_000
    assert weights_budget(SETTINGS, 600_000_000 + TAKEN, gpus=2) == 200_000_000 - 2 * WINDOWS * WINDOW_BYTES
    assert weights_budget(SETTINGS, TAKEN - 1) == 0


def test_the_promise_grows_with_what_is_promised() -> None:
    def promised(weights_bytes: int, executors: int) -> int:
        return promised_bytes(SETTINGS, weights_bytes=weights_bytes, executors=executors, at_start_bytes=5)

    assert promised(1000, 2) - promised(0, 2) == 1000
    assert promised(0, 3) - promised(0, 2) == 16 * SETTINGS.limits.picture_pixels
    assert promised(0, 0) - 3 * SETTINGS.limits.picture_pixels == passing_bytes(SETTINGS) + 2 * 100_000_000 + 5


def test_the_runtime_may_keep_as_much_of_past_runs_as_batches_take() -> None:
    none = SETTINGS.model_copy(update={"memory": SETTINGS.memory.model_copy(update={"activations": 0})})
    both = [promised_bytes(c, weights_bytes=0, executors=1, at_start_bytes=0) for c in (SETTINGS, none)]
    assert both[0] - both[1] == 2 * 100_000_000
