from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from appliance.catalog import ExpertManifest
from appliance.core.types import Box, Finding, Refusal
from appliance.drivers.heads import findings, margin, suppress

LABELS = ["sound", "missing", "turned"]


def manifest(head: dict[str, Any], **spec: Any) -> ExpertManifest:
    return ExpertManifest.model_validate(
        {
            "schema": 1,
            "name": "e",
            "version": 1,
            "model": {"sha256": "0" * 64, "bytes": 1, "opset": 17, "ir_version": 8, "max_batch": 4},
            "inputs": [
                {"name": "reference", "size": (8, 8), "source": "reference"},
                {"name": "image", "size": (100, 50), **spec},
            ],
            "head": head,
        }
    )


def classify(rows: Any, **head: Any) -> tuple[tuple[Finding, ...] | Refusal, ...]:
    expert = manifest({"kind": "classification", "output": "y", "labels": LABELS, "activation": "none", **head})
    rows = np.array(rows, np.float32)
    return findings(expert, {"y": rows}, [(10, 10)] * len(rows))


def only(answers: tuple[tuple[Finding, ...] | Refusal, ...]) -> tuple[Finding, ...]:
    [answer] = answers
    assert not isinstance(answer, Refusal), answer
    return answer


@pytest.mark.parametrize(
    ("head", "finding", "expected"),
    [
        ({"normal": "sound", "threshold": 0.5}, Finding("sound", 0.9, False), 0.4),
        ({"normal": "sound", "threshold": 0.5}, Finding("sound", 0.55, False), 0.05),
        ({"normal": "sound", "threshold": 0.5}, Finding("missing", 0.6, True), None),
        ({"failing": ["missing"], "threshold": 0.8}, Finding("missing", 0.7, False), 0.1),
        ({"failing": ["missing"], "threshold": 0.8}, Finding("sound", 0.7, False), None),
    ],
)
def test_the_margin_is_how_far_a_passing_score_was_from_failing(
    head: dict[str, Any], finding: Finding, expected: float | None
) -> None:
    known = manifest({"kind": "classification", "output": "y", "labels": LABELS, **head}).head
    found = margin(known, finding)
    assert found == (None if expected is None else pytest.approx(expected))


def test_a_detector_has_no_margin() -> None:
    known = manifest({"kind": "detection", "boxes": "b", "scores": "s", "labels": ["open"]}).head
    assert margin(known, Finding("open", 0.6, False, Box(1, 2, 3, 4))) is None


@pytest.mark.parametrize(
    ("row", "threshold", "expected"),
    [
        ([0.9, 0.08, 0.02], 0.5, Finding("sound", 0.9, False)),
        ([0.4, 0.2, 0.4], 0.5, Finding("turned", 0.6, True)),
        ([0.5, 0.3, 0.2], 0.5, Finding("missing", 0.5, True)),
        ([0.75, 0.0, 0.25], 0.25, Finding("turned", 0.25, True)),
        ([0.0, 1.0, 0.0], 1.0, Finding("missing", 1.0, True)),
    ],
)
def test_with_a_normal_label_the_part_fails_when_the_rest_reaches_the_threshold(
    row: list[float], threshold: float, expected: Finding
) -> None:
    [found] = only(classify([row], normal="sound", threshold=threshold))
    assert (found.label, found.fails) == (expected.label, expected.fails)
    assert found.score == pytest.approx(expected.score, abs=1e-6)


@pytest.mark.parametrize(
    ("row", "label", "fails"),
    [
        ([0.9, 0.05, 0.05], "sound", False),
        ([0.2, 0.7, 0.1], "missing", True),
        ([0.1, 0.45, 0.4], "missing", False),
        ([0.1, 0.1, 0.8], "turned", False),
    ],
)
def test_without_one_the_best_label_fails_if_it_is_listed_and_sure(row: list[float], label: str, fails: bool) -> None:
    [found] = only(classify([row], failing=["missing"], threshold=0.5))
    assert (found.label, found.fails) == (label, fails)
    assert found.score == pytest.approx(max(row))


@pytest.mark.parametrize(
    ("activation", "row", "score"),
    [
        ("softmax", [1000.0, 1000.0, -1000.0], 0.5),
        ("softmax", [0.0, 0.0, 0.0], 1 / 3),
        ("sigmoid", [0.0, -1.0, -2.0], 0.5),
        ("sigmoid", [1000.0, -1000.0, 0.0], 1.0),
        ("none", [0.25, 0.1, 0.1], 0.25),
        ("none", [7.0, 0.0, 0.0], 1.0),
    ],
)
def test_scores_lie_between_nought_and_one_for_any_logits(activation: str, row: list[float], score: float) -> None:
    [found] = only(classify([row], activation=activation))
    assert found.score == pytest.approx(score)


