"""Output tensors to findings, by the manifest's head; boxes in pixels of the published picture. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from appliance.catalog import ClassificationHead, DetectionHead, ExpertManifest, InputSpec
from appliance.core.types import Box, Finding, Refusal
from appliance.drivers.images import window

Answer = tuple[Finding, ...] | Refusal
Numbers = NDArray[np.float64]

_MOST_CANDIDATES = 5000
"""Boxes of one label looked at per picture, best first, whatever the threshold lets through."""


def findings(
    manifest: ExpertManifest, outputs: Mapping[str, NDArray[Any]], sizes: Sequence[tuple[int, int]]
) -> tuple[Answer, ...]:
    """What the expert saw in each picture; `sizes` are (width, height) of the pictures as published.

    Outputs of a shape that the head does not expect make every answer a Refusal("invalid-output"), numbers that are
    not finite that of their picture.
    """
    head = manifest.head
    if isinstance(head, ClassificationHead):
        return _classified(head, outputs, len(sizes))
    return _detected(head, _picture_input(manifest), outputs, sizes)


def margin(head: ClassificationHead | DetectionHead, finding: Finding) -> float | None:
    """How far a finding was from failing the part, 0..1; None if it fails it, or if its score does not say.

    Of a detector's boxes only those that reach the threshold are found.
    """
    if finding.fails or isinstance(head, DetectionHead):
        return None
    if head.normal is not None:
        return head.threshold - (1.0 - finding.score)
    return head.threshold - finding.score if finding.label in head.failing else None


def _picture_input(manifest: ExpertManifest) -> InputSpec:
    """The input that boxes refer to."""
    return next((spec for spec in manifest.inputs if spec.source == "picture"), manifest.inputs[0])


def _invalid(detail: str) -> Refusal:
    return Refusal("invalid-output", detail)


def _wrong_shape(name: str, outputs: Mapping[str, NDArray[Any]], expected: tuple[int | str, ...]) -> Refusal:
    found = outputs[name].shape if name in outputs else "missing"
    return _invalid(f"output {name} is {found}, the head expects ({', '.join(map(str, expected))})")


def _fits(outputs: Mapping[str, NDArray[Any]], name: str, expected: tuple[int | str, ...]) -> bool:
    if name not in outputs or outputs[name].ndim != len(expected):
        return False
    return all(isinstance(e, str) or e == found for e, found in zip(expected, outputs[name].shape, strict=True))


def _classified(head: ClassificationHead, outputs: Mapping[str, NDArray[Any]], count: int) -> tuple[Answer, ...]:
    expected = (count, len(head.labels))
    if not _fits(outputs, head.output, expected):
        return (_wrong_shape(head.output, outputs, expected),) * count
    return tuple(_label_of(head, row.astype(np.float64)) for row in outputs[head.output])


def _label_of(head: ClassificationHead, row: Numbers) -> Answer:
    if not np.isfinite(row).all():
        return _invalid(f"output {head.output} is not finite")
    scores = _activated(head.activation, row)
    if head.normal is None:
        best = int(np.argmax(scores))
        label, score = head.labels[best], float(scores[best])
        return (Finding(label, score, label in head.failing and score >= head.threshold),)
    normal = head.labels.index(head.normal)
    sound = float(scores[normal])
    if 1.0 - sound < head.threshold:
        return (Finding(head.normal, sound, False),)
    others = np.where(np.arange(len(scores)) == normal, -np.inf, scores)
    return (Finding(head.labels[int(np.argmax(others))], 1.0 - sound, True),)


def _activated(activation: str, row: Numbers) -> Numbers:
    """Scores in 0..1."""
    if activation == "softmax":
        powers = np.exp(row - row.max())
        return np.asarray(powers / powers.sum())
    if activation == "sigmoid":
        return np.asarray(0.5 * (1.0 + np.tanh(0.5 * row)))  # 1 / (1 + exp(-x)) without overflow
    return np.asarray(np.clip(row, 0.0, 1.0))


def _detected(
    head: DetectionHead, spec: InputSpec, outputs: Mapping[str, NDArray[Any]], sizes: Sequence[tuple[int, int]]
) -> tuple[Answer, ...]:
    count = len(sizes)
    if not _fits(outputs, head.boxes, (count, "A", 4)):
        return (_wrong_shape(head.boxes, outputs, (count, "A", 4)),) * count
    anchors = outputs[head.boxes].shape[1]
    if not _fits(outputs, head.scores, (count, anchors, "labels")):
        return (_wrong_shape(head.scores, outputs, (count, anchors, "labels")),) * count
    columns = _label_columns(head, outputs[head.scores].shape[2])
    if columns is None:
        return (_wrong_shape(head.scores, outputs, (count, anchors, len(head.labels))),) * count
    return tuple(
        _found(head, spec, columns, boxes.astype(np.float64), scores.astype(np.float64), size)
        for boxes, scores, size in zip(outputs[head.boxes], outputs[head.scores], sizes, strict=True)
    )


def _label_columns(head: DetectionHead, columns: int) -> list[tuple[str, int]] | None:
    """Label and score column. A background column may be counted among the labels or not; it is never found."""
    if columns == len(head.labels):
        return [(label, i) for i, label in enumerate(head.labels) if i != head.background]
    if head.background is not None and head.background < columns == len(head.labels) + 1:
        return list(zip(head.labels, (i for i in range(columns) if i != head.background), strict=True))
    return None


def _found(
    head: DetectionHead,
    spec: InputSpec,
    columns: Sequence[tuple[str, int]],
    boxes: Numbers,
    scores: Numbers,
    size: tuple[int, int],
) -> Answer:
    if not (np.isfinite(boxes).all() and np.isfinite(scores).all()):
        return _invalid(f"outputs {head.boxes} and {head.scores} are not finite")
    placed = _placed(boxes, spec, size, is_relative=head.coordinates == "relative")
    is_real = (placed[:, 2] > placed[:, 0]) & (placed[:, 3] > placed[:, 1])
    kept = []
    for rank, (label, column) in enumerate(columns):
        chosen = np.flatnonzero(is_real & (scores[:, column] >= head.threshold))
        for i in chosen[suppress(placed[chosen], scores[chosen, column], head.iou)]:
            if _is_inside(placed[i], head.region):
                kept.append((-float(scores[i, column]), rank, tuple(float(edge) for edge in placed[i]), label))
    return tuple(
        Finding(label, -negative, head.fails, Box(*box))
        for negative, _, box, label in sorted(kept)[: head.max_findings]
    )


def _placed(boxes: Numbers, spec: InputSpec, size: tuple[int, int], *, is_relative: bool) -> Numbers:
    """Boxes of the network's input as boxes of the published picture, cut at its edges."""
    x, y, width, height = window(size, spec)
    reach = (1.0, 1.0) if is_relative else spec.size
    factor = np.array([width / reach[0], height / reach[1]] * 2)
    placed = boxes * factor + np.array([x, y, x, y])
    return np.asarray(np.clip(placed, 0.0, np.array([*size, *size], np.float64)))


