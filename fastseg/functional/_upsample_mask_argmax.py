"""upsample_mask_argmax: what it means, what it accepts, and the checks of its arguments."""

from __future__ import annotations

import torch
from torch import Tensor

from fastseg.functional._checks import (
    FLOATING_DTYPES,
    FloatOrPair,
    IntOrPair,
    check_device,
    check_grid,
    check_map,
    resolve_label_dtype,
    resolve_size,
)
from fastseg.ops import upsample_mask_argmax as operator
from fastseg.ops.losses.options import accumulation_dtype
from fastseg.ops.upsampling import grid_between


def upsample_mask_argmax(
    input: Tensor,
    class_probabilities: Tensor,
    size: IntOrPair | None = None,
    *,
    scale_factor: FloatOrPair | None = None,
    mode: str = "bilinear",
    align_corners: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The class that the masks of all queries add up to most of, without the upsampled masks and without the sums.

    The semantic inference of networks that classify masks (MaskFormer, Mask2Former, EoMT). With the upsampled masks
    ``m = interpolate(input, size, scale_factor, mode, align_corners).sigmoid()`` it equals
    ``einsum("nqc,nqhw->nchw", class_probabilities, m).argmax(1)``. Of equal sums the lowest class wins, and NaN wins
    over numbers, as in torch. Half and bfloat16 logits are interpolated in float32; neither masks nor sums are rounded
    to them. Not differentiable.

    Args:
        input: Logits of masks ``[N, Q, h, w]``; float32, float64, bfloat16 or float16, in any memory format.
        class_probabilities: ``[N, Q, C]``, how much each query counts for each class, floating-point: the softmax of
            its class logits, without the class for "no object".
        size: The output's (height, width), or one number for both. Either it or ``scale_factor``.
        scale_factor: As in `upsample_argmax`.
        mode: "bilinear" or "nearest".
        align_corners: As in `fastseg.functional.upsample_cross_entropy`.
        dtype: The labels' dtype: uint8, int16, int32 or int64. None for uint8 for up to 256 classes, else int64.

    Returns:
        Labels ``[N, H, W]``.

    Raises:
        ValueError: Shapes, devices or numbers don't fit; the message names the argument.
        TypeError: A dtype that isn't supported.
    """
    queries = check_map(input)
    check_grid(mode, align_corners)
    output, factors = resolve_size(input, size, scale_factor)
    shape = tuple(class_probabilities.shape)
    if len(shape) != 3 or shape[:2] != (input.shape[0], queries) or shape[2] == 0:
        raise ValueError(f"class_probabilities: expected [{input.shape[0]}, {queries}, C] with classes, got {shape}")
    if class_probabilities.dtype not in FLOATING_DTYPES:
        raise TypeError(f"class_probabilities: expected a floating-point dtype, got {class_probabilities.dtype}")
    check_device("class_probabilities", class_probabilities, input)
    dtype = resolve_label_dtype(dtype, shape[2])
    grid = grid_between(input.shape[2:], output, mode, align_corners)
    weights = class_probabilities.to(accumulation_dtype(input))
    return operator.upsample_mask_argmax(input, weights, output, factors, *grid, dtype)
