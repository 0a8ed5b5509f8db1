"""Whole networks: "forward" is a prediction, "forward+backward" a training step without the optimizer's part."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.suite import Case, Job
from fastseg import models
from fastseg.testing import MEMORY_FORMATS, make, make_labels

NUM_CLASSES = 21

# Relative changes of the images, in float32's last places, under which a result must be expected to change.
PERTURBATION = 16


@dataclass(frozen=True)
class ModelCase(Case):
    """A network of `fastseg.models` on images of a shape."""

    network: str
    images: tuple[int, int, int, int]

    @property
    def name(self) -> str:
        """The network and the images' sizes."""
        return f"{self.network}-{'x'.join(map(str, self.images))}"

    @property
    def terms(self) -> int:
        """Loss and gradients are sums over all pixels."""
        return torch.Size((self.images[0], *self.images[2:])).numel()

    def job(self, fused: bool, layout: str, training: bool, dtype: torch.dtype = torch.float32) -> Job:
        """The loss with its gradients, or the prediction."""
        network = self.build(fused).to(dtype=dtype, memory_format=MEMORY_FORMATS[layout])  # type: ignore[call-overload]
        images = make(self.images, dtype, layout=layout)
        if not training:
            return Job(network.predict, (images,))
        labels = make_labels((self.images[0], *self.images[2:]), NUM_CLASSES, seed=1)
        return Job(network.loss, (images, labels), tuple(network.parameters()))

    def build(self, fused: bool) -> models.SegmentationModel:
        """The network, with the same weights every time."""
        torch.manual_seed(0)
        return getattr(models if fused else models.plain, self.network)(self.images[1], num_classes=NUM_CLASSES)

    def plain(self, training: bool) -> list[Tensor]:
        """For gradients, the true ones for images that differ in the last places.

        The gradient of a network jumps where two values of a pooling window are nearly equal, or one is nearly zero.
        Some of its millions of windows always are, so what float32 may do is what the truth does near by.
        """
        if not training:
            return super().plain(training)
        job = self.job(False, "nchw", training, torch.float64)
        images, labels = job.arguments
        noise = PERTURBATION * torch.finfo(torch.float32).eps * make(images.shape, torch.float64, seed=2)
        return [result.float() for result in job._replace(arguments=(images * (1 + noise), labels)).results()]

    def judged(self, results: list[Tensor]) -> list[Tensor]:
        """For labels, their true logits: of classes that are nearly equal, either is right."""
        if results[0].is_floating_point():
            return results
        return [self.logits.gather(1, results[0].long().unsqueeze(1)).float()]

    @functools.cached_property
    def logits(self) -> Tensor:
        """The true logits."""
        with torch.no_grad():
            return self.build(False).double()(make(self.images, torch.float64))


CASES = [
    ModelCase("FCN", (4, 3, 224, 224)),
    ModelCase("UNet", (4, 3, 192, 256)),
]


def test_models(record: Callable[[], None]) -> None:
    record()
