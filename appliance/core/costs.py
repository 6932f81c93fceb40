"""The latency model: what running and loading an expert costs on one device, as measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


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


def fit(samples: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """Least squares over (batch size, seconds) pairs: (K, B), neither below zero.

    One batch size cannot tell K from B: everything is then K, the cautious reading.
    """
    sizes = {n for n, _ in samples}
    if len(sizes) < 2:
        return min(s / n for n, s in samples), 0.0
    count = len(samples)
    mean_n = sum(n for n, _ in samples) / count
    mean_s = sum(s for _, s in samples) / count
    slope = sum((n - mean_n) * (s - mean_s) for n, s in samples) / sum((n - mean_n) ** 2 for n, _ in samples)
    slope = max(slope, 0.0)
    return slope, max(mean_s - slope * mean_n, 0.0)
