"""The pictures of open requests: read from the spool, decoded once for all experts that look at them, each beside
its golden reference where the product's recipe has one. Parts of a whole board are views into its one picture."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from appliance.catalog import Placement, Product
from appliance.drivers import images
from appliance.drivers.images import Views
from appliance.errors import CatalogError, MessageError, NotSpooled, PictureError

CACHE_BYTES = 16 << 20  # decoded pictures kept for a second expert, and golden pictures, each this much

Picture = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Subject:
    """What a request looks at: a part, in a picture of its own, or in that of the `whole` board of this name."""

    product: Product | None
    part: str
    whole: str | None = None


class Album:
    """`payload` reads a request's encoded picture, `subject` tells what it shows. Safe from several threads."""

    def __init__(
        self,
        payload: Callable[[str], bytes],
        subject: Callable[[str], Subject],
        max_bytes: int,
        max_pixels: int,
    ) -> None:
        self._payload, self._subject = payload, subject
        self._max_bytes, self._max_pixels = max_bytes, max_pixels
        self._pictures = _Cache()
        self._wholes: dict[str, _Whole] = {}
        self._golden = _Cache()
        self.largest_pixels = 0
        """Of the pictures decoded so far that are no whole boards: what decoding may have taken."""

    def look(self, request: str) -> Views:
        """The request's picture and reference. Raises PictureError when they cannot be decoded or do not match."""
        subject = self._subject(request)  # first: who has its verdict already is noted in nobody's hand
        placement = _placement(subject)
        if subject.whole is None:
            picture = self._pictures.get(request, lambda: self._decoded(self._read(request)))
        else:
            assert subject.product is not None
            assert placement is not None
            picture = images.crop(self._board(subject.whole, subject.product), placement.rect)
        reference = self._reference(subject.product, placement)
        if reference is not None and reference.shape[:2] != picture.shape[:2]:
            height, width = reference.shape[:2]
            raise PictureError(
                "picture-size",
                f"the picture is {picture.shape[1]} x {picture.shape[0]} pixels, its placement {width} x {height}",
                "publish the placement's rectangle unscaled, or correct the recipe",
            )
        return Views(picture, reference)

    @property
    def cached_bytes(self) -> int:
        """Of the decoded pictures that are kept."""
        wholes = sum(whole.bytes for whole in tuple(self._wholes.values()))
        return self._pictures.bytes + self._golden.bytes + wholes

    @property
    def decoding_pixels(self) -> int:
        """Of the boards' pictures that are being decoded, or soon will be."""
        return sum(whole.pixels for whole in tuple(self._wholes.values()) if not whole.is_decoded)

    def keep_whole(self, request: str, product: Product) -> None:
        """Parts are cut from this board's picture until it is forgotten: it is decoded once."""
        width, height = product.recipe.size
        self._wholes[request] = _Whole(width * height)

    def forget(self, request: str) -> None:
        """The request has its verdict."""
        self._pictures.drop(request)
        self._wholes.pop(request, None)

    def _board(self, request: str, product: Product) -> Picture:
        whole = self._wholes.get(request)
        if whole is None:
            raise MessageError("deadline", f"{request} has its verdict already", "nothing to do")
        return whole.get(lambda: self._decoded_board(request, product))

    def _decoded_board(self, request: str, product: Product) -> Picture:
        payload, (width, height) = self._read(request), product.recipe.size
        picture = images.decode(payload, max_bytes=self._max_bytes, max_pixels=self._max_pixels)
        if picture.shape[:2] != (height, width):
            raise PictureError(
                "picture-size",
                f"the picture is {picture.shape[1]} x {picture.shape[0]} pixels, its recipe says {width} x {height}",
                "publish the board at the size that its recipe states",
            )
        return picture

    def _reference(self, product: Product | None, placement: Placement | None) -> Picture | None:
        if product is None or placement is None or product.golden_path is None:
            return None
        path = product.golden_path
        key = f"{path} {product.golden_sha256}"
        try:
            golden = self._golden.get(key, lambda: self._decoded(_golden_bytes(path, product.golden_sha256)))
        except (OSError, PictureError) as error:
            raise CatalogError(f"the golden picture {path} is unusable: {error}", "restore it") from error
        return images.crop(golden, placement.rect)

    def _read(self, request: str) -> bytes:
        try:
            return self._payload(request)
        except NotSpooled as error:
            raise MessageError("deadline", f"{request} has its verdict already", "nothing to do") from error

    def _decoded(self, payload: bytes) -> Picture:
        picture = images.decode(payload, max_bytes=self._max_bytes, max_pixels=self._max_pixels)
        self.largest_pixels = max(self.largest_pixels, picture.shape[0] * picture.shape[1])
        return picture


def _placement(subject: Subject) -> Placement | None:
    """Raises MessageError `unknown-part`: the part was in the recipe when it was accepted."""
    if subject.product is None:
        return None
    placement = subject.product.placements.get(subject.part)
    if placement is None:
        product = subject.product.recipe.product
        raise MessageError("unknown-part", f"{product} has no placement {subject.part}", "see its recipe")
    return placement


def _golden_bytes(path: Path, sha256: str | None) -> bytes:
    """Raises CatalogError when they are not those that the recipe was read with."""
    payload = path.read_bytes()
    if sha256 is not None and hashlib.sha256(payload).hexdigest() != sha256:
        raise CatalogError(
            f"the golden picture {path} is not the one that was there when its recipe was read",
            "give a new golden picture a new name, then command reload",
        )
    return payload


class _Whole:
    """A board's picture, decoded by the first who looks. The others wait for that, or meet the same error."""

    def __init__(self, pixels: int) -> None:
        self.pixels = pixels
        self._lock = threading.Lock()
        self._found: Picture | MessageError | None = None

    @property
    def is_decoded(self) -> bool:
        return self._found is not None

    @property
    def bytes(self) -> int:
        return self._found.nbytes if isinstance(self._found, np.ndarray) else 0

    def get(self, make: Callable[[], Picture]) -> Picture:
        with self._lock:
            if self._found is None:
                try:
                    self._found = make()
                except MessageError as error:
                    self._found = error
            if isinstance(self._found, MessageError):
                raise self._found.with_traceback(None)
            return self._found


class _Cache:
    """Least recently used pictures leave when they come to more than CACHE_BYTES."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, Picture] = OrderedDict()
        self.bytes = 0

    def get(self, key: str, make: Callable[[], Picture]) -> Picture:
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        picture = make()
        with self._lock:
            if key not in self._kept:
                self._kept[key] = picture
                self.bytes += picture.nbytes
            while self.bytes > CACHE_BYTES:
                self.bytes -= self._kept.popitem(last=False)[1].nbytes
        return picture

    def drop(self, key: str) -> None:
        with self._lock:
            picture = self._kept.pop(key, None)
            if picture is not None:
                self.bytes -= picture.nbytes
