"""The manifest entries of the shipped experts: how their pictures are prepared, and what their outputs mean."""

from __future__ import annotations

from datetime import date

from appliance.catalog import ClassificationHead, DetectionHead, Head, InputSpec
from appliance.samples import DEFECTS, SOUND
from export import figure
from export.calibrate import Thresholds
from export.manifest import Entry
from export.products import DETECTOR, FIGURE
from export.samples import INPUT
from export.tiles import CELL, LABELS, MARGIN, PICTURE, SEEN

_OVERLAP_IS_ONE = 0.3
_FIGURE_THRESHOLD = 0.3
"""In a four-fold cross-validation of the 24 train pictures no sound one came above 0.24."""
_DEEPPCB = {
    "trained_on": "DeepPCB (github.com/tangsanli5201/DeepPCB at 08e98c4), train tiles of nine boards",
    "licence": "DeepPCB is MIT, and for research purposes by its authors' wish: see NOTICE.md",
}
_FIGURES = {
    "trained_on": "aliens-dataset (github.com/aws-samples/amazon-lookout-for-vision at 14bed61), 1 to 12 of each kind",
    "licence": "trained on pictures under CC BY-SA 4.0, (c) Amazon.com, Inc. or its affiliates: see NOTICE.md",
}


def cell_entry(name: str, board: str, thresholds: Thresholds) -> Entry:
    """The preliminary expert of one component type."""
    head = ClassificationHead(
        kind="classification",
        output="logits",
        activation="softmax",
        labels=LABELS,
        normal=SOUND,
        threshold=thresholds.classifier,
    )
    return _entry(
        name,
        architecture="cell-classifier",
        description=f"Sound, or which defect, for placements of board {board} that look alike",
        inputs=_compared(size=(INPUT, INPUT), crop=(SEEN, SEEN)),
        head=head,
        provenance=_DEEPPCB,
    )


def detector_entry(thresholds: Thresholds) -> Entry:
    """The subsequent expert that all component types share."""
    head = DetectionHead(
        kind="detection",
        boxes="boxes",
        scores="scores",
        coordinates="pixels",
        labels=DEFECTS,
        threshold=thresholds.detector,
        iou=_OVERLAP_IS_ONE,
        max_findings=10,
        region=(MARGIN, MARGIN, MARGIN + CELL, MARGIN + CELL),
    )
    return _entry(
        DETECTOR,
        architecture="defect-detector",
        description="Where a doubtful placement is defective, and how",
        inputs=_compared(size=(PICTURE, PICTURE), crop=None),
        head=head,
        provenance=_DEEPPCB,
    )


def figure_entry() -> Entry:
    """The good/bad expert of the second product line."""
    head = ClassificationHead(
        kind="classification",
        output="logits",
        activation="softmax",
        labels=figure.LABELS,
        normal=figure.LABELS[0],
        threshold=_FIGURE_THRESHOLD,
    )
    image = InputSpec(
        name="image",
        source="picture",
        color="rgb",
        size=(figure.WIDTH, figure.HEIGHT),
        crop=None,
        scale=1 / 255,
        mean=(0.5,),
        std=(0.5,),
    )
    return _entry(
        FIGURE,
        architecture="figure-classifier",
        description="A moulded figure: complete and clean, or not",
        inputs=(image,),
        head=head,
        provenance=_FIGURES,
    )


def _compared(size: tuple[int, int], crop: tuple[int, int] | None) -> tuple[InputSpec, ...]:
    """The published picture and the golden one, prepared alike."""
    return (
        InputSpec(
            name="image", source="picture", color="grey", size=size, crop=crop, scale=1 / 255, mean=(0.5,), std=(0.5,)
        ),
        InputSpec(
            name="reference",
            source="reference",
            color="grey",
            size=size,
            crop=crop,
            scale=1 / 255,
            mean=(0.5,),
            std=(0.5,),
        ),
    )


def _entry(
    name: str,
    architecture: str,
    description: str,
    inputs: tuple[InputSpec, ...],
    head: Head,
    provenance: dict[str, str],
) -> Entry:
    return Entry(
        name=name,
        description=description,
        architecture=architecture,
        checkpoint=f"checkpoints/{name}.pt",
        samples=f"samples/{name}",
        inputs=inputs,
        head=head,
        provenance={**provenance, "created": date.today().isoformat()},
    )
