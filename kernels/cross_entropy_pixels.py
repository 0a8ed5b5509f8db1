"""What cross_entropy's Triton kernels do with a tile of pixels, however they got its logits, and with all sums."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

from fastseg.kernels.launch import Plan, choose, launch

if TYPE_CHECKING:
    from fastseg.ops.losses.options import LossOptions

LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def exp(x):
    """The exponential. For float32 the chip's power of two: unlike `tl.exp`, it doesn't care for less than 2^-126."""
    if x.dtype == tl.float64:
        return tl.exp(x)
    return tl.exp2(x * LOG2_E)


@triton.jit
def locate(run_length, blocks, BLOCK_P: tl.constexpr):
    """A program's run of pixels, which of it is its first, and of [BLOCK_P] their numbers and whether they exist."""
    run = (tl.program_id(0) // blocks).to(tl.int64)
    first = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_P
    local = tl.arange(0, BLOCK_P)
    return run, first, local, first + local < run_length


@triton.jit
def offset_of(run, first, sizes, strides, pixel_stride):
    """The offset of a run's pixel: ``run`` counts the runs along axes of ``sizes``, the last one fastest."""
    offset = first * pixel_stride
    for axis in tl.static_range(len(sizes) - 1, -1, -1):
        offset += (run % sizes[axis]) * strides[axis]
        run = run // sizes[axis]
    return offset


@triton.jit
def load_labels(target, offsets, inside, ignore_index, CLASSES: tl.constexpr):
    """Labels [BLOCK_P], where they are ignored (as what lies beyond the last pixel is), and where they are classes."""
    labels = tl.load(target + offsets, inside, other=0).to(tl.int64)
    ignored = (labels == ignore_index) | (inside == 0)
    return labels, ignored, (ignored == 0) & (labels >= 0) & (labels < CLASSES)


@triton.jit
def from_bits(bits, ACC: tl.constexpr):
    """A double that came as its bits: a float argument would be a single."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True).to(ACC)


@triton.jit
def smoothed_share(weight, smoothing_bits, classes, CLASSES: tl.constexpr, ACC: tl.constexpr):
    """What smoothed labels give to classes, their dense share q of the target; zero beyond the last one."""
    q = tl.where(classes < CLASSES, from_bits(smoothing_bits, ACC) / CLASSES, 0.0)
    if weight is not None:
        q *= tl.load(weight + classes, classes < CLASSES, other=0)
    return q


@triton.jit
def load_grads(
    grad_output, offsets, inside, total_weight, REDUCED: tl.constexpr, MEAN: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """The gradient of each pixel's loss."""
    if REDUCED:
        grad = tl.zeros(inside.shape, ACC) + tl.load(grad_output).to(ACC)
        return grad / tl.load(total_weight) if MEAN else grad
    else:
        return tl.load(grad_output + offsets, inside, other=0).to(ACC)


@triton.jit
def label_gradients(
    target, offsets, inside, grad, weight, ignore_index, smoothing_bits,
    CLASSES: tl.constexpr, SMOOTHED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Labels [BLOCK_P], -1 where there is none; the gradient, 0 where ignored; and what of it goes to the label."""
    labels, ignored, valid = load_labels(target, offsets, inside, ignore_index, CLASSES)
    grad = tl.where(valid, grad, tl.where(ignored, 0.0, float("nan")))
    label_grad = grad
    if SMOOTHED:
        label_grad *= 1 - from_bits(smoothing_bits, ACC)
    if weight is not None:
        label_grad *= tl.load(weight + labels, valid, other=0)
    return tl.where(valid, labels, -1).to(tl.int32), grad, label_grad


@triton.jit
def no_classes(zeros):
    """What `add_classes` adds to before the first class, from a zero for each pixel."""
    return zeros + float("-inf"), zeros, zeros, zeros, zeros


@triton.jit
def add_classes(sums, logits):
    """The sums over classes of pixels, with some more logits [BLOCK_C, ...].

    They are the largest logit m, sum(exp(x - m)), and what `add_shares` adds to: sum(q * (x - m)) and sum(q); last what
    has been subtracted from logits so far: m, but zero where there is none above -inf.
    """
    before, total, spread, share, _ = sums
    largest = tl.maximum(before, tl.max(logits, 0))
    base = tl.where(largest == float("-inf"), 0.0, largest)
    total = total * exp(before - base) + tl.sum(exp(logits - base[None]), 0)
    return largest, total, spread, share, base


@triton.jit
def add_shares(sums, base_before, logits, q, exist):
    """The sums with the dense share q of the logits just added; ``exist`` is None where all of them are of classes."""
    largest, total, spread, share, base = sums
    terms = q * (logits - base[None])
    if exist is not None:
        terms = tl.where(exist, terms, 0.0)
    spread += (base_before - base) * share + tl.sum(terms, 0)
    return largest, total, spread, share + tl.sum(q, 0), base


@triton.jit
def of_all_classes(sums):
    """The statistics m and log(sum(exp(x - m))) of pixels, and their loss by the dense share."""
    largest, total, spread, share, base = sums
    log_sum = tl.log(total)
    # largest - base is zero, but for pixels whose logits are all -inf: there it makes NaN, as in log_softmax.
    return largest, log_sum, share * (log_sum + (largest - base)) - spread


@triton.jit
def store_losses(
    classes, logit, labels, weight, smoothing_bits, loss, statistics, total_weight, partials, at, inside, pixels,
    SMOOTHED: tl.constexpr, REDUCED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Stores the statistics of the pixels ``at``, where they are wanted, and their losses or the sums of them.

    ``classes`` is what `of_all_classes` gives, ``labels`` what `load_labels` does, or None for probabilities.
    """
    largest, log_sum, dense_loss = classes
    if labels is None:
        value, counted = tl.where(inside, dense_loss, 0.0), inside.to(ACC)
    else:
        labels, ignored, valid = labels
        counted = tl.where(valid, 1.0, 0.0).to(ACC)  # how much each counts in a mean
        if weight is not None:
            counted = tl.load(weight + labels, valid, other=0)
        value = ((largest - logit) + log_sum) * counted
        if SMOOTHED:
            value = value * (1 - from_bits(smoothing_bits, ACC)) + dense_loss
        value = tl.where(valid, value, tl.where(ignored, 0.0, float("nan")))
    if statistics is not None:
        tl.store(statistics + at, largest, inside)
        tl.store(statistics + pixels + at, log_sum, inside)
    program = tl.program_id(0)
    if REDUCED:
        tl.store(partials + program, tl.sum(value).to(tl.float64))
        tl.store(partials + tl.num_programs(0) + program, tl.sum(counted).to(tl.float64))
    else:
        tl.store(loss + at, value, inside)
        tl.store(total_weight, 0.0, program == 0)  # of no use without a mean, but never left unwritten


@triton.jit
def cross_entropy_finish(
    partials, loss, total_weight, programs,
    MEAN: tl.constexpr, SMOOTHED_LABELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The reduced loss, and what "mean" divides by, from all programs' sums."""
    losses, weights = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.float64)
    for start in range(0, programs, BLOCK):
        at = start + tl.arange(0, BLOCK)
        losses += tl.load(partials + at, at < programs, other=0)
        weights += tl.load(partials + programs + at, at < programs, other=0)
    value, divisor = tl.sum(losses, 0), tl.sum(weights, 0)
    tl.store(total_weight, divisor)
    if MEAN:
        value = value / divisor
        if SMOOTHED_LABELS:  # where no label has weight, the labels' own share is 0 / 0, whatever the smoothing's is
            value = tl.where(divisor == 0, float("nan"), value)
    tl.store(loss, value)


# ---- for the launchers ----

FINISH_PLANS = {"all": Plan({"BLOCK": 4096}, num_warps=8)}


def finish(partials: Tensor, loss: Tensor, total_weight: Tensor, options: LossOptions, with_labels: bool) -> None:
    """Fills the reduced loss, and what "mean" divides by, from the programs' sums [2, programs]."""
    arguments = {
        "partials": partials, "loss": loss, "total_weight": total_weight, "programs": partials.shape[1],
        "MEAN": options.reduction == "mean", "SMOOTHED_LABELS": options.label_smoothing > 0 and with_labels,
    }  # fmt: skip
    plan = choose(cross_entropy_finish, "all", FINISH_PLANS, loss.device)
    launch(cross_entropy_finish, "all", plan, 1, arguments)
