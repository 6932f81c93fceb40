"""What the demo's lines publish: real boards, cut into the pictures that a camera would take of their parts.

The defective boards are the products' inspected samples. The sound ones are their golden pictures, shifted by a pixel
and encoded anew, for no real sample is free of defects; they are labelled so.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from PIL import Image, ImageChops

from appliance import samples
from appliance.catalog import Product

SOUND_EVERY = 4  # one board of so many is a golden picture
SHIFT_PIXELS = 1
JPEG_QUALITY = 92


@dataclass(frozen=True, slots=True)
class Part:
    """One picture to publish, and what is true of it."""

    line: str
    product: str
    board: str
    part: str
    component: str
    rect: tuple[int, int, int, int]
    truth: str | None
    picture: bytes


def parts_of(product: Product, line: str, board: str, *, sound: bool) -> Iterator[Part]:
    """The placements of one board, cut out as a camera would and encoded."""
    defects = () if sound else samples.read_defects(product.folder / "sample.txt")
    path = product.golden_path if sound else product.folder / "sample.jpg"
    assert path is not None
    with Image.open(path) as opened:
        picture = opened.convert("L")
    if sound:
        picture = ImageChops.offset(picture, SHIFT_PIXELS, SHIFT_PIXELS)
    for placement in product.recipe.placements:
        x, y, width, height = placement.rect
        encoded = io.BytesIO()
        picture.crop((x, y, x + width, y + height)).save(encoded, "JPEG", quality=JPEG_QUALITY)
        truth = samples.truth_of(defects, samples.centre_cell(placement.rect))
        yield Part(
            line,
            product.recipe.product,
            board,
            placement.designator,
            placement.component,
            placement.rect,
            truth,
            encoded.getvalue(),
        )


def streams(products: Sequence[Product], lines: int) -> Iterator[Part]:
    """Boards go to the lines in turn; the lines publish at the same time, so that their experts compete."""

    def line_of(number: int) -> Iterator[Part]:
        for turn, product in enumerate(products[number::lines]):
            is_sound = (turn + number) % SOUND_EVERY == SOUND_EVERY - 1
            yield from parts_of(product, f"line{number + 1}", f"SN-{number + 1}-{turn + 1:03d}", sound=is_sound)

    # Products stand in the order of their boards: every line begins at another one.
    for together in zip_longest(*(line_of(number) for number in range(lines))):
        yield from (part for part in together if part is not None)


def mixed(products: Sequence[Product]) -> list[Product]:
    """Products of different boards in turn, by the first five digits of their names."""
    families: dict[str, list[Product]] = {}
    for product in products:
        families.setdefault(product.recipe.product[:5], []).append(product)
    return [p for together in zip_longest(*families.values()) for p in together if p is not None]
