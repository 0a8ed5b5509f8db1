"""upsample_argmax: what it means, what it accepts, and the checks of its arguments."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from fastseg import reference
from fastseg.functional._checks import LABEL_DTYPES, check_grid, check_map
from fastseg.ops import upsample_argmax as operator
from fastseg.ops.arguments import integer
from fastseg.ops.upsampling import grid_between

IntOrPair = int | tuple[int, ...]
FloatOrPair = float | tuple[float, ...]


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
        input: Logits ``[N, C, h, w]``; float32, float64, bfloat16 or float16, in any memory format.
        size: The output's (height, width), or one number for both. Either it or ``scale_factor``.
        scale_factor: The output's size in input's, for (height, width) or for both; sizes are rounded down.
        mode: "bilinear" or "nearest".
        align_corners: As in `fastseg.functional.upsample_cross_entropy`.
        dtype: The labels' dtype: uint8, int16, int32 or int64. None for uint8 for up to 256 classes, else int64.
        return_confidence: Also return the largest class's softmax value.

    Returns:
        Labels ``[N, H, W]``; where asked also the confidence ``[N, H, W]`` in input's dtype.

    Raises:
        ValueError: Shapes or numbers don't fit; the message names the argument.
        TypeError: A dtype that isn't supported.
    """
    classes = check_map(input)
    check_grid(mode, align_corners)
    output, factors = _resolve_size(input, size, scale_factor)
    dtype = dtype or reference.label_dtype(classes)
    if dtype not in LABEL_DTYPES:
        raise TypeError(f"dtype: expected uint8, int16, int32 or int64, got {dtype}")
    if classes - 1 > torch.iinfo(dtype).max:
        raise ValueError(f"dtype: {dtype} can't hold the labels of {classes} classes")
    grid = grid_between(input.shape[2:], output, mode, align_corners)
    labels, confidence = operator.upsample_argmax(input, output, factors, *grid, dtype, return_confidence)
    return (labels, confidence) if return_confidence else labels


def _resolve_size(
    input: Tensor, size: IntOrPair | None, scale_factor: FloatOrPair | None
) -> tuple[tuple[int, int], tuple[float, float] | None]:
    """The output's size, and the factors for rows and columns where they gave it."""
    if (size is None) == (scale_factor is None):
        raise ValueError(f"size: expected either it or scale_factor, got {size} and {scale_factor}")
    if size is not None:
        height, width = (integer("size", extent, 0) for extent in _pair("size", size))
    else:
        factors = _pair("scale_factor", scale_factor)
        if not all(map(_is_factor, factors)):
            raise ValueError(f"scale_factor: expected finite numbers above 0, got {scale_factor}")
        height, width = (math.floor(extent * factor) for extent, factor in zip(input.shape[2:], factors, strict=True))
    if height < 1 or width < 1:
        what = f"size {size}" if size is not None else f"scale_factor {scale_factor}"
        raise ValueError(f"size: expected at least one row and one column, got {height} x {width} of {what}")
    return (height, width), None if size is not None else factors


def _is_factor(value: Any) -> bool:
    """Whether a value is a number that sizes can be multiplied by; written so that NaN isn't."""
    is_number = isinstance(value, Real | torch.SymFloat | torch.SymInt)
    return is_number and bool(0 < value < math.inf)


def _pair(name: str, value: Any) -> tuple[Any, Any]:
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2:
        raise ValueError(f"{name}: expected one number or (height, width), got {value}")
    return pair[0], pair[1]
