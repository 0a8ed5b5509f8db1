"""What the Triton kernels of sigmoids do with some classes of some pixels, however they got their logits.

`fastseg.ops.upsample_sigmoid_sums` defines the terms of losses.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastseg.kernels.cross_entropy_pixels import exp, from_bits, load_labels
from fastseg.kernels.upsampling import flat, load


@triton.jit
def load_shares(
    target, strides, classes, opened, ignore_index,
    CLASSES: tl.constexpr, OF_LABELS: tl.constexpr, INDEX: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Shares [BLOCK_C, GROUP_H, GROUP_W, BLOCK_G] of opened groups in an image, and which count and are known.

    What isn't known is a label outside the classes.
    """
    out_rows, out_columns, inside, _, _ = opened
    if OF_LABELS:
        offsets = out_rows.to(INDEX) * strides[1] + out_columns.to(INDEX) * strides[2]
        labels, ignored, valid = load_labels(target, flat(offsets), flat(inside), ignore_index, CLASSES)
        shares = tl.where(classes == tl.reshape(labels, inside.shape), 1.0, 0.0).to(ACC)
        counts = tl.reshape(ignored == 0, inside.shape) & (classes < CLASSES)
        return shares, counts, tl.reshape(valid | ignored, inside.shape)
    else:
        offsets = out_rows.to(INDEX) * strides[2] + out_columns.to(INDEX) * strides[3]
        exist = inside & (classes < CLASSES)
        shares = load(target + classes.to(tl.int64) * strides[1] + offsets, exist, other=0).to(ACC)
        return shares, exist & (shares != tl.cast(ignore_index, tl.float64).to(ACC)), inside | (inside == 0)


@triton.jit
def _sigmoids(logits):
    """exp(-|z|), sigmoid(z) and sigmoid(-z), without an exponential that overflows."""
    exponential = exp(-tl.abs(logits))
    larger = 1 / (exponential + 1)
    smaller = exponential * larger
    return exponential, tl.where(logits > 0, larger, smaller), tl.where(logits > 0, smaller, larger)


@triton.jit
def sigmoid(logits):
    """Its value alone. An exponential that overflows makes 0 of it, as its value nearly is."""
    return 1 / (exp(-logits) + 1)


@triton.jit
def _log_of_one_plus(x):
    """log(1 + x), with what rounds off in the sum."""
    total = x + 1
    return tl.log(total) + (x - (total - 1)) / total


@triton.jit
def _losses(logits, exponential, shares):
    """The cross-entropies of the own and of the other pixels, t -log(sigmoid(z)) and (1 - t) -log(sigmoid(-z))."""
    log_sum = _log_of_one_plus(exponential)
    return shares * (tl.maximum(-logits, 0.0) + log_sum), (1 - shares) * (tl.maximum(logits, 0.0) + log_sum)


@triton.jit
def _focal_factors(signed, gamma_bits, scale_bits, threshold_bits, ACC: tl.constexpr):
    """The factors of logits, signed by whether the target agrees with them, and the factors' derivatives."""
    gamma = from_bits(gamma_bits, ACC)
    exponential, right, _ = _sigmoids(signed)
    loss_of_others = tl.maximum(signed, 0.0) + _log_of_one_plus(exponential)
    power = exp(-gamma * loss_of_others) * from_bits(scale_bits, ACC)
    focused = (right < from_bits(threshold_bits, ACC)) == 0
    return tl.where(focused, power, 1.0), tl.where(focused, power * right * -gamma, 0.0)


@triton.jit
def sigmoid_terms(
    logits, shares, gamma_bits, scale_bits, threshold_bits,
    SMALLER: tl.constexpr, FOCAL: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The overlap of p and the shares, p, and of the focal sums their terms."""
    exponential, p, _ = _sigmoids(logits)
    overlap = tl.where(shares < p, shares, p) if SMALLER else p * shares
    own, others = _losses(logits, exponential, shares)
    factors = tl.full(p.shape, 1.0, ACC)
    if FOCAL:
        factors, _ = _focal_factors(logits * (2 * shares - 1), gamma_bits, scale_bits, threshold_bits, ACC)
    return overlap, p, own * factors, others * factors, factors


@triton.jit
def load_sigmoid_grads(grad_sums, classes, strides, CLASSES: tl.constexpr, SUMS: tl.constexpr):
    """The gradients of an image's sums; without focal sums theirs are the first's."""
    at, exist = grad_sums + classes * strides[2], classes < CLASSES
    of_overlap, of_p = tl.load(at, exist, other=0), tl.load(at + strides[0], exist, other=0)
    of_own, of_others, of_factors = of_overlap, of_overlap, of_overlap
    if SUMS == 6:
        of_own = tl.load(at + 3 * strides[0], exist, other=0)
        of_others = tl.load(at + 4 * strides[0], exist, other=0)
        of_factors = tl.load(at + 5 * strides[0], exist, other=0)
    return of_overlap, of_p, of_own, of_others, of_factors


@triton.jit
def sigmoid_gradients(
    logits, shares, grads, gamma_bits, scale_bits, threshold_bits,
    SUMS: tl.constexpr, SMALLER: tl.constexpr, FOCAL: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The gradient of the logits."""
    of_overlap, of_p, of_own, of_others, of_factors = grads
    exponential, p, counter = _sigmoids(logits)
    if SMALLER:  # where p and the share are equal, torch.minimum halves the gradient
        halves = tl.where(p < shares, 0.5, 0.0) + tl.where(p <= shares, 0.5, 0.0)
        gradient = (halves.to(ACC) * of_overlap + of_p) * (p * counter)
    else:
        gradient = (shares * of_overlap + of_p) * (p * counter)
    if SUMS == 6:
        of_losses = (1 - shares) * of_others * p - shares * of_own * counter
        if FOCAL:
            own, others = _losses(logits, exponential, shares)
            sign = 2 * shares - 1
            factors, slopes = _focal_factors(logits * sign, gamma_bits, scale_bits, threshold_bits, ACC)
            of_losses = factors * of_losses + (of_own * own + of_others * others + of_factors) * (slopes * sign)
        gradient += of_losses
    return gradient
