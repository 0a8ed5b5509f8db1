"""upsample_cross_entropy: losses of ADE20K's, VOC's and Cityscapes' classes, of logits upsampled bilinearly by 4.

Beside them: mode "nearest", a ratio that isn't whole, and upsample_cross_entropy_dice.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.cases.bench_cross_entropy import count_partial_sums
from benchmarks.cases.upsampling import UpsamplingCase, sweep
from benchmarks.harness.devices import CPU, CUDA
from benchmarks.harness.roofline import Work
from benchmarks.harness.suite import BACKWARD, BOTH, FORWARD, TIMINGS, Job
from fastseg import functional, reference


@dataclass(frozen=True)
class UpsampleCrossEntropyCase(UpsamplingCase):
    """The mean cross-entropy of upsampled logits; with soft Dice where asked."""

    dice: bool = False

    @property
    def name(self) -> str:
        """The sizes, the mode, and Dice."""
        return super().name + (",dice" if self.dice else "")

    @property
    def terms(self) -> int:
        """The loss is a sum over all pixels."""
        return math.prod(self.labels)

    @property
    def partial_sums(self) -> int:
        """See `count_partial_sums`."""
        return count_partial_sums(self.labels)

    @property
    def timings(self) -> tuple[str, ...]:
        """Of a sweep, both passes."""
        return TIMINGS if self.swept is None else (BOTH,)

    def job(self, fused: bool, layout: str, training: bool, dtype: torch.dtype | None = None) -> Job:
        """One call of the operator."""
        logits = self.make_logits(dtype, layout, requires_grad=training)
        labels = self.device.make_labels(self.labels, self.shape[1], seed=1)
        operators = functional if fused else reference
        operator = operators.upsample_cross_entropy_dice if self.dice else operators.upsample_cross_entropy
        return Job(functools.partial(operator, mode=self.mode), (logits, labels), (logits,) if training else ())

    def work(self, timing: str) -> tuple[Work, ...]:
        """Forward: logits and labels. Backward: the same, and the gradient; the logits are those before upsampling."""
        logits = self.device.dtype.itemsize * math.prod(self.shape)
        labels = torch.int64.itemsize * math.prod(self.labels)
        forward, backward = Work(logits + labels), Work(2 * logits + labels)
        return {FORWARD: (forward,), BACKWARD: (backward,)}.get(timing, (forward, backward))


CASES = [
    UpsampleCrossEntropyCase((2, 150, 64, 64), (256, 256)),
    UpsampleCrossEntropyCase((4, 21, 64, 64), (256, 256), quick=True),
    UpsampleCrossEntropyCase((4, 21, 64, 64), (256, 256), mode="nearest"),
    UpsampleCrossEntropyCase((2, 21, 65, 65), (513, 513)),
    UpsampleCrossEntropyCase((4, 21, 64, 64), (256, 256), dice=True),
    UpsampleCrossEntropyCase((1, 14, 32, 32, 32), (64, 64, 64), mode="trilinear"),
    UpsampleCrossEntropyCase((16, 150, 128, 128), (512, 512), device=CUDA, max_autotune=("nchw",)),
    UpsampleCrossEntropyCase((16, 19, 128, 256), (512, 1024), device=CUDA),
    UpsampleCrossEntropyCase((2, 21, 32, 32), (128, 128), device=CUDA, quick=True, launch_bound=True),
    *sweep(UpsampleCrossEntropyCase, CPU),
    *sweep(UpsampleCrossEntropyCase, CUDA),
]


def test_upsample_cross_entropy(record: Callable[[], None]) -> None:
    record()
