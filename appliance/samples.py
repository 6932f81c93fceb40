"""Sample boards: what is really wrong with them, and how well verdicts agree with it.

A product may ship `sample.jpg`, an inspected board, and `sample.txt`, its defects as `x1 y1 x2 y2 type` lines (types
as in DeepPCB, arXiv:1902.06197). Values in, values out: training, evaluation and the demo are judged by the same sums.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from appliance.errors import CatalogError

Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels of the board's picture."""

SOUND = "sound"
DEFECTS = ("open", "short", "mousebite", "spur", "copper", "pin-hole")
"""In the order of the type numbers 1 to 6."""

_KINDS = dict(enumerate(DEFECTS, 1))

LOCALISED_IOU = 0.33
"""The measure of the DeepPCB authors: this overlap, and the type right."""

_REACH_SHARE = 0.25


@dataclass(frozen=True, slots=True)
class Defect:
    """One labelled defect."""

    box: Box
    kind: str

    @property
    def centre(self) -> tuple[float, float]:
        left, top, right, bottom = self.box
        return (left + right) / 2, (top + bottom) / 2

    @property
    def area(self) -> float:
        left, top, right, bottom = self.box
        return (right - left) * (bottom - top)


@dataclass(frozen=True, slots=True)
class Found:
    """A detector's finding in pixels of the board's picture."""

    box: Box
    kind: str
    score: float


@dataclass(frozen=True, slots=True)
class Judged:
    """One placement: what is true of it (None where that is a matter of taste), and whether its verdict was `fail`."""

    truth: str | None
    failed: bool


@dataclass(frozen=True, slots=True)
class Count:
    """Verdicts over placements whose truth is certain."""

    defective: int
    missed: int
    sound: int
    false_alarms: int

    def __add__(self, other: Count) -> Count:
        return Count(
            self.defective + other.defective,
            self.missed + other.missed,
            self.sound + other.sound,
            self.false_alarms + other.false_alarms,
        )

    @property
    def recall(self) -> float:
        return 1 - self.missed / self.defective if self.defective else 1.0

    @property
    def false_alarm_rate(self) -> float:
        return self.false_alarms / self.sound if self.sound else 0.0


@dataclass(frozen=True, slots=True)
class Localisation:
    """How many labelled boxes, how many findings, and how many of these are right."""

    boxes: int
    findings: int
    right: int

    @property
    def precision(self) -> float:
        return self.right / self.findings if self.findings else 1.0

    @property
    def recall(self) -> float:
        return self.right / self.boxes if self.boxes else 1.0

    @property
    def f(self) -> float:
        return 2 * self.right / (self.findings + self.boxes) if self.findings + self.boxes else 1.0


def read_defects(path: Path) -> tuple[Defect, ...]:
    """The defects of a label file. Raises CatalogError naming file and line."""
    defects = []
    for number, line in enumerate(path.read_text("ascii").splitlines(), 1):
        words = line.replace(",", " ").split()
        if not words:
            continue
        try:
            left, top, right, bottom, kind = (int(word) for word in words)
            defects.append(Defect((left, top, right, bottom), _KINDS[kind]))
        except (ValueError, KeyError) as error:
            raise CatalogError(f"{path} line {number} is not `x1 y1 x2 y2 type`", "types are 1 to 6") from error
    return tuple(defects)


def centre_cell(rect: tuple[int, int, int, int]) -> Box:
    """The part of a placement's rectangle (x, y, width, height) that is its own: the middle half of each side."""
    x, y, width, height = rect
    return x + width / 4, y + height / 4, x + width * 3 / 4, y + height * 3 / 4


def truth_of(defects: Sequence[Defect], cell: Box) -> str | None:
    """What is true of a cell; None where the answer is a matter of taste.

    A cell is defective when a box's centre lies in it, named after the largest such box. It is left out when a box
    only reaches in, by more than a quarter of its area; else it is sound.
    """
    inside = [defect for defect in defects if contains(cell, defect.centre)]
    if inside:
        return max(inside, key=lambda defect: defect.area).kind
    if any(overlap(defect.box, cell) > _REACH_SHARE * defect.area for defect in defects):
        return None
    return SOUND


def count(judged: Iterable[Judged]) -> Count:
    """Missed defects and false alarms."""
    certain = [(one.truth != SOUND, one.failed) for one in judged if one.truth is not None]
    return Count(
        defective=sum(defective for defective, _ in certain),
        missed=sum(defective and not failed for defective, failed in certain),
        sound=sum(not defective for defective, _ in certain),
        false_alarms=sum(failed and not defective for defective, failed in certain),
    )


def localise(defects: Sequence[Defect], found: Iterable[Found]) -> Localisation:
    """One board's labelled boxes and findings matched one to one, best score first."""
    unmatched, right, findings = list(defects), 0, 0
    for finding in sorted(found, key=lambda finding: -finding.score):
        findings += 1
        fitting = [d for d in unmatched if d.kind == finding.kind and iou(finding.box, d.box) >= LOCALISED_IOU]
        if fitting:
            unmatched.remove(max(fitting, key=lambda defect: iou(finding.box, defect.box)))
            right += 1
    return Localisation(len(defects), findings, right)


def total(parts: Iterable[Localisation]) -> Localisation:
    """Several boards taken together."""
    kept = tuple(parts)
    return Localisation(sum(p.boxes for p in kept), sum(p.findings for p in kept), sum(p.right for p in kept))


def contains(box: Box, point: tuple[float, float]) -> bool:
    return box[0] <= point[0] < box[2] and box[1] <= point[1] < box[3]


def overlap(one: Box, other: Box) -> float:
    """Shared area in square pixels."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(width, 0.0) * max(height, 0.0)


def iou(one: Box, other: Box) -> float:
    shared = overlap(one, other)
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other))
    return shared / (areas - shared) if shared else 0.0
