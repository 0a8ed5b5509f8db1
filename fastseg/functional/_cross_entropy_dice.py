"""cross_entropy_dice and upsample_cross_entropy_dice: what they mean, what they accept, their checks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastseg import reference
from fastseg.functional._checks import (
    check_batch,
    check_class_weight,
    check_label_map,
    check_labels,
    check_map,
    pixels_of,
)
from fastseg.functional._losses import as_map, in_accumulation_dtype, in_dtype, make_options
from fastseg.ops import upsample_cross_entropy as operator
from fastseg.ops.losses.options import LossOptions
from fastseg.ops.upsampling import grid_between


class _Combination(NamedTuple):
    """How the two losses are put together."""

    ce_weight: float
    dice_weight: float
    smooth: float
    batch_dice: bool
    include_background: bool


def cross_entropy_dice(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    *,
    ce_weight: float = 1.0,
    dice_weight: float = 1.0,
    smooth: float = 1e-5,
    batch_dice: bool = False,
    include_background: bool = True,
) -> Tensor:
    """The sum of cross-entropy and soft Dice loss between logits and class labels, in one pass over the logits.

    ``ce_weight * CE + dice_weight * (1 - mean Dice[n, c])``, where CE is `fastseg.functional.cross_entropy` with
    reduction "mean", and of image n and class c, with ``P = softmax(input, 1)`` and sums over the pixels whose label
    isn't ``ignore_index``::

        Dice[n, c] = (2 * sum(P[c] * [target = c]) + smooth) / (sum(P[c]) + sum([target = c]) + smooth)

    The denominator is at least 1e-8. It holds two numbers a pixel for the backward pass, not the probabilities, and
    sums in float32 (float64 for float64). Differentiable for ``input`` to any order; second derivatives run as plain
    PyTorch. Both losses are those of one process: under DistributedDataParallel, ``batch_dice`` is over the process's
    own images.

    Source: nnU-Net (Isensee et al. 2021), ``DC_and_CE_loss``, whose Dice term is this one minus 1.

    Args:
        input: Logits ``[N, C]`` or ``[N, C, d1, ...]`` with at least one pixel an image; float32, float64, bfloat16 or
            float16, in any memory format. Never written to.
        target: Labels in [0, C), of input's shape without C, of any integer dtype.
        weight: ``[C]``, how much each class counts in the cross-entropy, not in Dice; any floating-point dtype,
            without a gradient.
        ignore_index: A label that adds nothing to either loss, their gradients or the mean's divisor.
        label_smoothing: Share of the target, in [0, 1], that is spread evenly over all classes, in the cross-entropy
            alone.
        ce_weight: How much the cross-entropy counts; at least 0.
        dice_weight: How much the Dice loss counts; at least 0.
        smooth: Added to Dice's numerator and denominator, in pixels; at least 0. A class that has
            neither labels nor probability has Dice 1 with it, and 0 without.
        batch_dice: One Dice of each class over the whole batch, instead of one of each image and class.
        include_background: Whether class 0 counts in the mean over Dice; without it, C must be at least 2.

    Returns:
        One number in input's dtype (float32 for half dtypes under autocast). Where every label is ignored, the
        cross-entropy, which torch's is NaN of then, adds nothing, as in nnU-Net: what is left is Dice's, 0 with
        ``smooth``.

    Raises:
        IndexError: On a CPU, a label is neither in [0, C) nor ignore_index. A GPU can't raise one without waiting for
            it, and gives NaN.
        ValueError: Shapes, devices or numbers don't fit; the message names the argument.
        TypeError: A dtype that isn't supported, class probabilities among them.
    """
    check_batch(input)
    target = check_labels(target, pixels_of(input), input, ignore_index)
    combination = _Combination(ce_weight, dice_weight, smooth, batch_dice, include_background)
    options = make_options(ignore_index, _reduction(ce_weight), label_smoothing)
    return _loss(as_map(input, 2), as_map(target, 1), weight, options, combination)


def upsample_cross_entropy_dice(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    *,
    mode: str = "bilinear",
    align_corners: bool = False,
    ce_weight: float = 1.0,
    dice_weight: float = 1.0,
    smooth: float = 1e-5,
    batch_dice: bool = False,
    include_background: bool = True,
) -> Tensor:
    """Cross-entropy and soft Dice loss of logits upsampled to the labels' size, without the upsampled logits.

    Equals ``cross_entropy_dice(interpolate(input, size=target.shape[1:], mode=mode, align_corners=align_corners),
    target, ...)``; see `fastseg.functional.cross_entropy_dice` for the formula and the arguments that aren't here, and
    `fastseg.functional.upsample_cross_entropy` for what it holds in memory. Second derivatives
    run as plain PyTorch, with the upsampled logits in memory.

    Args:
        input: Logits ``[N, C, h, w]``, or of volumes ``[N, C, d, h, w]``; float32, float64, bfloat16 or float16, in any
            memory format. Never written to.
        target: Labels ``[N, H, W]`` or ``[N, D, H, W]`` in [0, C), of any integer dtype; larger or smaller than input,
            by any ratio.
        weight: As in `fastseg.functional.cross_entropy_dice`.
        ignore_index: As there.
        label_smoothing: As there.
        mode: "bilinear", of volumes "trilinear", or "nearest".
        align_corners: As in `fastseg.functional.upsample_cross_entropy`.
        ce_weight: As in `fastseg.functional.cross_entropy_dice`.
        dice_weight: As there.
        smooth: As there.
        batch_dice: As there.
        include_background: As there.

    Returns:
        One number in input's dtype (float32 for half dtypes under autocast).

    Raises:
        IndexError: As `fastseg.functional.cross_entropy_dice`.
        ValueError: Shapes, devices or numbers don't fit; the message names the argument.
        TypeError: A dtype that isn't supported.
    """
    combination = _Combination(ce_weight, dice_weight, smooth, batch_dice, include_background)
    check_map(input, volumes=True)
    options = make_options(ignore_index, _reduction(ce_weight), label_smoothing, mode, align_corners, input.ndim - 2)
    target = check_label_map(target, input, ignore_index)
    grid = grid_between(input.shape[2:], target.shape[1:], mode, align_corners)
    options = LossOptions(*options[:3], *grid)
    return _loss(input, target, weight, options, combination)


def _reduction(ce_weight: float) -> str:
    """The cross-entropy's: where it doesn't count, not divided by the sum of the labels' weights, which may be zero."""
    return "mean" if ce_weight else "sum"


def _loss(
    input: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions, combination: _Combination
) -> Tensor:
    """The loss of logits and labels, maps or volumes, which are checked."""
    _check(input, weight, combination)
    weight = in_accumulation_dtype(weight, input)
    loss, overlap = operator.upsample_cross_entropy(input, target, weight, options, with_overlap=True)
    return in_dtype(reference.combine_dice(loss, overlap, *combination), input.dtype)


def _check(input: Tensor, weight: Tensor | None, combination: _Combination) -> None:
    classes = input.shape[1]
    check_class_weight(weight, classes, input)
    if weight is not None and weight.requires_grad and torch.is_grad_enabled():
        raise ValueError("weight: it has no gradient here, as in torch's cross-entropy of labels; detach it")
    for name in ("ce_weight", "dice_weight", "smooth"):
        if not getattr(combination, name) >= 0:
            raise ValueError(f"{name}: expected a number of at least 0, got {getattr(combination, name)}")
    if classes == 1 and not combination.include_background:
        raise ValueError("include_background: with one class, which is the background, nothing else is left")
