"""Pictures of open requests: decoded once, each beside its golden reference."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from appliance.catalog import Placement, Product, Recipe
from appliance.drivers import album as albums
from appliance.drivers.album import Album, Subject
from appliance.errors import CatalogError, MessageError, NotSpooled, PictureError, RecordsError
from tests.kit_box import picture

PLACED = Subject("p1", "R1")


def test_a_picture_is_decoded_once_for_all_who_look(tmp_path: Path) -> None:
    reads: list[str] = []
    album = _album({"r": picture(1)}, {}, Subject("-", "c"), reads)
    first, second = album.look("r"), album.look("r")
    assert first.picture is second.picture
    assert first.reference is None
    assert reads == ["r"]
    album.forget("r")
    album.look("r")
    assert reads == ["r", "r"]


def test_the_reference_is_the_same_place_of_the_golden_picture(tmp_path: Path) -> None:
    golden = np.arange(40 * 40, dtype=np.uint8).reshape(40, 40)
    album = _album({"r": picture(1)}, _product(tmp_path, golden), PLACED)
    reference = album.look("r").reference
    assert reference is not None
    assert np.array_equal(reference, golden[8:24, 4:20])


def test_a_picture_of_another_size_than_its_placement_is_refused(tmp_path: Path) -> None:
    album = _album({"r": picture(1, side=17)}, _product(tmp_path, np.zeros((40, 40), np.uint8)), PLACED)
    with pytest.raises(PictureError, match="17 x 17 pixels, its placement 16 x 16") as caught:
        album.look("r")
    assert caught.value.reason == "picture-size"


def test_a_part_that_left_the_recipe_is_refused(tmp_path: Path) -> None:
    album = _album({"r": picture(1)}, _product(tmp_path, np.zeros((40, 40), np.uint8)), Subject("p1", "R9"))
    with pytest.raises(MessageError, match="no placement R9"):
        album.look("r")


def test_a_golden_picture_that_was_lost_is_named(tmp_path: Path) -> None:
    products = _product(tmp_path, np.zeros((40, 40), np.uint8))
    (tmp_path / "golden.png").unlink()
    with pytest.raises(CatalogError, match=r"golden\.png is unusable"):
        _album({"r": picture(1)}, products, PLACED).look("r")


def test_a_picture_that_became_late_is_refused_and_an_unreadable_store_is_not() -> None:
    for error, expected in ((NotSpooled("gone"), MessageError), (RecordsError("disk"), RecordsError)):

        def payload(request: str, error: Exception = error) -> bytes:
            raise error

        album = Album(payload, lambda request: Subject("-", "c"), {}, 1000, 1000)
        with pytest.raises(expected):
            album.look("r")


def test_a_picture_that_has_its_verdict_is_not_even_read() -> None:
    """Nobody has noted it as in work, so nobody may open it."""

    def late(request: str) -> Subject:
        raise MessageError("deadline", "r has its verdict already", "nothing to do")

    def unread(request: str) -> bytes:
        raise AssertionError("it was read")

    with pytest.raises(MessageError):
        Album(unread, late, {}, 1000, 1000).look("r")


def test_what_was_looked_at_longest_ago_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(albums, "CACHE_BYTES", 2 * 16 * 16 * 3)
    reads: list[str] = []
    album = _album({name: picture(ord(name)) for name in "abc"}, {}, Subject("-", "c"), reads)
    for name in "abacba":
        album.look(name)
    assert "".join(reads) == "abcb" + "a"


def test_what_is_kept_is_counted_until_it_is_forgotten(tmp_path: Path) -> None:
    album = _album({"r": picture(1)}, _product(tmp_path, np.zeros((40, 40), np.uint8)), PLACED)
    album.look("r")
    kept = album.cached_bytes
    assert kept >= 16 * 16 * 3 + 40 * 40
    album.forget("r")
    assert album.cached_bytes == kept - 16 * 16 * 3


def _album(
    payloads: Mapping[str, bytes], products: Mapping[str, Product], subject: Subject, reads: list[str] | None = None
) -> Album:
    def payload(request: str) -> bytes:
        if reads is not None:
            reads.append(request)
        return payloads[request]

    return Album(payload, lambda request: subject, products, 1_000_000, 1_000_000)


def _product(folder: Path, golden: np.typing.NDArray[np.uint8]) -> dict[str, Product]:
    Image.fromarray(golden).save(folder / "golden.png")
    place = Placement(designator="R1", component="c", rect=(4, 8, 16, 16))
    recipe = Recipe(schema=1, product="p1", size=(40, 40), golden="golden.png", placements=(place,))
    return {"p1": Product(folder, recipe, {"R1": place})}
