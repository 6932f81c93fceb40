from __future__ import annotations

import io
import struct
import subprocess
import sys
import warnings
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from appliance.catalog import InputSpec
from appliance.drivers import images
from appliance.errors import PictureError

LIMITS: dict[str, int] = {"max_bytes": 10_000_000, "max_pixels": 1_000_000}


def colours(height: int = 6, width: int = 5) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def greys(height: int = 6, width: int = 5) -> NDArray[np.uint8]:
    return colours(height, width)[:, :, 0].copy()


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def saved(array: NDArray[Any]) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def decode(payload: bytes, **limits: int) -> NDArray[np.uint8]:
    return images.decode(payload, **{**LIMITS, **limits})


def refusal(payload: bytes, **limits: int) -> str:
    """The reason for which both `decode` and `check`, if it can know, refuse the payload."""
    with pytest.raises(PictureError) as caught:
        decode(payload, **limits)
    return caught.value.reason


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_files_decode_to_their_pixels(kind: str) -> None:
    for pixels in (colours(), greys()):
        payload = encoded(Image.fromarray(pixels), kind)
        assert images.check(payload, **LIMITS) == kind
        found = decode(payload)
        np.testing.assert_array_equal(found, pixels)
        assert found.dtype == np.uint8
        assert found.flags.c_contiguous


def test_jpeg_decodes_to_nearly_its_pixels() -> None:
    smooth = np.repeat(np.arange(0, 240, 8, dtype=np.uint8)[None, :, None], 3, axis=2).repeat(20, axis=0)
    payload = encoded(Image.fromarray(smooth), "JPEG", quality=95)
    assert images.check(payload, **LIMITS) == "JPEG"
    assert np.abs(decode(payload).astype(int) - smooth).max() < 8
    assert decode(encoded(Image.fromarray(greys()), "JPEG")).shape == (6, 5)


@pytest.mark.parametrize("pixels", [colours(), greys(), np.asfortranarray(greys()), np.asfortranarray(colours())])
def test_arrays_decode_to_themselves(pixels: NDArray[np.uint8]) -> None:
    payload = saved(pixels)
    assert images.check(payload, **LIMITS) == "NPY"
    np.testing.assert_array_equal(decode(payload), pixels)


def palette() -> Image.Image:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    return image


@pytest.mark.parametrize(
    ("image", "kind", "options", "expected"),
    [
        (palette(), "PNG", {}, [[[10, 20, 30], [40, 50, 60]]]),
        (palette(), "PNG", {"transparency": 0}, [[[10, 20, 30], [40, 50, 60]]]),
        (palette(), "PNG", {"transparency": b"\x00\x80"}, [[[10, 20, 30], [40, 50, 60]]]),
        (Image.new("RGBA", (1, 1), (1, 2, 3, 0)), "PNG", {}, [[[1, 2, 3]]]),
        (Image.new("LA", (1, 1), (7, 0)), "PNG", {}, [[7]]),
        (Image.new("1", (2, 1), 1), "PNG", {}, [[255, 255]]),
        (Image.new("CMYK", (1, 1), (255, 0, 0, 0)), "TIFF", {}, [[[0, 255, 255]]]),
        (Image.fromarray(np.array([[0x1234, 0xFFFF]], np.uint16)), "PNG", {}, [[0x12, 0xFF]]),
        (Image.fromarray(np.array([[0x1234, 0xFFFF]], np.uint16)), "TIFF", {}, [[0x12, 0xFF]]),
    ],
)
def test_every_kind_of_pixel_has_one_defined_meaning(
    image: Image.Image, kind: str, options: dict[str, Any], expected: Any
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode(encoded(image, kind, **options)).tolist() == expected


def test_of_16_bit_netpbm_samples_the_upper_half_counts() -> None:
    assert decode(b"P5 2 1 65535\n\x12\x34\xff\xff").tolist() == [[0x12, 0xFF]]


def test_netpbm_text_is_a_picture_too() -> None:
    assert decode(b"P2 2 1 255\n17 255\n").tolist() == [[17, 255]]
    assert decode(b"P1 2 1\n1 0\n").tolist() == [[0, 255]]


def test_the_exif_orientation_is_ignored() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    payload = encoded(Image.fromarray(colours(6, 4)), "JPEG", exif=exif)
    assert decode(payload).shape == (6, 4, 3)


def test_of_several_frames_the_first_counts() -> None:
    first, second = Image.new("L", (2, 2), 10), Image.new("L", (2, 2), 200)
    payload = encoded(first, "TIFF", save_all=True, append_images=[second])
    assert decode(payload).tolist() == [[10, 10], [10, 10]]


@pytest.mark.parametrize("pixels", [np.zeros((2, 2), np.int32), np.zeros((2, 2), np.float32)])
def test_samples_of_32_bits_are_refused(pixels: NDArray[Any]) -> None:
    assert refusal(encoded(Image.fromarray(pixels), "TIFF")) == "picture-format"


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((2, 2), np.int8),
        np.zeros((2, 2), np.uint16),
        np.zeros((2, 2), np.float32),
        np.zeros(4, np.uint8),
        np.zeros((2, 2, 4), np.uint8),
        np.zeros((2, 2, 3, 1), np.uint8),
        np.zeros((), np.uint8),
        np.zeros((2, 2), [("a", np.uint8)]),
    ],
)
def test_arrays_of_another_kind_are_refused(array: NDArray[Any]) -> None:
    assert refusal(saved(array)) == "picture-format"


