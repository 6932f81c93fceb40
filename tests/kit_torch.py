"""PyTorch networks for the tests of the export: a stranger's, and some that misbehave on purpose. Imports torch."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from export.nets import FigureClassifier

KILL_ONCE = "EXPORT_TEST_KILL_ONCE"
"""Environment variable naming a file: while it exists, building a `Killer` removes it and kills the export."""


class ResNet20(nn.Module):
    """The CIFAR network of He et al. as github.com/akamaster/pytorch_resnet_cifar10 trained it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(_Block(16, 16), _Block(16, 16), _Block(16, 16))
        self.layer2 = nn.Sequential(_Block(16, 32), _Block(32, 32), _Block(32, 32))
        self.layer3 = nn.Sequential(_Block(32, 64), _Block(64, 64), _Block(64, 64))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        features = self.layer3(self.layer2(self.layer1(functional.relu(self.bn1(self.conv1(x))))))
        logits: Tensor = self.linear(features.mean(dim=(2, 3)))
        return logits


class _Block(nn.Module):
    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        self._pad = (out - into) // 2
        self.conv1 = nn.Conv2d(into, out, 3, stride=out // into, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        if self._pad:
            x = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self._pad, self._pad))
        return functional.relu(inner + x)


class Fickle(FigureClassifier):
    """Answers differently in PyTorch than what was exported."""

    def forward(self, image: Tensor) -> Tensor:
        shift = 0.0 if torch.compiler.is_exporting() else 0.5
        return super().forward(image) + shift


class Turncoat(FigureClassifier):
    """Almost the same numbers, but on the other side of the threshold."""

    def forward(self, image: Tensor) -> Tensor:
        shift = -1e-4 if torch.compiler.is_exporting() else 1e-4
        return super().forward(image)[:, :1] * torch.tensor([0.0, 0.0]) + torch.tensor([0.0, shift])


class PairsOnly(FigureClassifier):
    """Works for two pictures only."""

    def forward(self, image: Tensor) -> Tensor:
        return super().forward(image).reshape(2, 2)


class Dying(FigureClassifier):
    """Takes its process with it, as a bug in a native library would."""

    def __init__(self) -> None:
        os._exit(3)


class Killer(FigureClassifier):
    """Kills the export command once, as the power cord would."""

    def __init__(self) -> None:
        super().__init__()
        trigger = Path(os.environ[KILL_ONCE])
        if trigger.exists():
            trigger.unlink()
            os.kill(os.getppid(), signal.SIGKILL)
            signal.pause()
