"""Training pictures: what a camera would have published of a placement, and what is true of it.

The published picture is a grey JPEG, a pixel or two off the reference; so are the training pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from appliance.samples import Box, Defect, truth_of
from export.tiles import CELL, LABELS, PICTURE, SEEN, TILE, Cell, Picture, Tile, area_of, window

INPUT = 64
"""Side of what the preliminary expert is fed, in pixels."""

JPEG_QUALITIES = (85, 95)
SHIFT = 2
"""Largest misalignment of picture and reference, in pixels."""

Corner = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Scene:
    """One published picture with its reference; boxes in picture pixels, of defects whose centre lies in it."""

    picture: Picture
    reference: Picture
    label: str | None
    defects: tuple[Defect, ...]


@dataclass(frozen=True, slots=True)
class Pairs:
    """Classifier samples: pictures and references (n, 64, 64), labels (n)."""

    pictures: NDArray[np.uint8]
    references: NDArray[np.uint8]
    labels: NDArray[np.int64]


def photograph(tile: Tile, corner: Corner, generator: np.random.Generator, *, golden: bool = False) -> Scene:
    """What a camera would publish of that place; with `golden`, of a board without defects."""
    source = tile.golden if golden else tile.inspected
    defects = () if golden else tile.defects
    shifted = tuple(_shift(place, generator) for place in corner)
    picture = published(source, (shifted[0], shifted[1]), int(generator.integers(*JPEG_QUALITIES, endpoint=True)))
    moved = (_relative(defect, (shifted[0], shifted[1])) for defect in defects)
    visible = tuple(defect for defect in moved if all(0 < place < PICTURE for place in defect.centre))
    return Scene(picture, window(tile.golden, corner), truth_of(defects, area_of(corner)), visible)


def published(source: Picture, corner: Corner, quality: int) -> Picture:
    """A picture after the camera's JPEG encoding."""
    buffer = BytesIO()
    Image.fromarray(window(source, corner)).save(buffer, format="JPEG", quality=quality)
    with Image.open(buffer) as image:
        return np.array(image.convert("L"))


def turned(scene: Scene, quarters: int, mirrored: bool) -> Scene:
    """The scene turned by quarter turns, then mirrored left to right: copper knows no up or down."""
    defects = tuple(Defect(_turned_box(defect.box, quarters, mirrored), defect.kind) for defect in scene.defects)
    return Scene(
        _turned_picture(scene.picture, quarters, mirrored),
        _turned_picture(scene.reference, quarters, mirrored),
        scene.label,
        defects,
    )


def reduced(picture: Picture) -> Picture:
    """What the preliminary expert sees of a published picture, 64 x 64; the same steps as at the appliance."""
    inset = (PICTURE - SEEN) // 2
    seen = Image.fromarray(picture[inset : inset + SEEN, inset : inset + SEEN])
    return np.array(seen.resize((INPUT, INPUT), Image.Resampling.BILINEAR))


def pairs(scenes: Sequence[Scene]) -> Pairs:
    """Classifier samples of the scenes whose label is certain."""
    certain = [(scene, scene.label) for scene in scenes if scene.label is not None]
    return Pairs(
        np.stack([reduced(scene.picture) for scene, _ in certain]),
        np.stack([reduced(scene.reference) for scene, _ in certain]),
        np.array([LABELS.index(label) for _, label in certain], dtype=np.int64),
    )


def wild_scenes(tiles: Sequence[Tile], count: int, generator: np.random.Generator) -> Iterator[Scene]:
    """Scenes at any place, not only at the placements: defects half of the time, near misses, sound and golden ones."""
    choices: tuple[Callable[[Tile, np.random.Generator], Scene], ...] = (_at_defect, _near_defect, _anywhere, _golden)
    for choice in generator.choice(len(choices), size=count, p=(0.45, 0.2, 0.2, 0.15)):
        tile = tiles[int(generator.integers(len(tiles)))]
        scene = choices[choice](tile, generator)
        yield turned(scene, int(generator.integers(4)), bool(generator.integers(2)))


def placed_scenes(
    places: Sequence[tuple[Tile, Cell]], generator: np.random.Generator, *, golden: bool = False
) -> list[Scene]:
    """One scene at each of the placements, as the line will see it."""
    return [photograph(tile, cell.corner, generator, golden=golden) for tile, cell in places]


def _at_defect(tile: Tile, generator: np.random.Generator) -> Scene:
    """A defect's centre somewhere in the cell."""
    return _around(tile, CELL / 2, generator)


def _near_defect(tile: Tile, generator: np.random.Generator) -> Scene:
    """A defect in or around the cell: what teaches where a cell ends."""
    return _around(tile, CELL, generator)


def _around(tile: Tile, reach: float, generator: np.random.Generator) -> Scene:
    defect = tile.defects[int(generator.integers(len(tile.defects)))]
    corner = [round(centre - PICTURE / 2 + generator.uniform(-reach, reach)) for centre in defect.centre]
    return photograph(tile, (_inside(corner[0]), _inside(corner[1])), generator)


def _anywhere(tile: Tile, generator: np.random.Generator) -> Scene:
    return photograph(tile, _random_corner(generator), generator)


def _golden(tile: Tile, generator: np.random.Generator) -> Scene:
    return photograph(tile, _random_corner(generator), generator, golden=True)


def _random_corner(generator: np.random.Generator) -> Corner:
    left, top = generator.integers(TILE - PICTURE + 1, size=2)
    return int(left), int(top)


def _shift(place: int, generator: np.random.Generator) -> int:
    return _inside(place + int(generator.integers(-SHIFT, SHIFT, endpoint=True)))


def _inside(place: int) -> int:
    return min(max(place, 0), TILE - PICTURE)


def _relative(defect: Defect, corner: Corner) -> Defect:
    left, top, right, bottom = defect.box
    return Defect((left - corner[0], top - corner[1], right - corner[0], bottom - corner[1]), defect.kind)


def _turned_picture(picture: Picture, quarters: int, mirrored: bool) -> Picture:
    result = np.rot90(picture, quarters)
    return np.ascontiguousarray(result[:, ::-1] if mirrored else result)


def _turned_box(box: Box, quarters: int, mirrored: bool) -> Box:
    """As numpy.rot90 turns: a point x, y of a picture of side s goes to y, s - x."""
    left, top, right, bottom = box
    for _ in range(quarters):
        left, top, right, bottom = top, PICTURE - right, bottom, PICTURE - left
    if mirrored:
        left, right = PICTURE - right, PICTURE - left
    return left, top, right, bottom