def test_pickled_arrays_are_refused_unopened() -> None:
    file = io.BytesIO()
    np.save(file, np.array([[None]], dtype=object), allow_pickle=True)
    assert refusal(file.getvalue()) == "picture-format"


def test_an_array_that_promises_more_than_it_has_takes_no_memory() -> None:
    assert refusal(saved(greys())[:-1]) == "picture-damaged"
    assert refusal(saved(greys()) + b"x") == "picture-damaged"
    assert refusal(saved(greys()).replace(b"(6, 5)", b"(9, 9)")) == "picture-damaged"
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (99999, 99999), }"
    bomb = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header
    assert refusal(bomb) == "picture-too-many-pixels"
    assert refusal(bomb.replace(b"99999, 99999", b"00000, 00000")) == "picture-damaged"


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (b"", "picture-empty"),
        (b"GIF89a" + bytes(20), "picture-format"),
        (encoded(Image.new("L", (2, 2)), "WEBP"), "picture-format"),
        (b"%PDF-1.4", "picture-format"),
        (b"P7 nothing", "picture-format"),
        (b"\xff\xd8\xff", "picture-damaged"),
        (b"\x89PNG\r\n\x1a\n", "picture-damaged"),
        (b"BM" + bytes(60), "picture-damaged"),
        (b"II*\0", "picture-damaged"),
        (b"P6 0 0 255\n", "picture-damaged"),
        (b"\x93NUMPY", "picture-format"),
        (b"\x93NUMPY\x01\x00\xff\xff", "picture-format"),
    ],
)
def test_what_is_no_picture_has_a_reason(payload: bytes, reason: str) -> None:
    assert refusal(payload) == reason
    with pytest.raises(PictureError) as caught:
        images.check(payload, **LIMITS)
    assert caught.value.reason == reason
    assert caught.value.remedy


def test_payloads_and_pictures_over_the_limits_are_refused_and_at_the_limits_taken() -> None:
    payload = encoded(Image.fromarray(colours(10, 10)), "PNG")
    assert refusal(payload, max_bytes=len(payload) - 1) == "picture-too-large"
    assert refusal(payload, max_pixels=99) == "picture-too-many-pixels"
    assert decode(payload, max_bytes=len(payload), max_pixels=100).shape == (10, 10, 3)


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png_bomb(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = zlib.compress(bytes(1_000_000), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_a_bomb_is_refused_from_its_header_without_a_warning() -> None:
    bomb = png_bomb(20_000, 20_000)
    assert len(bomb) < 2000
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert refusal(bomb, max_pixels=40_000_000) == "picture-too-many-pixels"
        with pytest.raises(PictureError, match="20000 x 20000"):
            images.check(bomb, max_bytes=10_000, max_pixels=40_000_000)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "TIFF", "PPM"])
def test_truncated_files_are_damaged_and_never_half_a_picture(kind: str) -> None:
    payload = encoded(Image.fromarray(colours(64, 64)), kind)
    for share in (0.5, 0.9):
        assert refusal(payload[: int(len(payload) * share)]) == "picture-damaged"


def test_a_nameless_chunk_among_the_pixels_is_damage() -> None:
    payload = encoded(Image.fromarray(colours(64, 64)), "PNG")
    begin, end = payload.index(b"IDAT") - 4, payload.index(b"IEND") - 4
    pixels = payload[begin + 8 : end - 4]
    nameless = chunk(b"IDAT", pixels[:100]) + chunk(bytes(4), b"") + chunk(b"IDAT", pixels[100:])
    assert refusal(payload[:begin] + nameless + payload[end:]) == "picture-damaged"


PAYLOADS = [
    encoded(Image.fromarray(colours(16, 16)), "JPEG"),
    encoded(Image.fromarray(greys(16, 16)), "JPEG", progressive=True),
    encoded(Image.fromarray(colours(16, 16)), "PNG"),
    encoded(palette(), "PNG", transparency=0),
    encoded(Image.fromarray(colours(8, 8)), "BMP"),
    encoded(Image.fromarray(colours(8, 8)), "TIFF"),
    encoded(Image.fromarray(colours(8, 8)), "TIFF", compression="tiff_lzw"),
    encoded(Image.fromarray(greys(8, 8)), "PPM"),
    saved(colours(8, 8)),
]
changes = st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), max_size=12)


@given(st.sampled_from(PAYLOADS), changes, st.integers(0, 40), st.binary(max_size=20))
def test_changed_bytes_give_a_picture_or_a_picture_error(
    payload: bytes, changed: list[tuple[int, int]], cut: int, tail: bytes
) -> None:
    content = bytearray(payload)
    for position, value in changed:
        content[position % len(content)] = value
    mutated = bytes(content[: len(content) - cut]) + tail
    decode_or_refuse(mutated)


