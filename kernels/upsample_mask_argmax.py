"""upsample_mask_argmax's Triton kernel: the masks of some pixels, added up for classes by matrix products."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

from fastseg.kernels import upsampling as up
from fastseg.kernels.launch import Plan, launch, next_power_of_2, replayed
from fastseg.kernels.sigmoid_pixels import sigmoid

if TYPE_CHECKING:
    from fastseg.ops.upsampling import Upsampling

NAN = tl.constexpr(float("nan"))


@triton.jit
def find_largest(sums, classes, CLASSES: tl.constexpr):
    """Of sums [pixels, BLOCK_M] the largest and its class, of equal ones the first, of NaN the first, too."""
    exist = (classes < CLASSES)[None, :]
    places = classes[None, :] + tl.zeros_like(sums).to(tl.int32)
    largest = tl.max(tl.where(exist & (sums == sums), sums, float("-inf")), 1)
    first = tl.min(tl.where(exist & (sums == largest[:, None]), places, CLASSES), 1)
    first_nan = tl.min(tl.where(exist & (sums != sums), places, CLASSES), 1)
    has_nan = first_nan < CLASSES
    return tl.where(has_nan, NAN, largest), tl.where(has_nan, first_nan, first)


@triton.jit
def _masks(
    input, start, query_stride, taps, weights, some,
    QUERIES: tl.constexpr, GRID: tl.constexpr, ACC: tl.constexpr, BLOCK_Q: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """The masks [PIXELS, BLOCK_Q] of the queries from ``start`` on."""
    GROUP_H: tl.constexpr = GRID.group[0]  # Triton 3.6 takes no part of a tuple in a shape
    GROUP_W: tl.constexpr = GRID.group[1]
    queries = start + tl.arange(0, BLOCK_Q)
    of_queries = (queries.to(tl.int64) * query_stride)[:, None, None, None]
    exist = (queries < QUERIES)[:, None, None, None]
    masks = sigmoid(up.load_logits(input + of_queries, taps, weights, exist & some, GRID, ACC))
    masks = tl.broadcast_to(masks, (BLOCK_Q, GROUP_H, GROUP_W, masks.shape[3]))
    return tl.trans(tl.reshape(masks, (BLOCK_Q, PIXELS)))


@triton.jit(do_not_specialize=up.GRID_ARGUMENTS)
def upsample_mask_argmax_forward(
    input, class_probabilities, labels,
    height, width, out_height, out_width, row_step, column_step, row_passes, column_passes, column_groups, blocks,
    input_strides, probability_strides,
    QUERIES: tl.constexpr, CLASSES: tl.constexpr, PRECISION: tl.constexpr, GRID: tl.constexpr, INDEX: tl.constexpr,
    ACC: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Labels of all pixels. Of more than BLOCK_Q queries, the masks are made again for each BLOCK_M classes."""
    image, opened, taps = up.locate_groups(
        tl.program_id(0), height, width, out_height, out_width, row_step, column_step, row_passes, column_passes,
        column_groups, blocks, input_strides, GRID, INDEX, ACC, BLOCK_G,
    )  # fmt: skip
    out_rows, out_columns, inside, weights, some = opened
    input += image * input_strides[0]
    class_probabilities += image * probability_strides[0]
    GROUP_H: tl.constexpr = GRID.group[0]
    GROUP_W: tl.constexpr = GRID.group[1]
    PIXELS: tl.constexpr = GROUP_H * GROUP_W * BLOCK_G
    best, label = tl.full((PIXELS,), float("-inf"), ACC), tl.zeros((PIXELS,), tl.int32)
    if QUERIES <= BLOCK_Q:
        masks = _masks(input, 0, input_strides[1], taps, weights, some, QUERIES, GRID, ACC, BLOCK_Q, PIXELS)
    for first in range(0, CLASSES, BLOCK_M):
        classes = first + tl.arange(0, BLOCK_M)
        sums = tl.zeros((PIXELS, BLOCK_M), ACC)
        for start in range(0, QUERIES, BLOCK_Q):
            if QUERIES > BLOCK_Q:
                masks = _masks(input, start, input_strides[1], taps, weights, some, QUERIES, GRID, ACC, BLOCK_Q, PIXELS)
            queries = start + tl.arange(0, BLOCK_Q)
            at = classes[None, :] * probability_strides[2] + queries[:, None] * probability_strides[1]
            shares = tl.load(class_probabilities + at, (classes[None, :] < CLASSES) & (queries[:, None] < QUERIES), 0)
            sums = tl.dot(masks, shares, sums, input_precision=PRECISION, out_dtype=ACC)
        largest, place = find_largest(sums, classes, CLASSES)
        larger = ((largest <= best) == 0) & (best == best)  # a NaN is larger, and nothing than a NaN
        best, label = tl.where(larger, largest, best), tl.where(larger, place, label)
    at = image * out_height * out_width + (out_rows.to(INDEX) * out_width + out_columns)
    tl.store(labels + up.flat(at), label, up.flat(inside))


# ---- launcher ----

# All queries of a usual network at once: their masks are made once for all classes, and are the first factor, which a
# product on tensor cores takes out of registers. 16 x 100 x 128^2 to 512^2 of 150 classes took 2.15 ms in TF32 (H200,
# 2026-11-27); with 16 classes at a time 2.28, with 64 2.91, with 8 warps 3.55, with 16 queries and all classes
# at a time 2.16. Masks as the second factor took 2.5 to 4.6, torch.compile 2.92.
PLANS = up.plans_of(
    {pixels: {"BLOCK_G": 64 // pixels} for pixels in (1, 2, 4, 8)},
    Plan({"BLOCK_Q": 128, "BLOCK_M": 32}, num_warps=4),
)
for bucket, plan in PLANS.items():
    if bucket.endswith("-double"):
        PLANS[bucket] = plan._replace(tile=plan.tile | {"BLOCK_Q": 16}, num_warps=8)
LEAST = 16  # of the sides of a product on tensor cores


@replayed
def forward(tensors: tuple[Tensor, Tensor, Tensor], takes_tf32: bool, upsampling: Upsampling) -> None:
    """Fills labels from masks' logits and class probabilities; see `fastseg.ops.upsample_mask_argmax`."""
    input, class_probabilities, labels = tensors
    queries, classes = class_probabilities.shape[1:]
    grid, arguments = up.grid_of(up.in_planes(input), labels, upsampling)
    arguments |= {
        "class_probabilities": class_probabilities, "labels": labels,
        "probability_strides": class_probabilities.stride(), "QUERIES": queries, "CLASSES": classes,
        "PRECISION": "tf32" if takes_tf32 else "ieee",
    }  # fmt: skip
    kernel = upsample_mask_argmax_forward
    bucket, plan, cut = up.cut_groups(kernel, PLANS, grid, arguments)
    sides = {
        "BLOCK_Q": next_power_of_2(queries, LEAST, plan.tile["BLOCK_Q"]),
        "BLOCK_M": next_power_of_2(classes, LEAST, plan.tile["BLOCK_M"]),
    }  # fmt: skip
    plan = plan._replace(tile={**plan.tile, **sides})
    launch(kernel, bucket, plan, len(input) * cut["blocks"], arguments | cut)
