"""Does a product's working set fit a box, and what will one board after another of it come to."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import pytest
from onnx import ModelProto
from rich.console import Console

from appliance.config import Config, Experts, Memory, Paths
from appliance.core.graph import Condition
from appliance.lab.feasibility import leading_on, products
from appliance.report import print_check
from appliance.startup import Installation, checked, install
from tests.kit import inspection_graph
from tests.kit_box import write_catalog
from tests.kit_children import kept_children
from tests.kit_models import fine_tune

__all__ = ["kept_children"]  # a fixture

pytestmark = pytest.mark.usefixtures("kept_children")

PROFILE = Path(__file__).parents[1] / "profiles" / "default.json"


def test_a_product_that_fits_is_loaded_once(tmp_path: Path) -> None:
    (found,) = products(_box(tmp_path, 4, {"p": "0123"}))
    assert (found["name"], found["experts"], found["fits"], found["loads_per_board"]) == ("p", 4, True, 0.0)
    assert found["images_per_second"] > 0


def test_a_product_that_does_not_fit_is_loaded_with_every_board(tmp_path: Path) -> None:
    size = install(_config(tmp_path, 4, {"p": "0123", "q": "01"})).compiled["e0"].bytes
    found = {one["name"]: one for one in products(_box(tmp_path, 4, {}, weights=2 * size))}
    assert found["p"]["working_set_bytes"] == 4 * size
    assert (found["p"]["fits"], found["q"]["fits"]) == (False, True)
    assert found["p"]["loads_per_board"] >= 2, "two of four cannot have stayed"
    assert found["q"]["loads_per_board"] == 0
    assert found["p"]["images_per_second"] < found["q"]["images_per_second"]


def test_whom_the_placements_may_lead_to_belongs_to_the_working_set(tmp_path: Path) -> None:
    edges = [("e0", "e2"), ("e2", "e3")]
    (found,) = products(_box(tmp_path, 5, {"p": "01"}, edges=edges))
    assert found["experts"] == 4, "and e4 is nobody's"


def test_tensors_that_experts_share_count_once(tmp_path: Path) -> None:
    nets: Mapping[str, ModelProto] = {f"e{n}": fine_tune(n, width=200) for n in range(3)}
    made = _box(tmp_path, nets, {"p": "012"})
    (found,) = products(made)
    assert found["working_set_bytes"] < sum(compiled.bytes for compiled in made.compiled.values())


def test_whoever_is_pinned_takes_room_from_products(tmp_path: Path) -> None:
    size = install(_config(tmp_path, 3, {"p": "01"})).compiled["e0"].bytes
    for pinned, fits in ((), True), (("e2",), False), (("e1",), True):
        made = install(_config(tmp_path, 3, {}, weights=2 * size).model_copy(update={"experts": Experts(pin=pinned)}))
        (found,) = products(made)
        assert found["fits"] is fits, pinned


def test_the_same_box_gets_the_same_answer(tmp_path: Path) -> None:
    size = install(_config(tmp_path, 4, {"p": "0123"})).compiled["e0"].bytes
    made = _box(tmp_path, 4, {}, weights=3 * size)
    assert products(made) == products(made)


def test_every_picture_asks_all_whom_it_may_lead_to() -> None:
    graph = inspection_graph(["a"])
    assert graph.next_experts("a", tuple(leading_on(graph, "a"))) == ("detector",)
    (edge,) = graph.edges["a"]
    for condition in (*edge.conditions, Condition(score_at_least=0.5), Condition("x", score_below=0.1), Condition()):
        other = inspection_graph(["a"])
        changed = type(edge)("a", "detector", (condition,))
        other = type(other)(other.entries, {"a": (changed,)}, other.before)
        assert other.next_experts("a", tuple(leading_on(other, "a"))) == ("detector",), condition


def test_a_product_with_an_expert_that_cannot_serve_does_not_fit(tmp_path: Path) -> None:
    config = _config(tmp_path, 2, {"p": "01"})
    (config.paths.catalog / "e1" / "1" / "model.onnx").write_bytes(b"other")
    (found,) = products(install(config))
    assert (found["experts"], found["unavailable"], found["fits"]) == (2, ["e1"], False)


def test_pictures_that_nobody_can_answer_are_no_images_per_second(tmp_path: Path) -> None:
    config = _config(tmp_path, 2, {"p": "01", "q": "0"})
    (config.paths.catalog / "e1" / "1" / "model.onnx").write_bytes(b"other")
    half, whole = products(install(config))
    assert half["images_per_second"] == pytest.approx(whole["images_per_second"])


def test_a_check_shows_products(tmp_path: Path) -> None:
    size = install(_config(tmp_path, 4, {"p": "0123", "q": "01"})).compiled["e0"].bytes
    found = checked(_config(tmp_path, 4, {}, weights=3 * size), forecast=products)
    assert [one["name"] for one in found["products"]] == ["p", "q"]
    shown = io.StringIO()
    print_check(found, Console(file=shown, width=200))
    assert "loads per board" in shown.getvalue()


def _box(
    folder: Path,
    experts: int | Mapping[str, ModelProto],
    products: Mapping[str, str],
    *,
    weights: int = 10_000_000,
    edges: list[tuple[str, str]] | None = None,
) -> Installation:
    return install(_config(folder, experts, products, weights=weights, edges=edges))


def _config(
    folder: Path,
    experts: int | Mapping[str, ModelProto],
    products: Mapping[str, str],
    *,
    weights: int = 10_000_000,
    edges: list[tuple[str, str]] | None = None,
) -> Config:
    """A catalogue, made once in each folder, of products whose placements ask the experts of these numbers."""
    catalog = folder / "catalog"
    if not catalog.exists():
        write_catalog(catalog, experts, edges or [])
    for name, numbers in products.items():
        home = catalog / "products" / name
        home.mkdir(parents=True)
        lines = ["schema = 1", f"product = '{name}'", "size = [100, 100]"]
        for place, number in enumerate(numbers):
            lines += [
                "[[placements]]",
                f"designator = 'R{place}'",
                f"component = 'c-e{number}'",
                "rect = [0, 0, 10, 10]",
            ]
        (home / "recipe.toml").write_text("\n".join(lines), "utf-8")
    paths = Paths(catalog=catalog, state=folder / "state", store=folder / "store", profile=PROFILE)
    return Config(paths=paths, memory=Memory.model_validate({"weights": weights}))
