"""What an inspection is measured by: missed defects, false alarms, and whether defects are named and placed right.

Values in, values out: the same sums judge the nets while thresholds are chosen and the shipped files afterwards.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from appliance import samples
from appliance.core.types import Finding
from appliance.samples import Box, Count, Defect, Found, Judged, Localisation
from export.tiles import Cell, Tile


@dataclass(frozen=True, slots=True)
class Inspection:
    """One placement as the chain saw it. `found`: the detector's findings in tile pixels, None if it did not run."""

    expert: str
    tile: Tile
    cell: Cell
    truth: str | None
    defective: float
    """1 - P(sound) of the preliminary expert."""
    found: tuple[Finding, ...] | None

    def fails(self, classifier_threshold: float, detector_threshold: float) -> bool:
        return self.defective >= classifier_threshold or any(
            finding.score >= detector_threshold for finding in self.found or ()
        )


def truth_of(tile: Tile, cell: Cell) -> str | None:
    return samples.truth_of(tile.defects, cell.area)


def count(inspections: Iterable[Inspection], classifier_threshold: float, detector_threshold: float) -> Count:
    """Missed defects and false alarms at these thresholds."""
    return samples.count(Judged(one.truth, one.fails(classifier_threshold, detector_threshold)) for one in inspections)


def localise(inspections: Sequence[Inspection], detector_threshold: float) -> Localisation:
    """Boxes and findings matched one to one within each tile, best score first."""
    by_tile: dict[str, list[Inspection]] = {}
    for inspection in inspections:
        by_tile.setdefault(inspection.tile.id, []).append(inspection)
    return samples.total(
        samples.localise(inspected_defects(members[0].tile), _found(members, detector_threshold))
        for members in by_tile.values()
    )


def inspected_defects(tile: Tile) -> tuple[Defect, ...]:
    """The defects whose centre lies in a cell that is inspected."""
    return tuple(d for d in tile.defects if any(samples.contains(cell.area, d.centre) for cell in tile.cells))


def _found(inspections: Sequence[Inspection], threshold: float) -> list[Found]:
    findings = [finding for one in inspections for finding in one.found or () if finding.score >= threshold]
    return [Found(_box(finding), finding.label, finding.score) for finding in findings]


def _box(finding: Finding) -> Box:
    assert finding.box is not None
    return finding.box.x1, finding.box.y1, finding.box.x2, finding.box.y2
