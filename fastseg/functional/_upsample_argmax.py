"""upsample_argmax: what it means, what it accepts, and the checks of its arguments."""

from __future__ import annotations

import torch
from torch import Tensor

from fastseg.functional._checks import (
    FloatOrPair,
    IntOrPair,
    check_grid,
    check_map,
    resolve_label_dtype,
    resolve_size,
)
from fastseg.ops import upsample_argmax as operator
from fastseg.ops.upsampling import grid_between


def upsample_argmax(
    input: Tensor,
    size: IntOrPair | None = None,
    scale_factor: FloatOrPair | None = None,
    mode: str = "bilinear",
    align_corners: bool = False,
    *,
    dtype: torch.dtype | None = None,
    return_confidence: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The class of the largest upsampled logit of each pixel, without the upsampled logits.

    Equals ``interpolate(input, size, scale_factor, mode, align_corners).argmax(1)``; see
    `torch.nn.functional.interpolate` for the grids, of which that of a scale factor isn't that of the size it gives. Of
    equal logits the lowest class wins, and NaN wins over numbers, as in torch. Half and bfloat16 logits are
    interpolated in float32, and not rounded before they are compared. Not differentiable.

    Args:
        input: Logits ``[N, C, h, w]``, or of volumes ``[N, C, d, h, w]``; float32, float64, bfloat16 or float16, in any
            memory format.
        size: The output's (height, width) or (depth, height, width), or one number for all. Either it or
            ``scale_factor``.
        scale_factor: The output's size in input's, for each axis or for all; sizes are rounded down.
        mode: "bilinear", of volumes "trilinear", or "nearest".
        align_corners: As in `fastseg.functional.upsample_cross_entropy`.
        dtype: The labels' dtype: uint8, int16, int32 or int64. None for uint8 for up to 256 classes, else int64.
        return_confidence: Also return the largest class's softmax value.

    Returns:
        Labels ``[N, H, W]`` or ``[N, D, H, W]``; where asked also the confidence, of that shape, in input's dtype.

    Raises:
        ValueError: Shapes or numbers don't fit; the message names the argument.
        TypeError: A dtype that isn't supported.
    """
    classes = check_map(input, volumes=True)
    check_grid(mode, align_corners, input.ndim - 2)
    output, factors = resolve_size(input, size, scale_factor)
    dtype = resolve_label_dtype(dtype, classes)
    grid = grid_between(input.shape[2:], output, mode, align_corners)
    labels, confidence = operator.upsample_argmax(input, output, factors, *grid, dtype, return_confidence)
    return (labels, confidence) if return_confidence else labels
