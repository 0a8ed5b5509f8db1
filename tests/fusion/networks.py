"""A network for the fusion pass' tests, and what training it gives."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastseg.testing import assert_parity, make, make_labels
from tests.fusion.cases import CLASSES, PIXELS

# What is put into `Net` with its loss.
_LOSSES = ["upsample_cross_entropy", "upsample_cross_entropy"]
TRAINED = ["conv_relu_pool2d", "relu_pool2d", *_LOSSES]
EVALUATED = ["conv_relu_pool2d", "conv_relu_pool2d", *_LOSSES]


class Level(nn.Module):
    """Convolution, batch normalisation and ReLU, as most encoders have them."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.norm(self.conv(x)))


class Net(nn.Module):
    """Two levels, one with batch normalisation and a skip, two heads at a quarter of the size, and the loss of both."""

    def __init__(self) -> None:
        super().__init__()
        self.level = Level(3, 8)
        self.pool = nn.MaxPool2d(2)
        self.features = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2))
        self.skip = nn.Conv2d(8, CLASSES, 1)
        self.head = nn.Conv2d(8, CLASSES, 1)
        self.auxiliary = nn.Sequential(nn.Conv2d(8, CLASSES, 1), nn.Upsample(scale_factor=4))
        self.loss = nn.CrossEntropyLoss(ignore_index=255)

    def logits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        level = self.level(x)
        features = self.features(self.pool(level))
        low = self.head(features) + F.avg_pool2d(self.skip(level), 4)
        return F.interpolate(low, size=x.shape[-2:], mode="bilinear", align_corners=False), self.auxiliary(features)

    def forward(self, x: Tensor, target: Tensor | None = None) -> Tensor:
        logits, auxiliary = self.logits(x)
        if target is None:
            return logits.softmax(1).argmax(1)
        return self.loss(logits, target) + 0.4 * self.loss(auxiliary, target)


def batch(size: tuple[int, int] = (16, 24), seed: int = 0, images: int = 2) -> tuple[Tensor, Tensor]:
    """Images and labels for `Net`."""
    return make((images, 3, *size), seed=seed), make_labels((images, *size), CLASSES, seed=seed, ignore_index=255)


def trained(
    model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]], run: Callable[[nn.Module], Any] = lambda model: model,
    dtype: torch.dtype = torch.float32, rate: float = 0.1,
) -> dict[str, Tensor]:  # fmt: skip
    """The losses of a copy of ``model``, trained for a step on each batch, and its state afterwards."""
    model = copy.deepcopy(model).to(dtype)
    step, optimizer = run(model), torch.optim.SGD(model.parameters(), rate, momentum=0.9)
    losses = []
    for images, labels in batches:
        optimizer.zero_grad()
        loss = step(images.to(dtype), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return {"losses": torch.stack(losses), **model.state_dict()}


def assert_trains_alike(
    model: nn.Module, run: Callable[[nn.Module], Any], batches: Sequence[tuple[Tensor, Tensor]], terms: int = PIXELS
) -> None:
    """Training what ``run`` makes of a model ends as close to float64 as training the model does."""
    actual, plain, truth = (
        trained(model, batches, *how) for how in ((run,), (lambda model: model,), (lambda model: model, torch.float64))
    )
    assert list(actual) == list(plain)
    assert_parity(list(actual.values()), list(plain.values()), list(truth.values()), terms=terms)
