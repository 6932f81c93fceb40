"""The network architectures of the shipped experts, by name.

Every trained tensor has at least 16 numbers: a box lifts tensors of 64 bytes and more out of the graph, so that
experts of one architecture share a template; a smaller one would stay inside and make each expert its own template.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from appliance.errors import ExportError

STRIDE = 4
"""Pixels of the picture per place of the detector's map."""
_TYPICAL_BOX = 32.0
_LARGEST_LOG = 2.0
_MAP = 32
_STEEPNESS = 20.0


def build(architecture: str) -> nn.Module:
    """An untrained network: a name of the registry, or `module:Class` for one of your own."""
    if architecture in REGISTRY:
        return REGISTRY[architecture]()
    module, _, name = architecture.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)()
    except (ImportError, AttributeError, ValueError) as error:
        raise ExportError(
            f"no architecture {architecture!r}: {error}", f"name one of {', '.join(REGISTRY)} or give module:Class"
        ) from error
    if not isinstance(found, nn.Module):
        raise ExportError(f"{architecture} is not a torch.nn.Module")
    return found


class CellClassifier(nn.Module):
    """Preliminary expert: sound, or which of six defects has its centre in the middle of the picture.

    Inputs `image` and `reference` (N, 1, 64, 64), output `logits` (N, 7). Each class collects evidence over the
    8 x 8 places of the last map by log-sum-exp; `place` learns where a centre counts as inside the cell.
    """

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _block(2, 16, stride=2),
            _block(16, 32),
            _block(32, 32, stride=2),
            _block(32, 64),
            _block(64, 64, stride=2),
            _block(64, 96),
        )
        self.kinds = nn.Conv2d(96, 7, kernel_size=1, bias=False)
        self.place = nn.Parameter(torch.zeros(1, 7, 8, 8))

    def forward(self, image: Tensor, reference: Tensor) -> Tensor:
        evidence = self.kinds(self.body(torch.cat([image, reference], dim=1))) + self.place
        return torch.logsumexp(evidence.flatten(2), dim=2)


class DefectDetector(nn.Module):
    """Subsequent expert: a centre-point detector of six defects, decoded inside the graph.

    Inputs `image` and `reference` (N, 1, 128, 128). Outputs `boxes` (N, 1024, 4) in input pixels and `scores`
    (N, 1024, 6), zero where a neighbour's is higher by 0.05. What still overlaps is for the caller to suppress.
    """

    grid: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(_block(2, 16, stride=2), _block(16, 24))
        self.middle = nn.Sequential(_block(24, 48, stride=2), _block(48, 48))
        self.deep = nn.Sequential(_block(48, 64, stride=2), _block(64, 64, dilation=2), _block(64, 48))
        self.join = _block(96, 48)
        self.heat = nn.Conv2d(48, 6, kernel_size=3, padding=1)
        self.shape = nn.Conv2d(48, 4, kernel_size=3, padding=1)
        nn.init.constant_(_present(self.heat.bias), -4.0)
        across = torch.arange(_MAP, dtype=torch.float32)
        y, x = torch.meshgrid(across, across, indexing="ij")
        self.register_buffer("grid", torch.stack([x, y])[None], persistent=False)

    def forward(self, image: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
        heat, shape = self.maps(image, reference)
        scores = torch.sigmoid(heat)
        best = scores.amax(dim=1, keepdim=True)
        highest = functional.max_pool2d(best, kernel_size=3, stride=1, padding=1)
        # Falling off, not cut off: between two almost equal neighbours a rounding error would decide, and runtimes
        # would disagree by the whole score.
        peaks = scores * torch.clamp(1 + _STEEPNESS * (scores - highest), 0, 1)
        return decoded(shape, self.grid).flatten(2).transpose(1, 2), peaks.flatten(2).transpose(1, 2)

    def maps(self, image: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
        """Score map before sigmoid (N, 6, 32, 32) and shape map (N, 4, 32, 32)."""
        middle = self.middle(self.stem(torch.cat([image, reference], dim=1)))
        wide = functional.interpolate(self.deep(middle), scale_factor=2.0, mode="nearest")
        joined = self.join(torch.cat([middle, wide], dim=1))
        return self.heat(joined), self.shape(joined)


class FigureClassifier(nn.Module):
    """A good/bad expert for colour pictures: input `image` (N, 3, 96, 128), output `logits` (N, 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _block(3, 16, stride=2),
            _block(16, 24, stride=2),
            _block(24, 32, stride=2),
            _block(32, 48, stride=2),
            _block(48, 48),
        )
        self.verdict = nn.Linear(48 * 6 * 8, 2, bias=False)

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.verdict(self.body(image).flatten(1))
        return logits


def decoded(shape: Tensor, grid: Tensor) -> Tensor:
    """Boxes x1 y1 x2 y2 in input pixels (N, 4, rows, columns) from offsets within a place and log sizes."""
    centre = (grid + torch.sigmoid(shape[:, :2])) * STRIDE
    half = torch.exp(torch.clamp(shape[:, 2:], -_LARGEST_LOG, _LARGEST_LOG)) * (_TYPICAL_BOX / 2)
    return torch.cat([centre - half, centre + half], dim=1)


REGISTRY: Mapping[str, Callable[[], nn.Module]] = {
    "cell-classifier": CellClassifier,
    "defect-detector": DefectDetector,
    "figure-classifier": FigureClassifier,
}


def _block(into: int, out: int, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(into, out, 3, stride=stride, padding=dilation, dilation=dilation, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(out), nn.ReLU(inplace=True))


def _present(bias: Tensor | None) -> Tensor:
    assert bias is not None
    return bias
