"""cross_entropy's Triton kernels for labels of few classes that lie apart, as in NCHW: all of a pixel's in one thread.

A thread reads the logits of its pixels into registers, all at once, so that backward finds m and s of a pixel by
itself: to keep them would be a tenth of what both passes read and write for 19 classes of a half type, a third for 2.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastseg.kernels import cross_entropy_pixels as ce
from fastseg.kernels.launch import Plan


@triton.jit
def _load(input, class_stride, inside, CLASSES: tl.constexpr):
    """The logits [BLOCK_P] of every class."""
    logits = ()
    for index in tl.static_range(CLASSES):
        pointers = input + tl.cast(index, tl.int64) * class_stride
        logits = logits + (tl.load(pointers, inside, other=0),)  # noqa: RUF005 - Triton unpacks no tuple
    return logits


@triton.jit
def _sum(logits, labels, CLASSES: tl.constexpr, ACC: tl.constexpr):
    """What `add_classes` makes of all classes.

    No label is -2, which the compiler doesn't know: it loads them with the logits, and not when those have come.
    """
    largest = tl.where(labels == -2, float("inf"), logits[0].to(ACC))
    for index in tl.static_range(1, CLASSES):
        largest = tl.maximum(largest, logits[index].to(ACC))
    base = tl.where(largest == float("-inf"), 0.0, largest)
    total = tl.zeros_like(base)
    for index in tl.static_range(CLASSES):
        total += ce.exp(logits[index].to(ACC) - base)
    return largest, total, tl.zeros_like(base), tl.zeros_like(base), base


@triton.jit
def _smoothed_share(weight, smoothing_bits, index, CLASSES: tl.constexpr, ACC: tl.constexpr):
    """What smoothed labels give to a class."""
    q = ce.from_bits(smoothing_bits, ACC) / CLASSES
    if weight is not None:
        q *= tl.load(weight + index)
    return q


@triton.jit(do_not_specialize=["ignore_index", "smoothing_bits"])
def cross_entropy_forward_few(
    input, target, weight, loss, statistics, total_weight, partials,
    pixels, run_length, blocks, run_sizes, input_runs, input_class, input_pixel, target_runs, target_pixel,
    ignore_index, smoothing_bits,
    CLASSES: tl.constexpr, SMOOTHED: tl.constexpr, REDUCED: tl.constexpr, INDEX: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """As `cross_entropy_forward`."""
    ACC: tl.constexpr = tl.float64 if input.dtype.element_ty == tl.float64 else tl.float32
    run, first, local, inside = ce.locate(run_length, blocks, BLOCK_P)
    input += ce.offset_of(run, first, run_sizes, input_runs, input_pixel)
    target += ce.offset_of(run, first, run_sizes, target_runs, target_pixel)
    labels = ce.load_labels(target, local.to(INDEX) * target_pixel, inside, ignore_index, CLASSES)
    logits = _load(input + local.to(INDEX) * input_pixel, input_class, inside, CLASSES)
    label = tl.where(labels[2], labels[0], -1).to(tl.int32)
    largest, total, spread, share, base = _sum(logits, label, CLASSES, ACC)
    logit = tl.zeros_like(base)
    for index in tl.static_range(CLASSES):
        logit = tl.where(label == index, logits[index].to(ACC), logit)
        if SMOOTHED:
            q = _smoothed_share(weight, smoothing_bits, index, CLASSES, ACC)
            spread += q * (logits[index].to(ACC) - base)
            share += q
    ce.store_losses(
        ce.of_all_classes((largest, total, spread, share, base)), logit, labels, weight, smoothing_bits, loss,
        statistics, total_weight, partials, run * run_length + first + local, inside, pixels, SMOOTHED, REDUCED, ACC,
    )  # fmt: skip


@triton.jit(do_not_specialize=["ignore_index", "smoothing_bits"])
def cross_entropy_backward_few(
    grad_output, input, target, weight, total_weight, grad_input,
    run_length, blocks, run_sizes,
    grad_output_runs, grad_output_pixel, input_runs, input_class, input_pixel, target_runs, target_pixel,
    grad_input_runs, grad_input_class, grad_input_pixel,
    ignore_index, smoothing_bits,
    CLASSES: tl.constexpr, SMOOTHED: tl.constexpr, REDUCED: tl.constexpr, MEAN: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_P: tl.constexpr,
):  # fmt: skip
    """As `cross_entropy_backward`."""
    ACC: tl.constexpr = tl.float64 if input.dtype.element_ty == tl.float64 else tl.float32
    run, first, local, inside = ce.locate(run_length, blocks, BLOCK_P)
    input += ce.offset_of(run, first, run_sizes, input_runs, input_pixel)
    target += ce.offset_of(run, first, run_sizes, target_runs, target_pixel)
    grad_input += ce.offset_of(run, first, run_sizes, grad_input_runs, grad_input_pixel)
    logits = _load(input + local.to(INDEX) * input_pixel, input_class, inside, CLASSES)
    at = ce.offset_of(run, first, run_sizes, grad_output_runs, grad_output_pixel) + local.to(INDEX) * grad_output_pixel
    grad = ce.load_grads(grad_output, at, inside, total_weight, REDUCED, MEAN, ACC)
    labels, grad, label_grad = ce.label_gradients(
        target, local.to(INDEX) * target_pixel, inside, grad, weight, ignore_index, smoothing_bits, CLASSES, SMOOTHED,
        ACC,
    )  # fmt: skip
    largest, log_sum, _ = ce.of_all_classes(_sum(logits, labels, CLASSES, ACC))
    share = tl.zeros_like(grad)
    if SMOOTHED:
        for index in tl.static_range(CLASSES):
            share += _smoothed_share(weight, smoothing_bits, index, CLASSES, ACC)
    grad_input += local.to(INDEX) * grad_input_pixel
    for index in tl.static_range(CLASSES):
        probability = ce.exp((logits[index].to(ACC) - largest) - log_sum)
        gradient = (probability - tl.where(labels == index, 1.0, 0.0)) * label_grad
        if SMOOTHED:
            q = _smoothed_share(weight, smoothing_bits, index, CLASSES, ACC)
            gradient += (probability * share - q) * grad
        tl.store(grad_input + tl.cast(index, tl.int64) * grad_input_class, gradient, inside)


# ---- for the launchers ----

# By a logit's bytes: each thread reads 8 bytes of a class, of many classes 4. Of a copy's bandwidth, 19 classes of
# bfloat16 get 82% forward and 93% backward, with kept statistics 67% and 85%; 32 classes 79% and 90%, with 8 bytes 76%
# and 81% (H200, 2026-11-27).
PLANS = {f"few-{size}": Plan({"BLOCK_P": 1024 // size}) for size in (2, 4, 8, 16)}
MANY = 20


def bucket_of(input: Tensor) -> str:
    """The bucket of a call."""
    return f"few-{input.dtype.itemsize * (2 if input.shape[1] > MANY else 1)}"
