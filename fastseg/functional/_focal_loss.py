"""focal_loss and upsample_focal_loss: what they mean, what they accept, and the checks of their arguments."""

from __future__ import annotations

import torch
from torch import Tensor

from fastseg import reference
from fastseg.functional._checks import (
    check_class_weight,
    check_label_map,
    check_labels,
    check_logits,
    check_map,
    pixels_of,
)
from fastseg.functional._losses import in_dtype, make_options, without_reduction
from fastseg.ops.cross_entropy import cross_entropy
from fastseg.ops.losses.options import LossOptions
from fastseg.ops.upsample_cross_entropy import upsample_cross_entropy


def focal_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    *,
    gamma: float = 2.0,
) -> Tensor:
    """The focal loss of softmax probabilities: cross-entropy that counts well classified pixels less.

    With p the softmax probability of a pixel's label: ``-weight[label] * (1 - p)^gamma * log(p)``. It reads half and
    bfloat16 logits as they are, in any memory format, computes in float32 (float64 for float64), and holds a few
    numbers a pixel, not the probabilities. Differentiable for ``input`` and ``weight`` to any order, with finite
    gradients where p rounds to 1; second derivatives run as plain PyTorch.

    Source: Lin et al. 2017, "Focal Loss for Dense Object Detection", in its form for several classes.

    Args:
        input: Logits ``[C]``, ``[N, C]`` or ``[N, C, d1, ...]``; float32, float64, bfloat16 or float16. Never
            written to.
        target: Labels in [0, C), of input's shape without C, of any integer dtype.
        weight: ``[C]``, the paper's alpha of each class; any floating-point dtype.
        ignore_index: A label that adds nothing to the loss, its gradient or the mean's divisor.
        reduction: "none" for a loss per pixel; "mean" for their sum over the number of pixels that aren't ignored,
            whatever their weights are; or "sum".
        gamma: How much less well classified pixels count; at least 0. 0 is cross-entropy.

    Returns:
        The loss in input's dtype (float32 for half dtypes under autocast): ``[N, d1, ...]`` for "none", else one
        number. NaN for the "mean" over no pixel.

    Raises:
        IndexError: On a CPU, a label is neither in [0, C) nor ignore_index. A GPU can't raise one without waiting for
            it, and gives NaN as that pixel's loss and gradient.
        ValueError: Shapes, devices or numbers don't fit; the message names the argument.
        TypeError: A dtype that isn't supported, class probabilities among them.
    """
    options = make_options(ignore_index, reduction)
    classes = check_logits(input)
    target = check_labels(target, pixels_of(input), input, ignore_index)
    _check(weight, classes, input, gamma)
    losses = cross_entropy(input, target, None, without_reduction(options))
    return _focus(losses, target, weight, options, gamma, input.dtype)


def upsample_focal_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    *,
    gamma: float = 2.0,
    mode: str = "bilinear",
    align_corners: bool = False,
) -> Tensor:
    """The focal loss of logits upsampled to the labels' size, without the upsampled logits.

    Equals ``focal_loss(interpolate(input, size=target.shape[-2:], mode=mode, align_corners=align_corners), target,
    ...)``; see `fastseg.functional.focal_loss` for the formula, and `fastseg.functional.upsample_cross_entropy` for
    the pass over the logits. Second derivatives run as plain PyTorch, with the upsampled logits in memory.

    Args:
        input: Logits ``[N, C, h, w]``; float32, float64, bfloat16 or float16, in any memory format. Never written to.
        target: Labels ``[N, H, W]`` in [0, C), of any integer dtype; larger or smaller than input, by any ratio.
        weight: As in `fastseg.functional.focal_loss`.
        ignore_index: As there.
        reduction: As there.
        gamma: As there.
        mode: "bilinear" or "nearest".
        align_corners: As in `fastseg.functional.upsample_cross_entropy`.

    Returns:
        The loss in input's dtype (float32 for half dtypes under autocast): ``[N, H, W]`` for "none", else one number.

    Raises:
        IndexError: As `fastseg.functional.focal_loss`.
        ValueError: Shapes, devices or numbers don't fit; the message names the argument.
        TypeError: A dtype that isn't supported.
    """
    options = make_options(ignore_index, reduction, mode=mode, align_corners=align_corners)
    classes = check_map(input)
    target = check_label_map(target, input, ignore_index)
    if input.shape[2:] == target.shape[1:]:
        return focal_loss(input, target, weight, ignore_index, reduction, gamma=gamma)
    _check(weight, classes, input, gamma)
    losses, _ = upsample_cross_entropy(input, target, None, without_reduction(options))
    return _focus(losses, target, weight, options, gamma, input.dtype)


def _check(weight: Tensor | None, classes: int, input: Tensor, gamma: float) -> None:
    check_class_weight(weight, classes, input)
    if not gamma >= 0:
        raise ValueError(f"gamma: expected a number of at least 0, got {gamma}")


def _focus(
    losses: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions, gamma: float, dtype: torch.dtype
) -> Tensor:
    """The focal loss from the pixels' cross-entropies."""
    return in_dtype(reference.focus(losses, target, weight, options.ignore_index, options.reduction, gamma), dtype)
