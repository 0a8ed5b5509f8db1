"""Whole networks: "forward" is a prediction, "forward+backward" a training step without the optimizer's part."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.cases.bench_cross_entropy import count_partial_sums
from benchmarks.harness.devices import CUDA
from benchmarks.harness.roofline import Work
from benchmarks.harness.suite import BACKWARD, FORWARD, OPENVINO, Case, Job
from fastseg import models
from fastseg.testing import MEMORY_FORMATS

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
        return math.prod(self.labels)

    @property
    def labels(self) -> tuple[int, ...]:
        """The labels' sizes."""
        return (self.images[0], *self.images[2:])

    @property
    def partial_sums(self) -> int:
        """Those behind the loss."""
        return count_partial_sums(self.labels)

    @property
    def deployments(self) -> tuple[str, ...]:
        """A prediction is an inference."""
        return (OPENVINO,)

    def job(self, fused: bool, layout: str, training: bool, dtype: torch.dtype | None = None) -> Job:
        """The loss with its gradients, or the prediction."""
        network = self.build(fused, dtype).to(memory_format=MEMORY_FORMATS[layout])  # type: ignore[call-overload]
        images = self.device.make(self.images, dtype, layout=layout)
        if not training:
            network.requires_grad_(False)  # OpenVINO takes the weights as constants
            return Job(network.predict, (images,))
        labels = self.device.make_labels(self.labels, NUM_CLASSES, seed=1)
        return Job(network.loss, (images, labels), tuple(network.parameters()))

    def build(self, fused: bool, dtype: torch.dtype | None) -> models.SegmentationModel:
        """The network, with the same weights every time."""
        torch.manual_seed(0)
        network = getattr(models if fused else models.plain, self.network)(self.images[1], num_classes=NUM_CLASSES)
        return network.to(self.device.name, self.device.dtype).to(dtype or self.device.dtype)

    def work(self, timing: str) -> tuple[Work, ...]:
        """Images, labels and parameters, and the operations of the convolutions; in training the gradients too."""
        with torch.device("meta"):
            images, labels = torch.empty(self.images), torch.empty(self.labels, dtype=torch.int64)
            network: models.SegmentationModel = getattr(models.plain, self.network)(
                self.images[1], num_classes=NUM_CLASSES
            )
        itemsize = self.device.dtype.itemsize
        parameters = itemsize * sum(parameter.numel() for parameter in network.parameters())
        read = itemsize * images.numel() + parameters
        with FlopCounterMode(display=False) as counter:
            if timing == FORWARD:
                mask = network.predict(images)
                return (Work(read + mask.nbytes, counter.get_total_flops()),)
            loss = network.loss(images, labels)
            forward = Work(read + labels.nbytes, counter.get_total_flops())
            loss.backward()
            backward = Work(read + labels.nbytes + parameters, counter.get_total_flops() - forward.operations)
        return (backward,) if timing == BACKWARD else (forward, backward)

    def plain(self, training: bool) -> list[Tensor]:
        """For gradients in float32, the true ones for images that differ in the last places.

        The gradient of a network jumps where two values of a pooling window are nearly equal, or one is nearly zero.
        Some of its millions of windows always are, so what float32 may do is what the truth does near by. In a half
        dtype, rounding decides a few windows of every hundred: so many that their sum is no chance any more, and plain
        PyTorch's own error is the measure.
        """
        if not training or self.device.dtype != torch.float32:
            return super().plain(training)
        job = self.job(False, "nchw", training, torch.float64)
        images, labels = job.arguments
        noise = PERTURBATION * torch.finfo(torch.float32).eps * self.device.make(images.shape, torch.float64, seed=2)
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
            return self.build(False, torch.float64)(self.device.make(self.images, torch.float64))


CASES = [
    ModelCase("FCN", (4, 3, 224, 224)),
    ModelCase("UNet", (4, 3, 192, 256)),
    ModelCase("FCN", (16, 3, 512, 512), device=CUDA),
    ModelCase("UNet", (16, 3, 512, 512), device=CUDA),
]


def test_models(record: Callable[[], None]) -> None:
    record()
