"""How much memory the process ever has: the promise of docs/architecture.md, held by tests. Pure sums of settings."""

from __future__ import annotations

from appliance.config import INBOX_BYTES, Config
from appliance.drivers.records.fresh import FRESH_BYTES
from appliance.drivers.records.writer import GROUP_BYTES, QUEUED_BYTES
from appliance.engine.pinned import WINDOW_BYTES, WINDOWS

AT_START_BYTES = 80_000_000
"""More than the process has when it starts serving (60 MB), for sums that are made before it does."""
WORKING_BYTES = 64_000_000
"""Beside all that is counted: decoded and golden pictures (2 x 16 MB), template sessions, SQLite's caches and what the
allocator keeps for the next batch."""
WHOLE_BYTES_PER_PIXEL = 3
"""Decoded pictures of whole boards, from which parts are being cut: together as many pixels as the largest may have."""
DECODING_BYTES_PER_PIXEL = 16
"""For the picture that an executor decodes: as Pillow holds it, as bytes, and as the array (measured: 14)."""


def promised_bytes(config: Config, *, weights_bytes: int, executors: int, at_start_bytes: int) -> int:
    """The most anonymous memory that the process ever has, with this budget for weights.

    What is pinned for GPUs was there when it started serving.
    """
    decoding = DECODING_BYTES_PER_PIXEL * config.limits.picture_pixels * executors
    wholes = WHOLE_BYTES_PER_PIXEL * config.limits.picture_pixels
    return at_start_bytes + weights_bytes + activation_bytes(config) + decoding + wholes + passing_bytes(config)


def activation_bytes(config: Config) -> int:
    """For the batches in work, and as much again that the runtime keeps of past ones for others."""
    return 2 * int(config.memory.activations)


def pinned_bytes(config: Config) -> int:
    """Main memory that a GPU's weights pass through, or wait in."""
    return int(config.memory.gpu_host_tier) + WINDOWS * WINDOW_BYTES


def passing_bytes(config: Config) -> int:
    """Of the promise, what comes and goes with pictures that wait, and what nobody counts."""
    queued = INBOX_BYTES + QUEUED_BYTES + GROUP_BYTES + FRESH_BYTES
    return WORKING_BYTES + queued + 2 * int(config.limits.picture_bytes)


def weights_budget(config: Config, memory_bytes: int, gpus: int = 0) -> int:
    """memory.weights, or less where the machine or its cgroup do not have as much.

    Decoding is not subtracted: few boxes see a picture of `limits.picture_pixels` on every executor at a time.
    """
    taken = AT_START_BYTES + WORKING_BYTES + activation_bytes(config) + gpus * pinned_bytes(config)
    return max(0, min(int(config.memory.weights), memory_bytes - taken))
