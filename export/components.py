"""Which placements look alike: the component types of a board, found on the golden pictures of its train tiles.

A type is fixed before anything is inspected, so every placement of a new tile of the board has one too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from export.tiles import SEEN, Cell, Picture, Tile, window

Vectors = NDArray[np.float32]
"""Samples x features."""

_SIDE = 12
_ROUNDS = 40
_STARTS = 4


@dataclass(frozen=True, slots=True)
class Family:
    """The component types of one board; `centroids[i]` belongs to type i, types are ordered from common to rare."""

    board: str
    centroids: Vectors
    shares: tuple[float, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(component_name(self.board, number) for number in range(len(self.centroids)))

    def type_of(self, tile: Tile, cell: Cell) -> int:
        return int(_nearest(_look(tile, cell)[None], self.centroids)[0])


def component_name(board: str, number: int) -> str:
    return f"pcb-{board}-{number:02d}"


def find_family(board: str, tiles: Sequence[Tile], types: int, generator: np.random.Generator) -> Family:
    """k-means over the golden cells; the best of a few starts."""
    looks = np.stack([_look(tile, cell) for tile in tiles for cell in tile.cells])
    attempts = [_cluster(looks, types, generator) for _ in range(_STARTS)]
    centroids = min(attempts, key=lambda found: _spread(looks, found))
    counts = np.bincount(_nearest(looks, centroids), minlength=types)
    order = np.argsort(-counts, kind="stable")
    shares = tuple(float(share) for share in counts[order] / counts.sum())
    return Family(board, centroids[order], shares)


def _look(tile: Tile, cell: Cell) -> Vectors:
    """The golden surroundings, reduced: box filtering makes a shift by a pixel or two harmless."""
    return _reduced(window(tile.golden, cell.corner, SEEN))


def _reduced(picture: Picture) -> Vectors:
    small = Image.fromarray(picture).resize((_SIDE, _SIDE), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float32).ravel() / np.float32(255)


def _cluster(looks: Vectors, types: int, generator: np.random.Generator) -> Vectors:
    centroids = _seeds(looks, types, generator)
    for _ in range(_ROUNDS):
        nearest = _nearest(looks, centroids)
        moved = np.stack([_centre(looks[nearest == number], centroids[number]) for number in range(types)])
        if np.array_equal(moved, centroids):
            break
        centroids = moved
    return centroids


def _seeds(looks: Vectors, types: int, generator: np.random.Generator) -> Vectors:
    """k-means++: each further seed is drawn in proportion to its squared distance from those there are."""
    chosen = [looks[generator.integers(len(looks))]]
    while len(chosen) < types:
        distance = _distances(looks, np.stack(chosen)).min(axis=1).astype(np.float64)
        chosen.append(looks[generator.choice(len(looks), p=distance / distance.sum())])
    return np.stack(chosen)


def _centre(members: Vectors, otherwise: Vectors) -> Vectors:
    return members.mean(axis=0, dtype=np.float32) if len(members) else otherwise


def _nearest(looks: Vectors, centroids: Vectors) -> NDArray[np.intp]:
    nearest: NDArray[np.intp] = _distances(looks, centroids).argmin(axis=1)
    return nearest


def _distances(looks: Vectors, centroids: Vectors) -> Vectors:
    difference = looks[:, None, :] - centroids[None, :, :]
    squares: Vectors = np.einsum("nkf,nkf->nk", difference, difference).astype(np.float32)
    return squares


def _spread(looks: Vectors, centroids: Vectors) -> float:
    return float(_distances(looks, centroids).min(axis=1).sum())
