"""cross_entropy's Triton kernels for labels of channels_last logits: dense rows, each of a pixel's classes.

Rows of 19 or 150 classes fill neither whole vectors nor whole warps, and a warp that has a row in its lanes spends most
of its instructions on passing numbers between them. So a program reads its rows as one chunk of memory, in whole
vectors, and `tl.gather` hands each thread the logits of a pixel of its own, through shared memory: then its sums need
no other thread. For a pixel a warp runs (sm_90, bfloat16) 11 instructions for 19 classes and 50 for 150; of the kernel
for any layout 73 and 153, several times what reading takes.

Backward sums nothing: a thread takes as many neighbours in memory as a vector holds, which are of two pixels at most.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastseg.kernels import cross_entropy_pixels as ce
from fastseg.kernels.launch import Plan, next_power_of_2


@triton.jit(do_not_specialize=["ignore_index", "smoothing_bits"])
def cross_entropy_forward_rows(
    input, target, weight, loss, statistics, total_weight, partials, pixels, target_pixel, ignore_index, smoothing_bits,
    CLASSES: tl.constexpr, SMOOTHED: tl.constexpr, REDUCED: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """As `cross_entropy_forward`; CHUNK is a power of two, and at least BLOCK_P * CLASSES."""
    ACC: tl.constexpr = tl.float64 if input.dtype.element_ty == tl.float64 else tl.float32
    first = tl.program_id(0).to(tl.int64) * BLOCK_P
    local, chunk = tl.arange(0, BLOCK_P), tl.arange(0, CHUNK)
    count = tl.minimum(pixels - first, BLOCK_P).to(tl.int32)
    inside = local < count
    input += first * CLASSES
    rows = tl.load(input + chunk, chunk < count * CLASSES, other=0)
    offsets = (first + local) * target_pixel
    labels = ce.load_labels(target, offsets, inside, ignore_index, CLASSES)
    # Once more from memory: it is in the cache, and a gather would store all rows to shared memory once more.
    logit = tl.load(input + local * CLASSES + labels[0].to(tl.int32), labels[2], other=0).to(ACC)

    sums = ce.no_classes(tl.zeros((BLOCK_P,), ACC))
    for start in tl.static_range(0, CLASSES, BLOCK_C):
        classes = start + tl.arange(0, BLOCK_C)
        exist = (classes < CLASSES)[:, None]
        source = tl.minimum(classes, CLASSES - 1)[:, None] + (local * CLASSES)[None, :]
        logits = tl.gather(rows, tl.reshape(source, (BLOCK_C * BLOCK_P,)), 0)
        logits = tl.where(exist, tl.reshape(logits, (BLOCK_C, BLOCK_P)).to(ACC), float("-inf"))
        base = sums[4]
        sums = ce.add_classes(sums, logits)
        if SMOOTHED:
            q = ce.smoothed_share(weight, smoothing_bits, classes, CLASSES, ACC)[:, None]
            sums = ce.add_shares(sums, base, logits, q, exist)
    ce.store_losses(
        ce.of_all_classes(sums), logit, labels, weight, smoothing_bits, loss, statistics, total_weight, partials,
        first + local, inside, pixels, SMOOTHED, REDUCED, ACC,
    )  # fmt: skip


# ---- backward ----


@triton.jit
def _of_pixel(
    pixel, pixels, target, target_pixel, statistics, grad_output, grad_pixel, total_weight, weight, ignore_index,
    smoothing_bits,
    CLASSES: tl.constexpr, SMOOTHED: tl.constexpr, REDUCED: tl.constexpr, MEAN: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Statistics, label, gradient and the label's share of it, of pixels [ROWS]."""
    inside = pixel < pixels
    largest = tl.load(statistics + pixel, inside, other=0)
    log_sum = tl.load(statistics + pixels + pixel, inside, other=0)
    grad = ce.load_grads(grad_output, pixel * grad_pixel, inside, total_weight, REDUCED, MEAN, ACC)
    labels, grad, label_grad = ce.label_gradients(
        target, pixel * target_pixel, inside, grad, weight, ignore_index, smoothing_bits, CLASSES, SMOOTHED, ACC
    )
    return largest, log_sum, labels, grad, label_grad


