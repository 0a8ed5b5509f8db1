"""upsample_confusion_matrix's Triton kernel: predictions of groups of pixels, counted where they are made."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

from fastseg.kernels.launch import replayed
from fastseg.kernels.upsample_argmax import GROUP_PIXELS, PLANS, predict
from fastseg.kernels.upsampling import GRID_ARGUMENTS, flat, grid_of, in_planes, launch_groups, load, locate_groups

if TYPE_CHECKING:
    from fastseg.ops.upsampling import Upsampling

# Cells of the matrix that a program counts by itself, before it sends each other pixel's one to memory: most of its
# pixels, which lie side by side, are of few cells, and additions to the same address wait for each other.
OWN_CELLS = tl.constexpr(2)


@triton.jit(do_not_specialize=[*GRID_ARGUMENTS, "ignore_index"])
def upsample_confusion_matrix_forward(
    input, target, counts,
    height, width, out_height, out_width, row_step, column_step, row_passes, column_passes, column_groups, blocks,
    input_strides, target_strides, ignore_index,
    CLASSES: tl.constexpr, IGNORES: tl.constexpr, GRID: tl.constexpr, INDEX: tl.constexpr, ACC: tl.constexpr,
    BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Adds pixels to counts [CLASSES * CLASSES + 1], those of labels outside the classes to the last.

    Whole numbers add up to the same in any order.
    """
    image, opened, taps = locate_groups(
        tl.program_id(0), height, width, out_height, out_width, row_step, column_step, row_passes, column_passes,
        column_groups, blocks, input_strides, GRID, INDEX, ACC, BLOCK_G,
    )  # fmt: skip
    out_rows, out_columns, inside, weights, some = opened
    input += image * input_strides[0]
    _, prediction = predict(input, input_strides[1], taps, weights, some, CLASSES, GRID, ACC, BLOCK_G)
    offsets = out_rows.to(INDEX) * target_strides[1] + out_columns.to(INDEX) * target_strides[2]
    labels = flat(load(target + image * target_strides[0] + offsets, inside, other=0)).to(tl.int64)
    prediction, inside = flat(prediction), flat(inside)
    valid = (labels >= 0) & (labels < CLASSES)
    left = inside & (labels != ignore_index) if IGNORES else inside
    cells = tl.where(valid, labels * CLASSES + prediction, CLASSES * CLASSES).to(tl.int32)
    for _ in tl.static_range(OWN_CELLS):
        cell = tl.max(tl.where(left, cells, -1))
        same = left & (cells == cell)
        tl.atomic_add(counts + cell, tl.sum(same.to(tl.int64)), cell >= 0, sem="relaxed")
        left = left & (cells != cell)
    tl.atomic_add(counts + cells, 1, left, sem="relaxed")


# ---- launcher ----


@replayed
def forward(tensors: tuple[Tensor, Tensor, Tensor], ignore_index: int | None, upsampling: Upsampling) -> None:
    """Adds input's predictions and target to counts [C * C + 1]; see `fastseg.ops.upsample_confusion_matrix`."""
    input, target, counts = tensors
    grid, arguments = grid_of(in_planes(input), target, upsampling, GROUP_PIXELS)
    arguments |= {
        "target": target, "counts": counts, "target_strides": target.stride(), "ignore_index": ignore_index or 0,
        "IGNORES": ignore_index is not None,
    }  # fmt: skip
    launch_groups(upsample_confusion_matrix_forward, PLANS, grid, arguments)
