"""cross_entropy: logits of segmentation networks (ADE20K's, VOC's and Cityscapes' classes) and of classifiers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.suite import Case, Job
from fastseg import functional, reference
from fastseg.testing import make, make_labels


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
        return torch.Size((*self.shape[:1], *self.shape[2:])).numel()

    @property
    def layouts(self) -> tuple[str, ...]:
        """Logits of two dimensions have but one layout."""
        return super().layouts if len(self.shape) == 4 else ("nchw",)

    def job(self, fused: bool, layout: str, training: bool, dtype: torch.dtype = torch.float32) -> Job:
        """One call of the operator."""
        logits = make(self.shape, dtype, layout=layout, requires_grad=training)
        labels = make_labels((*self.shape[:1], *self.shape[2:]), self.shape[1], seed=1)
        operators = functional if fused else reference
        return Job(operators.cross_entropy, (logits, labels), (logits,) if training else ())


CASES = [
    CrossEntropyCase((2, 150, 128, 128)),
    CrossEntropyCase((8, 21, 256, 256)),
    CrossEntropyCase((4, 19, 256, 512)),
    CrossEntropyCase((256, 10), quick=True),
    CrossEntropyCase((65536, 10)),
]


def test_cross_entropy(record: Callable[[], None]) -> None:
    record()
