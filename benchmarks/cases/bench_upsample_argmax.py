"""upsample_argmax: the prediction, of the sizes of upsample_cross_entropy."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.cases.upsampling import UpsamplingCase, sweep
from benchmarks.harness.devices import CPU, CUDA
from benchmarks.harness.roofline import Work
from benchmarks.harness.suite import FORWARD, Job
from fastseg import functional, reference


@dataclass(frozen=True)
class UpsampleArgmaxCase(UpsamplingCase):
    """The class of each pixel's largest upsampled logit."""

    @property
    def terms(self) -> int:
        """The error of the chosen logit is that of two that are compared; it goes with the square root of the terms."""
        return max(1, (2 * self.roundings) ** 2)

    @property
    def timings(self) -> tuple[str, ...]:
        """It has no gradient."""
        return (FORWARD,)

    def job(self, fused: bool, layout: str, training: bool, dtype: torch.dtype | None = None) -> Job:
        """One call of the operator."""
        operators = functional if fused else reference
        operator = functools.partial(operators.upsample_argmax, size=self.size, mode=self.mode)
        return Job(operator, (self.make_logits(dtype, layout),))

    def judged(self, results: list[Tensor]) -> list[Tensor]:
        """The labels' true logits: of classes that are nearly equal, either is right."""
        labels = results[0].long()
        if labels.amin() < 0 or labels.amax() >= self.shape[1]:  # a GPU's gather would end the whole run
            raise AssertionError(f"labels from {labels.amin()} to {labels.amax()} of {self.shape[1]} classes")
        return [self.map_upsampled(lambda logits, image: logits.gather(0, labels[image : image + 1])).float()]

    def work(self, timing: str) -> tuple[Work, ...]:
        """The logits before upsampling, and the labels."""
        labels = reference.label_dtype(self.shape[1]).itemsize * math.prod(self.labels)
        return (Work(self.device.dtype.itemsize * math.prod(self.shape) + labels),)


CASES = [
    UpsampleArgmaxCase((2, 150, 64, 64), (256, 256)),
    UpsampleArgmaxCase((4, 21, 64, 64), (256, 256), quick=True),
    UpsampleArgmaxCase((4, 21, 64, 64), (256, 256), mode="nearest"),
    UpsampleArgmaxCase((2, 21, 65, 65), (513, 513)),
    UpsampleArgmaxCase((1, 14, 64, 64, 64), (128, 128, 128), mode="trilinear"),
    UpsampleArgmaxCase((16, 150, 128, 128), (512, 512), device=CUDA),
    UpsampleArgmaxCase((16, 19, 128, 256), (512, 1024), device=CUDA),
    UpsampleArgmaxCase((1, 14, 96, 96, 96), (192, 192, 192), mode="trilinear", device=CUDA),
    UpsampleArgmaxCase((2, 21, 32, 32), (128, 128), device=CUDA, quick=True, launch_bound=True),
    *sweep(UpsampleArgmaxCase, CPU),
    *sweep(UpsampleArgmaxCase, CUDA),
]


def test_upsample_argmax(record: Callable[[], None]) -> None:
    record()
