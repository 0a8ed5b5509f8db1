"""The checks of arguments that several operators share."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from fastseg import reference
from fastseg.ops.arguments import integer
from fastseg.ops.losses.options import accumulation_dtype
from fastseg.ops.upsampling import MODES

IntOrPair = int | tuple[int, ...]
FloatOrPair = float | tuple[float, ...]

FLOATING_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LABEL_DTYPES = (torch.uint8, torch.int16, torch.int32, torch.int64)  # those that the kernels read
WIDER_DTYPES = {torch.int8: torch.int16, torch.uint16: torch.int32, torch.uint32: torch.int64, torch.uint64: None}
LARGEST_LABEL = torch.iinfo(torch.int64).max


def without_batch(results: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
    """Results for a batch of one as those for its image."""
    return tuple(result.squeeze(0) for result in results) if isinstance(results, tuple) else results.squeeze(0)


def check_logits(input: Tensor) -> int:
    """The number of classes of logits ``[C]`` or ``[N, C, ...]``."""
    shape = tuple(input.shape)
    if not shape:
        raise ValueError("input: expected [C], [N, C] or [N, C, d1, ...], got a scalar")
    classes = shape[min(1, len(shape) - 1)]
    if classes == 0:
        raise ValueError(f"input: expected at least one class, got shape {shape}")
    if input.dtype not in FLOATING_DTYPES:
        raise TypeError(f"input: expected float32, float64, bfloat16 or float16, got {input.dtype}")
    return classes


def check_batch(input: Tensor) -> None:
    """Refuses what isn't logits ``[N, C, ...]`` with pixels, of which an image's sums are made."""
    check_logits(input)
    if input.ndim < 2 or 0 in input.shape[2:]:
        raise ValueError(f"input: expected [N, C, d1, ...] with at least one pixel, got shape {tuple(input.shape)}")


def pixels_of(input: Tensor) -> tuple[int, ...]:
    """The shape of what has one value for each pixel of logits ``[C]`` or ``[N, C, ...]``."""
    return (*input.shape[:1], *input.shape[2:]) if input.ndim > 1 else ()


def check_map(input: Tensor, volumes: bool = False) -> int:
    """The number of classes of logits that are to be upsampled, ``[N, C, h, w]`` or maybe ``[N, C, d, h, w]``."""
    if input.ndim != 4 and not (volumes and input.ndim == 5):
        expected = "[N, C, h, w] or [N, C, d, h, w]" if volumes else "[N, C, h, w]"
        raise ValueError(f"input: expected {expected}, got shape {tuple(input.shape)}")
    if 0 in input.shape[2:]:
        raise ValueError(f"input: expected at least one row and one column, got shape {tuple(input.shape)}")
    return check_logits(input)


def resolve_size(
    input: Tensor, size: IntOrPair | None, scale_factor: FloatOrPair | None
) -> tuple[tuple[int, ...], tuple[float, ...] | None]:
    """The output's size, and the factors for its axes where they gave it."""
    if (size is None) == (scale_factor is None):
        raise ValueError(f"size: expected either it or scale_factor, got {size} and {scale_factor}")
    before = input.shape[2:]
    if size is not None:
        output = tuple(integer("size", extent, 0) for extent in _each_axis("size", size, len(before)))
    else:
        factors = _each_axis("scale_factor", scale_factor, len(before))
        if not all(map(_is_factor, factors)):
            raise ValueError(f"scale_factor: expected finite numbers above 0, got {scale_factor}")
        output = tuple(math.floor(extent * factor) for extent, factor in zip(before, factors, strict=True))
    if any(extent < 1 for extent in output):
        what = f"size {size}" if size is not None else f"scale_factor {scale_factor}"
        got = " x ".join(map(str, output))
        raise ValueError(f"size: expected at least one row and one column, got {got} of {what}")
    return output, None if size is not None else factors


def _is_factor(value: Any) -> bool:
    """Whether a value is a number that sizes can be multiplied by; written so that NaN isn't."""
    is_number = isinstance(value, Real | torch.SymFloat | torch.SymInt)
    return is_number and bool(0 < value < math.inf)


def _each_axis(name: str, value: Any, axes: int) -> tuple[Any, ...]:
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,) * axes
    if len(values) != axes:
        expected = "(height, width)" if axes == 2 else "(depth, height, width)"
        raise ValueError(f"{name}: expected one number or {expected}, got {value}")
    return values


def resolve_label_dtype(dtype: torch.dtype | None, classes: int) -> torch.dtype:
    """The dtype of predicted labels, which may not be too small for the classes."""
    dtype = dtype or reference.label_dtype(classes)
    if dtype not in LABEL_DTYPES:
        raise TypeError(f"dtype: expected uint8, int16, int32 or int64, got {dtype}")
    if classes - 1 > torch.iinfo(dtype).max:
        raise ValueError(f"dtype: {dtype} can't hold the labels of {classes} classes")
    return dtype


