"""The training loops: shared classifier, a gentle fine-tune per component type, the defect detector, the figure expert.

Everything is seeded; on one machine the same call gives the same weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.nn import functional

from appliance.samples import DEFECTS
from export.figure import Colour
from export.nets import STRIDE, CellClassifier, DefectDetector, FigureClassifier, decoded
from export.samples import Pairs, Scene, pairs, placed_scenes, wild_scenes
from export.tiles import PICTURE, Cell, Tile

Say = Callable[[str], None]

_MAP = PICTURE // STRIDE


@dataclass(frozen=True, slots=True)
class Course:
    """How long something is taught, and how fast."""

    epochs: int
    samples: int
    batch: int
    rate: float


CLASSIFIER = Course(epochs=28, samples=9000, batch=64, rate=3e-3)
DETECTOR = Course(epochs=36, samples=2400, batch=16, rate=2e-3)
FINE_TUNE = Course(epochs=1, samples=1280, batch=32, rate=1e-4)
FIGURE = Course(epochs=50, samples=384, batch=24, rate=2e-3)


def teach_classifier(tiles: Sequence[Tile], seed: int, say: Say, course: Course = CLASSIFIER) -> CellClassifier:
    """The expert that all types start from, taught on every board."""
    torch.manual_seed(seed)
    net = CellClassifier()
    generator = np.random.default_rng(seed)
    teacher = _Teacher(net, course)
    for epoch in range(course.epochs):
        lesson = pairs(list(wild_scenes(tiles, course.samples, generator)))
        loss = teacher.epoch(len(lesson.labels), partial(_classification_loss, net, lesson), generator)
        say(f"classifier epoch {epoch + 1}/{course.epochs} loss {loss:.4f}")
    return net.eval()


def fine_tune(
    shared: CellClassifier,
    places: Sequence[tuple[Tile, Cell]],
    common: Pairs,
    seed: int,
    course: Course = FINE_TUNE,
) -> CellClassifier:
    """The expert of one component type: 40 small steps, half on its own placements, half on what all must know.

    Batch norm keeps the shared statistics: a type has too few pictures to replace them.
    """
    torch.manual_seed(seed)
    generator = np.random.default_rng(seed)
    net = copy.deepcopy(shared).eval()
    # A rare type may occur on held-out tiles only.
    own = pairs(placed_scenes(places, generator) + placed_scenes(places, generator, golden=True)) if places else common
    optimiser = torch.optim.AdamW(net.parameters(), lr=course.rate, weight_decay=0.0)
    for _ in range(course.samples // course.batch):
        half = course.batch // 2
        mine = _classification_loss(net, own, generator.integers(len(own.labels), size=half))
        general = _classification_loss(net, common, generator.integers(len(common.labels), size=half))
        _step(optimiser, (mine + general) / 2)
    return net


def common_lesson(tiles: Sequence[Tile], seed: int) -> Pairs:
    """What every fine-tune is reminded of."""
    return pairs(list(wild_scenes(tiles, 4000, np.random.default_rng(seed))))


def teach_detector(tiles: Sequence[Tile], seed: int, say: Say, course: Course = DETECTOR) -> DefectDetector:
    """The one detector that serves all types, taught on every board."""
    torch.manual_seed(seed)
    net = DefectDetector()
    generator = np.random.default_rng(seed)
    teacher = _Teacher(net, course)
    for epoch in range(course.epochs):
        scenes = list(wild_scenes(tiles, course.samples, generator))
        loss = teacher.epoch(len(scenes), _detection_lesson(net, scenes), generator)
        say(f"detector epoch {epoch + 1}/{course.epochs} loss {loss:.4f}")
    return net.eval()


def teach_figure(
    pictures: NDArray[np.uint8], labels: NDArray[np.int64], seed: int, say: Say, course: Course = FIGURE
) -> FigureClassifier:
    """A good/bad expert from a handful of colour pictures (n, 96, 128, 3); labels 0 sound, 1 anomaly."""
    torch.manual_seed(seed)
    net = FigureClassifier()
    generator = np.random.default_rng(seed)
    teacher = _Teacher(net, course)

    def loss_of(rows: NDArray[np.int64]) -> Tensor:
        chosen = [_varied(pictures[row], int(labels[row]), generator) for row in rows % len(labels)]
        truth = torch.tensor([label for _, label in chosen])
        loss: Tensor = functional.cross_entropy(net(colour_input(np.stack([one for one, _ in chosen]))), truth)
        return loss

    for epoch in range(course.epochs):
        loss = teacher.epoch(course.samples, loss_of, generator)
        if (epoch + 1) % 10 == 0:
            say(f"figure epoch {epoch + 1}/{course.epochs} loss {loss:.4f}")
    return net.eval()


def grey_input(pictures: NDArray[np.uint8]) -> Tensor:
    """(n, h, w) 0..255 to (n, 1, h, w) -1..1, as the manifests state it: scale 1/255, mean 0.5, deviation 0.5."""
    return (torch.from_numpy(pictures)[:, None].float() / 255 - 0.5) / 0.5


def colour_input(pictures: NDArray[np.uint8]) -> Tensor:
    """(n, h, w, 3) 0..255 to (n, 3, h, w) -1..1."""
    return (torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5


class _Teacher:
    """Adam with one warm-up and cosine decay over the whole course."""

    def __init__(self, net: nn.Module, course: Course) -> None:
        self._net, self._course = net, course
        self._optimiser = torch.optim.AdamW(net.parameters(), lr=course.rate, weight_decay=1e-3)
        steps = course.epochs * -(-course.samples // course.batch)
        self._schedule = torch.optim.lr_scheduler.OneCycleLR(
            self._optimiser, max_lr=course.rate, total_steps=steps + course.epochs, pct_start=0.15
        )

    def epoch(
        self, samples: int, loss_of: Callable[[NDArray[np.int64]], Tensor], generator: np.random.Generator
    ) -> float:
        """Every sample once, in random order; the mean loss."""
        self._net.train()
        losses = []
        order = generator.permutation(samples)
        for start in range(0, samples - self._course.batch + 1, self._course.batch):
            loss = loss_of(order[start : start + self._course.batch])
            _step(self._optimiser, loss)
            self._schedule.step()
            losses.append(loss.item())
        return float(np.mean(losses))


def _step(optimiser: torch.optim.Optimizer, loss: Tensor) -> None:
    optimiser.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]  # torch 2.13 leaves backward unannotated
    optimiser.step()


def _classification_loss(net: CellClassifier, lesson: Pairs, rows: NDArray[np.int64]) -> Tensor:
    logits = net(grey_input(lesson.pictures[rows]), grey_input(lesson.references[rows]))
    return functional.cross_entropy(logits, torch.from_numpy(lesson.labels[rows]))


def _detection_lesson(net: DefectDetector, scenes: Sequence[Scene]) -> Callable[[NDArray[np.int64]], Tensor]:
    def loss_of(rows: NDArray[np.int64]) -> Tensor:
        chosen = [scenes[row] for row in rows]
        heat, shape = net.maps(
            grey_input(np.stack([scene.picture for scene in chosen])),
            grey_input(np.stack([scene.reference for scene in chosen])),
        )
        return _heat_loss(heat, _heat_targets(chosen)) + 2 * _box_loss(net, shape, chosen)

    return loss_of


def _heat_targets(scenes: Sequence[Scene]) -> Tensor:
    """A peak of 1 at each centre's place, falling off with the size of the box."""
    targets = np.zeros((len(scenes), len(DEFECTS), _MAP, _MAP), dtype=np.float32)
    across = np.arange(_MAP)
    for target, scene in zip(targets, scenes, strict=True):
        for defect in scene.defects:
            x, y = (int(place / STRIDE) for place in defect.centre)
            spread = max(np.sqrt(defect.area) / STRIDE / 6, 0.7)
            bump = np.exp(-((across[None] - x) ** 2 + (across[:, None] - y) ** 2) / (2 * spread**2))
            layer = target[DEFECTS.index(defect.kind)]
            np.maximum(layer, bump, out=layer)
    return torch.from_numpy(targets)


