"""upsample_confusion_matrix: the evaluation, beside plain PyTorch's interpolate, argmax and bincount."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.cases.upsampling import UpsamplingCase
from benchmarks.harness.devices import CUDA
from benchmarks.harness.roofline import Work
from benchmarks.harness.suite import FORWARD, Job
from fastseg import functional, reference

IGNORED = 255  # as data sets mark the borders of objects


@dataclass(frozen=True)
class UpsampleConfusionMatrixCase(UpsamplingCase):
    """The counts of each pair of a true and a predicted class."""

    @property
    def terms(self) -> int:
        """Counts are exact."""
        return 1

    @property
    def timings(self) -> tuple[str, ...]:
        """It has no gradient."""
        return (FORWARD,)

    def job(self, fused: bool, layout: str, training: bool, dtype: torch.dtype | None = None) -> Job:
        """One call of the operator."""
        operators = functional if fused else reference
        operator = functools.partial(operators.upsample_confusion_matrix, ignore_index=IGNORED, mode=self.mode)
        return Job(operator, (self.make_logits(dtype, layout), self.target))

    def judged(self, results: list[Tensor]) -> list[Tensor]:
        """The counts as floating-point numbers, which are held to the truth."""
        return [results[0].double()]

    @functools.cached_property
    def target(self) -> Tensor:
        """Labels: random, and ignored for the few pixels whose class rounding decides.

        There, the two largest logits differ by less than their errors: interpolation's, and, where the upsampled logits
        are rounded to a half dtype, as plain PyTorch does, half an epsilon of each.
        """
        interpolating = self.roundings * torch.finfo(torch.float32).eps
        rounding = torch.finfo(self.device.dtype).eps / 2 if self.mode == "bilinear" else 0

        def decided(logits: Tensor, image: int) -> Tensor:
            first, second = logits.topk(2, 0).values
            return first - second > 2 * interpolating * logits.abs().amax() + rounding * (first.abs() + second.abs())

        labels = self.device.make_labels(self.labels, self.shape[1], seed=1)
        return labels.where(self.map_upsampled(decided), IGNORED)

    def work(self, timing: str) -> tuple[Work, ...]:
        """The logits before upsampling, the labels, and the matrix."""
        logits = self.device.dtype.itemsize * math.prod(self.shape)
        return (Work(logits + torch.int64.itemsize * (math.prod(self.labels) + self.shape[1] ** 2)),)


CASES = [
    UpsampleConfusionMatrixCase((2, 150, 64, 64), (256, 256)),
    UpsampleConfusionMatrixCase((4, 21, 64, 64), (256, 256), quick=True),
    UpsampleConfusionMatrixCase((16, 150, 128, 128), (512, 512), device=CUDA),
    UpsampleConfusionMatrixCase((2, 21, 32, 32), (128, 128), device=CUDA, quick=True, launch_bound=True),
]


def test_upsample_confusion_matrix(record: Callable[[], None]) -> None:
    record()
