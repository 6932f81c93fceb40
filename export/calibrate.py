"""Chooses the thresholds from inspections of held-out train tiles; never looks at test tiles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from export.quality import Inspection, count, localise

WANTED_RECALL = 0.99
"""Of defective cells, by the whole chain."""

_CANDIDATES = tuple(round(0.02 * step, 2) for step in range(3, 49))
LOWEST = _CANDIDATES[0]


@dataclass(frozen=True, slots=True)
class Thresholds:
    """`classifier`: 1 - P(sound) from which a part fails. `detector`: the score from which a finding does."""

    classifier: float
    detector: float


def choose(inspections: Sequence[Inspection]) -> Thresholds:
    """The detector's is the best for localisation; the classifier's the highest that finds enough defective cells.

    One pair for all experts: a single type has two or three held-out defects, too few to choose anything by.
    """
    detector = max(_CANDIDATES, key=lambda threshold: localise(inspections, threshold).f)
    enough = [level for level in _CANDIDATES if count(inspections, level, detector).recall >= WANTED_RECALL]
    return Thresholds(max(enough, default=_CANDIDATES[0]), detector)