def test_every_picture_of_a_batch_has_its_own_answer_and_a_broken_one_does_not_spoil_the_others() -> None:
    good, broken, also_good = classify([[1, 0, 0], [np.nan, 0, 0], [0, 1, 0]])
    assert isinstance(good, tuple)
    assert isinstance(also_good, tuple)
    assert (good[0].label, also_good[0].label) == ("sound", "missing")
    assert isinstance(broken, Refusal)
    assert broken.reason == "invalid-output"


@pytest.mark.parametrize("shape", [(2, 2), (1, 3), (2, 3, 1), (6,)])
def test_a_classification_of_another_shape_is_refused_for_every_picture(shape: tuple[int, ...]) -> None:
    expert = manifest({"kind": "classification", "output": "y", "labels": LABELS})
    for outputs in ({"y": np.zeros(shape, np.float32)}, {"z": np.zeros((2, 3), np.float32)}):
        answers = findings(expert, outputs, [(10, 10)] * 2)
        assert [isinstance(a, Refusal) and a.reason for a in answers] == ["invalid-output"] * 2


def detect(
    boxes: Any, scores: Any, size: tuple[int, int] = (100, 50), spec: dict[str, Any] | None = None, **head: Any
) -> tuple[tuple[Finding, ...] | Refusal, ...]:
    described = {"kind": "detection", "boxes": "b", "scores": "s", "labels": ["dot", "line"], **head}
    outputs = {"b": np.array([boxes], np.float32), "s": np.array([scores], np.float32)}
    return findings(manifest(described, **(spec or {})), outputs, [size])


def test_boxes_in_pixels_come_back_in_pixels_of_the_published_picture() -> None:
    [found] = only(detect([[10, 5, 20, 25]], [[0.9, 0.1]], size=(200, 200)))
    assert (found.label, found.fails) == ("dot", True)
    assert found.box == Box(20, 20, 40, 100)


def test_relative_boxes_come_back_in_pixels_of_the_published_picture() -> None:
    [found] = only(detect([[0.1, 0.2, 0.5, 0.4]], [[0.9, 0.1]], size=(200, 100), coordinates="relative"))
    assert found.box is not None
    edges = (found.box.x1, found.box.y1, found.box.x2, found.box.y2)
    assert edges == pytest.approx((20, 20, 100, 40))


def test_a_centred_crop_is_undone() -> None:
    spec = {"crop": (100, 100)}
    [found] = only(detect([[0, 0, 100, 50], [0, 0, 0, 50]], [[0.9, 0], [1, 0]], size=(300, 200), spec=spec))
    assert found.box == Box(100, 50, 200, 150)


def test_boxes_are_cut_at_the_pictures_edges_and_empty_ones_are_dropped() -> None:
    boxes = [[-20, -20, 10, 10], [110, 10, 120, 20], [30, 30, 30, 40], [60, 40, 50, 45]]
    [found] = only(detect(boxes, [[0.9, 0]] * 4))
    assert found.box == Box(0, 0, 10, 10)


def test_nothing_found_is_an_answer() -> None:
    assert only(detect([[0, 0, 10, 10]], [[0.4, 0.3]])) == ()
    assert only(detect(np.zeros((0, 4)), np.zeros((0, 2)))) == ()


def test_overlapping_boxes_are_one_finding_per_label() -> None:
    boxes = [[0, 0, 20, 20], [1, 1, 21, 21], [50, 0, 70, 20], [0, 0, 20, 20]]
    found = only(detect(boxes, [[0.8, 0], [0.9, 0], [0.7, 0], [0, 0.95]]))
    assert [(f.label, round(f.score, 2)) for f in found] == [("line", 0.95), ("dot", 0.9), ("dot", 0.7)]


def test_one_box_may_have_two_labels_and_the_number_of_findings_is_capped() -> None:
    found = only(detect([[0, 0, 20, 20], [50, 0, 70, 20]], [[0.8, 0.9], [0.7, 0.6]], max_findings=3))
    assert [(f.label, round(f.score, 1)) for f in found] == [("line", 0.9), ("dot", 0.8), ("dot", 0.7)]


@pytest.mark.parametrize(
    ("labels", "background", "row", "expected"),
    [
        (["dot"], 0, [0.9, 0.6], ["dot"]),
        (["dot"], 1, [0.9, 0.6], ["dot"]),
        (["nothing", "dot"], 0, [0.9, 0.6], ["dot"]),
        (["dot", "line"], None, [0.9, 0.6], ["dot", "line"]),
        (["dot", "line"], 0, [0.9, 0.8, 0.7], ["dot", "line"]),
    ],
)
def test_the_background_is_never_found(
    labels: list[str], background: int | None, row: list[float], expected: list[str]
) -> None:
    found = only(detect([[0, 0, 9, 9]], [row], labels=labels, background=background))
    assert [f.label for f in found] == expected


