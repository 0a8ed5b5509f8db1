"""What the drop-in losses of sigmoids, each class against the rest, share: their sums over pixels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from fastseg import reference
from fastseg.functional._checks import check_shares
from fastseg.functional._losses import as_map
from fastseg.ops.losses.options import IGNORE_NONE
from fastseg.ops.upsample_sigmoid_sums import SigmoidOptions, upsample_sigmoid_sums


def sigmoid_sums(
    input: Tensor,
    target: Tensor,
    gamma: float | None = None,
    threshold: float | None = None,
    ignore_index: int | None = None,
    smaller: bool = False,
) -> Tensor:
    """The sums ``[3 or 6, N, C]`` of `fastseg.ops.upsample_sigmoid_sums`.

    The target has labels ``[N, d1, ...]`` of a dtype that the operators read, or a mask for each class, of input's
    shape. Differentiable to any order; second derivatives run as plain PyTorch.
    """
    of_labels = target.ndim < input.ndim
    target = as_map(target if of_labels else check_shares(target, tuple(input.shape), input), 1 if of_labels else 2)
    ignored = IGNORE_NONE if ignore_index is None else ignore_index
    return upsample_sigmoid_sums(as_map(input, 2), target, SigmoidOptions(ignored, gamma, threshold, smaller))


def _is_readable(tensor: Tensor) -> bool:
    """Whether what happens may depend on a tensor's numbers: not on a device, and not where a program is captured."""
    return tensor.is_cpu and not torch.compiler.is_compiling() and get_proxy_mode() is None


def is_hard(target: Tensor, ignore_index: int | None = None) -> bool:
    """Whether a target is zeros and ones: labels, integers, and on a CPU floating-point numbers that are nothing else.

    Of a target between 0 and 1 other libraries' focal losses aren't made of `sigmoid_sums`. Where only waiting for a
    device would tell, and in a compiled graph, the answer for floating-point numbers is no.
    """
    if not target.is_floating_point():
        return True
    if not _is_readable(target):
        return False
    hard = (target == 0) | (target == 1)
    return bool((hard if ignore_index is None else hard | (target == ignore_index)).all())


# What `masks_of` gives where a label is ignored.
IGNORED_MASK = 2


def are_classes(labels: Tensor, classes: int, ignore_index: int | None) -> bool:
    """Whether all labels are known to be in [0, classes) or ignored, without waiting for a device."""
    if not _is_readable(labels):
        return False
    known = (labels >= 0) & (labels < classes)
    return bool((known if ignore_index is None else known | reference.is_ignored(labels, ignore_index)).all())


def masks_of(labels: Tensor, classes: int, ignore_index: int | None) -> Tensor:
    """A mask for each class ``[N, C, d1, ...]`` of labels ``[N, d1, ...]``; one that is no class is in none of them."""
    numbers = torch.arange(classes, device=labels.device).view(-1, *[1] * (labels.ndim - 1))
    masks = (labels.unsqueeze(1) == numbers).to(torch.uint8)
    if ignore_index is None:
        return masks
    return masks.masked_fill(reference.is_ignored(labels, ignore_index).unsqueeze(1), IGNORED_MASK)
