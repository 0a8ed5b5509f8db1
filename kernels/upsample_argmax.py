"""upsample_argmax's Triton kernel: the class of the largest interpolated logit, and its softmax value."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

from fastseg.kernels import upsampling as up
from fastseg.kernels.cross_entropy_pixels import exp
from fastseg.kernels.launch import Plan, replayed

if TYPE_CHECKING:
    from fastseg.ops.upsampling import Upsampling


@triton.jit
def predict(
    input, class_stride, offsets, weights, some,
    CLASSES: tl.constexpr, GRID: tl.constexpr, ACC: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """The largest logits of groups' pixels and their classes, of equal ones the first, of NaN the first, too.

    A class' taps are loaded while those of the class before it are compared. That takes a comparison, a selection and
    a maximum for each pixel, but leaves the class of a NaN unknown: where there is one, all is done again with care.
    """
    GROUP_H: tl.constexpr = GRID.group[0]
    GROUP_W: tl.constexpr = GRID.group[1]
    TYPE: tl.constexpr = input.dtype.element_ty
    largest = tl.full((GROUP_H, GROUP_W, BLOCK_G), float("-inf"), ACC)
    label = tl.zeros((GROUP_H, GROUP_W, BLOCK_G), tl.int32)
    pointer = input
    ahead = up.load_taps(pointer, offsets, some, GRID, TYPE)
    for index in range(CLASSES):
        taps = ahead[0].to(ACC), ahead[1].to(ACC), ahead[2].to(ACC), ahead[3].to(ACC)
        pointer += class_stride
        ahead = up.load_taps(pointer, offsets, some & (index < CLASSES - 1), GRID, TYPE)
        logits = up.interpolate(taps, weights, GRID)
        label = tl.where(logits > largest, index, label)
        largest = tl.maximum(largest, logits, propagate_nan=tl.PropagateNan.ALL)
    if tl.max((largest != largest).to(tl.int32)) > 0:
        largest = tl.full((GROUP_H, GROUP_W, BLOCK_G), float("-inf"), ACC)
        label = tl.zeros((GROUP_H, GROUP_W, BLOCK_G), tl.int32)
        for index in range(CLASSES):
            logits = up.load_logits(input + tl.cast(index, tl.int64) * class_stride, offsets, weights, some, GRID, ACC)
            larger = ((logits <= largest) == 0) & (largest == largest)  # a NaN is larger, and nothing than a NaN
            largest, label = tl.where(larger, logits, largest), tl.where(larger, index, label)
    return largest, label


@triton.jit(do_not_specialize=up.GRID_ARGUMENTS)
def upsample_argmax_forward(
    input, labels, confidence,
    height, width, out_height, out_width, row_step, column_step, row_passes, column_passes, column_groups, blocks,
    input_strides,
    CLASSES: tl.constexpr, GRID: tl.constexpr, INDEX: tl.constexpr, ACC: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Labels of all pixels, and where ``confidence`` is given their softmax values."""
    image, opened, taps = up.locate_groups(
        tl.program_id(0), height, width, out_height, out_width, row_step, column_step, row_passes, column_passes,
        column_groups, blocks, input_strides, GRID, INDEX, ACC, BLOCK_G,
    )  # fmt: skip
    out_rows, out_columns, inside, weights, some = opened
    input += image * input_strides[0]
    largest, label = predict(input, input_strides[1], taps, weights, some, CLASSES, GRID, ACC, BLOCK_G)
    at = image * out_height * out_width + (out_rows.to(INDEX) * out_width + out_columns)
    up.store(labels + at, label, inside)
    if confidence is not None:
        GROUP_H: tl.constexpr = GRID.group[0]
        GROUP_W: tl.constexpr = GRID.group[1]
        total = tl.zeros((GROUP_H, GROUP_W, BLOCK_G), ACC)
        for index in range(CLASSES):
            pointer = input + tl.cast(index, tl.int64) * input_strides[1]
            total += exp(up.load_logits(pointer, taps, weights, some, GRID, ACC) - largest)
        up.store(confidence + at, 1 / total, inside)


# ---- launcher ----

GROUP_PIXELS = 16  # of a group, at most: here a thread has only two numbers for each

# 0.27 ms for 16 x 150 x 128^2 to 512^2 in bfloat16 (H200, 2026-11-27); with groups of 8 pixels 0.31.
PLANS = up.plans_of({pixels: {} for pixels in (1, 2, 4, 8, 16)}, Plan({"BLOCK_G": 64}, num_warps=2))
PLANS["1-pixels-double"] = PLANS["1-pixels-double"]._replace(num_warps=1)  # on two, one register spills


@replayed
def forward(tensors: tuple[Tensor, Tensor, Tensor], upsampling: Upsampling) -> None:
    """Fills labels and confidence, empty where it isn't wanted, from input; see `fastseg.ops.upsample_argmax`."""
    input, labels, confidence = tensors
    grid, arguments = up.grid_of(up.in_planes(input), labels, upsampling, GROUP_PIXELS)
    arguments |= {"labels": labels, "confidence": confidence if len(confidence) > 0 else None}
    up.launch_groups(upsample_argmax_forward, PLANS, grid, arguments)
