"""cross_entropy's forward Triton kernel for labels of channels_last logits: dense rows, each of a pixel's classes.

Rows of 19 or 150 classes fill neither whole vectors nor whole warps, and a warp that has a row in its lanes spends most
of its instructions on passing numbers between them. So a program reads its rows as one stretch of memory, in whole
vectors, and `tl.gather` hands each thread the logits of a pixel of its own, through shared memory: then its sums need
no other thread. For a pixel a warp runs (sm_90, bfloat16) 11 instructions for 19 classes and 50 for 150; of the kernel
for any layout 73 and 153, several times what reading takes. Backward, which sums nothing, gains nothing from this.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastseg.kernels.cross_entropy_pixels import (
    add_classes,
    from_bits,
    label_losses,
    load_labels,
    store_forward,
)
from fastseg.kernels.launch import Plan, next_power_of_2


@triton.jit(do_not_specialize=["ignore_index", "smoothing_bits"])
def cross_entropy_forward_rows(
    input, target, weight, loss, statistics, total_weight, partials, pixels, target_pixel, ignore_index, smoothing_bits,
    CLASSES: tl.constexpr, SMOOTHED: tl.constexpr, REDUCED: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, STRETCH: tl.constexpr,
):  # fmt: skip
    """As `cross_entropy_forward`; STRETCH is a power of two, and at least BLOCK_P * CLASSES."""
    ACC: tl.constexpr = statistics.dtype.element_ty
    first = tl.program_id(0).to(tl.int64) * BLOCK_P
    local, stretch = tl.arange(0, BLOCK_P), tl.arange(0, STRETCH)
    count = tl.minimum(pixels - first, BLOCK_P).to(tl.int32)
    inside = local < count
    rows = tl.load(input + first * CLASSES + stretch, stretch < count * CLASSES, other=0)
    offsets = (first + local) * target_pixel
    labels, ignored, valid = load_labels(target, offsets, inside, ignore_index, CLASSES)
    logit = tl.gather(rows, local * CLASSES + tl.where(valid, labels, 0).to(tl.int32), 0).to(ACC)

    largest = tl.full((BLOCK_P,), float("-inf"), ACC)
    total = tl.zeros((BLOCK_P,), ACC)
    spread = tl.zeros((BLOCK_P,), ACC)
    share = tl.zeros((BLOCK_P,), ACC)
    base = tl.zeros((BLOCK_P,), ACC)
    for start in tl.static_range(0, CLASSES, BLOCK_C):
        classes = start + tl.arange(0, BLOCK_C)
        exist = (classes < CLASSES)[:, None]
        source = tl.minimum(classes, CLASSES - 1)[:, None] + (local * CLASSES)[None, :]
        logits = tl.gather(rows, tl.reshape(source, (BLOCK_C * BLOCK_P,)), 0)
        logits = tl.where(exist, tl.reshape(logits, (BLOCK_C, BLOCK_P)).to(ACC), float("-inf"))
        base_before = base
        largest, total, base = add_classes(logits, largest, total)
        if SMOOTHED:
            q = from_bits(smoothing_bits, ACC) / CLASSES + tl.zeros((BLOCK_C, 1), ACC)
            if weight is not None:
                q *= tl.load(weight + classes, classes < CLASSES, other=0)[:, None]
            q = tl.where(exist, q, 0.0)
            spread += (base_before - base) * share + tl.sum(tl.where(exist, q * (logits - base[None, :]), 0.0), 0)
            share += tl.sum(q, 0)
    log_sum = tl.log(total)

    dense_loss = share * (log_sum + (largest - base)) - spread
    value, counted = label_losses(
        largest, log_sum, logit, dense_loss, labels, ignored, valid, weight, smoothing_bits, SMOOTHED, ACC
    )
    store_forward(
        largest, log_sum, value, counted, loss, statistics, total_weight, partials, first + local, inside, pixels,
        REDUCED,
    )  # fmt: skip


# ---- for the launcher ----

# A row of this many bytes in registers still leaves some for the arithmetic: 256 classes of a half type.
MOST_ROW_BYTES = 512

# Not measured on a GPU yet. A thread for each pixel.
PLANS = {
    f"rows-{c}": Plan({"BLOCK_C": 32, "BLOCK_P": 128 if c <= 64 else 64}, num_warps=4 if c <= 64 else 2)
    for c in (2, 4, 8, 16, 32, 64, 128, 256)
}


def bucket(input: Tensor) -> str:
    """The bucket of a call's plan."""
    return f"rows-{next_power_of_2(input.shape[1], 2, 256)}"


def serves(input: Tensor, target: Tensor, run_count: int, run_steps: list[int]) -> bool:
    """Whether this kernel serves a call: labels, and pixels in one run of dense rows that aren't too long."""
    classes = input.shape[1]
    dense = input.stride(1) == 1 and run_count == 1 and run_steps[0] == classes > 1
    row_bytes = next_power_of_2(classes) * input.dtype.itemsize
    return dense and target.ndim == input.ndim - 1 and row_bytes <= MOST_ROW_BYTES


def stretch(input: Tensor, plan: Plan) -> int:
    """The power of two that holds a program's rows."""
    return plan.tile["BLOCK_P"] * next_power_of_2(input.shape[1])
