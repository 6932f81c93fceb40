"""Sample boards: truth, missed defects, false alarms and localisation."""

from __future__ import annotations

from pathlib import Path

import pytest

from appliance import samples
from appliance.errors import CatalogError
from appliance.samples import Defect, Found, Judged

CELL = (100.0, 100.0, 164.0, 164.0)


@pytest.mark.parametrize(
    ("box", "truth"),
    [
        ((110, 110, 130, 130), "open"),
        ((90, 90, 120, 120), "open"),  # its centre lies inside
        ((60, 110, 104, 150), "sound"),  # reaches in by less than a quarter
        ((60, 110, 119, 150), None),  # reaches in by more than a quarter
        ((200, 200, 220, 220), "sound"),
    ],
)
def test_the_truth_of_a_cell(box: tuple[int, int, int, int], truth: str | None) -> None:
    assert samples.truth_of([Defect(box, "open")], CELL) == truth


def test_a_cell_is_named_after_its_largest_defect() -> None:
    small, large = Defect((110, 110, 114, 114), "open"), Defect((130, 130, 160, 160), "short")
    assert samples.truth_of([small, large], CELL) == "short"


def test_a_placements_own_cell_is_the_middle_of_its_rectangle() -> None:
    assert samples.centre_cell((64, 128, 128, 128)) == (96, 160, 160, 224)


def test_what_is_a_matter_of_taste_does_not_count() -> None:
    judged = [
        Judged("open", True),
        Judged("open", False),
        Judged("sound", True),
        Judged("sound", False),
        Judged(None, True),
    ]
    count = samples.count(judged)
    assert (count.defective, count.missed, count.sound, count.false_alarms) == (2, 1, 2, 1)
    assert (count.recall, count.false_alarm_rate) == (0.5, 0.5)


def test_nothing_to_find_is_found_perfectly() -> None:
    assert (samples.count([]).recall, samples.count([]).false_alarm_rate, samples.localise([], []).f) == (1.0, 0.0, 1.0)


def test_each_box_is_found_once_with_the_right_type_and_overlap() -> None:
    defects = [Defect((0, 0, 10, 10), "open"), Defect((50, 50, 60, 60), "short")]
    found = [
        Found((1, 1, 11, 11), "open", 0.9),
        Found((0, 0, 10, 10), "open", 0.8),  # the same once more
        Found((50, 50, 60, 60), "spur", 0.9),  # another type
        Found((55, 55, 75, 75), "short", 0.9),  # too little overlap
    ]
    located = samples.localise(defects, found)
    assert (located.boxes, located.findings, located.right) == (2, 4, 1)
    assert samples.total([located, located]).f == pytest.approx(2 * 2 / (8 + 4))


def test_a_label_file_is_read_and_a_faulty_line_named(tmp_path: Path) -> None:
    path = tmp_path / "sample.txt"
    path.write_text("1 2 3 4 1\n\n5,6,7,8,6\n")
    assert [d.kind for d in samples.read_defects(path)] == ["open", "pin-hole"]
    path.write_text("1 2 3 4 1\n1 2 3 4 7\n")
    with pytest.raises(CatalogError, match="line 2"):
        samples.read_defects(path)
