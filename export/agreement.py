"""How far a variant of a network agrees with the network: what both found in the same pictures. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from appliance import samples
from appliance.core.types import Box, Finding

SAME_IOU = 0.5
"""Findings of one label that overlap so much are one."""

Found = tuple[Finding, ...]
"""In one picture."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """Over `pictures`; the recalls (of the parts that shall fail, the share that does) where it is known of any."""

    pictures: int
    verdicts: float
    findings: float
    full_recall: float | None
    recall: float | None

    @property
    def share(self) -> float:
        return min(self.verdicts, self.findings)

    def misses(self, asked: float) -> list[str]:
        """What is too little, in words with numbers; empty when the variant may serve."""
        wrong = [
            f"{what} of {self.pictures} pictures agree to {share:.2%}, asked is {asked:.2%}"
            for what, share in (("pass and fail", self.verdicts), ("findings", self.findings))
            if share < asked
        ]
        if self.recall is not None and self.full_recall is not None and self.recall < self.full_recall:
            wrong.append(f"recall falls from {self.full_recall:.2%} to {self.recall:.2%}")
        return wrong


def compare(full: Sequence[Found], variant: Sequence[Found], truths: Sequence[bool | None]) -> Agreement:
    """By picture, what each found, and whether the part shall fail, where that is known."""
    pairs = list(zip(full, variant, strict=True))
    same = sum(_fails(one) == _fails(other) for one, other in pairs)
    matched, found = sum(_matched(one, other) for one, other in pairs), sum(len(f) + len(v) for f, v in pairs)
    return Agreement(
        pictures=len(pairs),
        verdicts=same / len(pairs),
        findings=2 * matched / found if found else 1.0,
        full_recall=_recall(full, truths),
        recall=_recall(variant, truths),
    )


def _fails(found: Found) -> bool:
    return any(finding.fails for finding in found)


def _matched(one: Found, other: Found) -> int:
    """How many findings of one are in the other, each counted once, the best first."""
    left, count = list(other), 0
    for finding in one:
        same = next((candidate for candidate in left if _is_same(finding, candidate)), None)
        if same is not None:
            left.remove(same)
            count += 1
    return count


def _is_same(one: Finding, other: Finding) -> bool:
    if (one.label, one.fails) != (other.label, other.fails):
        return False
    if one.box is None or other.box is None:
        return one.box is other.box
    return samples.iou(_edges(one.box), _edges(other.box)) >= SAME_IOU


def _edges(box: Box) -> samples.Box:
    return box.x1, box.y1, box.x2, box.y2


def _recall(found: Sequence[Found], truths: Sequence[bool | None]) -> float | None:
    defective = [_fails(one) for one, truth in zip(found, truths, strict=True) if truth]
    return sum(defective) / len(defective) if defective else None
