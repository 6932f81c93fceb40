"""Payload bytes to pixels, and pixels to what a network takes. The only room that opens foreign pictures.

What a picture becomes is fixed, because verdict boxes are pixels of it and experts were trained on it:

- grey (mode 1, L, LA, I;16) becomes (H, W), everything else (H, W, 3) RGB, both uint8;
- alpha and transparent colours are dropped, not blended; palettes become their colours; CMYK, YCbCr are converted;
- of 16 bits per sample the upper 8 count; 32-bit and floating-point samples are refused;
- of several frames the first counts;
- the EXIF orientation is ignored: a camera at a line is fixed, and its boxes must be those of the bytes it sent.
"""

from __future__ import annotations

import importlib
import io
import re
import struct
import warnings
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from appliance.catalog import InputSpec
from appliance.errors import PictureError

Picture = NDArray[np.uint8]
"""(H, W) grey or (H, W, 3) RGB."""


@dataclass(frozen=True, slots=True)
class Views:
    """What an expert looks at; the reference is the golden picture's same place."""

    picture: Picture
    reference: Picture | None = None


# Pillow's own limit warns from within `open`; ours is exact, set by the operator and checked before any pixel is.
Image.MAX_IMAGE_PIXELS = None

# Whatever reads our kinds, now. Pillow 13 imports it with the first picture, for a TIFF all readers that it has: memory
# that nobody counted, and while the process may open no more files that picture is called damaged.
Image.preinit()
for _reader in ("MpoImagePlugin", "TiffImagePlugin"):  # a JPEG may hold several pictures
    importlib.import_module(f"PIL.{_reader}")

_MAGIC: Mapping[bytes, str] = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"BM": "BMP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    **{b"P%d" % kind: "PPM" for kind in range(1, 7)},
    b"\x93NUMPY": "NPY",
}
_ARRAY_HEADER = re.compile(
    rb"\{'descr': '[|<>=]u1', 'fortran_order': (?:False|True), 'shape': \((\d{1,9}), (\d{1,9})(, 3)?,?\), \} *\n?"
)
"""What numpy writes for unsigned bytes; anything cleverer is not a picture, and nothing here is evaluated."""
_GREY = {"1", "L", "LA", "La"}
_COLOUR = {"RGB", "RGBA", "RGBa", "RGBX", "P", "PA", "CMYK", "YCbCr", "HSV"}
_DECODER_ERRORS = (
    OSError,
    EOFError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    MemoryError,
    RuntimeError,
    AssertionError,
    struct.error,
    zlib.error,
)
"""What Pillow was seen to raise, or raises by its source, for damaged files."""


def check(payload: bytes, *, max_bytes: int, max_pixels: int) -> str:
    """The payload's format (JPEG, PNG, BMP, TIFF, PPM or NPY), from its first bytes and header only.

    Raises PictureError: picture-empty, picture-too-large, picture-format, picture-too-many-pixels, picture-damaged.
    """
    kind = _kind(payload, max_bytes)
    if kind == "NPY":
        _array_shape(payload, max_pixels)
    else:
        _opened(payload, kind, max_pixels).close()
    return kind


def decode(payload: bytes, *, max_bytes: int, max_pixels: int) -> Picture:
    """The pixels, (H, W) grey or (H, W, 3) RGB. Raises PictureError as `check` does, before memory is taken."""
    kind = _kind(payload, max_bytes)
    if kind == "NPY":
        return _array(payload, max_pixels)
    with _opened(payload, kind, max_pixels) as image:
        try:
            return _pixels(image)
        except _DECODER_ERRORS as error:
            raise _damaged(kind, error) from error


def crop(picture: Picture, rect: tuple[int, int, int, int]) -> Picture:
    """The part at x, y of width and height in pixels, as a view. Raises PictureError (picture-too-small) outside."""
    x, y, width, height = rect
    if min(x, y) < 0 or x + width > picture.shape[1] or y + height > picture.shape[0]:
        raise PictureError(
            "picture-too-small",
            f"{width} x {height} at {x}, {y} is not inside a picture of {picture.shape[1]} x {picture.shape[0]}",
            "publish the board at the size that its recipe states",
        )
    return picture[y : y + height, x : x + width]


def window(size: tuple[int, int], spec: InputSpec) -> tuple[int, int, int, int]:
    """What a network sees of a picture of (width, height): x, y, width, height of the centred crop in its pixels.

    A crop larger than the picture is the picture.
    """
    width, height = size
    seen_width, seen_height = (min(width, spec.crop[0]), min(height, spec.crop[1])) if spec.crop else size
    return (width - seen_width) // 2, (height - seen_height) // 2, seen_width, seen_height