@triton.jit(do_not_specialize=["ignore_index", "smoothing_bits"])
def cross_entropy_backward_rows(
    grad_output, input, target, weight, statistics, total_weight, grad_input, pixels, target_pixel, grad_output_pixel,
    ignore_index, smoothing_bits,
    CLASSES: tl.constexpr, SMOOTHED: tl.constexpr, REDUCED: tl.constexpr, MEAN: tl.constexpr,
    ALL_CLASSES: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """As `cross_entropy_backward`, for BLOCK vectors of VECTOR neighbours; a row has no fewer classes than those."""
    ACC: tl.constexpr = statistics.dtype.element_ty
    first = tl.program_id(0).to(tl.int64) * (BLOCK * VECTOR)
    first_pixel = first // CLASSES
    vector, lane = tl.arange(0, BLOCK), tl.arange(0, VECTOR)
    ahead = (first - first_pixel * CLASSES).to(tl.int32) + vector * VECTOR  # of the first pixel's first class
    pixel = first_pixel + ahead // CLASSES
    near = _of_pixel(
        pixel, pixels, target, target_pixel, statistics, grad_output, grad_output_pixel, total_weight, weight,
        ignore_index, smoothing_bits, CLASSES, SMOOTHED, REDUCED, MEAN, ACC,
    )  # fmt: skip
    far = _of_pixel(
        pixel + 1, pixels, target, target_pixel, statistics, grad_output, grad_output_pixel, total_weight, weight,
        ignore_index, smoothing_bits, CLASSES, SMOOTHED, REDUCED, MEAN, ACC,
    )  # fmt: skip
    classes = (ahead % CLASSES)[:, None] + lane[None, :]  # [BLOCK, VECTOR]
    is_far = classes >= CLASSES
    classes = tl.where(is_far, classes - CLASSES, classes)
    largest = tl.where(is_far, far[0][:, None], near[0][:, None])
    log_sum = tl.where(is_far, far[1][:, None], near[1][:, None])
    labels = tl.where(is_far, far[2][:, None], near[2][:, None])
    label_grad = tl.where(is_far, far[4][:, None], near[4][:, None])
    at = first + (vector[:, None] * VECTOR + lane[None, :])
    inside = at < tl.cast(pixels, tl.int64) * CLASSES
    probability = ce.exp((tl.load(input + at, inside, other=0).to(ACC) - largest) - log_sum)
    gradient = (probability - tl.where(classes == labels, 1.0, 0.0)) * label_grad
    if SMOOTHED:
        everyone = ce.smoothed_share(weight, smoothing_bits, tl.arange(0, ALL_CLASSES), CLASSES, ACC)
        q = tl.zeros(classes.shape, ACC) + ce.from_bits(smoothing_bits, ACC) / CLASSES
        if weight is not None:
            q *= tl.load(weight + classes)
        grad = tl.where(is_far, far[3][:, None], near[3][:, None])
        gradient += (probability * tl.sum(everyone, 0) - q) * grad
    tl.store(grad_input + at, gradient, inside)


# ---- for the launchers ----

# A row of this many bytes in registers still leaves some for the arithmetic: 256 classes of a half type.
MOST_ROW_BYTES = 512
VECTOR_BYTES = 16  # the most that a thread reads or writes at once

# A thread for each pixel.
PLANS = {
    f"rows-{c}": Plan({"BLOCK_C": 32, "BLOCK_P": 128 if c <= 64 else 64}, num_warps=4 if c <= 64 else 2)
    for c in (2, 4, 8, 16, 32, 64, 128, 256)
}
BACKWARD_PLANS = {"rows": Plan({"BLOCK": 128})}


def in_rows(input: Tensor, target: Tensor, run_count: int, steps: list[int]) -> bool:
    """Whether there are labels, and pixels lie in one run of dense rows; ``steps`` of tensors with rows come first."""
    classes = input.shape[1]
    return input.stride(1) == 1 and run_count == 1 and steps[0] == classes > 1 and target.ndim == input.ndim - 1


def serves_forward(input: Tensor, target: Tensor, run_count: int, run_steps: list[int]) -> bool:
    """Whether the forward kernel serves a call: rows that aren't too long."""
    row_bytes = next_power_of_2(input.shape[1]) * input.dtype.itemsize
    return in_rows(input, target, run_count, run_steps) and row_bytes <= MOST_ROW_BYTES


def serves_backward(input: Tensor, target: Tensor, grad_input: Tensor, run_count: int, run_steps: list[int]) -> bool:
    """Whether the backward kernel serves a call: rows of a vector or more, of the gradient too."""
    classes = input.shape[1]
    both = grad_input.stride(1) == 1 and run_steps[2] == classes >= vector_of(input)
    return in_rows(input, target, run_count, run_steps) and both


def vector_of(input: Tensor) -> int:
    """How many logits a thread reads at once."""
    return VECTOR_BYTES // input.dtype.itemsize
