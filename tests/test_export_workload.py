"""The inspection workload made of tiles: what a placement is, what is true of it, and how an inspection is judged."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some

from appliance.core.types import Box, Finding
from appliance.errors import ExportError
from appliance.samples import DEFECTS, SOUND, Count, Defect, Localisation
from export import toml
from export.calibrate import choose
from export.components import find_family
from export.quality import Inspection, count, inspected_defects, localise
from export.samples import SHIFT, Scene, photograph, turned
from export.tiles import (
    CELLS,
    LABELS,
    MARGIN,
    PICTURE,
    TILE,
    Cell,
    Tile,
    is_blank,
    read_boards,
)

PRODUCTS = Path(__file__).parent.parent / "models_onnx" / "products"


def shipped_tile(product: str) -> Tile:
    folder = PRODUCTS / product
    return Tile(product, folder / "golden.jpg", folder / "sample.jpg", folder / "sample.txt")


def test_every_published_picture_lies_inside_the_tile() -> None:
    for row in range(CELLS):
        for column in range(CELLS):
            left, top = Cell(row, column).corner
            assert 0 <= left <= TILE - PICTURE
            assert 0 <= top <= TILE - PICTURE


def test_blank_and_solid_surroundings_are_skipped() -> None:
    picture = np.zeros((96, 96), np.uint8)
    assert is_blank(picture)
    assert is_blank(picture + 255)
    picture[:, :4] = 255
    assert not is_blank(picture)


def test_boxes_turn_with_their_picture() -> None:
    picture = np.zeros((PICTURE, PICTURE), np.uint8)
    picture[20:30, 70:100] = 255
    scene = Scene(picture, picture, "open", (Defect((70, 20, 100, 30), "open"),))
    for quarters in range(4):
        for mirrored in (False, True):
            after = turned(scene, quarters, mirrored)
            left, top, right, bottom = (int(edge) for edge in after.defects[0].box)
            assert after.picture[top:bottom, left:right].all()
            assert np.count_nonzero(after.picture) == 300


def test_a_published_picture_is_at_most_two_pixels_off_its_reference() -> None:
    tile = shipped_tile("00041003")
    corner = tile.cells[20].corner
    for seed in range(10):
        scene = photograph(tile, corner, np.random.default_rng(seed), golden=True)
        best = min(
            np.abs(np.roll(scene.picture.astype(int), (down, right), (0, 1)) - scene.reference)[4:-4, 4:-4].mean()
            for down in range(-SHIFT, SHIFT + 1)
            for right in range(-SHIFT, SHIFT + 1)
        )
        assert best < 4


def test_the_test_tiles_are_those_at_fixed_places_of_the_scan(tmp_path: Path) -> None:
    for number in range(60):
        for suffix in ("_temp.jpg", "_test.jpg", ".txt"):
            (tmp_path / f"00041{number:03d}{suffix}").touch()
    (split,) = read_boards(tmp_path, ["00041"])
    numbers = [int(tile.id[5:]) for tile in split.test]
    assert numbers == [3, 6, 9, 12, 16, 19, 22, 25, 29, 32, 35, 38, 42, 45, 48, 51]
    assert (len(split.fit), len(split.held_out)) == (28, 8)
    assert not {tile.id for tile in split.test} & {tile.id for tile in (*split.fit, *split.held_out)}


def test_a_board_without_enough_tiles_is_an_error_that_says_where_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="tangsanli5201/DeepPCB"):
        read_boards(tmp_path, ["00041"])


def test_types_are_ordered_from_common_to_rare_and_found_again() -> None:
    tiles = [shipped_tile(name) for name in ("00041003", "00041006")]
    family = find_family("00041", tiles, 5, np.random.default_rng(0))
    assert list(family.shares) == sorted(family.shares, reverse=True)
    assert sum(family.shares) == pytest.approx(1)
    assert family.names[2] == "pcb-00041-02"
    assert {family.type_of(tile, cell) for tile in tiles for cell in tile.cells} == set(range(5))


def inspection(
    truth: str | None, defective: float, found: tuple[Finding, ...] | None = None, cell: int = 0
) -> Inspection:
    tile = shipped_tile("00041003")
    return Inspection("pcb-00041-00", tile, tile.cells[cell], truth, defective, found)


def finding(score: float, box: tuple[float, float, float, float] = (0, 0, 1, 1), label: str = "open") -> Finding:
    return Finding(label, score, True, Box(*box))


def test_missed_defects_and_false_alarms_are_counted_where_the_truth_is_certain() -> None:
    seen = [
        inspection("open", 0.9),
        inspection("open", 0.3, (finding(0.6),)),
        inspection("open", 0.3, (finding(0.4),)),
        inspection(SOUND, 0.1),
        inspection(SOUND, 0.8),
        inspection(None, 0.99),
    ]
    assert count(seen, 0.5, 0.5) == Count(defective=3, missed=1, sound=2, false_alarms=1)


def test_a_finding_is_right_when_type_and_place_are() -> None:
    tile = shipped_tile("00041003")
    nobody = localise([inspection(SOUND, 0.1)], 0.5)
    assert nobody.right == 0
    assert 0 < nobody.boxes <= len(tile.defects)
    inside = inspected_defects(tile)[0]
    twice = (finding(0.9, inside.box, inside.kind), finding(0.8, inside.box, inside.kind))
    wrong = (finding(0.9, inside.box, next(kind for kind in DEFECTS if kind != inside.kind)),)
    assert localise([inspection(SOUND, 0.9, twice)], 0.5) == Localisation(nobody.boxes, 2, 1)
    assert localise([inspection(SOUND, 0.9, wrong)], 0.5).right == 0


def test_the_threshold_is_the_highest_that_finds_enough() -> None:
    seen = [inspection("open", 0.61 if number else 0.31) for number in range(200)]
    assert choose([*seen, inspection(SOUND, 0.05)]).classifier == pytest.approx(0.6)


def test_labels_are_sound_and_the_upstream_types_in_their_order() -> None:
    assert LABELS == ("sound", "open", "short", "mousebite", "spur", "copper", "pin-hole")
    assert MARGIN == 32


Plain = some.one_of(
    some.booleans(),
    some.integers(-(2**40), 2**40),
    some.floats(allow_nan=False, allow_infinity=False),
    some.text(some.characters(exclude_categories=["Cs"]), max_size=20),
)
Tables = some.recursive(
    some.dictionaries(some.text(max_size=8), some.one_of(Plain, some.lists(Plain, max_size=4)), max_size=4),
    lambda inner: some.dictionaries(some.text(max_size=8), inner | some.lists(inner, min_size=1, max_size=3)),
    max_leaves=8,
)


@given(Tables)
def test_what_is_written_as_toml_reads_back_the_same(document: Mapping[str, object]) -> None:
    assert tomllib.loads(toml.dumps(document)) == document
