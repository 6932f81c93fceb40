"""The inspection of a tile as the appliance would do it: publish, prepare, classify, and where in doubt detect.

It is told how an expert computes, so that the nets can be judged before they are exported and the shipped files after.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from appliance.catalog import ExpertManifest, Head
from appliance.core.types import Box, Finding
from appliance.samples import SOUND
from export import proof
from export.proof import Arrays
from export.quality import Inspection, truth_of
from export.tiles import PICTURE, Cell, Picture, Tile, window

JPEG_QUALITY = 90
MAX_BATCH = 16
IN_DOUBT = 0.2
"""Above this 1 - P(sound) the detector is asked, as the shipped graph.toml says."""


@dataclass(frozen=True, slots=True)
class Expert:
    """One expert, however it computes."""

    manifest: ExpertManifest
    compute: Callable[[Arrays], Arrays]

    @property
    def name(self) -> str:
        return self.manifest.name


@dataclass(frozen=True, slots=True)
class View:
    """One placement's published picture and its reference, as decoded arrays."""

    cell: Cell
    picture: Picture
    reference: Picture


@dataclass(frozen=True, slots=True)
class Answer:
    findings: tuple[Finding, ...]
    outputs: Arrays


def inspect(
    tile: Tile, expert_of: Mapping[Cell, Expert], detector: Expert, *, is_golden: bool = False
) -> list[Inspection]:
    """Every placement of a tile; with `is_golden`, of a sound board that lies one pixel off and was photographed."""
    views = [_view(tile, cell, is_golden) for cell in tile.cells]
    defective = _defective(views, expert_of)
    doubtful = [view for view in views if defective[view.cell] > IN_DOUBT]
    answers = ask(detector, doubtful)
    found = {
        view.cell: tuple(_in_tile(finding, view.cell) for finding in answer.findings)
        for view, answer in zip(doubtful, answers, strict=True)
    }
    return [
        Inspection(
            expert_of[cell].name,
            tile,
            cell,
            SOUND if is_golden else truth_of(tile, cell),
            defective[cell],
            found.get(cell),
        )
        for cell in tile.cells
    ]


def ask(expert: Expert, views: Sequence[View]) -> list[Answer]:
    """The expert's answers, in batches as large as it is proven for."""
    answers: list[Answer] = []
    for start in range(0, len(views), MAX_BATCH):
        answers += _ask_batch(expert, views[start : start + MAX_BATCH])
    return answers


def published_bytes(source: Picture, cell: Cell) -> bytes:
    """What the camera publishes of a placement."""
    buffer = BytesIO()
    Image.fromarray(window(source, cell.corner)).save(buffer, format="JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()


def moved(picture: Picture) -> Picture:
    """The picture one pixel to the right and down, as a board lies in its fixture."""
    padded: Picture = np.pad(picture, ((1, 0), (1, 0)), mode="edge")[:-1, :-1]
    return padded


def defective_share(head: Head, outputs: Arrays) -> NDArray[np.float64]:
    """1 - P(normal) for each sample of a softmax classification."""
    assert head.kind == "classification"
    assert head.normal is not None
    logits = outputs[head.output].astype(np.float64)
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    result: NDArray[np.float64] = 1 - shares[:, head.labels.index(head.normal)] / shares.sum(axis=1)
    return result


def _view(tile: Tile, cell: Cell, is_golden: bool) -> View:
    source = moved(tile.golden) if is_golden else tile.inspected
    return View(cell, proof.decoded(published_bytes(source, cell)), window(tile.golden, cell.corner))


def _defective(views: Sequence[View], expert_of: Mapping[Cell, Expert]) -> dict[Cell, float]:
    by_expert: dict[str, list[View]] = {}
    for view in views:
        by_expert.setdefault(expert_of[view.cell].name, []).append(view)
    result = {}
    for members in by_expert.values():
        expert = expert_of[members[0].cell]
        for view, answer in zip(members, ask(expert, members), strict=True):
            result[view.cell] = float(defective_share(expert.manifest.head, answer.outputs)[0])
    return result


def _ask_batch(expert: Expert, views: Sequence[View]) -> list[Answer]:
    feeds = {
        spec.name: proof.prepared(
            [view.picture if spec.source == "picture" else view.reference for view in views], spec
        )
        for spec in expert.manifest.inputs
    }
    outputs = expert.compute(feeds)
    found = proof.decisions(expert.manifest, outputs, [(PICTURE, PICTURE)] * len(views))
    return [
        Answer(findings, {name: output[row : row + 1] for name, output in outputs.items()})
        for row, findings in enumerate(found)
    ]


def _in_tile(finding: Finding, cell: Cell) -> Finding:
    """From pixels of the published picture to pixels of the tile."""
    assert finding.box is not None
    left, top = cell.corner
    box = finding.box
    return Finding(
        finding.label, finding.score, finding.fails, Box(box.x1 + left, box.y1 + top, box.x2 + left, box.y2 + top)
    )
