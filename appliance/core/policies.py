"""Whom to give a task, and whom to evict: pure functions of values.

Assignment and eviction are CoServe's (ASPLOS 2025, §4.3 and §4.4). Two rules are ours: what a queued request needs
leaves last, and only for one who has waited longer than `PATIENCE_SECONDS`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from heapq import nlargest

# A cold expert waits this long for a resident one to run out of work before it may displace one that still has some.
# It bounds starvation; shorter means more switches.
PATIENCE_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Offer:
    """What a task would add to one executor: `total_seconds` is its backlog before, `extra_seconds` the addition."""

    executor: str
    total_seconds: float
    extra_seconds: float


def assign(offers: Sequence[Offer]) -> Offer:
    """The offer that finishes the whole backlog soonest; among equals the one that adds least (CoServe §4.3)."""
    busiest, next_busiest = nlargest(2, [*(offer.total_seconds for offer in offers), 0.0])

    def finished(offer: Offer) -> tuple[float, float]:
        others = next_busiest if offer.total_seconds == busiest else busiest
        return max(offer.total_seconds + offer.extra_seconds, others), offer.extra_seconds

    return min(offers, key=finished)


@dataclass(frozen=True, slots=True)
class Resident:
    """An expert that may leave. `orphaned`: a subsequent expert none of whose preliminary experts is resident."""

    expert: str
    bytes: int
    probability: float
    orphaned: bool
    queued: int


def eviction_order(residents: Iterable[Resident], *, spare_queued: bool) -> list[str]:
    """Who leaves first: (1) orphaned subsequent experts, largest first; (2) the others, least probable first.

    CoServe's two stages (§4.4). Experts that queued requests need come last, or not at all with `spare_queued`.
    """
    leaving = [r for r in residents if not (spare_queued and r.queued)]
    leaving.sort(key=lambda r: (r.queued > 0, not r.orphaned, -r.bytes if r.orphaned else r.probability, r.expert))
    return [r.expert for r in leaving]
