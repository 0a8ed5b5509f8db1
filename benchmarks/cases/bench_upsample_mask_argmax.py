"""upsample_mask_argmax: the semantic inference of MaskFormer and its successors, which classify masks."""

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


@dataclass(frozen=True)
class UpsampleMaskArgmaxCase(UpsamplingCase):
    """The class that the upsampled masks of a shape (N, Q, h, w) add up to most of."""

    classes: int = 20

    @property
    def name(self) -> str:
        """The sizes, and the number of classes."""
        return f"{super().name},{self.classes}"

    @property
    def terms(self) -> int:
        """The error of the chosen sum is that of two that are compared, each of as many masks as there are queries."""
        return max(1, (2 * self.roundings) ** 2) + self.shape[1]

    @property
    def timings(self) -> tuple[str, ...]:
        """It has no gradient."""
        return (FORWARD,)

    def make_probabilities(self, dtype: torch.dtype | None = None) -> Tensor:
        """Softmax over the classes and one more, "no object", which is left out."""
        logits = self.device.make((*self.shape[:2], self.classes + 1), torch.float64, seed=1)
        probabilities = logits.softmax(2)[..., :-1].to(self.device.dtype)
        return probabilities.to(dtype or self.device.dtype).contiguous()

    def job(self, fused: bool, layout: str, training: bool, dtype: torch.dtype | None = None) -> Job:
        """One call of the operator."""
        operators = functional if fused else reference
        operator = functools.partial(operators.upsample_mask_argmax, size=self.size, mode=self.mode)
        return Job(operator, (self.make_logits(dtype, layout), self.make_probabilities(dtype)))

    def judged(self, results: list[Tensor]) -> list[Tensor]:
        """The labels' true sums: of classes that are nearly equal, either is right."""
        labels, probabilities = results[0].long(), self.make_probabilities(torch.float64)
        if labels.amin() < 0 or labels.amax() >= self.classes:  # a GPU's gather would end the whole run
            raise AssertionError(f"labels from {labels.amin()} to {labels.amax()} of {self.classes} classes")

        def chosen(logits: Tensor, image: int) -> Tensor:
            sums = torch.einsum("qc,qhw->chw", probabilities[image], logits.sigmoid())
            return sums.gather(0, labels[image : image + 1])

        return [self.map_upsampled(chosen).float()]

    def work(self, timing: str) -> tuple[Work, ...]:
        """The logits before upsampling, and the labels; a product for each pixel, query and class."""
        bytes_ = self.device.dtype.itemsize * math.prod(self.shape) + math.prod(self.labels)
        return (Work(bytes_, 2 * self.classes * self.shape[1] * math.prod(self.labels)),)


CASES = [
    UpsampleMaskArgmaxCase((2, 100, 64, 64), (256, 256)),
    UpsampleMaskArgmaxCase((1, 100, 64, 64), (256, 256), classes=150),
    UpsampleMaskArgmaxCase((2, 20, 32, 32), (128, 128), quick=True),
    UpsampleMaskArgmaxCase((16, 100, 128, 128), (512, 512), classes=150, device=CUDA),
    UpsampleMaskArgmaxCase((2, 20, 32, 32), (128, 128), device=CUDA, quick=True, launch_bound=True),
]


def test_upsample_mask_argmax(record: Callable[[], None]) -> None:
    record()