@given(
    st.binary(max_size=200),
    st.sampled_from([b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"BM", b"II*\0", b"P5", b"\x93NUMPY"]),
)
def test_noise_behind_a_true_beginning_gives_a_picture_or_a_picture_error(noise: bytes, magic: bytes) -> None:
    decode_or_refuse(magic + noise)


def decode_or_refuse(payload: bytes) -> None:
    try:
        found = images.decode(payload, max_bytes=100_000, max_pixels=100_000)
    except PictureError:
        return
    assert found.dtype == np.uint8
    assert found.ndim == 2 or found.shape[2:] == (3,)
    assert found.shape[0] * found.shape[1] <= 100_000


def test_a_crop_is_the_part_of_the_picture_and_not_a_copy() -> None:
    picture = colours(20, 30)
    part = images.crop(picture, (4, 2, 10, 5))
    np.testing.assert_array_equal(part, picture[2:7, 4:14])
    assert part.base is picture


@pytest.mark.parametrize("rect", [(-1, 0, 2, 2), (0, -1, 2, 2), (29, 0, 2, 2), (0, 19, 2, 2)])
def test_a_crop_outside_the_picture_is_refused(rect: tuple[int, int, int, int]) -> None:
    with pytest.raises(PictureError) as caught:
        images.crop(colours(20, 30), rect)
    assert caught.value.reason == "picture-too-small"


def spec(**fields: Any) -> InputSpec:
    return InputSpec.model_validate({"name": "image", "size": (5, 6), **fields})


def test_prepared_pixels_are_scaled_then_shifted_then_divided() -> None:
    picture = colours()
    found = images.prepare(picture, spec(scale=1 / 255, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)))
    expected = (picture / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    assert found.dtype == np.float32
    assert found.flags.c_contiguous
    np.testing.assert_allclose(found, expected.transpose(2, 0, 1), atol=1e-5)


def test_one_mean_and_deviation_serve_all_channels() -> None:
    found = images.prepare(colours(), spec(mean=(127,), std=(128,)))
    np.testing.assert_allclose(found, ((colours().astype(float) - 127) / 128).transpose(2, 0, 1), atol=1e-6)


def test_channels_stand_in_the_order_that_the_net_wants() -> None:
    rgb, bgr = images.prepare(colours(), spec()), images.prepare(colours(), spec(color="bgr"))
    np.testing.assert_array_equal(rgb[::-1], bgr)
    different = images.prepare(colours(), spec(color="bgr", mean=(1, 2, 3)))
    np.testing.assert_array_equal(different, bgr - np.array([1, 2, 3], np.float32)[:, None, None])


def test_colour_becomes_grey_and_grey_becomes_colour() -> None:
    grey = images.prepare(colours(), spec(color="grey"))
    luma = colours() @ np.array([0.299, 0.587, 0.114])
    assert grey.shape == (1, 6, 5)
    assert np.abs(grey[0] - luma).max() < 1
    np.testing.assert_array_equal(images.prepare(greys(), spec()), np.stack([greys()] * 3).astype(np.float32))


def test_a_crop_is_centred_and_a_larger_one_is_the_picture() -> None:
    picture = greys(20, 30)
    cropped = images.prepare(picture, spec(color="grey", crop=(5, 6)))
    np.testing.assert_array_equal(cropped[0], picture[7:13, 12:17])
    larger = images.prepare(greys(), spec(color="grey", crop=(100, 100)))
    np.testing.assert_array_equal(larger[0], greys())
    assert images.window((30, 20), spec(crop=(100, 10))) == (0, 5, 30, 10)


def test_resizing_is_pillows_bilinear() -> None:
    picture = colours(40, 50)
    expected = np.asarray(Image.fromarray(picture).resize((5, 6), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(images.prepare(picture, spec()), expected.transpose(2, 0, 1).astype(np.float32))
    assert images.prepare(greys(1, 1), spec(color="grey")).shape == (1, 6, 5)


NO_MORE_FILES = """
import resource, sys
from appliance.drivers import images
payload = sys.stdin.buffer.read()
resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
print(images.check(payload, max_bytes=10**6, max_pixels=10**6))
print(images.decode(payload, max_bytes=10**6, max_pixels=10**6).shape)
"""


@pytest.mark.parametrize("kind", ["JPEG", "MPO", "PNG", "BMP", "TIFF", "PPM"])
def test_the_first_picture_of_a_process_that_may_open_no_more_files_is_not_called_damaged(kind: str) -> None:
    several = {"save_all": True, "append_images": [Image.fromarray(greys())]} if kind == "MPO" else {}
    payload = encoded(Image.fromarray(colours()), kind, **several)
    child = subprocess.run([sys.executable, "-c", NO_MORE_FILES], input=payload, capture_output=True, timeout=60)
    assert child.stdout.split(b"\n")[:2] == [b"JPEG" if kind == "MPO" else kind.encode(), b"(6, 5, 3)"], child.stderr
