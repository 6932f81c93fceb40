"""DeepPCB tiles as an inspection workload: boards, placements and what is true of each placement.

Reads a folder of `<id>_temp.jpg` (golden), `<id>_test.jpg` (inspected) and `<id>.txt` (defect boxes), wherever below
it they lie, so that a clone of the upstream repository serves as it is. Knows nothing of networks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from appliance.errors import ExportError
from appliance.samples import DEFECTS, SOUND, Box, Defect, centre_cell, read_defects

Picture = NDArray[np.uint8]
"""Grey picture, height x width, 0..255."""

BOARDS = ("00041", "12100", "12300", "13000", "20085", "44000", "50600", "77000", "92000")
SHIPPED_BOARDS = BOARDS[:3]
"""The first three in id order: a rule that does not look at results."""

LABELS = (SOUND, *DEFECTS)

TILE = 640
CELL = 64
PICTURE = 128
"""Side of a published picture: the cell and 32 px around it."""
MARGIN = (PICTURE - CELL) // 2
SEEN = 96
"""Side of the centred crop that a preliminary expert sees."""
CELLS = (TILE - 2 * MARGIN) // CELL

TILES_PER_BOARD = 52
HELD_OUT_TILES = 8
"""The last train tiles of each board choose thresholds and train nothing."""

_TEST_POSITIONS = (3, 6, 9, 12)
_SPLIT_PERIOD = 13
_BLANK_SHARE = 0.01


@dataclass(frozen=True, slots=True)
class Cell:
    """One placement of a tile: row and column in the 9 x 9 grid of 64 px cells."""

    row: int
    column: int

    @property
    def designator(self) -> str:
        return f"C{self.row:02d}{self.column:02d}"

    @property
    def corner(self) -> tuple[int, int]:
        """Left and top of the cell's published picture in the tile."""
        return self.column * CELL, self.row * CELL

    @property
    def area(self) -> Box:
        """What belongs to the cell alone, in tile pixels."""
        return area_of(self.corner)


@dataclass(frozen=True)
class Tile:
    """One place of one board: golden picture, inspected picture and the inspected one's defects."""

    id: str
    golden_file: Path
    inspected_file: Path
    labels_file: Path

    @property
    def board(self) -> str:
        return self.id[:5]

    @cached_property
    def golden(self) -> Picture:
        return read_grey(self.golden_file)

    @cached_property
    def inspected(self) -> Picture:
        return read_grey(self.inspected_file)

    @cached_property
    def defects(self) -> tuple[Defect, ...]:
        return read_defects(self.labels_file)

    @cached_property
    def cells(self) -> tuple[Cell, ...]:
        """The placements worth inspecting: those whose golden surroundings are neither blank nor solid."""
        grid = (Cell(row, column) for row in range(CELLS) for column in range(CELLS))
        return tuple(cell for cell in grid if not is_blank(window(self.golden, cell.corner, SEEN)))


@dataclass(frozen=True, slots=True)
class Split:
    """The tiles of one board: what trains, what chooses thresholds, what is only reported on."""

    board: str
    fit: tuple[Tile, ...]
    held_out: tuple[Tile, ...]
    test: tuple[Tile, ...]


def read_boards(folder: Path, boards: Sequence[str] = BOARDS) -> tuple[Split, ...]:
    """The tiles below `folder`, split by place in the scan: from 0, 3, 6, 9 and 12 of every 13 are for testing."""
    golden = {path.name.removesuffix("_temp.jpg"): path for path in folder.rglob("*_temp.jpg")}
    inspected = {path.name.removesuffix("_test.jpg"): path for path in folder.rglob("*_test.jpg")}
    labels = {path.stem: path for path in folder.rglob("*.txt")}
    complete = sorted(golden.keys() & inspected.keys() & labels.keys())
    tiles = [Tile(name, golden[name], inspected[name], labels[name]) for name in complete]
    return tuple(_split(folder, board, [tile for tile in tiles if tile.board == board]) for board in boards)


def read_grey(path: Path) -> Picture:
    """Some upstream files are stored as RGB: all are read as grey."""
    with Image.open(path) as image:
        return np.array(image.convert("L"), dtype=np.uint8)


def window(picture: Picture, corner: tuple[int, int], side: int = PICTURE) -> Picture:
    """The centred `side` x `side` part of the published picture whose left top corner is given."""
    inset = (PICTURE - side) // 2
    left, top = corner[0] + inset, corner[1] + inset
    return picture[top : top + side, left : left + side]


def area_of(corner: tuple[int, int]) -> Box:
    """The middle of the published picture whose left top corner is given: what its verdict is about."""
    return centre_cell((*corner, PICTURE, PICTURE))


def is_blank(picture: Picture) -> bool:
    """Whether less than 1 % of the pixels differ from the rest: nothing there to compare with."""
    light = float((picture > 127).mean())
    return min(light, 1 - light) < _BLANK_SHARE


def _split(folder: Path, board: str, tiles: Sequence[Tile]) -> Split:
    if len(tiles) < TILES_PER_BOARD:
        raise ExportError(
            f"{folder} holds {len(tiles)} tiles of board {board}, {TILES_PER_BOARD} are needed",
            "point --data at a clone of github.com/tangsanli5201/DeepPCB",
        )
    numbered = list(enumerate(tiles[:TILES_PER_BOARD]))
    test = tuple(tile for place, tile in numbered if place % _SPLIT_PERIOD in _TEST_POSITIONS)
    train = tuple(tile for place, tile in numbered if place % _SPLIT_PERIOD not in _TEST_POSITIONS)
    return Split(board, train[:-HELD_OUT_TILES], train[-HELD_OUT_TILES:], test)
