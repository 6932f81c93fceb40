"""A kept picture with what was found in it, for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from appliance.drivers import images
from appliance.errors import ConfigError

FAILS, PASSES = (230, 30, 30), (30, 160, 60)
SMALLEST_PIXELS = 400
"""Pictures of small parts are enlarged by whole factors until they are so wide: else no label could be read."""


def write_drawn(payload: bytes, findings: Sequence[Mapping[str, Any]], path: Path, *, max_pixels: int) -> None:
    """Draw the boxes of a verdict's findings, in pixels of the picture, and write it in the format of the file's name.

    Raises PictureError when the picture cannot be decoded, ConfigError when the file cannot be written.
    """
    picture = Image.fromarray(images.decode(payload, max_bytes=len(payload), max_pixels=max_pixels)).convert("RGB")
    factor = max(1, -(-SMALLEST_PIXELS // picture.width))
    picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(picture)
    for finding in findings:
        if finding["box"] is not None:
            _draw(draw, finding, [edge * factor for edge in finding["box"]])
    try:
        picture.save(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be written: {error}", "give a name such as out.png") from error


def _draw(draw: ImageDraw.ImageDraw, finding: Mapping[str, Any], box: Sequence[float]) -> None:
    x1, y1, x2, y2 = box
    colour = FAILS if finding["fails"] else PASSES
    draw.rectangle((x1, y1, max(x1, x2), max(y1, y2)), outline=colour, width=2)
    draw.text((x1 + 3, y1 + 3), f"{finding['label']} {finding['score']:.2f}", fill=colour)