def _is_inside(box: Numbers, region: tuple[float, float, float, float] | None) -> bool:
    if region is None:
        return True
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    return bool(region[0] <= x <= region[2] and region[1] <= y <= region[3])


def suppress(boxes: Numbers, scores: Numbers, iou: float) -> NDArray[np.intp]:
    """Non-maximum suppression: indices of boxes (A, 4) of which no two overlap by more than `iou`, best first.

    Equal scores are ordered by their boxes, so that the order of the candidates does not matter.
    """
    order = np.lexsort((*boxes.T[::-1], -scores))[:_MOST_CANDIDATES]
    kept = []
    while order.size:
        best, rest = order[0], order[1:]
        kept.append(best)
        order = rest[_overlaps(boxes[best], boxes[rest]) <= iou]
    return np.array(kept, np.intp)


def _overlaps(box: Numbers, others: Numbers) -> Numbers:
    """Intersection over union of one box with each of the others."""
    low, high = np.maximum(box[:2], others[:, :2]), np.minimum(box[2:], others[:, 2:])
    common = np.prod(np.clip(high - low, 0.0, None), axis=1)
    areas = np.prod(others[:, 2:] - others[:, :2], axis=1) + np.prod(box[2:] - box[:2])
    return np.asarray(common / np.maximum(areas - common, np.finfo(np.float64).tiny))
