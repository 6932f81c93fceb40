"""Sample boards: truth, missed defects, false alarms and localisation."""

from __future__ import annotations

from pathlib import Path

import pytest

from appliance import samples
from appliance.errors import CatalogError
from appliance.samples import SOUND, Defect, Found, Judged

CELL = (100.0, 100.0, 164.0, 164.0)


@pytest.mark.parametrize(
    ("boxes", "label"),
    [
        pytest.param([], SOUND, id="nothing there"),
        pytest.param([((40, 40, 60, 60), "open")], "open", id="in the cell"),
        pytest.param([((40, 40, 60, 60), "open"), ((60, 60, 90, 90), "spur")], "spur", id="two: the larger one"),
        pytest.param([((60, 10, 80, 40), "short")], None, id="reaches in by more than a quarter"),
        pytest.param([((60, 4, 80, 36), "short")], SOUND, id="reaches in by an eighth"),
        pytest.param([((0, 0, 20, 20), "copper")], SOUND, id="beside"),
        pytest.param([((22, 40, 42, 60), "copper")], "copper", id="centre on the left edge"),
        pytest.param([((86, 40, 106, 60), "copper")], None, id="centre on the right edge"),
    ],
)
def test_a_cell_is_what_the_boxes_centred_in_it_say(
    boxes: list[tuple[tuple[int, int, int, int], str]], label: str | None
) -> None:
    assert samples.truth_of([Defect(box, kind) for box, kind in boxes], (32, 32, 96, 96)) == label


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


def test_iou_is_the_share_of_the_union() -> None:
    assert samples.iou((0, 0, 10, 10), (0, 0, 10, 10)) == 1
    assert samples.iou((0, 0, 10, 10), (5, 0, 15, 10)) == pytest.approx(1 / 3)
    assert samples.iou((0, 0, 10, 10), (10, 0, 20, 10)) == 0


def test_a_label_file_is_read_and_a_faulty_line_named(tmp_path: Path) -> None:
    path = tmp_path / "sample.txt"
    path.write_text("1 2 3 4 1\n\n5,6,7,8,6\n")
    assert [d.kind for d in samples.read_defects(path)] == ["open", "pin-hole"]
    path.write_text("1 2 3 4 1\n1 2 3 4 7\n")
    with pytest.raises(CatalogError, match="line 2"):
        samples.read_defects(path)