def _heat_loss(heat: Tensor, targets: Tensor) -> Tensor:
    """The penalty-reduced focal loss of CenterNet (arXiv 1904.07850)."""
    sure = functional.logsigmoid(heat)
    sure_not = functional.logsigmoid(-heat)
    likely = torch.sigmoid(heat)
    peaks = targets.eq(1.0)
    hit = torch.where(peaks, sure * (1 - likely) ** 2, 0.0).sum()
    miss = torch.where(peaks, 0.0, sure_not * likely**2 * (1 - targets) ** 4).sum()
    return -(hit + miss) / max(int(peaks.sum()), 1)


def _box_loss(net: DefectDetector, shape: Tensor, scenes: Sequence[Scene]) -> Tensor:
    """1 - generalised IoU at the centres: what the localisation measure looks at."""
    found, truth = [], []
    boxes = decoded(shape, net.grid)
    for number, scene in enumerate(scenes):
        for defect in scene.defects:
            x, y = (int(place / STRIDE) for place in defect.centre)
            found.append(boxes[number, :, y, x])
            truth.append(defect.box)
    if not truth:
        return shape.sum() * 0
    return _distance(torch.stack(found), torch.tensor(truth, dtype=torch.float32)).mean()


def _distance(found: Tensor, truth: Tensor) -> Tensor:
    """1 - GIoU of boxes (n, 4), pair by pair."""
    inner = torch.minimum(found[:, 2:], truth[:, 2:]) - torch.maximum(found[:, :2], truth[:, :2])
    outer = torch.maximum(found[:, 2:], truth[:, 2:]) - torch.minimum(found[:, :2], truth[:, :2])
    shared = inner.clamp(min=0).prod(dim=1)
    union = (found[:, 2:] - found[:, :2]).prod(dim=1) + (truth[:, 2:] - truth[:, :2]).prod(dim=1) - shared
    hull = outer.prod(dim=1)
    return 1 - shared / union + (hull - union) / hull


