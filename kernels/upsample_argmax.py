"""upsample_argmax's Triton kernel: the class of the largest interpolated logit, and its softmax value."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

from fastseg.kernels.cross_entropy_pixels import exp
from fastseg.kernels.launch import Plan, launch, replayed
from fastseg.kernels.upsampling import (
    GRID_ARGUMENTS,
    axes_of,
    cut_groups,
    grid_of,
    in_planes,
    index_of,
    interpolate,
    load_taps,
    locate_groups,
    pixels_of,
    plans_of,
    store,
    tap_offsets,
)

if TYPE_CHECKING:
    from fastseg.ops.upsampling import Upsampling


@triton.jit
def predict(
    input, class_stride, row_taps, column_taps, some, row_weights, column_weights,
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
    ahead = load_taps(pointer, row_taps, column_taps, some, GRID, TYPE)
    for index in range(CLASSES):
        taps = ahead[0].to(ACC), ahead[1].to(ACC), ahead[2].to(ACC), ahead[3].to(ACC)
        pointer += class_stride
        ahead = load_taps(pointer, row_taps, column_taps, some & (index < CLASSES - 1), GRID, TYPE)
        logits = interpolate(taps, row_weights, column_weights, GRID)
        label = tl.where(logits > largest, index, label)
        largest = tl.maximum(largest, logits, propagate_nan=tl.PropagateNan.ALL)
    if tl.max((largest != largest).to(tl.int32)) > 0:
        largest = tl.full((GROUP_H, GROUP_W, BLOCK_G), float("-inf"), ACC)
        label = tl.zeros((GROUP_H, GROUP_W, BLOCK_G), tl.int32)
        for index in range(CLASSES):
            taps = load_taps(input + tl.cast(index, tl.int64) * class_stride, row_taps, column_taps, some, GRID, ACC)
            logits = interpolate(taps, row_weights, column_weights, GRID)
            larger = ((logits <= largest) == 0) & (largest == largest)  # a NaN is larger, and nothing than a NaN
            largest, label = tl.where(larger, logits, largest), tl.where(larger, index, label)
    return largest, label


@triton.jit(do_not_specialize=GRID_ARGUMENTS)
def upsample_argmax_forward(
    input, labels, confidence,
    height, width, out_height, out_width, row_step, column_step, row_passes, column_passes, column_groups, blocks,
    input_strides,
    CLASSES: tl.constexpr, GRID: tl.constexpr, INDEX: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Labels of all pixels, and where ``confidence`` is given their softmax values."""
    ACC: tl.constexpr = tl.float64 if input.dtype.element_ty == tl.float64 else tl.float32
    rows, columns = axes_of(
        height, width, out_height, out_width, row_step, column_step, row_passes, column_passes, GRID, ACC
    )
    image, row_intervals, opened_rows, column_intervals, opened_columns = locate_groups(
        tl.program_id(0), blocks, column_groups, rows, columns, GRID, BLOCK_G
    )
    out_rows, out_columns, inside, row_weights, column_weights, some = pixels_of(opened_rows, opened_columns)
    row_taps = tap_offsets(row_intervals, height, input_strides[2], GRID, INDEX)
    column_taps = tap_offsets(column_intervals, width, input_strides[3], GRID, INDEX)
    input += image * input_strides[0]
    largest, label = predict(
        input, input_strides[1], row_taps, column_taps, some, row_weights, column_weights, CLASSES, GRID, ACC,
        BLOCK_G,
    )  # fmt: skip
    at = image * out_height * out_width + (out_rows.to(INDEX) * out_width + out_columns)
    store(labels + at, label, inside)
    if confidence is not None:
        GROUP_H: tl.constexpr = GRID.group[0]
        GROUP_W: tl.constexpr = GRID.group[1]
        total = tl.zeros((GROUP_H, GROUP_W, BLOCK_G), ACC)
        for index in range(CLASSES):
            pointer = input + tl.cast(index, tl.int64) * input_strides[1]
            taps = load_taps(pointer, row_taps, column_taps, some, GRID, ACC)
            total += exp(interpolate(taps, row_weights, column_weights, GRID) - largest)
        store(confidence + at, 1 / total, inside)


# ---- launcher ----

GROUP_PIXELS = 16  # of a group, at most: here a thread has only two numbers for each

# 0.27 ms for 16 x 150 x 128^2 to 512^2 in bfloat16 (H200, 2026-11-27); with groups of 8 pixels 0.31.
PLANS = plans_of({pixels: {} for pixels in (1, 2, 4, 8, 16)}, Plan({"BLOCK_G": 64}, num_warps=2))
PLANS["1-pixels-double"] = PLANS["1-pixels-double"]._replace(num_warps=1)  # on two, one register spills


@replayed
def forward(tensors: tuple[Tensor, Tensor, Tensor], upsampling: Upsampling) -> None:
    """Fills labels and confidence, empty where it isn't wanted, from input; see `fastseg.ops.upsample_argmax`."""
    input, labels, confidence = tensors
    input = in_planes(input)
    grid, arguments = grid_of(input.shape[2:], labels.shape[1:], upsampling, GROUP_PIXELS)
    bucket, plan, cut = cut_groups(upsample_argmax_forward, PLANS, input, grid, arguments)
    arguments |= {
        "input": input, "labels": labels, "confidence": confidence if len(confidence) > 0 else None,
        **cut, "input_strides": input.stride(), "CLASSES": input.shape[1],
        "INDEX": index_of(labels.shape, input),
    }  # fmt: skip
    launch(upsample_argmax_forward, bucket, plan, input.shape[0] * cut["blocks"], arguments)
