"""The catalogue: bundles, graph and recipes checked against each other, every fault named."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance import catalog as catalogs
from appliance.catalog import ClassificationHead, Recipe
from appliance.core.types import Finding
from appliance.errors import CatalogError, DigestMismatch, GraphError
from appliance.lab.shapes import manifest_text
from tests.kit_box import write_catalog
from tests.kit_models import conv_net, write_bundle


def test_a_sound_catalogue_is_read_and_its_digests_hold(tmp_path: Path) -> None:
    catalog = catalogs.load(write_catalog(tmp_path, 3, [("e0", "e2")]))
    assert list(catalog.bundles) == ["e0", "e1", "e2"]
    assert catalog.graph.before == {"e2": ("e0",)}
    for bundle in catalog.bundles.values():
        catalogs.verify(bundle)


def test_the_newest_version_serves_unless_another_is_pinned(tmp_path: Path) -> None:
    write_catalog(tmp_path, 1)
    bundle = write_bundle(tmp_path, "e0", conv_net(9), version=10)
    (bundle.folder / "expert.toml").write_text(manifest_text(bundle))
    assert catalogs.load(tmp_path).bundles["e0"].manifest.version == 10
    assert catalogs.load(tmp_path).versions["e0"] == (1, 10)
    _append(tmp_path / "graph.toml", "[versions]\ne0 = 1\n")
    assert catalogs.load(tmp_path).bundles["e0"].manifest.version == 1


@pytest.mark.parametrize("pin", ["e0 = 3", "ghost = 1"])
def test_a_pin_that_points_nowhere_is_an_error(tmp_path: Path, pin: str) -> None:
    write_catalog(tmp_path, 1)
    _append(tmp_path / "graph.toml", f"[versions]\n{pin}\n")
    with pytest.raises(CatalogError, match="pins"):
        catalogs.load(tmp_path)


def test_a_step_may_have_a_limit(tmp_path: Path) -> None:
    write_catalog(tmp_path, 2, [("e0", "e1")])
    _append(tmp_path / "graph.toml", "[limits]\ne1 = 64\n")
    assert catalogs.load(tmp_path).graph.limits == {"e1": 64}


def test_another_expert_may_stand_in(tmp_path: Path) -> None:
    write_catalog(tmp_path, 3)
    _append(tmp_path / "graph.toml", "[stand_ins]\ne0 = 'e1'\ne1 = 'e2'\n")
    assert catalogs.load(tmp_path).graph.stand_ins == {"e0": "e1", "e1": "e2"}


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ("e0 = 'ghost'", "ghost, which has no bundle"),
        ("ghost = 'e0'", "ghost, which has no bundle"),
        ("e0 = 'e1'\ne1 = 'e0'", "e0 → e1 → e0"),
        ("e0 = 'e0'", "e0 → e0"),
    ],
)
def test_a_stand_in_that_is_none_is_refused(tmp_path: Path, lines: str, says: str) -> None:
    write_catalog(tmp_path, 2)
    _append(tmp_path / "graph.toml", f"[stand_ins]\n{lines}\n")
    with pytest.raises(GraphError, match=says):
        catalogs.load(tmp_path)


def test_who_needs_a_golden_picture_stands_in_only_for_who_does_so_too(tmp_path: Path) -> None:
    write_catalog(tmp_path, 2)
    path = tmp_path / "e1" / "1" / "expert.toml"
    path.write_text(path.read_text().replace('source = "picture"', 'source = "reference"'))
    _append(tmp_path / "graph.toml", "[stand_ins]\ne0 = 'e1'\n")
    with pytest.raises(GraphError, match="e1 compares with a golden picture"):
        catalogs.load(tmp_path)


def test_a_pattern_stands_for_every_expert_it_matches_but_its_target(tmp_path: Path) -> None:
    catalog = catalogs.load(write_catalog(tmp_path, 3, [("e*", "e2")]))
    assert catalog.graph.before["e2"] == ("e0", "e1")


def test_a_pattern_that_matches_nobody_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(GraphError, match="'x\\*' matches no expert"):
        catalogs.load(write_catalog(tmp_path, 2, [("x*", "e1")]))


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("unknown = 1", "unknown: Extra inputs"),
        ("version = 2", "must be those of the folder"),
        ("inputs = []", "inputs"),
        ("name = 'Up'", "name"),
    ],
)
def test_a_faulty_manifest_breaks_its_own_expert_only(tmp_path: Path, line: str, says: str) -> None:
    write_catalog(tmp_path, 2)
    path = tmp_path / "e0" / "1" / "expert.toml"
    key = line.split()[0]
    kept = [old for old in path.read_text().splitlines() if not old.startswith(f"{key} =")]
    if key == "inputs":
        kept = "\n".join(kept).split("[[inputs]]")[0].splitlines()
    path.write_text("\n".join([line, *kept]))
    catalog = catalogs.load(tmp_path)
    assert list(catalog.bundles) == ["e1"]
    assert says in str(catalog.broken["e0"])
    assert str(tmp_path / "e0") in str(catalog.broken["e0"])


def test_other_bytes_than_the_manifest_names_are_found(tmp_path: Path) -> None:
    catalog = catalogs.load(write_catalog(tmp_path, 1))
    path = catalog.bundles["e0"].model_path
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    with pytest.raises(DigestMismatch, match=r"model\.onnx"):
        catalogs.verify(catalog.bundles["e0"])


def test_a_table_leads_from_each_label_to_its_expert(tmp_path: Path) -> None:
    write_catalog(tmp_path, 3)
    _append(tmp_path / "graph.toml", "[[tables]]\nfrom = 'e0'\nto = { open = 'e1', short = 'e2' }\n")
    graph = catalogs.load(tmp_path).graph
    assert graph.next_experts("e0", [Finding("short", 0.9, fails=True)]) == ("e2",)
    _append(tmp_path / "graph.toml", "[[tables]]\nfrom = 'e1'\nto = { open = 'ghost' }\n")
    with pytest.raises(GraphError, match="ghost"):
        catalogs.load(tmp_path)


def test_usage_of_an_unknown_component_is_an_error(tmp_path: Path) -> None:
    write_catalog(tmp_path, 1)
    _append(tmp_path / "graph.toml", "[usage]\nghost = 1\n")
    with pytest.raises(GraphError, match="ghost"):
        catalogs.load(tmp_path)


@pytest.mark.parametrize(
    ("placement", "says"),
    [
        ("rect = [0, 0, 101, 10]\ncomponent = 'c-e0'", "reaches outside the 100 x 100 picture"),
        ("rect = [-1, 0, 10, 10]\ncomponent = 'c-e0'", "reaches outside"),
        ("rect = [0, 0, 0, 10]\ncomponent = 'c-e0'", "reaches outside"),
        ("rect = [0, 0, 10, 10]\ncomponent = 'ghost'", "unknown component ghost"),
    ],
)
def test_a_faulty_recipe_is_named(tmp_path: Path, placement: str, says: str) -> None:
    write_catalog(tmp_path, 1)
    folder = tmp_path / "products" / "p1"
    folder.mkdir(parents=True)
    text = f"schema = 1\nproduct = 'p1'\nsize = [100, 100]\n[[placements]]\ndesignator = 'R1'\n{placement}\n"
    (folder / "recipe.toml").write_text(text)
    with pytest.raises(CatalogError, match=says):
        catalogs.load(tmp_path)


def test_a_designator_stands_for_one_place() -> None:
    place = {"designator": "R1", "component": "c", "rect": (0, 0, 1, 1)}
    with pytest.raises(ValueError, match="R1 is listed twice"):
        Recipe.model_validate({"schema": 1, "product": "p", "size": (9, 9), "placements": [place, place]})


def test_a_label_that_is_not_there_cannot_be_normal() -> None:
    with pytest.raises(ValueError, match="'fine' is not among the labels"):
        ClassificationHead(kind="classification", output="y", labels=("a", "b"), normal="fine")


def test_a_manifest_beyond_its_size_is_not_parsed(tmp_path: Path) -> None:
    write_catalog(tmp_path, 1)
    _append(tmp_path / "graph.toml", "#" * (catalogs.MAX_MANIFEST_BYTES + 1))
    with pytest.raises(CatalogError, match="larger than"):
        catalogs.load(tmp_path)


@given(st.binary(max_size=200))
def test_any_bytes_as_a_manifest_are_a_catalogue_or_an_error(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "graph.toml").write_bytes(data)
    with pytest.raises(CatalogError):
        catalogs.load(folder)


def _append(path: Path, text: str) -> None:
    path.write_text(path.read_text() + "\n" + text)
