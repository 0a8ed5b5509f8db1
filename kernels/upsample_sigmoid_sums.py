"""upsample_sigmoid_sums' Triton kernels: forward; backward is upsample_cross_entropy's, with another derivative.

A program adds up the terms of some classes, over blocks of an image's groups; what it has is added in a fixed order by
a second kernel. `fastseg.kernels.upsampling` says what a thread has, `fastseg.kernels.sigmoid_pixels` what the terms
are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastseg.kernels.launch import Plan, bits_of, replayed
from fastseg.kernels.sigmoid_pixels import load_shares, sigmoid_terms
from fastseg.kernels.upsample_cross_entropy import fill_class_sums
from fastseg.kernels.upsample_cross_entropy_backward import launch_backward
from fastseg.kernels.upsampling import (
    GRID_ARGUMENTS,
    axes_of,
    grid_of,
    in_planes,
    index_of,
    interpolate,
    load_taps,
    locate_groups,
    pixels_of,
    plans_of,
    tap_offsets,
)

if TYPE_CHECKING:
    from fastseg.ops.upsample_sigmoid_sums import SigmoidOptions
    from fastseg.ops.upsampling import Upsampling


@triton.jit
def _add(sums, terms, counts):
    """Adds terms [BLOCK_C, GROUP_H, GROUP_W, BLOCK_G] to the sums [BLOCK_C, BLOCK_G]."""
    return sums + tl.sum(tl.sum(tl.where(counts, terms, 0.0), 1), 1)


@triton.jit(
    do_not_specialize=[
        *GRID_ARGUMENTS, "shares", "class_blocks", "ignore_index", "gamma_bits", "scale_bits", "threshold_bits"
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
    rows, columns = axes_of(
        height, width, out_height, out_width, row_step, column_step, row_passes, column_passes, GRID, ACC
    )
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
        _, row_intervals, opened_rows, column_intervals, opened_columns = locate_groups(
            block, blocks, column_groups, rows, columns, GRID, BLOCK_G
        )
        out_rows, out_columns, inside, row_weights, column_weights, some = pixels_of(opened_rows, opened_columns)
        share, counts, known = load_shares(
            target, target_strides, classes, out_rows, out_columns, inside, ignore_index, CLASSES, OF_LABELS, INDEX, ACC
        )
        row_taps = tap_offsets(row_intervals, height, input_strides[2], GRID, INDEX)
        column_taps = tap_offsets(column_intervals, width, input_strides[3], GRID, INDEX)
        taps = load_taps(pointers, row_taps, column_taps, (classes < CLASSES) & some, GRID, ACC)
        logits = tl.where(known, interpolate(taps, row_weights, column_weights, GRID), float("nan"))
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

# Estimates: no GPU has run them yet.
FORWARD_PLANS = plans_of(
    {1: {"BLOCK_C": 4}, 2: {"BLOCK_C": 4}, 4: {"BLOCK_C": 2}, 8: {"BLOCK_C": 2}},
    Plan({"BLOCK_G": 64}, max_registers=255),
)


class ForwardTensors(NamedTuple):
    """What forward reads and fills; see `fastseg.ops.upsample_sigmoid_sums`."""

    input: Tensor
    target: Tensor
    sums: Tensor


class BackwardTensors(NamedTuple):
    """What backward reads and fills."""

    grad_sums: Tensor
    input: Tensor
    target: Tensor
    grad_input: Tensor


def _common(input: Tensor, target: Tensor, sums: Tensor, options: SigmoidOptions) -> dict[str, Any]:
    """What the kernels of both passes take; ``input`` are the logits in planes."""
    gamma, threshold = options.gamma or 0.0, options.threshold or 0.0
    return {
        "input": input, "target": target, "input_strides": input.stride(), "target_strides": target.stride(),
        "ignore_index": options.ignore_index, "gamma_bits": bits_of(gamma), "threshold_bits": bits_of(threshold),
        "scale_bits": bits_of(threshold**-gamma if threshold > 0 else 1.0), "CLASSES": input.shape[1],
        "SUMS": len(sums), "SMALLER": options.smaller, "FOCAL": gamma > 0, "OF_LABELS": target.ndim == 3,
        "ACC": tl.float64 if sums.dtype == torch.float64 else tl.float32,
    }  # fmt: skip


@replayed
def forward(tensors: ForwardTensors, options: SigmoidOptions, upsampling: Upsampling) -> None:
    """Fills sums; see the operator's registration."""
    target, sums = tensors.target, tensors.sums
    input = in_planes(tensors.input)
    grid, arguments = grid_of(input.shape[2:], target.shape[-2:], upsampling)
    arguments |= _common(input, target, sums, options) | {"INDEX": index_of(target.shape[-3:], input, target)}
    fill_class_sums(upsample_sigmoid_sums_forward, FORWARD_PLANS, sums, grid, arguments)


@replayed
def backward(tensors: BackwardTensors, options: SigmoidOptions, upsampling: Upsampling) -> None:
    """Fills grad_input; see the operator's registration."""
    grad_sums, target, grad_input = tensors.grad_sums, tensors.target, tensors.grad_input
    input = in_planes(tensors.input)
    grid, arguments = grid_of(input.shape[2:], target.shape[-2:], upsampling)
    arguments |= _common(input, target, grad_sums, options) | {
        "grad_overlap": grad_sums, "grad_overlap_strides": grad_sums.stride(), "mean_grads": None, "grad_loss": None,
        "grad_loss_strides": (0, 0, 0), "weight": None, "statistics": None, "total_weight": None, "pixels": 0,
        "smoothing_bits": 0, "SMOOTHED": False, "REDUCED": True, "MEAN": False,
        "INDEX": index_of(target.shape[-3:], input, target, grad_input),
    }  # fmt: skip
    launch_backward(grad_input, grid, arguments, "-sigmoid")
