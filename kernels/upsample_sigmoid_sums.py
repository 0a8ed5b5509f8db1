"""upsample_sigmoid_sums' Triton kernels: forward; backward is upsample_cross_entropy's, with another derivative.

A program adds up the terms of some classes, over blocks of an image's groups; a second kernel adds what it has, in a
fixed order. `fastseg.kernels.upsampling` says what a thread has, `fastseg.kernels.sigmoid_pixels` what the terms are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl
from torch import Tensor

from fastseg.kernels import upsampling as up
from fastseg.kernels.launch import Plan, bits_of, replayed
from fastseg.kernels.sigmoid_pixels import load_shares, sigmoid_terms
from fastseg.kernels.upsample_cross_entropy import fill_class_sums
from fastseg.kernels.upsample_cross_entropy_backward import launch_backward

if TYPE_CHECKING:
    from fastseg.ops.upsample_sigmoid_sums import SigmoidOptions
    from fastseg.ops.upsampling import Upsampling


@triton.jit
def _add(sums, terms, counts):
    """Adds terms [BLOCK_C, GROUP_H, GROUP_W, BLOCK_G] to the sums [BLOCK_C, BLOCK_G]."""
    return sums + tl.sum(tl.sum(tl.where(counts, terms, 0.0), 1), 1)


@triton.jit(
    do_not_specialize=[
        *up.GRID_ARGUMENTS, "shares", "class_blocks", "ignore_index", "gamma_bits", "scale_bits", "threshold_bits"
    ]
)  # fmt: skip
def upsample_sigmoid_sums_forward(
    input, target, partials,
    height, width, out_height, out_width, row_step, column_step, row_passes, column_passes, column_groups, blocks,
    shares, class_blocks, input_strides, target_strides, ignore_index, gamma_bits, scale_bits, threshold_bits,
    CLASSES: tl.constexpr, SUMS: tl.constexpr, SMALLER: tl.constexpr, FOCAL: tl.constexpr, OF_LABELS: tl.constexpr,
    GRID: tl.constexpr, INDEX: tl.constexpr, ACC: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """A program's part of the sums, in double [images, shares, SUMS, CLASSES].

    It has some classes of every ``shares``-th block of an image's groups.
    """
    program = tl.program_id(0)
    row = program // class_blocks
    image = (row // shares).to(tl.int64)
    first_classes = program % class_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    classes = first_classes[:, None, None, None]
    pointers = input + image * input_strides[0] + classes.to(tl.int64) * input_strides[1]
    target += image * target_strides[0]
    zeros = tl.zeros((BLOCK_C, BLOCK_G), tl.float64)
    overlap, predicted, labelled, own, others, factors = zeros, zeros, zeros, zeros, zeros, zeros
    for block in range(row % shares, blocks, shares):
        _, opened, taps = up.locate_groups(
            block, height, width, out_height, out_width, row_step, column_step, row_passes, column_passes,
            column_groups, blocks, input_strides, GRID, INDEX, ACC, BLOCK_G,
        )  # fmt: skip
        _, _, _, weights, some = opened
        share, counts, known = load_shares(
            target, target_strides, classes, opened, ignore_index, CLASSES, OF_LABELS, INDEX, ACC
        )
        logits = up.load_logits(pointers, taps, weights, (classes < CLASSES) & some, GRID, ACC)
        logits = tl.where(known, logits, float("nan"))
        both, p, own_terms, other_terms, factor_terms = sigmoid_terms(
            logits, share, gamma_bits, scale_bits, threshold_bits, SMALLER, FOCAL, ACC
        )
        overlap, predicted = _add(overlap, both, counts), _add(predicted, p, counts)
        labelled = _add(labelled, share, counts)
        if SUMS == 6:
            own, others = _add(own, own_terms, counts), _add(others, other_terms, counts)
            factors = _add(factors, factor_terms, counts)
    at, exist = partials + row.to(tl.int64) * (SUMS * CLASSES) + first_classes, first_classes < CLASSES
    tl.store(at, tl.sum(overlap, 1), exist)
    tl.store(at + CLASSES, tl.sum(predicted, 1), exist)
    tl.store(at + 2 * CLASSES, tl.sum(labelled, 1), exist)
    if SUMS == 6:
        tl.store(at + 3 * CLASSES, tl.sum(own, 1), exist)
        tl.store(at + 4 * CLASSES, tl.sum(others, 1), exist)
        tl.store(at + 5 * CLASSES, tl.sum(factors, 1), exist)


# ---- launchers ----

# 0.44 ms for masks of 16 x 20 x 128^2 to 512^2 in bfloat16; with two classes and 128 groups 0.48, with 64 groups 0.63
# (H200, 2026-11-27).
FORWARD_PLANS = up.plans_of(
    {1: {"BLOCK_C": 4}, 2: {"BLOCK_C": 4}, 4: {"BLOCK_C": 2}, 8: {"BLOCK_C": 1}},
    Plan({"BLOCK_G": 256}, num_warps=8, max_registers=255),
)


def _common(target: Tensor, sums: Tensor, options: SigmoidOptions) -> dict[str, Any]:
    """What the kernels of both passes take."""
    gamma, threshold = options.gamma or 0.0, options.threshold or 0.0
    return {
        "target": target, "target_strides": target.stride(), "ignore_index": options.ignore_index,
        "gamma_bits": bits_of(gamma), "threshold_bits": bits_of(threshold),
        "scale_bits": bits_of(threshold**-gamma if threshold > 0 else 1.0), "SUMS": len(sums),
        "SMALLER": options.smaller, "FOCAL": gamma > 0, "OF_LABELS": target.ndim == 3,
    }  # fmt: skip


@replayed
def forward(tensors: tuple[Tensor, Tensor, Tensor], options: SigmoidOptions, upsampling: Upsampling) -> None:
    """Fills sums from input and target; see `fastseg.ops.upsample_sigmoid_sums`."""
    input, target, sums = tensors
    grid, arguments = up.grid_of(up.in_planes(input), target, upsampling)
    arguments |= _common(target, sums, options)
    fill_class_sums(upsample_sigmoid_sums_forward, FORWARD_PLANS, sums, grid, arguments)


@replayed
def backward(tensors: tuple[Tensor, Tensor, Tensor, Tensor], options: SigmoidOptions, upsampling: Upsampling) -> None:
    """Fills grad_input from the sums' gradients, input and target."""
    grad_sums, input, target, grad_input = tensors
    grid, arguments = up.grid_of(up.in_planes(input), target, upsampling)
    arguments |= _common(target, grad_sums, options) | {
        "grad_overlap": grad_sums, "grad_overlap_strides": grad_sums.stride(), "mean_grads": None, "grad_loss": None,
        "grad_loss_strides": (0, 0, 0), "weight": None, "statistics": None, "total_weight": None, "pixels": 0,
        "smoothing_bits": 0, "SMOOTHED": False, "REDUCED": True, "MEAN": False,
        "INDEX": up.index_of(target, arguments["input"], grad_input),
    }  # fmt: skip
    launch_backward(grad_input, grid, arguments, "-sigmoid")