def test_only_findings_centred_in_the_region_count() -> None:
    boxes = [[0, 0, 20, 20], [40, 0, 60, 20], [80, 0, 100, 20]]
    found = only(detect(boxes, [[0.9, 0]] * 3, region=(30, 0, 70, 50), fails=False))
    assert [(f.box, f.fails) for f in found] == [(Box(40, 0, 60, 20), False)]


@pytest.mark.parametrize(
    ("boxes", "scores"),
    [
        (np.zeros((1, 3, 4)), np.zeros((1, 2, 2))),
        (np.zeros((1, 3, 5)), np.zeros((1, 3, 2))),
        (np.zeros((2, 3, 4)), np.zeros((2, 3, 2))),
        (np.zeros((3, 4)), np.zeros((3, 2))),
        (np.zeros((1, 3, 4)), np.zeros((1, 3, 3))),
        (np.full((1, 3, 4), np.inf), np.zeros((1, 3, 2))),
        (np.zeros((1, 3, 4)), np.full((1, 3, 2), np.nan)),
    ],
)
def test_detections_of_another_shape_or_not_finite_are_refused(boxes: NDArray[Any], scores: NDArray[Any]) -> None:
    expert = manifest({"kind": "detection", "boxes": "b", "scores": "s", "labels": ["dot", "line"]})
    [answer] = findings(expert, {"b": boxes, "s": scores}, [(10, 10)])
    assert isinstance(answer, Refusal)
    assert answer.reason == "invalid-output"


def test_findings_of_no_picture_are_none() -> None:
    expert = manifest({"kind": "classification", "output": "y", "labels": LABELS})
    assert findings(expert, {"y": np.zeros((0, 3), np.float32)}, []) == ()


def test_boxes_that_overlap_just_as_much_as_allowed_are_two() -> None:
    places, scores = np.array([[0, 0, 2, 1], [0, 0, 1, 1]], np.float64), np.array([0.9, 0.8])
    assert list(suppress(places, scores, 0.5)) == [0, 1]
    assert list(suppress(places, scores, 0.49)) == [0]


edges = st.integers(0, 12).map(float)
boxes = st.tuples(edges, edges, st.integers(1, 12).map(float), st.integers(1, 12).map(float)).map(
    lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3])
)
candidates = st.lists(st.tuples(boxes, st.integers(0, 5).map(lambda s: s / 5)), max_size=25)
overlap = st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0])


def split(found: list[tuple[tuple[float, ...], float]]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    return np.array([b for b, _ in found], np.float64).reshape(-1, 4), np.array([s for _, s in found], np.float64)


def iou(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    width = max(0.0, min(one[2], other[2]) - max(one[0], other[0]))
    height = max(0.0, min(one[3], other[3]) - max(one[1], other[1]))
    area = (one[2] - one[0]) * (one[3] - one[1]) + (other[2] - other[0]) * (other[3] - other[1])
    return float(width * height / (area - width * height))


@given(candidates, overlap)
def test_no_two_kept_boxes_overlap_more_than_allowed(
    found: list[tuple[tuple[float, ...], float]], limit: float
) -> None:
    places, scores = split(found)
    kept = suppress(places, scores, limit)
    assert all(iou(places[a], places[b]) <= limit + 1e-9 for a in kept for b in kept if a != b)


@given(candidates, overlap)
def test_every_box_left_out_overlaps_a_kept_one_that_is_no_worse(
    found: list[tuple[tuple[float, ...], float]], limit: float
) -> None:
    places, scores = split(found)
    kept = suppress(places, scores, limit)
    assert len(set(kept)) == len(kept)
    for i in set(range(len(found))) - set(kept):
        assert any(scores[k] >= scores[i] and iou(places[k], places[i]) > limit - 1e-9 for k in kept)


@given(candidates, overlap)
def test_kept_boxes_are_ordered_by_score(found: list[tuple[tuple[float, ...], float]], limit: float) -> None:
    places, scores = split(found)
    kept = scores[suppress(places, scores, limit)]
    assert list(kept) == sorted(kept, reverse=True)


@given(candidates, overlap, st.randoms())
def test_the_order_of_the_candidates_does_not_matter(
    found: list[tuple[tuple[float, ...], float]], limit: float, chance: Any
) -> None:
    mixed = list(found)
    chance.shuffle(mixed)
    ours, theirs = split(found), split(mixed)
    chosen = [[tuple(p[i]) for i in suppress(p, s, limit)] for p, s in (ours, theirs)]
    assert chosen[0] == chosen[1]
