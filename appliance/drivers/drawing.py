"""A kept picture with what was found in it, for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from appliance.drivers import images
from appliance.errors import ConfigError

FAILS, PASSES = (230, 30, 30), (30, 160, 60)
SMALLEST_PIXELS = 400
"""Pictures of small parts are enlarged by whole factors until they are so wide: else no label could be read."""


def write_drawn(payload: bytes, verdict: Mapping[str, Any], path: Path, *, max_pixels: int) -> None:
    """Draw the boxes in a verdict's body, in pixels of the picture, and write it in the format of the file's name.

    Of a whole board these are the parts that did not pass, with their names, and what was found in them.

    Raises PictureError when the picture cannot be decoded, ConfigError when the file cannot be written.
    """
    picture = Image.fromarray(images.decode(payload, max_bytes=len(payload), max_pixels=max_pixels)).convert("RGB")
    factor = max(1, -(-SMALLEST_PIXELS // picture.width))
    picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(picture)
    for mark in _marks(verdict):
        _draw(draw, mark, [edge * factor for edge in mark.box])
    try:
        picture.save(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be written: {error}", "give a name such as out.png") from error


@dataclass(frozen=True, slots=True)
class _Mark:
    box: Sequence[float]
    text: str
    fails: bool


def _marks(verdict: Mapping[str, Any]) -> Iterator[_Mark]:
    for part in verdict.get("parts", ()):
        if part["outcome"] != "pass":
            x, y, width, height = part["rect"]
            yield _Mark((x, y, x + width, y + height), f"{part['part']} {part['outcome']}", True)
        yield from _found(part["findings"])
    yield from _found(verdict.get("findings", ()))


def _found(findings: Sequence[Mapping[str, Any]]) -> Iterator[_Mark]:
    for finding in findings:
        if finding["box"] is not None:
            yield _Mark(finding["box"], f"{finding['label']} {finding['score']:.2f}", finding["fails"])


def _draw(draw: ImageDraw.ImageDraw, mark: _Mark, box: Sequence[float]) -> None:
    x1, y1, x2, y2 = box
    colour = FAILS if mark.fails else PASSES
    draw.rectangle((x1, y1, max(x1, x2), max(y1, y2)), outline=colour, width=2)
    draw.text((x1 + 3, y1 + 3), mark.text, fill=colour)
