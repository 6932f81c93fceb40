"""Recipes that are replaced while boards are under way."""

from __future__ import annotations

import queue
from pathlib import Path

import pytest

from appliance import catalog as catalogs
from appliance.contract import Address
from appliance.core.types import Refusal
from appliance.drivers.recipes import Recipes
from appliance.errors import CatalogError
from tests.kit_boards import write_board_catalog, write_product

FORMER, NEW = {"R1": "c-good"}, {"R2": "c-good"}
ADDRESS = Address("line1", "one", "SN-1", "R1")


def reloaded(recipes: Recipes) -> Refusal | None:
    answers: queue.Queue[Refusal | None] = queue.Queue()
    recipes.reload(answers.put)
    return answers.get(timeout=60)


def parts(recipes: Recipes, address: Address = ADDRESS) -> list[str]:
    return list(recipes.of(address).products["one"].placements)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_product(write_board_catalog(tmp_path), "one", FORMER, golden=True)
    return tmp_path


def test_a_new_recipe_counts_for_all_but_the_boards_under_way(folder: Path) -> None:
    recipes = Recipes(catalogs.load(folder))
    recipes.keep(ADDRESS.board_name, recipes.of(ADDRESS).products["one"])
    write_product(folder, "one", NEW)
    write_product(folder, "another", NEW)
    assert reloaded(recipes) is None
    assert parts(recipes) == ["R1"]
    other = Address("line1", "one", "SN-2", "R1")
    assert parts(recipes, other) == ["R2"]
    assert "another" in recipes.of(other).products
    recipes.release(ADDRESS.board_name)
    assert parts(recipes) == ["R2"]


@pytest.mark.parametrize(
    ("file", "old", "new", "says"),
    [
        ("recipe.toml", "size = [16, 16]", "size = [16, 15]", "R1 reaches outside"),
        ("recipe.toml", "size = [16, 16]", "size = [20, 20]", "16 x 16 pixels, and size in"),
        ("recipe.toml", "'c-good'", "'ghost'", "R1 is an unknown component ghost"),
        ("recipe.toml", "rect =", "rectangle =", "placements.0.rect"),
        ("recipe.toml", "golden.png", "gone.png", "gone.png is missing"),
        ("recipe.toml", "schema = 1", "schema = ", "at line 1"),
    ],
)
def test_a_wrong_recipe_is_refused_by_name_and_the_former_stays(
    folder: Path, file: str, old: str, new: str, says: str
) -> None:
    recipes = Recipes(catalogs.load(folder))
    path = folder / "products" / "one" / file
    path.write_text(path.read_text().replace(old, new))
    refusal = reloaded(recipes)
    assert refusal is not None
    assert refusal.reason == "catalog"
    assert says in refusal.detail
    assert "products/one" in refusal.detail
    assert parts(recipes) == ["R1"]


def test_a_recipe_with_more_placements_than_pictures_may_wait_is_refused_and_the_former_stays(folder: Path) -> None:
    recipes = Recipes(catalogs.load(folder), 2)
    write_product(folder, "one", {f"R{number}": "c-good" for number in range(3)})
    refusal = reloaded(recipes)
    assert refusal is not None
    assert refusal.reason == "catalog"
    assert "one has 3 placements, and limits.waiting_pictures is 2" in refusal.detail
    assert parts(recipes) == ["R1"]
    write_product(folder, "one", {f"R{number}": "c-good" for number in range(2)})
    assert reloaded(recipes) is None


@pytest.mark.parametrize(("name", "says"), [("graph.toml", "graph.toml"), ("good/1/expert.toml", "the experts good")])
def test_more_than_recipes_needs_a_restart(folder: Path, name: str, says: str) -> None:
    recipes = Recipes(catalogs.load(folder))
    text = (folder / name).read_text()
    changed = text.replace("threshold = 1.0", "threshold = 0.9").replace("c-bad =", "c-worse =")
    (folder / name).write_text(changed)
    write_product(folder, "another", NEW)
    refusal = reloaded(recipes)
    assert refusal is not None
    assert refusal.reason == "restart"
    assert says in refusal.detail
    assert "another" not in recipes.of(ADDRESS).products


def test_a_golden_picture_that_is_none_is_named(folder: Path) -> None:
    (folder / "products" / "one" / "golden.png").write_bytes(b"no picture")
    with pytest.raises(CatalogError, match=r"golden\.png is no picture"):
        catalogs.load(folder)
