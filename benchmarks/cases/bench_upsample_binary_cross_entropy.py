"""upsample_binary_cross_entropy with Dice from the same pass, of binary and multilabel logits upsampled by 4."""

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
from benchmarks.harness.suite import BACKWARD, FORWARD, Job
from fastseg import reference
from fastseg.losses import UpsampleDiceLoss


def plain(input: Tensor, target: Tensor, mode: str) -> Tensor:
    """The loss as people write it."""
    logits = reference.upsample(input, target.shape[2:], None, mode, False)
    overlap, predicted, labelled = reference.class_sums(logits, target, None, "sigmoid").unbind(-1)
    dice = 1 - ((2 * overlap + 1) / (predicted + labelled + 1)).mean()
    return dice + torch.nn.functional.binary_cross_entropy_with_logits(logits, target.to(logits.dtype))


@dataclass(frozen=True)
class UpsampleBinaryCrossEntropyCase(UpsamplingCase):
    """The mean binary cross-entropy and soft Dice of upsampled logits and of a float32 mask for each class."""

    @property
    def name(self) -> str:
        """The sizes, and Dice."""
        return f"{super().name},dice"

    @property
    def terms(self) -> int:
        """The loss is a sum over all values."""
        return self.shape[1] * math.prod(self.labels)

    def job(self, fused: bool, layout: str, training: bool, dtype: torch.dtype | None = None) -> Job:
        """One call of the loss."""
        logits = self.make_logits(dtype, layout, requires_grad=training)
        masks = self.device.make_labels((*self.shape[:2], *self.size), 2, seed=1).float()
        loss = UpsampleDiceLoss("multilabel", smooth=1.0, ce_weight=1.0, mode=self.mode)
        return Job(
            loss if fused else functools.partial(plain, mode=self.mode), (logits, masks), (logits,) if training else ()
        )

    def work(self, timing: str) -> tuple[Work, ...]:
        """Forward: logits and masks. Backward: the same, and the gradient; the logits are those before upsampling."""
        logits = self.device.dtype.itemsize * math.prod(self.shape)
        masks = torch.float32.itemsize * self.terms
        forward, backward = Work(logits + masks), Work(2 * logits + masks)
        return {FORWARD: (forward,), BACKWARD: (backward,)}.get(timing, (forward, backward))


CASES = [
    UpsampleBinaryCrossEntropyCase((4, 1, 64, 64), (256, 256)),
    UpsampleBinaryCrossEntropyCase((4, 20, 64, 64), (256, 256), quick=True),
    UpsampleBinaryCrossEntropyCase((16, 20, 128, 128), (512, 512), device=CUDA),
]


def test_upsample_binary_cross_entropy(record: Callable[[], None]) -> None:
    record()
