"""upsample_cross_entropy: what it means, what it accepts, and the checks of its arguments."""

from __future__ import annotations

import torch
from torch import Tensor

from fastseg import reference
from fastseg._native import log_fallback
from fastseg.functional._checks import check_class_weight, check_label_map, check_map, check_pixel_weight
from fastseg.functional._cross_entropy import cross_entropy
from fastseg.functional._losses import in_accumulation_dtype, in_dtype, make_options, weigh_pixels, without_reduction
from fastseg.ops import upsample_cross_entropy as operator


def upsample_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    mode: str = "bilinear",
    align_corners: bool = False,
    pixel_weight: Tensor | None = None,
) -> Tensor:
    """Cross-entropy between logits, upsampled to the labels' size, and the labels, without the upsampled logits.

    Equals ``cross_entropy(interpolate(input, size=target.shape[1:], mode=mode, align_corners=align_corners), target,
    ...)``; see `torch.nn.functional.interpolate` for the grids, and `fastseg.functional.cross_entropy` for the loss.
    What it holds for the backward pass is two numbers a pixel of the target; on a CPU, for a reduced loss, a gradient
    of input's shape instead, in the dtype of the arithmetic, made in the forward pass. Half and bfloat16 logits are
    interpolated in float32. Differentiable for ``input`` to any order; second derivatives run as plain PyTorch, with
    the upsampled logits in memory, as do calls with class probabilities (which are as large themselves), or whose
    weight needs a gradient.

    Args:
        input: Logits ``[N, C, h, w]``, or of volumes ``[N, C, d, h, w]``; float32, float64, bfloat16 or float16, in any
            memory format. Never written to.
        target: Labels ``[N, H, W]`` or ``[N, D, H, W]`` in [0, C), of any integer dtype; larger or smaller than input,
            by any ratio. Or class probabilities ``[N, C, H, W]`` or ``[N, C, D, H, W]``.
        weight: ``[C]``, how much each class counts; any floating-point dtype.
        ignore_index: A label that adds nothing to the loss, its gradient or the mean's divisor.
        reduction: "none" for a loss per pixel; "mean" for their sum over the weights of the labels that count; "sum".
        label_smoothing: Share of the target, in [0, 1], that is spread evenly over all classes.
        mode: "bilinear", of volumes "trilinear", or "nearest".
        align_corners: Whether the centres of the corner pixels, instead of the corners, lie on each other; not for
            "nearest".
        pixel_weight: Of the labels' shape, how much each pixel counts; see `fastseg.functional.cross_entropy`.

    Returns:
        The loss in input's dtype (float32 for half dtypes under autocast): of the labels' shape for "none", else one
        number.

    Raises:
        IndexError: On a CPU, a label is neither in [0, C) nor ignore_index. A GPU can't raise one without waiting for
            it, and gives NaN as that pixel's loss and gradient.
        ValueError: Shapes, devices or numbers don't fit; the message names the argument.
        TypeError: A dtype that isn't supported.
    """
    classes, axes = check_map(input, volumes=True), input.ndim - 2
    options = make_options(ignore_index, reduction, label_smoothing, mode, align_corners, axes)
    if input.shape[2:] == target.shape[-axes:]:
        return cross_entropy(input, target, weight, ignore_index, reduction, label_smoothing, pixel_weight=pixel_weight)
    if target.is_floating_point():
        if not torch.compiler.is_compiling():
            log_fallback(
                "upsample_cross_entropy", "class probabilities hold the output's size for every class themselves"
            )
        logits = reference.upsample(input, target.shape[-axes:], None, mode, align_corners)
        return cross_entropy(
            logits, target, weight, ignore_index, reduction, label_smoothing, pixel_weight=pixel_weight
        )
    target = check_label_map(target, input, ignore_index)
    check_class_weight(weight, classes, input)
    check_pixel_weight(pixel_weight, tuple(target.shape), input)
    weight = in_accumulation_dtype(weight, input)
    if pixel_weight is None:
        return in_dtype(operator.upsample_cross_entropy(input, target, weight, options)[0], input.dtype)
    losses, _ = operator.upsample_cross_entropy(input, target, weight, without_reduction(options))
    return in_dtype(weigh_pixels(losses, target, weight, pixel_weight, options), input.dtype)
