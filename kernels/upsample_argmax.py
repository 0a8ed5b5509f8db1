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


# Classes from which they are compared in pairs: 150 then take 0.212 ms for 0.252 (16 x 128^2 to 512^2 in bfloat16), 19
# would take 3% more (H200, 2026-11-27).
LEAST_PAIRED = tl.constexpr(32)


@triton.jit
def _load(input, index, class_stride, offsets, mask, CLASSES: tl.constexpr, GRID: tl.constexpr):
    """A class' taps; those of the last one where there is none."""
    pointer = input + tl.cast(tl.minimum(index, CLASSES - 1), tl.int64) * class_stride
    return up.load_taps(pointer, offsets, mask, GRID, input.dtype.element_ty)


@triton.jit
def _interpolate(taps, weights, GRID: tl.constexpr, ACC: tl.constexpr):
    taps = taps[0].to(ACC), taps[1].to(ACC), taps[2].to(ACC), taps[3].to(ACC)
    return up.interpolate(taps, weights, GRID)


@triton.jit
def _decide(input, label, largest, class_stride, offsets, weights, some, GRID: tl.constexpr, ACC: tl.constexpr):
    """The labels: the first class of pairs, or the next where that hasn't the largest logit; rows of groups in turn."""
    rows = tl.arange(0, GRID.group[0])[:, None, None]
    row_weights, column_weights = weights
    for row in range(GRID.group[0]):
        here = rows == row
        first = tl.sum(tl.where(here, label, 0), 0, keep_dims=True)
        wanted = tl.sum(tl.where(here, largest, 0.0), 0, keep_dims=True)
        near = tl.sum(tl.where(here, row_weights[0], 0.0), 0, keep_dims=True)
        far = tl.sum(tl.where(here, row_weights[1], 0.0), 0, keep_dims=True)
        pointers = input + first.to(tl.int64) * class_stride
        logits = up.load_logits(pointers, offsets, ((near, far), column_weights), some, GRID, ACC)
        label += tl.where(here & (logits != wanted), 1, 0)
    return label


@triton.jit
def predict(
    input, class_stride, offsets, weights, some,
    CLASSES: tl.constexpr, GRID: tl.constexpr, ACC: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """The largest logits of groups' pixels and their classes, of equal ones the first, of NaN the first, too.

    A class' taps are loaded while those of the class before it are compared. That takes a comparison, a selection and
    a maximum for each pixel; in pairs, one maximum more for two classes, and in the end a look at which of the two it
    was. All that leaves the class of a NaN unknown: where there is one, all is done again with care.
    """
    GROUP_H: tl.constexpr = GRID.group[0]
    GROUP_W: tl.constexpr = GRID.group[1]
    PAIRED: tl.constexpr = CLASSES >= LEAST_PAIRED
    STEP: tl.constexpr = 2 if PAIRED else 1
    largest = tl.full((GROUP_H, GROUP_W, BLOCK_G), float("-inf"), ACC)
    label = tl.zeros((GROUP_H, GROUP_W, BLOCK_G), tl.int32)
    ahead = _load(input, 0, class_stride, offsets, some, CLASSES, GRID)
    second_ahead = _load(input, 1, class_stride, offsets, some, CLASSES, GRID) if PAIRED else ahead
    for first in range(0, CLASSES, STEP):
        logits = _interpolate(ahead, weights, GRID, ACC)
        left = some & (first + STEP < CLASSES)
        ahead = _load(input, first + STEP, class_stride, offsets, left, CLASSES, GRID)
        if PAIRED:
            others = _interpolate(second_ahead, weights, GRID, ACC)
            second_ahead = _load(input, first + 3, class_stride, offsets, left, CLASSES, GRID)
            logits = tl.maximum(logits, others, propagate_nan=tl.PropagateNan.ALL)
        label = tl.where(logits > largest, first, label)
        largest = tl.maximum(largest, logits, propagate_nan=tl.PropagateNan.ALL)
    if PAIRED:
        label = _decide(input, label, largest, class_stride, offsets, weights, some, GRID, ACC)
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
    labels += image * out_height * out_width
    at = out_rows.to(INDEX) * out_width + out_columns
    up.store(labels + at, label, inside)
    if confidence is not None:
        GROUP_H: tl.constexpr = GRID.group[0]
        GROUP_W: tl.constexpr = GRID.group[1]
        total = tl.zeros((GROUP_H, GROUP_W, BLOCK_G), ACC)
        for index in range(CLASSES):
            pointer = input + tl.cast(index, tl.int64) * input_strides[1]
            total += exp(up.load_logits(pointer, taps, weights, some, GRID, ACC) - largest)
        up.store(confidence + image * out_height * out_width + at, 1 / total, inside)


# ---- launcher ----

GROUP_PIXELS = 16  # of a group, at most: here a thread has only two numbers for each

PLANS = up.plans_of({pixels: {} for pixels in (1, 2, 4, 8, 16)}, Plan({"BLOCK_G": 64}, num_warps=2))
# A thread with so few lets more programs run: without the limit, 0.257 ms.
PLANS["16-pixels"] = Plan({"BLOCK_G": 64}, num_warps=2, max_registers=128)
PLANS["1-pixels-double"] = PLANS["1-pixels-double"]._replace(num_warps=1)  # on two, one register spills


@replayed
def forward(tensors: tuple[Tensor, Tensor, Tensor], upsampling: Upsampling) -> None:
    """Fills labels and confidence, empty where it isn't wanted, from input; see `fastseg.ops.upsample_argmax`."""
    input, labels, confidence = tensors
    grid, arguments = up.grid_of(up.in_planes(input), labels, upsampling, GROUP_PIXELS)
    arguments |= {"labels": labels, "confidence": confidence if len(confidence) > 0 else None}
    up.launch_groups(upsample_argmax_forward, PLANS, grid, arguments)