def check_grid(mode: str, align_corners: bool, axes: int = 2) -> None:
    """Refuses what `torch.nn.functional.interpolate` has no grid for, of images or of volumes."""
    nearest, linear = MODES[axes]
    if mode not in (nearest, linear):
        of_volumes = " for [N, C, d, h, w]" if axes == 3 else ""
        raise ValueError(f'mode: expected "{linear}" or "{nearest}"{of_volumes}, got {mode!r}')
    if align_corners and mode == nearest:
        raise ValueError(f'align_corners: only mode "{linear}" has corners to align')


def check_device(name: str, tensor: Tensor, input: Tensor) -> None:
    """Refuses a tensor that is elsewhere than input."""
    if tensor.device != input.device:
        raise ValueError(f"{name}: expected input's device {input.device}, got {tensor.device}")


def widen_labels(labels: Tensor, ignore_index: int | None) -> Tensor:
    """Labels of any integer dtype in one that the kernels read, with the same values.

    int64 can't hold those of uint64 from 2^63 on, which are neither a class nor ``ignore_index``: they become the
    largest that it holds and that isn't ``ignore_index``, and are refused as it is.
    """
    if labels.dtype == torch.uint64:
        signed = labels.view(torch.int64)
        return signed.masked_fill(signed < 0, LARGEST_LABEL - (ignore_index == LARGEST_LABEL))
    wider = WIDER_DTYPES.get(labels.dtype)
    return labels if wider is None else labels.to(wider)


def check_labels(target: Tensor, shape: tuple[int, ...], input: Tensor, ignore_index: int | None) -> Tensor:
    """The labels in a dtype that the kernels read; refuses a target that isn't labels of a shape."""
    check_device("target", target, input)
    if target.dtype not in LABEL_DTYPES and target.dtype not in WIDER_DTYPES:
        raise TypeError(f"target: expected labels of an integer dtype, got {target.dtype}")
    if target.shape != shape:
        got = f"{tuple(target.shape)} in {target.dtype}"
        raise ValueError(f"target: expected labels of shape {shape}, got {got}{_remedy(target, len(shape))}")
    return widen_labels(target, ignore_index)


def check_label_map(target: Tensor, input: Tensor, ignore_index: int | None) -> Tensor:
    """The labels in a dtype that the kernels read; refuses a target that isn't labels ``[N, H, W]`` of input's N.

    Of volumes they are ``[N, D, H, W]``.
    """
    ndim = input.ndim - 1
    if target.ndim != ndim or 0 in target.shape[1:]:
        expected = "[N, H, W] with rows and columns" if ndim == 3 else "[N, D, H, W] with planes, rows and columns"
        got = f"{tuple(target.shape)}{_remedy(target, ndim)}"
        raise ValueError(f"target: expected labels {expected}, got shape {got}")
    return check_labels(target, (input.shape[0], *target.shape[1:]), input, ignore_index)


def check_shares(target: Tensor, shape: tuple[int, ...], input: Tensor) -> Tensor:
    """Each class's share of a pixel, in a dtype that the kernels read; refuses a target of another shape."""
    check_device("target", target, input)
    if target.shape != shape or 0 in shape[2:]:
        raise ValueError(f"target: expected labels or a target of shape {shape}, got {tuple(target.shape)}")
    if target.dtype == torch.bool:
        return target.view(torch.uint8)
    if target.is_floating_point():
        wide = accumulation_dtype(input)
        return target if target.dtype in FLOATING_DTYPES and wide == accumulation_dtype(target) else target.to(wide)
    if target.dtype not in LABEL_DTYPES and target.dtype not in WIDER_DTYPES:
        raise TypeError(f"target: expected a boolean, integer or floating-point dtype, got {target.dtype}")
    return widen_labels(target, None)


def _remedy(target: Tensor, ndim: int) -> str:
    """What helps where labels, which should have ``ndim`` dimensions, have one of channels, too."""
    channel = target.ndim == ndim + 1 > 1 and target.shape[1] == 1
    return "; labels have no dimension of channels: give target.squeeze(1)" if channel else ""


def check_class_weight(weight: Tensor | None, classes: int, input: Tensor, name: str = "weight") -> None:
    """Refuses a weight that isn't a number for each class."""
    if weight is None:
        return
    if weight.ndim != 1 or weight.shape[0] != classes:
        raise ValueError(f"{name}: expected shape ({classes},), got {tuple(weight.shape)}")
    if not weight.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point dtype, got {weight.dtype}")
    check_device(name, weight, input)


def check_pixel_weight(pixel_weight: Tensor | None, shape: tuple[int, ...], input: Tensor) -> None:
    """Refuses a weight that isn't a number for each pixel."""
    if pixel_weight is None:
        return
    if pixel_weight.shape != shape:
        raise ValueError(f"pixel_weight: expected shape {shape}, got {tuple(pixel_weight.shape)}")
    if not pixel_weight.is_floating_point():
        raise TypeError(f"pixel_weight: expected a floating-point dtype, got {pixel_weight.dtype}")
    check_device("pixel_weight", pixel_weight, input)
