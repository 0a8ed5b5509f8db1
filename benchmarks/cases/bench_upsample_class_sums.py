"""upsample_class_sums: what region losses are made of, of sigmoids of masks and of a softmax, upsampled by 4."""

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
from fastseg import functional, reference
from fastseg.ops.losses.options import accumulation_dtype


@dataclass(frozen=True)
class UpsampleClassSumsCase(UpsamplingCase):
    """The sums of upsampled logits and of labels, for sigmoids of a mask for each class."""

    activation: str = "sigmoid"

    @property
    def name(self) -> str:
        """The sizes, the mode, and the activation."""
        return f"{super().name},{self.activation}"

    @property
    def terms(self) -> int:
        """A sum has all pixels of an image."""
        return math.prod(self.labels)

    def _target(self) -> Tensor:
        if self.activation == "softmax":
            return self.device.make_labels(self.labels, self.shape[1], seed=1)
        return self.device.make_labels((*self.shape[:2], *self.size), 2, seed=1).to(torch.uint8)

    def job(self, fused: bool, layout: str, training: bool, dtype: torch.dtype | None = None) -> Job:
        """One call of the operator."""
        logits = self.make_logits(dtype, layout, requires_grad=training)
        operator = (functional if fused else reference).upsample_class_sums
        call = functools.partial(operator, mode=self.mode, activation=self.activation)
        sums = (*self.shape[:2], 3)
        incoming = torch.linspace(0.5, 1.5, math.prod(sums), device=logits.device).reshape(sums)
        incoming = incoming.to(accumulation_dtype(logits))
        return Job(call, (logits, self._target()), (logits,) if training else (), incoming)

    def work(self, timing: str) -> tuple[Work, ...]:
        """Forward: logits and target. Backward: the same, and the gradient; the logits are those before upsampling."""
        logits = self.device.dtype.itemsize * math.prod(self.shape)
        target = self._target_bytes()
        forward, backward = Work(logits + target), Work(2 * logits + target)
        return {FORWARD: (forward,), BACKWARD: (backward,)}.get(timing, (forward, backward))

    def _target_bytes(self) -> int:
        pixels = math.prod(self.labels)
        return pixels * (torch.int64.itemsize if self.activation == "softmax" else self.shape[1])


CASES = [
    UpsampleClassSumsCase((4, 20, 64, 64), (256, 256), quick=True),
    UpsampleClassSumsCase((4, 1, 64, 64), (256, 256)),
    UpsampleClassSumsCase((4, 21, 64, 64), (256, 256), activation="softmax"),
    UpsampleClassSumsCase((16, 20, 128, 128), (512, 512), device=CUDA),
    UpsampleClassSumsCase((16, 1, 128, 128), (512, 512), device=CUDA),
]


def test_upsample_class_sums(record: Callable[[], None]) -> None:
    record()
