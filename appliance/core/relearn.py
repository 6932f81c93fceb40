"""What runs take, learnt anew from those that are seen, beside what the profile says they take.

Sums of least squares that forget: K·n + B of about the last hundred batches of each architecture (CoServe §4.2 fits it
once, offline). Deciding goes on by the profile: what the runs of one busy hour take is told, not believed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from appliance.core.costs import Cost

KEPT = 0.99
"""Of what is known, with each batch more."""
LEAST_BATCHES = 50
"""Fewer say nothing: the first runs of an expert warm caches, and there are always some beside a load."""
FAR_OFF = 1.5
"""Times as long as the profile says, or as short: then it is not this box's any more. Executors beside each other and
loads make runs up to so much longer."""
STILL_OFF = 1.3
"""Until it is less than this, who was far off is: near the limit a hundred batches are now beyond it, and now not."""


@dataclass(slots=True)
class _Sums:
    batches: int = 0
    weight: float = 0.0
    items: float = 0.0
    items_squared: float = 0.0
    seconds: float = 0.0
    items_seconds: float = 0.0
    expected_seconds: float = 0.0

    def add(self, items: int, seconds: float, expected_seconds: float) -> None:
        self.batches += 1
        self.weight = self.weight * KEPT + 1.0
        self.items = self.items * KEPT + items
        self.items_squared = self.items_squared * KEPT + items * items
        self.seconds = self.seconds * KEPT + seconds
        self.items_seconds = self.items_seconds * KEPT + items * seconds
        self.expected_seconds = self.expected_seconds * KEPT + expected_seconds

    def line(self) -> tuple[float, float]:
        """K and B, neither below zero; where all batches were of one size, everything is K."""
        spread = self.weight * self.items_squared - self.items**2
        if spread <= 1e-9 * self.weight**2:
            return self.seconds / self.items, 0.0
        item = (self.weight * self.items_seconds - self.items * self.seconds) / spread
        fixed = (self.seconds - item * self.items) / self.weight
        if item <= 0.0:
            return 0.0, self.seconds / self.weight
        return (item, fixed) if fixed >= 0.0 else (self.items_seconds / self.items_squared, 0.0)


@dataclass(frozen=True, slots=True)
class Learnt:
    """Of one architecture on one device: K, B, and how many times as long its runs take as they should."""

    item_seconds: float
    fixed_seconds: float
    times_as_long: float

    def is_far_off(self, sharing: float = 1.0, *, was: bool = False) -> bool:
        """Where so many runs `sharing` each core make them longer, that is no drift. `was`: it is far off already."""
        limit = STILL_OFF if was else FAR_OFF
        return not 1 / limit <= self.times_as_long <= limit * max(sharing, 1.0)


class Relearning:
    """`kinds` are the experts' architectures, by device: graphs compiled for one differ from those for another."""

    def __init__(self, kinds: Mapping[str, Mapping[str, str]]) -> None:
        self._kinds = kinds
        self._sums: dict[tuple[str, str], _Sums] = {}

    def saw(self, expert: str, device: str, items: int, seconds: float, cost: Cost) -> None:
        """A batch that ran to its end."""
        key = (self._kinds[device][expert], device)
        self._sums.setdefault(key, _Sums()).add(items, seconds, cost.run_seconds(items))

    def learnt(self) -> dict[tuple[str, str], Learnt]:
        """By architecture and device, of those with batches enough."""
        return {
            key: Learnt(*sums.line(), sums.seconds / sums.expected_seconds)
            for key, sums in self._sums.items()
            if sums.batches >= LEAST_BATCHES and sums.expected_seconds > 0
        }
