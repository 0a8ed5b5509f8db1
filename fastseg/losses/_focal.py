"""The focal loss of sigmoids, one class against the rest: its sums over pixels."""

from __future__ import annotations

import torch
from torch import Tensor

from fastseg.functional._checks import check_shares
from fastseg.functional._losses import as_map
from fastseg.losses._sums import softmax_sums
from fastseg.ops.focal_sums import Focal, plain_sums
from fastseg.ops.losses.options import IGNORE_NONE, LossOptions
from fastseg.ops.upsample_sigmoid_sums import SigmoidOptions, upsample_sigmoid_sums


def focal_sums(input: Tensor, labels: Tensor, focal: Focal, with_overlap: bool = False) -> tuple[Tensor, Tensor]:
    """The sums over the pixels that aren't ignored, and where asked `fastseg.reference.overlap`, or ``[0, N, C]``.

    `fastseg.ops.focal_sums` defines the sums. Differentiable to any order; second derivatives run as plain PyTorch.
    """
    input, labels = as_map(input, 2), as_map(labels, 1)
    if torch.compiler.is_compiling():  # a compiler fuses the terms with their sums itself
        sums = plain_sums(input, labels, focal)
        if not with_overlap:
            return sums, sums.new_empty((0, *input.shape[:2]))
        return sums, softmax_sums(input, labels, LossOptions(focal.ignore_index, "sum"))[1]
    sums, _, _, overlap = torch.ops.fastseg.focal_sums.default(input, labels, *focal, with_overlap)
    return sums, overlap


def mask_sums(input: Tensor, masks: Tensor, focal: Focal) -> Tensor:
    """The sums ``[3, C]`` of `fastseg.ops.focal_sums`, of a mask for each class, of input's shape."""
    return all_sums(input, masks, focal.gamma, focal.threshold, focal.ignore_index)[3:].sum(1)


def all_sums(
    input: Tensor, target: Tensor, gamma: float, threshold: float | None = None, ignore_index: int = IGNORE_NONE
) -> Tensor:
    """The sums ``[6, N, C]`` of `fastseg.ops.upsample_sigmoid_sums`; labels are of a dtype that the operators read."""
    of_labels = target.ndim < input.ndim
    target = as_map(target if of_labels else check_shares(target, tuple(input.shape), input), 1 if of_labels else 2)
    return upsample_sigmoid_sums(as_map(input, 2), target, SigmoidOptions(ignore_index, gamma, threshold))
