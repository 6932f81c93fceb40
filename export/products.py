"""Products and the expert graph as the catalogue reads them: recipes with their pictures, components, edges, usage."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from appliance.catalog import GraphManifest, Recipe
from appliance.samples import SOUND
from export import toml
from export.components import Family
from export.tiles import PICTURE, TILE, Tile

DETECTOR = "defect-detector"
FIGURE = "moulded-figure"

SURE_OF_SOUND = 0.8
"""Below this P(sound) the detector is asked too."""


def write_product(tile: Tile, family: Family, products: Path) -> None:
    """A tile as a product: recipe, golden picture, an inspected sample and the sample's defects, bytes unchanged."""
    folder = products / tile.id
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(tile.golden_file, folder / "golden.jpg")
    shutil.copyfile(tile.inspected_file, folder / "sample.jpg")
    shutil.copyfile(tile.labels_file, folder / "sample.txt")
    names = family.names
    recipe = {
        "schema": 1,
        "product": tile.id,
        "size": [TILE, TILE],
        "golden": "golden.jpg",
        "placements": [
            {
                "designator": cell.designator,
                "component": names[family.type_of(tile, cell)],
                "rect": [*cell.corner, PICTURE, PICTURE],
            }
            for cell in tile.cells
        ],
    }
    Recipe.model_validate(recipe)
    (folder / "recipe.toml").write_text(toml.dumps(recipe), encoding="utf-8")


def write_graph(families: Sequence[Family], has_figure: bool, path: Path) -> None:
    """Every component asks the expert of its name; a cell that is not surely sound goes on to the detector."""
    components = [*(name for family in families for name in family.names), *([FIGURE] if has_figure else [])]
    graph = {
        "schema": 1,
        "name": "pcb-inspection",
        "components": {name: name for name in components},
        "edges": [
            {
                "from": "pcb-*",
                "to": DETECTOR,
                "when": ({"not_label": SOUND}, {"label": SOUND, "score_below": SURE_OF_SOUND}),
            }
        ],
        "usage": _usage(families),
    }
    GraphManifest.model_validate(graph)
    path.write_text(toml.dumps(graph), encoding="utf-8")


def _usage(families: Sequence[Family]) -> dict[str, float]:
    """Relative frequency of each component on the train tiles, every board being equally frequent."""
    return {
        name: round(share / len(families), 6)
        for family in families
        for name, share in zip(family.names, family.shares, strict=True)
    }
