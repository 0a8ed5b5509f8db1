"""What the pixel losses share: their options, made and checked once, and what is done before and after an operator."""

from __future__ import annotations

import torch
from torch import Tensor

from fastseg import reference
from fastseg.functional._checks import check_grid
from fastseg.ops.losses.options import REDUCTIONS, LossOptions, accumulation_dtype

# Lengths of the rows that a sequence's pixels are laid out in: the first that divides their number. The operator works
# row by row, in parallel, and keeps a few in cache.
ROW_LENGTHS = (256, 16, 1)


def make_options(
    ignore_index: int, reduction: str, label_smoothing: float = 0.0, mode: str = "nearest",
    align_corners: bool = False, axes: int = 2,
) -> LossOptions:  # fmt: skip
    """The options of a loss, of images of so many axes; refuses what has no meaning."""
    if reduction not in REDUCTIONS:
        raise ValueError(f'reduction: expected "none", "mean" or "sum", got {reduction!r}')
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing: expected a number in [0, 1], got {label_smoothing}")
    check_grid(mode, align_corners, axes)
    return LossOptions(ignore_index, reduction, label_smoothing, mode, align_corners)


def without_reduction(options: LossOptions) -> LossOptions:
    """The same options for a loss per pixel, which something else is to be done to."""
    return LossOptions(options.ignore_index, "none", options.label_smoothing, options.mode, options.align_corners)


def in_accumulation_dtype(weight: Tensor | None, input: Tensor) -> Tensor | None:
    """The classes' weights as the operators take them."""
    return None if weight is None else weight.to(accumulation_dtype(input)).contiguous()


def weigh_pixels(
    losses: Tensor, target: Tensor, weight: Tensor | None, pixel_weight: Tensor, options: LossOptions
) -> Tensor:
    """Losses of pixels, weighed and reduced."""
    return reference.weigh(losses, target, weight, pixel_weight, options.ignore_index, options.reduction)


def in_dtype(loss: Tensor, dtype: torch.dtype) -> Tensor:
    """A loss in the accumulation dtype as one of ``dtype``; unchanged where autocast asks for float32."""
    if loss.dtype == dtype:
        return loss
    device = loss.device.type
    # TorchDynamo can't trace is_autocast_available (torch 2.11); what it compiles for has autocast.
    available = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device)
    autocasts = available and torch.is_autocast_enabled(device)
    return loss if autocasts and dtype.itemsize < loss.dtype.itemsize else loss.to(dtype)


def as_map(tensor: Tensor, pixel_dim: int) -> Tensor:
    """The tensor with two dimensions of pixels, a view where its strides allow one."""
    if tensor.ndim == pixel_dim:
        return tensor[..., None, None]
    if tensor.ndim > pixel_dim + 1:
        return tensor.flatten(pixel_dim, -2)
    columns = next(columns for columns in ROW_LENGTHS if tensor.shape[-1] % columns == 0)
    return tensor.unflatten(-1, (-1, columns))
