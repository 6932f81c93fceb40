"""Pictures of open requests: decoded once, each beside its golden reference."""

from __future__ import annotations

import io
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from appliance.catalog import Placement, Product, Recipe, product_of
from appliance.drivers import album as albums
from appliance.drivers.album import Album, Subject
from appliance.errors import CatalogError, MessageError, NotSpooled, PictureError, RecordsError
from tests.kit_box import picture

UNPLACED = Subject(None, "c")


def test_a_picture_is_decoded_once_for_all_who_look(tmp_path: Path) -> None:
    reads: list[str] = []
    album = _album({"r": picture(1)}, UNPLACED, reads)
    first, second = album.look("r"), album.look("r")
    assert first.picture is second.picture
    assert first.reference is None
    assert reads == ["r"]
    album.forget("r")
    album.look("r")
    assert reads == ["r", "r"]


def test_the_reference_is_the_same_place_of_the_golden_picture(tmp_path: Path) -> None:
    golden = np.arange(40 * 40, dtype=np.uint8).reshape(40, 40)
    album = _album({"r": picture(1)}, Subject(_product(tmp_path, golden), "R1"))
    reference = album.look("r").reference
    assert reference is not None
    assert np.array_equal(reference, golden[8:24, 4:20])


def test_a_picture_of_another_size_than_its_placement_is_refused(tmp_path: Path) -> None:
    album = _album({"r": picture(1, side=17)}, Subject(_product(tmp_path), "R1"))
    with pytest.raises(PictureError, match="17 x 17 pixels, its placement 16 x 16") as caught:
        album.look("r")
    assert caught.value.reason == "picture-size"


def test_a_part_that_left_the_recipe_is_refused(tmp_path: Path) -> None:
    album = _album({"r": picture(1)}, Subject(_product(tmp_path), "R9"))
    with pytest.raises(MessageError, match="no placement R9"):
        album.look("r")


def test_a_golden_picture_that_was_lost_is_named(tmp_path: Path) -> None:
    product = _product(tmp_path)
    (tmp_path / "golden.png").unlink()
    with pytest.raises(CatalogError, match=r"golden\.png is unusable"):
        _album({"r": picture(1)}, Subject(product, "R1")).look("r")


def test_a_picture_that_became_late_is_refused_and_an_unreadable_store_is_not() -> None:
    for error, expected in ((NotSpooled("gone"), MessageError), (RecordsError("disk"), RecordsError)):

        def payload(request: str, error: Exception = error) -> bytes:
            raise error

        album = Album(payload, lambda request: UNPLACED, 1000, 1000)
        with pytest.raises(expected):
            album.look("r")


def test_a_picture_that_has_its_verdict_is_not_even_read() -> None:
    """Nobody has noted it as in work, so nobody may open it."""

    def late(request: str) -> Subject:
        raise MessageError("deadline", "r has its verdict already", "nothing to do")

    def unread(request: str) -> bytes:
        raise AssertionError("it was read")

    with pytest.raises(MessageError):
        Album(unread, late, 1000, 1000).look("r")


def test_what_was_looked_at_longest_ago_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(albums, "CACHE_BYTES", 2 * 16 * 16 * 3)
    reads: list[str] = []
    album = _album({name: picture(ord(name)) for name in "abc"}, UNPLACED, reads)
    for name in "abacba":
        album.look(name)
    assert "".join(reads) == "abcb" + "a"


def test_what_is_kept_is_counted_until_it_is_forgotten(tmp_path: Path) -> None:
    album = _album({"r": picture(1)}, Subject(_product(tmp_path), "R1"))
    album.look("r")
    kept = album.cached_bytes
    assert kept >= 16 * 16 * 3 + 40 * 40
    album.forget("r")
    assert album.cached_bytes == kept - 16 * 16 * 3


def test_the_parts_of_a_whole_board_are_cut_from_its_picture_which_is_decoded_once(tmp_path: Path) -> None:
    board = np.random.default_rng(1).integers(0, 256, (40, 40, 3), np.uint8)
    reads: list[str] = []
    product = _product(tmp_path)
    album = _album({"b": _encoded(board)}, Subject(product, "R1", "b"), reads)
    album.keep_whole("b", product)
    assert (album.cached_bytes, album.decoding_pixels) == (0, 40 * 40)
    with ThreadPoolExecutor(4) as threads:
        looks = list(threads.map(album.look, [f"b/{number}" for number in range(20)]))
    assert reads == ["b"]
    for views in looks:
        assert np.array_equal(views.picture, board[8:24, 4:20])
        assert views.reference is not None
        assert views.reference.shape[:2] == (16, 16)
    assert album.cached_bytes >= board.nbytes
    assert album.decoding_pixels == 0
    album.forget("b")
    assert album.cached_bytes < board.nbytes
    with pytest.raises(MessageError, match="has its verdict"):
        album.look("b/1")


@pytest.mark.parametrize(("side", "cut", "reason"), [(40, 60, "picture-damaged"), (41, 0, "picture-size")])
def test_a_board_that_cannot_be_cut_says_so_to_all_its_parts_and_is_decoded_once(
    tmp_path: Path, side: int, cut: int, reason: str
) -> None:
    reads: list[str] = []
    payload = picture(1, side)
    product = _product(tmp_path)
    album = _album({"b": payload[: len(payload) - cut]}, Subject(product, "R1", "b"), reads)
    album.keep_whole("b", product)
    for number in range(3):
        with pytest.raises(PictureError) as caught:
            album.look(f"b/{number}")
        assert caught.value.reason == reason
    assert reads == ["b"]
    assert album.cached_bytes == 0


def test_a_golden_picture_other_than_the_one_that_the_recipe_was_read_with_is_refused(tmp_path: Path) -> None:
    product = replace(_product(tmp_path), golden_sha256="0" * 64)
    with pytest.raises(CatalogError, match="not the one that was there"):
        _album({"r": picture(1)}, Subject(product, "R1")).look("r")


def _album(payloads: Mapping[str, bytes], subject: Subject, reads: list[str] | None = None) -> Album:
    def payload(request: str) -> bytes:
        if reads is not None:
            reads.append(request)
        return payloads[request]

    return Album(payload, lambda request: subject, 1_000_000, 1_000_000)


def _product(folder: Path, golden: np.typing.NDArray[np.uint8] | None = None) -> Product:
    """Of 40 x 40 pixels, with one part of 16 x 16 at 4, 8."""
    (folder / "golden.png").write_bytes(_encoded(np.zeros((40, 40), np.uint8) if golden is None else golden))
    place = Placement(designator="R1", component="c", rect=(4, 8, 16, 16))
    recipe = Recipe(schema=1, product="p1", size=(40, 40), golden="golden.png", placements=(place,))
    return product_of(folder, recipe, None)


def _encoded(pixels: np.typing.NDArray[np.uint8]) -> bytes:
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, "PNG")
    return encoded.getvalue()
