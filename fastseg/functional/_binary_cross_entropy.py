"""binary_cross_entropy and upsample_binary_cross_entropy: what they mean, what they accept, and their checks."""

from __future__ import annotations

import torch
from torch import Tensor

from fastseg import reference
from fastseg._native import log_fallback
from fastseg.functional._checks import check_batch, check_class_weight, check_grid, check_map, check_shares
from fastseg.functional._losses import as_map, in_dtype, make_options
from fastseg.ops.losses.options import IGNORE_NONE, accumulation_dtype
from fastseg.ops.upsample_sigmoid_sums import SigmoidOptions, upsample_sigmoid_sums
from fastseg.ops.upsampling import grid_between


def binary_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    ignore_index: int | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Binary cross-entropy of logits, each class against the rest, with target values that don't count.

    With p the sigmoid of a class's logit and t its target: ``-weight[c] * (pos_weight[c] * t * log(p) + (1 - t) *
    log(1 - p))``, which is `torch.nn.functional.binary_cross_entropy_with_logits` where a weight is one of classes. Of
    the logits' size it holds nothing but their gradient, and it reads masks of any dtype as they are. Differentiable
    for ``input`` and the weights to any order; second derivatives, and reduction "none", run as plain PyTorch.

    Args:
        input: Logits ``[N, C]`` or ``[N, C, d1, ...]`` with at least one pixel an image; float32, float64, bfloat16 or
            float16, in any memory format. Never written to.
        target: Of input's shape, zeros and ones or numbers in between, of a boolean, integer or floating-point dtype;
            where C is 1 also without that dimension.
        weight: ``[C]``, how much each class counts; any floating-point dtype.
        pos_weight: ``[C]``, how much a target of 1 counts; any floating-point dtype.
        ignore_index: A target value that adds nothing to the loss, its gradient or the mean's divisor; None for none.
        reduction: "none" for a loss of each value; "mean" for their sum over the number of values that count; "sum".

    Returns:
        The loss in input's dtype (float32 for half dtypes under autocast): of input's shape for "none", else one
        number. NaN for the "mean" over no value.

    Raises:
        ValueError: Shapes, devices or arguments don't fit; the message names the argument.
        TypeError: A dtype that isn't supported.
    """
    make_options(0, reduction)
    check_batch(input)
    target = check_shares(_with_classes(target, input), tuple(input.shape), input)
    grid = ("nearest", False)
    return _loss(as_map(input, 2), as_map(target, 2), (weight, pos_weight), ignore_index, reduction, grid, input.shape)


def upsample_binary_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    ignore_index: int | None = None,
    reduction: str = "mean",
    *,
    mode: str = "bilinear",
    align_corners: bool = False,
) -> Tensor:
    """Binary cross-entropy of logits upsampled to the target's size, without the upsampled logits.

    Equals ``binary_cross_entropy(interpolate(input, size=target.shape[-2:], mode=mode, align_corners=align_corners),
    target, ...)``; see `fastseg.functional.binary_cross_entropy` for the formula and the other arguments.

    Args:
        input: Logits ``[N, C, h, w]``; float32, float64, bfloat16 or float16, in any memory format. Never written to.
        target: ``[N, C, H, W]``, where C is 1 also ``[N, H, W]``; larger or smaller than input, by any ratio.
        weight: As in `fastseg.functional.binary_cross_entropy`.
        pos_weight: As there.
        ignore_index: As there.
        reduction: As there.
        mode: "bilinear" or "nearest".
        align_corners: As in `fastseg.functional.upsample_cross_entropy`.

    Returns:
        The loss in input's dtype (float32 for half dtypes under autocast): ``[N, C, H, W]`` for "none", else one
        number.

    Raises:
        ValueError: Shapes, devices or arguments don't fit; the message names the argument.
        TypeError: A dtype that isn't supported.
    """
    make_options(0, reduction)
    check_grid(mode, align_corners)
    classes = check_map(input)
    target = _with_classes(target, input)
    shape = (input.shape[0], classes, *target.shape[2:])
    target = check_shares(target, shape, input)
    grid = grid_between(input.shape[2:], target.shape[2:], mode, align_corners)
    return _loss(input, target, (weight, pos_weight), ignore_index, reduction, grid, target.shape)


def is_of_classes(weight: Tensor, logits: Tensor) -> bool:
    """Whether a weight that broadcasts to logits ``[N, C, ...]`` is one number a class, or one for all."""
    shape = (1,) * (logits.ndim - weight.ndim) + tuple(weight.shape)
    return len(shape) == logits.ndim and all(size == 1 for dim, size in enumerate(shape) if dim != 1)


def of_each_class(weight: Tensor | None, classes: int) -> Tensor | None:
    """The weight ``[C]`` of one that `is_of_classes`."""
    return None if weight is None else weight.reshape(-1).expand(classes)


def mean_over_all(weight: Tensor | None, target: Tensor) -> Tensor:
    """The weight ``[C]`` with which the sum is the mean over all values, those that are ignored among them.

    A sum that is divided afterwards would overflow in half types.
    """
    if weight is None:
        weight = torch.ones(target.shape[1], device=target.device)
    return weight.to(torch.promote_types(weight.dtype, torch.float32)) / target.numel()


def _with_classes(target: Tensor, input: Tensor) -> Tensor:
    """The target with a dimension of classes, of which there may be one alone."""
    return target.unsqueeze(1) if input.shape[1] == 1 and target.ndim == input.ndim - 1 else target


def _loss(
    input: Tensor, target: Tensor, weights: tuple[Tensor | None, Tensor | None], ignore_index: int | None,
    reduction: str, grid: tuple[str, bool], shape: torch.Size,
) -> Tensor:  # fmt: skip
    """The loss of maps, which are checked; of a shape for "none"."""
    for name, weight in zip(("weight", "pos_weight"), weights, strict=True):
        check_class_weight(weight, input.shape[1], input, name)
    ignored = IGNORE_NONE if ignore_index is None else ignore_index
    if reduction == "none":
        if not torch.compiler.is_compiling():
            log_fallback("binary_cross_entropy", 'reduction="none" gives a result of the target\'s size')
        wide = input.to(accumulation_dtype(input))
        logits = reference.upsample(wide, target.shape[2:], None, *grid)
        losses = reference.binary_cross_entropy(logits, target, *weights, ignored, reduction)
        return in_dtype(losses.reshape(shape), input.dtype)
    mode, align_corners = grid
    options = SigmoidOptions(ignored, 0.0, mode=mode, align_corners=align_corners)
    sums = upsample_sigmoid_sums(input, target, options)
    return in_dtype(reference.combine_binary(sums, *weights, reduction), input.dtype)
