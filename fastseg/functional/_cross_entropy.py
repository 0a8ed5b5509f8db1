"""cross_entropy: what it means, what it accepts, and the checks of its arguments."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastseg import reference
from fastseg._native import log_fallback
from fastseg.functional._checks import (
    FLOATING_DTYPES,
    check_class_weight,
    check_device,
    check_labels,
    check_logits,
    check_pixel_weight,
    pixels_of,
)
from fastseg.functional._losses import in_accumulation_dtype, in_dtype, make_options, weigh_pixels, without_reduction
from fastseg.ops import cross_entropy as operator


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    pixel_weight: Tensor | None = None,
) -> Tensor:
    """Cross-entropy between logits and class labels or class probabilities.

    Equals `torch.nn.functional.cross_entropy`; see `torch.nn.CrossEntropyLoss` for the formulas. It reads half and
    bfloat16 logits as they are, in any memory format, computes in float32 (float64 for float64), and keeps two numbers
    a pixel for the backward pass, not the probabilities. Differentiable for ``input`` to any order. Second derivatives
    run as plain PyTorch, as do calls whose target or weight needs a gradient, or whose probabilities alone are float64;
    small float32 logits take torch's own operator, which is faster there (its module in fastseg.ops says up to where).

    Args:
        input: Logits ``[C]``, ``[N, C]`` or ``[N, C, d1, ...]``; float32, float64, bfloat16 or float16. Never
            written to.
        target: Labels in [0, C), of input's shape without C, of any integer dtype; or class probabilities,
            floating-point, of input's shape.
        weight: ``[C]``, how much each class counts; any floating-point dtype.
        ignore_index: A label that adds nothing to the loss, its gradient or the mean's divisor. With probabilities it
            must be negative, and has no meaning.
        reduction: "none" for a loss per pixel; "mean" for their sum over the weights of the labels that count (over the
            number of pixels, with probabilities); or "sum".
        label_smoothing: Share of the target, in [0, 1], that is spread evenly over all classes.
        pixel_weight: How much each pixel counts, of the labels' shape; any floating-point dtype. It multiplies the
            pixel's loss, and "mean" then divides by the sum of ``pixel_weight`` times the labels' weights. Ignored
            pixels count nothing, whatever their weight is. May need a gradient. Torch has no such argument.

    Returns:
        The loss in input's dtype (its promotion with target's, for probabilities; float32 for half dtypes under
        autocast): ``[N, d1, ...]`` for "none", else one number. NaN for the "mean" over no pixel.

    Raises:
        IndexError: On a CPU, a label is neither in [0, C) nor ignore_index. A GPU can't raise one without waiting for
            it, and gives NaN as that pixel's loss and gradient.
        ValueError: Shapes, devices or numbers don't fit; the message names the argument.
        TypeError: A dtype that isn't supported.
    """
    small = not torch.compiler.is_compiling() and operator.choose_algorithm(input, target, weight) == "plain"
    if small and 0 <= label_smoothing <= 1 and pixel_weight is None:
        try:
            return F.cross_entropy(
                input, target, weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
            )
        except (IndexError, RuntimeError, ValueError):
            pass  # The checks below find what is wrong, too, and name the argument.
    options = make_options(ignore_index, reduction, label_smoothing)
    classes, pixels = check_logits(input), pixels_of(input)
    if target.is_floating_point():
        _check_probabilities(target, input, ignore_index)
    else:
        target = check_labels(target, pixels, input, ignore_index)
    check_class_weight(weight, classes, input)
    check_pixel_weight(pixel_weight, pixels, input)
    if target.dtype == torch.float64 and input.dtype != torch.float64:
        if not torch.compiler.is_compiling():
            log_fallback("cross_entropy", "float64 probabilities for logits of less precision")
        return reference.cross_entropy(
            input, target, weight, ignore_index, reduction, label_smoothing, pixel_weight=pixel_weight
        )
    dtype = input.dtype
    if target.is_floating_point():
        dtype = torch.promote_types(dtype, target.dtype)
        target = target.to(torch.float64) if input.dtype == torch.float64 else target
    weight = in_accumulation_dtype(weight, input)
    if pixel_weight is None:
        return in_dtype(operator.cross_entropy(input, target, weight, options), dtype)
    losses = operator.cross_entropy(input, target, weight, without_reduction(options))
    return in_dtype(weigh_pixels(losses, target, weight, pixel_weight, options), dtype)


def _check_probabilities(target: Tensor, input: Tensor, ignore_index: int) -> None:
    check_device("target", target, input)
    if target.shape != input.shape:
        raise ValueError(
            f"target: expected class probabilities of input's shape {tuple(input.shape)}, got {tuple(target.shape)} in "
            f"{target.dtype}; class labels need an integer dtype"
        )
    if target.dtype not in FLOATING_DTYPES:
        raise TypeError(f"target: expected float32, float64, bfloat16 or float16, got {target.dtype}")
    if ignore_index >= 0:
        raise ValueError(f"ignore_index: class probabilities have no label to ignore, got {ignore_index}")
