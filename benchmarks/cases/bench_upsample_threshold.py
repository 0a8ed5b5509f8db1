"""upsample_threshold: the masks of binary and multilabel networks, alone and with scores and boxes."""

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
class UpsampleThresholdCase(UpsamplingCase):
    """Where the sigmoid of the upsampled logits is above a half, ``scores`` with each mask's score and box."""

    scores: bool = False

    @property
    def name(self) -> str:
        """The sizes, and whether scores and boxes are asked for."""
        return f"{super().name}{',scores' if self.scores else ''}"

    @property
    def terms(self) -> int:
        """The error of a logit at the threshold goes with the square root of the terms; a mask's pixels are summed."""
        return max(math.prod(self.size), self.roundings**2)

    @property
    def timings(self) -> tuple[str, ...]:
        """It has no gradient."""
        return (FORWARD,)

    def job(self, fused: bool, layout: str, training: bool, dtype: torch.dtype | None = None) -> Job:
        """One call of the operator."""
        operators = functional if fused else reference
        operator = functools.partial(
            operators.upsample_threshold, size=self.size, mode=self.mode, return_scores=self.scores
        )
        return Job(operator, (self.make_logits(dtype, layout),))

    def judged(self, results: list[Tensor]) -> list[Tensor]:
        """The true logits where the masks contradict them, though it isn't rounding that decides; the scores."""
        masks = results[0]

        def contradicted(logits: Tensor, image: int) -> Tensor:
            rounding = self.roundings * torch.finfo(torch.float32).eps * logits.abs().amax()
            half = torch.finfo(self.device.dtype).eps if self.mode == "bilinear" else 0
            decided = logits.abs() > rounding + half * logits.abs()
            return (logits * (decided & ((logits > 0) != masks[image].bool()))).float()

        return [self.map_upsampled(contradicted), *results[1:2]]

    def work(self, timing: str) -> tuple[Work, ...]:
        """The logits before upsampling, and the masks."""
        masks = math.prod((*self.shape[:2], *self.size))
        return (Work(self.device.dtype.itemsize * math.prod(self.shape) + masks),)


CASES = [
    UpsampleThresholdCase((4, 1, 64, 64), (256, 256), quick=True),
    UpsampleThresholdCase((4, 20, 64, 64), (256, 256)),
    UpsampleThresholdCase((4, 20, 64, 64), (256, 256), scores=True),
    UpsampleThresholdCase((1, 100, 128, 128), (512, 512), scores=True),
    UpsampleThresholdCase((16, 20, 128, 128), (512, 512), device=CUDA),
    UpsampleThresholdCase((1, 100, 256, 256), (1024, 1024), scores=True, device=CUDA),
    UpsampleThresholdCase((2, 2, 32, 32), (128, 128), device=CUDA, quick=True, launch_bound=True),
]


def test_upsample_threshold(record: Callable[[], None]) -> None:
    record()
