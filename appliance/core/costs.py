"""The latency model: what running and loading an expert costs on one device, as measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, linear_regression

LEAST_SHARE = 0.1
"""Of what a picture takes in the best batch. A line that rises less says that a batch takes as long however full it is,
and its slope is noise; as a group counts B once, its pictures would be almost free."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Batch latency = K·n + B (CoServe §4.2) and load latency L, per architecture and device.

    `item_seconds` is K, `fixed_seconds` is B, `load_seconds` is L.
    """

    item_seconds: float
    fixed_seconds: float
    load_seconds: float

    def run_seconds(self, items: int) -> float:
        return self.item_seconds * items + self.fixed_seconds


def mixed(far_seconds: float, near_seconds: float, near_share: float) -> float:
    """What a load takes on average that finds its bytes near so often, and else far."""
    return far_seconds + near_share * (near_seconds - far_seconds)


def fit(samples: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """Least squares over (batch size, seconds) pairs: (K, B), B not below zero and K above it.

    One batch size cannot tell K from B, nor can runs so short that noise hides what a picture more takes: everything
    is then K, for a queue whose pictures cost nothing would get them all.
    """
    item_seconds, best = slope(samples), min(s / n for n, s in samples)
    if item_seconds < LEAST_SHARE * best:
        return best, 0.0
    return item_seconds, max(fmean(s for _, s in samples) - item_seconds * fmean(n for n, _ in samples), 0.0)


def slope(samples: Sequence[tuple[int, float]]) -> float:
    """Of the line through (batch size, value) pairs by least squares; 0 if there is but one size."""
    if len({n for n, _ in samples}) < 2:
        return 0.0
    return linear_regression(*zip(*samples, strict=True)).slope
