"""How measurements tell what they found: beside their targets, by quantiles, and meanwhile by lines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

Say = Callable[[str], None]
"""Tells people, a line at a time, what is being measured."""


@dataclass(frozen=True, slots=True)
class Target:
    """What was promised of a measurement: `value` is at most, or at least, the `bound`."""

    name: str
    value: float
    relation: str
    bound: float

    @property
    def met(self) -> bool:
        return self.value <= self.bound if self.relation == "at most" else self.value >= self.bound

    def told(self) -> dict[str, Any]:
        return {**asdict(self), "met": self.met}


def quantile(values: Sequence[float], share: float) -> float:
    """That which so large a share of the values is below; zero where there is none."""
    ordered = sorted(values)
    return ordered[min(int(len(ordered) * share), len(ordered) - 1)] if ordered else 0.0
