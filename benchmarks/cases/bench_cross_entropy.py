"""cross_entropy: logits of segmentation networks (ADE20K's, VOC's and Cityscapes' classes) and of classifiers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.harness.devices import CUDA
from benchmarks.harness.roofline import Work
from benchmarks.harness.suite import BACKWARD, FORWARD, Case, Job
from fastseg import functional, reference

# Pixels whose losses one block of PyTorch's CUDA kernel (nll_loss2d) sums, before it adds its sum to the other blocks'
# in the logits' dtype.
PIXELS_OF_A_PARTIAL_SUM = 128 * 1024


def count_partial_sums(labels: tuple[int, ...]) -> int:
    """Partial sums in the logits' dtype behind a mean cross-entropy in plain PyTorch, for labels [N, H, W] or [N]."""
    images, *pixels = labels
    return images * max(1, math.prod(pixels) // PIXELS_OF_A_PARTIAL_SUM) if pixels else 1


@dataclass(frozen=True)
class CrossEntropyCase(Case):
    """The mean cross-entropy of logits of a shape (N, C, ...)."""

    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        """The logits' sizes."""
        return "x".join(map(str, self.shape))

    @property
    def terms(self) -> int:
        """The loss is a sum over all pixels; a softmax is one over the classes."""
        return math.prod(self.labels)

    @property
    def labels(self) -> tuple[int, ...]:
        """The labels' sizes."""
        return (*self.shape[:1], *self.shape[2:])

    @property
    def partial_sums(self) -> int:
        """See `count_partial_sums`."""
        return count_partial_sums(self.labels)

    @property
    def layouts(self) -> tuple[str, ...]:
        """Logits of two dimensions have but one layout."""
        return super().layouts if len(self.shape) == 4 else ("nchw",)

    def job(self, fused: bool, layout: str, training: bool, dtype: torch.dtype | None = None) -> Job:
        """One call of the operator."""
        logits = self.device.make(self.shape, dtype, layout=layout, requires_grad=training)
        labels = self.device.make_labels(self.labels, self.shape[1], seed=1)
        operators = functional if fused else reference
        return Job(operators.cross_entropy, (logits, labels), (logits,) if training else ())

    def work(self, timing: str) -> tuple[Work, ...]:
        """Forward: logits and labels. Backward: the same, and the gradient."""
        logits = self.device.dtype.itemsize * math.prod(self.shape)
        labels = torch.int64.itemsize * math.prod(self.labels)
        forward, backward = Work(logits + labels), Work(2 * logits + labels)
        return {FORWARD: (forward,), BACKWARD: (backward,)}.get(timing, (forward, backward))


CASES = [
    CrossEntropyCase((2, 150, 128, 128)),
    CrossEntropyCase((8, 21, 256, 256)),
    CrossEntropyCase((4, 19, 256, 512)),
    CrossEntropyCase((256, 10), quick=True),
    CrossEntropyCase((65536, 10)),
    CrossEntropyCase((8, 150, 512, 512), device=CUDA, max_autotune=("nchw",)),
    CrossEntropyCase((16, 19, 512, 1024), device=CUDA, max_autotune=("nchw",)),
    CrossEntropyCase((8, 21, 512, 512), device=CUDA),
    CrossEntropyCase((2, 21, 64, 64), device=CUDA, quick=True, launch_bound=True),
    CrossEntropyCase((65536, 10), device=CUDA, launch_bound=True),
]


def test_cross_entropy(record: Callable[[], None]) -> None:
    record()
