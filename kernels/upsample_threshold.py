"""upsample_threshold's Triton kernels: masks of groups of pixels, and then the scores and boxes of whole masks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastseg.kernels import upsampling as up
from fastseg.kernels.cross_entropy_pixels import from_bits
from fastseg.kernels.launch import Plan, bits_of, cdiv, choose, launch, replayed, scratch
from fastseg.kernels.sigmoid_pixels import sigmoid

if TYPE_CHECKING:
    from fastseg.ops.upsampling import Upsampling

NOWHERE = tl.constexpr(2**31 - 1)  # farther than any position
PLACES = tl.constexpr(5)  # what is kept of where a mask is: pixels, left, top, right, bottom


@triton.jit(do_not_specialize=[*up.GRID_ARGUMENTS, "bound_bits", "class_blocks"])
def upsample_threshold_forward(
    input, masks, sums, places, bound_bits,
    height, width, out_height, out_width, row_step, column_step, row_passes, column_passes, column_groups, blocks,
    class_blocks, input_strides,
    CLASSES: tl.constexpr, GRID: tl.constexpr, INDEX: tl.constexpr, ACC: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Masks of BLOCK_C classes, and of each the program's share, where ``sums`` [masks, blocks] are given.

    That is the sum of the probabilities inside, and in ``places`` [PLACES, masks, blocks] how many there are, and the
    first and last column and row.
    """
    program = tl.program_id(0)
    part, opened, taps = up.locate_groups(
        program, height, width, out_height, out_width, row_step, column_step, row_passes, column_passes, column_groups,
        blocks, input_strides, GRID, INDEX, ACC, BLOCK_G,
    )  # fmt: skip
    out_rows, out_columns, inside, weights, some = opened
    image, first = part // class_blocks, (part % class_blocks * BLOCK_C).to(tl.int32)
    input += image * input_strides[0]
    bound = from_bits(bound_bits, ACC)
    at = out_rows.to(INDEX) * out_width + out_columns
    for index in range(first, tl.minimum(first + BLOCK_C, CLASSES)):
        pointer = input + tl.cast(index, tl.int64) * input_strides[1]
        logits = up.load_logits(pointer, taps, weights, some, GRID, ACC)
        above = inside & (logits > bound)
        mask = image * CLASSES + index
        up.store(masks + mask * out_height * out_width + at, above, inside)
        if sums is not None:
            cell = mask * blocks + program % blocks
            stride = tl.num_programs(0).to(tl.int64) // (blocks * class_blocks) * CLASSES * blocks
            tl.store(sums + cell, tl.sum(up.flat(tl.where(above, sigmoid(logits), 0.0))))
            tl.store(places + cell, tl.sum(up.flat(above.to(tl.int32))))
            tl.store(places + stride + cell, tl.min(up.flat(tl.where(above, out_columns, NOWHERE))))
            tl.store(places + 2 * stride + cell, tl.min(up.flat(tl.where(above, out_rows, NOWHERE))))
            tl.store(places + 3 * stride + cell, tl.max(up.flat(tl.where(above, out_columns, -1))))
            tl.store(places + 4 * stride + cell, tl.max(up.flat(tl.where(above, out_rows, -1))))


@triton.jit(do_not_specialize=["blocks"])
def gather_scores(sums, places, scores, boxes, blocks, BLOCK_B: tl.constexpr):
    """Score and box of a mask, from its shares in the order of the blocks."""
    mask = tl.program_id(0).to(tl.int64)
    stride = tl.num_programs(0).to(tl.int64) * blocks
    total = tl.zeros((BLOCK_B,), sums.dtype.element_ty)
    count = tl.zeros((BLOCK_B,), tl.int64)
    left, top = tl.full((BLOCK_B,), NOWHERE, tl.int32), tl.full((BLOCK_B,), NOWHERE, tl.int32)
    right, bottom = tl.full((BLOCK_B,), -1, tl.int32), tl.full((BLOCK_B,), -1, tl.int32)
    for start in range(0, blocks, BLOCK_B):
        block = start + tl.arange(0, BLOCK_B)
        exist, cells = block < blocks, mask * blocks + block
        total += tl.load(sums + cells, exist, other=0)
        count += tl.load(places + cells, exist, other=0)
        left = tl.minimum(left, tl.load(places + stride + cells, exist, other=NOWHERE))
        top = tl.minimum(top, tl.load(places + 2 * stride + cells, exist, other=NOWHERE))
        right = tl.maximum(right, tl.load(places + 3 * stride + cells, exist, other=-1))
        bottom = tl.maximum(bottom, tl.load(places + 4 * stride + cells, exist, other=-1))
    pixels = tl.sum(count)
    tl.store(scores + mask, tl.sum(total) / tl.maximum(pixels, 1).to(total.dtype))
    boxes += mask * 4
    tl.store(boxes, tl.where(pixels > 0, tl.min(left), 0))
    tl.store(boxes + 1, tl.where(pixels > 0, tl.min(top), 0))
    tl.store(boxes + 2, tl.max(right) + 1)
    tl.store(boxes + 3, tl.max(bottom) + 1)


# ---- launcher ----

PLANS = up.plans_of({pixels: {} for pixels in (1, 2, 4, 8)}, Plan({"BLOCK_C": 8, "BLOCK_G": 256}, num_warps=8))
GATHER_PLANS = {"all": Plan({"BLOCK_B": 128})}


@replayed
def forward(tensors: tuple[Tensor, Tensor, Tensor, Tensor], bound: float, upsampling: Upsampling) -> None:
    """Fills masks, scores and boxes, empty where they aren't wanted; see `fastseg.ops.upsample_threshold`."""
    input, masks, scores, boxes = tensors
    images, classes = masks.shape[:2]
    grid, arguments = up.grid_of(up.in_planes(input), masks, upsampling)
    bucket, plan, cut = up.cut_groups(upsample_threshold_forward, PLANS, grid, arguments)
    class_blocks, with_scores = cdiv(classes, plan.tile["BLOCK_C"]), len(scores) > 0
    accumulation = torch.float64 if input.dtype == torch.float64 else torch.float32
    shares = (images * classes * with_scores, cut["blocks"])
    sums = scratch(shares, accumulation, input.device)
    places = scratch((PLACES.value, *shares), torch.int32, input.device)
    arguments |= {
        "masks": masks, "sums": sums if with_scores else None, "places": places if with_scores else None,
        "bound_bits": bits_of(bound), **cut, "class_blocks": class_blocks,
    }  # fmt: skip
    launch(upsample_threshold_forward, bucket, plan, images * class_blocks * cut["blocks"], arguments)
    if not with_scores:
        return
    plan = choose(gather_scores, "all", GATHER_PLANS, input.device)
    of_masks = {"sums": sums, "places": places, "scores": scores, "boxes": boxes, "blocks": cut["blocks"]}
    launch(gather_scores, "all", plan, images * classes, of_masks)