def prepare(picture: Picture, spec: InputSpec) -> NDArray[np.float32]:
    """A picture as the network takes it, (C, height, width): crop, colour, bilinear resize, then scale, mean, std."""
    x, y, width, height = window((picture.shape[1], picture.shape[0]), spec)
    seen = _seen(picture[y : y + height, x : x + width], spec)
    planes = seen[None] if seen.ndim == 2 else seen.transpose(2, 0, 1)
    if spec.color == "bgr":
        planes = planes[::-1]
    factor, offset = _line(spec.scale, spec.mean, spec.std, spec.channels)
    prepared = np.empty(planes.shape, np.float32)
    np.multiply(planes, factor, out=prepared)
    prepared += offset
    return prepared


def _seen(picture: Picture, spec: InputSpec) -> Picture:
    """In the network's colour and size: (height, width) or (height, width, 3). What is so already is not copied."""
    mode = "L" if spec.color == "grey" else "RGB"
    has_size = (picture.shape[1], picture.shape[0]) == spec.size
    if has_size and picture.ndim == (2 if mode == "L" else 3):
        return picture
    image = _converted(Image.fromarray(picture), mode)
    return np.asarray(image if has_size else image.resize(spec.size, Image.Resampling.BILINEAR))


@lru_cache(maxsize=1024)
def _line(
    scale: float, mean: tuple[float, ...], std: tuple[float, ...], channels: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """What a pixel is multiplied by, and what is added then, (channels, 1, 1) each."""
    wide = np.resize(np.array(std, np.float64), (channels, 1, 1))
    offset = -np.resize(np.array(mean, np.float64), (channels, 1, 1)) / wide
    return (scale / wide).astype(np.float32), offset.astype(np.float32)


def _kind(payload: bytes, max_bytes: int) -> str:
    if not payload:
        raise PictureError("picture-empty", "the payload is empty", "publish the picture's bytes")
    if len(payload) > max_bytes:
        raise PictureError(
            "picture-too-large",
            f"the payload has {len(payload)} bytes, {max_bytes} are allowed",
            "publish a smaller picture, or raise limits.picture_bytes",
        )
    for magic, kind in _MAGIC.items():
        if payload.startswith(magic):
            return kind
    raise _unknown_format(f"the payload begins with {payload[:8].hex(' ')}")


def _opened(payload: bytes, kind: str, max_pixels: int) -> Image.Image:
    """A picture of which only the header was read."""
    # Set anew each time: cheap, and a `catch_warnings` elsewhere in the process undoes filters set once.
    warnings.filterwarnings("ignore", module=r"PIL\b")
    try:
        image = Image.open(io.BytesIO(payload), formats=[kind])
    except _DECODER_ERRORS as error:
        raise _damaged(kind, error) from error
    try:
        _check_pixels(image.size, max_pixels)
    except PictureError:
        image.close()
        raise
    return image


def _pixels(image: Image.Image) -> Picture:
    if image.mode in _GREY:
        return np.asarray(_converted(image, "L"))
    if image.mode in _COLOUR:
        return np.asarray(_converted(image, "RGB"))
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return (np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8)
    raise _unknown_format(f"samples of mode {image.mode} are not 8 or 16 bits")


def _converted(image: Image.Image, mode: str) -> Image.Image:
    """Pillow copies what has the mode already."""
    return image if image.mode == mode else image.convert(mode)


def _array(payload: bytes, max_pixels: int) -> Picture:
    shape, start, order = _array_shape(payload, max_pixels)
    flat = np.frombuffer(payload, np.uint8, offset=start)
    return np.ascontiguousarray(flat.reshape(shape, order=order))


def _array_shape(payload: bytes, max_pixels: int) -> tuple[tuple[int, ...], int, Literal["C", "F"]]:
    """Shape, offset of the first sample and order of an NPY payload."""
    length_bytes = 2 if payload[6:7] == b"\x01" else 4
    start = 8 + length_bytes + int.from_bytes(payload[8 : 8 + length_bytes], "little")
    header = payload[8 + length_bytes : min(start, 4096)]
    match = _ARRAY_HEADER.fullmatch(header)
    if match is None:
        raise _unknown_format("the array is not uint8 of shape (H, W) or (H, W, 3)")
    height, width = int(match[1]), int(match[2])
    _check_pixels((width, height), max_pixels)
    shape = (height, width, 3) if match[3] else (height, width)
    if len(payload) - start != prod(shape):
        raise PictureError(
            "picture-damaged",
            f"an array of shape {shape} has {prod(shape)} bytes, the payload {len(payload) - start}",
            "publish the whole file",
        )
    return shape, start, "F" if b"True" in header else "C"


def _check_pixels(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise PictureError("picture-damaged", f"its header says {width} x {height} pixels", "publish the file again")
    if width * height > max_pixels:
        raise PictureError(
            "picture-too-many-pixels",
            f"its header says {width} x {height} pixels, {max_pixels} are allowed",
            "publish a smaller picture, or raise limits.picture_pixels",
        )


def _unknown_format(what: str) -> PictureError:
    return PictureError("picture-format", what, "publish JPEG, PNG, BMP, TIFF, PNM or a uint8 NPY array")


def _damaged(kind: str, error: Exception) -> PictureError:
    return PictureError("picture-damaged", f"the {kind} cannot be decoded: {error}"[:300], "publish the file again")
