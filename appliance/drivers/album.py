"""The pictures of open requests: read from the spool, decoded once for all experts that look at them, each beside
its golden reference where the product's recipe has one."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from appliance.catalog import Product
from appliance.drivers import images
from appliance.drivers.images import Views
from appliance.errors import CatalogError, MessageError, NotSpooled, PictureError

CACHE_BYTES = 16 << 20  # decoded pictures kept for a second expert, and golden pictures, each this much

Picture = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Subject:
    """What a request's picture shows."""

    product: str
    part: str


class Album:
    """`payload` reads a request's encoded picture, `subject` tells what it shows. Safe from several threads."""

    def __init__(
        self,
        payload: Callable[[str], bytes],
        subject: Callable[[str], Subject],
        products: Mapping[str, Product],
        max_bytes: int,
        max_pixels: int,
    ) -> None:
        self._payload, self._subject, self._products = payload, subject, products
        self._max_bytes, self._max_pixels = max_bytes, max_pixels
        self._pictures = _Cache()
        self._golden = _Cache()
        self.largest_pixels = 0
        """Of the pictures decoded so far: what decoding may have taken."""

    def look(self, request: str) -> Views:
        """The request's picture and reference. Raises PictureError when they cannot be decoded or do not match."""
        subject = self._subject(request)  # first: who has its verdict already is noted in nobody's hand
        picture = self._pictures.get(request, lambda: self._decoded(self._read(request)))
        reference = self._reference(subject)
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
        return self._pictures.bytes + self._golden.bytes

    def forget(self, request: str) -> None:
        """The request has its verdict."""
        self._pictures.drop(request)

    def _reference(self, subject: Subject) -> Picture | None:
        product = self._products.get(subject.product)
        if product is None or product.golden_path is None:
            return None
        placement = product.placements.get(subject.part)
        if placement is None:  # the part was in the recipe when it was accepted
            raise MessageError("unknown-part", f"{subject.product} has no placement {subject.part}", "see its recipe")
        path = product.golden_path
        try:
            golden = self._golden.get(subject.product, lambda: self._decoded(path.read_bytes()))
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