def _varied(picture: Colour, label: int, generator: np.random.Generator) -> tuple[Colour, int]:
    """The picture moved and lit otherwise; a third of the sound ones with a made-up defect: 12 real ones are few."""
    varied = _moved(picture, generator)
    if label == 0 and generator.random() < 1 / 3:
        varied, label = _damaged(varied, generator), 1
    light = varied * generator.uniform(0.88, 1.12) + generator.uniform(-10, 10, size=3)
    disturbed: Colour = np.clip(light, 0, 255).astype(np.uint8)
    return disturbed, label


def _moved(picture: Colour, generator: np.random.Generator) -> Colour:
    """Turned by up to 4 degrees and moved by up to 6 pixels, on the light ground that the figure lies on."""
    image = Image.fromarray(picture)
    down, right = (int(place) for place in generator.integers(-6, 6, size=2, endpoint=True))
    angle = float(generator.uniform(-4, 4))
    ground = (252, 252, 248)
    return np.array(image.rotate(angle, Image.Resampling.BILINEAR, translate=(right, down), fillcolor=ground))


def _damaged(picture: Colour, generator: np.random.Generator) -> Colour:
    """A part of the figure broken off, or pen strokes across it."""
    image = Image.fromarray(picture)
    draw = ImageDraw.Draw(image)
    rows, columns = np.nonzero(picture.min(axis=2) < 160)
    chosen = int(generator.integers(len(rows)))
    x, y = float(columns[chosen]), float(rows[chosen])
    if generator.integers(2):
        across, down = generator.uniform(6, 20, size=2)
        draw.ellipse((x - across, y - down, x + across, y + down), fill=(252, 252, 248))
    else:
        ink = tuple(int(level) for level in generator.integers(0, 90, size=3))
        for _ in range(int(generator.integers(1, 4))):
            ends = [(x + float(dx), y + float(dy)) for dx, dy in generator.uniform(-12, 12, size=(2, 2))]
            draw.line(ends, fill=(ink[0], ink[1], ink[2]), width=int(generator.integers(1, 4)))
    return np.array(image)
