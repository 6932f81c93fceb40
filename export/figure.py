"""The second product line: colour photographs of a moulded figure, sound or not."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from appliance.errors import ExportError

WIDTH, HEIGHT = 128, 96
LABELS = ("normal", "anomaly")

Colour = NDArray[np.uint8]
"""Height x width x 3, RGB."""


@dataclass(frozen=True, slots=True)
class Photograph:
    """One picture of the figure; the folder it lay in is its label."""

    path: Path
    label: str
    picture: Colour


def read_pictures(folder: Path) -> list[Photograph]:
    """All pictures below `normal/` and `anomaly/`."""
    found = [
        Photograph(path, label, _read(path)) for label in LABELS for path in sorted((folder / label).glob("*.png"))
    ]
    if not found:
        raise ExportError(f"{folder} holds no pictures", "give the folder that holds normal/ and anomaly/")
    return found


def reduced(picture: Colour) -> Colour:
    """What the expert sees, 128 x 96; the same step as at the appliance."""
    return np.array(Image.fromarray(picture).resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR))


def _read(path: Path) -> Colour:
    with Image.open(path) as image:
        return np.array(image.convert("RGB"))
