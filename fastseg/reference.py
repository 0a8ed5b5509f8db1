"""Every operator in plain PyTorch: the definition that the kernels are held to, the baseline, and the fallback.

Imports torch alone. All functions are differentiable, to any order, by PyTorch's own autograd.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

IntOrPair = int | tuple[int, ...]


def conv_relu_pool2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntOrPair = 1,
    padding: str | IntOrPair = 0,
    dilation: IntOrPair = 1,
    groups: int = 1,
    *,
    pool_size: IntOrPair = 2,
    pool_stride: IntOrPair | None = None,
    pool_padding: IntOrPair = 0,
    ceil_mode: bool = False,
    return_indices: bool = False,
    return_skip: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """``max_pool2d(relu(conv2d(input, weight, bias, ...)), pool_size, ...)``; see `fastseg.functional`."""
    # In place, as networks are written: this is the baseline of the benchmarks too, and it should be a strong one.
    skip = F.relu(F.conv2d(input, weight, bias, stride, padding, dilation, groups), inplace=True)
    output, indices = F.max_pool2d(skip, pool_size, pool_stride, pool_padding, ceil_mode=ceil_mode, return_indices=True)
    results = (output, *((indices,) if return_indices else ()), *((skip,) if return_skip else ()))
    return results if len(results) > 1 else output


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """`torch.nn.functional.cross_entropy`, for class indices of any integer dtype; see `fastseg.functional`."""
    if not target.is_floating_point():
        target = target.long()
    if weight is not None:
        weight = weight.to(input.dtype)
    return F.cross_entropy(
        input, target, weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
    )
