"""cross_entropy: what it means, what it accepts, and the checks of its arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
    check_reduction,
    check_smoothing,
    pixels_of,
)
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
    target = _check(input, target, weight, ignore_index, reduction, label_smoothing, pixel_weight)
    if target.dtype == torch.float64 and input.dtype != torch.float64:
        if not torch.compiler.is_compiling():
            log_fallback("cross_entropy", "float64 probabilities for logits of less precision")
        return reference.cross_entropy(
            input, target, weight, ignore_index, reduction, label_smoothing, pixel_weight=pixel_weight
        )
    dtype, accumulated = input.dtype, operator.accumulation_dtype(input)
    if target.is_floating_point():
        dtype = torch.promote_types(dtype, target.dtype)
        target = target.to(accumulated) if accumulated == torch.float64 else target
    return reduce_pixels(
        call_operator, input, target, weight, pixel_weight, ignore_index, reduction, label_smoothing, dtype
    )


def _check(
    input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str, label_smoothing: float,
    pixel_weight: Tensor | None,
) -> Tensor:  # fmt: skip
    """The target in a dtype that the kernels read; refuses arguments that don't fit."""
    classes, pixels = check_logits(input), pixels_of(input)
    if target.is_floating_point():
        check_device("target", target, input)
        _check_probabilities(tuple(input.shape), target, ignore_index)
    else:
        target = check_labels(target, pixels, input, ignore_index)
    check_class_weight(weight, classes, input)
    check_reduction(reduction)
    check_smoothing(label_smoothing)
    check_pixel_weight(pixel_weight, pixels, input)
    return target


def _check_probabilities(shape: tuple[int, ...], target: Tensor, ignore_index: int) -> None:
    if target.shape != shape:
        raise ValueError(
            f"target: expected class probabilities of input's shape {shape}, got {tuple(target.shape)} in "
            f"{target.dtype}; class labels need an integer dtype"
        )
    if target.dtype not in FLOATING_DTYPES:
        raise TypeError(f"target: expected float32, float64, bfloat16 or float16, got {target.dtype}")
    if ignore_index >= 0:
        raise ValueError(f"ignore_index: class probabilities have no label to ignore, got {ignore_index}")


def call_operator(input: Tensor, target: Tensor, *options: Any) -> Tensor:
    """The operator, which takes no logits without a batch."""
    if input.ndim > 1:
        return torch.ops.fastseg.cross_entropy.default(input, target, *options)[0]
    loss = torch.ops.fastseg.cross_entropy.default(input.unsqueeze(0), target.unsqueeze(0), *options)[0]
    return loss.squeeze(0) if loss.ndim == 1 else loss


def reduce_pixels(
    losses: Callable[..., Tensor], input: Tensor, target: Tensor, weight: Tensor | None, pixel_weight: Tensor | None,
    ignore_index: int, reduction: str, label_smoothing: float, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The loss that an operator gives of checked arguments, in ``dtype``, or in float32 where autocast asks for it."""
    if weight is not None:
        weight = weight.to(operator.accumulation_dtype(input)).contiguous()
    if pixel_weight is None:
        return in_dtype(losses(input, target, weight, ignore_index, reduction, label_smoothing), dtype)
    loss = losses(input, target, weight, ignore_index, "none", label_smoothing)
    return in_dtype(reference.weigh(loss, target, weight, pixel_weight, ignore_index, reduction), dtype)


def in_dtype(loss: Tensor, dtype: torch.dtype) -> Tensor:
    """A loss in the accumulation dtype as one of ``dtype``; unchanged where autocast asks for float32."""
    if loss.dtype == dtype:
        return loss
    device = loss.device.type
    # TorchDynamo can't trace is_autocast_available (torch 2.11); what it compiles for has autocast.
    available = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device)
    autocasts = available and torch.is_autocast_enabled(device)
    return loss if autocasts and dtype.itemsize < loss.dtype.itemsize else loss.to(dtype)
