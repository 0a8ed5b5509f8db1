"""upsample_cross_entropy's backward Triton kernels: a gather, without atomics.

The gradient of an interpolated logit is p * g - (what of g goes to the label), with p = exp(z - m - s). A thread has an
interval of columns and some classes, and goes down the cells of a segment of rows. For each cell it adds up what its
pixels give to the four taps. What goes to the lower taps stays for the next cell; what goes to the right ones passes to
the neighbouring thread; what the left and upper ones then have is the gradient of a row. Programs overlap by columns,
and segments by a row of cells, so that every sum is one thread's or its neighbours', in a fixed order.

Pixels before the input's first position have the second one as their tap of weight 0 (as in torch), which receives
nothing from them but NaN: the sums of interval -1 for its near taps go there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from fastseg.kernels import upsampling as up
from fastseg.kernels.cross_entropy_pixels import label_gradients, load_labels, smoothed_share
from fastseg.kernels.launch import Plan, bits_of, cdiv, choose, fit, launch, replayed, scratch
from fastseg.kernels.sigmoid_pixels import load_shares, load_sigmoid_grads, sigmoid_gradients

if TYPE_CHECKING:
    from fastseg.ops.losses.options import LossOptions
    from fastseg.ops.upsampling import Upsampling


@triton.jit
def _from_lanes_before(values, COUNT: tl.constexpr):
    """Values [BLOCK_C, BLOCK_G] of threads so many before; the first ones' their own, which nobody uses."""
    lanes = tl.maximum(tl.arange(0, values.shape[1]) - COUNT, 0)
    return tl.gather(values, tl.broadcast_to(lanes[None, :], values.shape), 1)


@triton.jit
def _to_taps(gradients, weights, AXIS: tl.constexpr, TAPS: tl.constexpr):
    """Sums over an axis of a group of what goes to its near and its far tap."""
    near_weight, far_weight = weights
    if TAPS == 2:
        return tl.sum(gradients * near_weight, AXIS), tl.sum(gradients * far_weight, AXIS)
    else:
        near = tl.sum(gradients, AXIS)
        return near, tl.zeros_like(near)


@triton.jit(
    do_not_specialize=[
        *up.GRID_ARGUMENTS, "class_blocks", "ignore_index", "smoothing_bits", "gamma_bits", "scale_bits",
        "threshold_bits",
    ]
)  # fmt: skip
def upsample_cross_entropy_backward(
    grad_loss, grad_overlap, mean_grads, input, target, weight, statistics, total_weight, grad_input,
    height, width, out_height, out_width, row_step, column_step, row_passes, column_passes, blocks, class_blocks,
    pixels, grad_loss_strides, grad_overlap_strides, input_strides, target_strides, grad_input_strides,
    ignore_index, smoothing_bits, gamma_bits, scale_bits, threshold_bits,
    CLASSES: tl.constexpr, SMOOTHED: tl.constexpr, REDUCED: tl.constexpr, MEAN: tl.constexpr, SUMS: tl.constexpr,
    SMALLER: tl.constexpr, FOCAL: tl.constexpr, OF_LABELS: tl.constexpr, CLASSES_INNER: tl.constexpr,
    GRID: tl.constexpr, INDEX: tl.constexpr, ACC: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr,
    SEGMENT: tl.constexpr,
):  # fmt: skip
    """The gradient of the low-resolution logits: BLOCK_C classes of SEGMENT rows under BLOCK_G intervals.

    ``grad_overlap`` is that of so many SUMS of sigmoids where there are any, and there is no loss; else the overlap's.
    """
    SIGMOID: tl.constexpr = SUMS > 0
    OVERLAP: tl.constexpr = grad_overlap is not None and not SIGMOID
    rows, columns = up.axes_of(
        height, width, out_height, out_width, row_step, column_step, row_passes, column_passes, GRID, ACC
    )
    HALO_H: tl.constexpr = GRID.taps[0] - 1  # intervals before position 0
    HALO_W: tl.constexpr = GRID.taps[1] - 1
    BORDER: tl.constexpr = not GRID.corners  # whether interval -1 has pixels
    SHARED: tl.constexpr = HALO_W * (1 + BORDER)  # threads that a program shares with the one before
    program = tl.program_id(0)
    classes = program % class_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    block = program // class_blocks
    image = (block // blocks).to(tl.int64)
    lanes = tl.arange(0, BLOCK_G)
    line = block % blocks * (BLOCK_G - SHARED) + lanes - SHARED
    column = line % (width + HALO_W) - HALO_W
    first_row = line // (width + HALO_W) * SEGMENT - HALO_H
    grad_input += image * grad_input_strides[0]
    owned = (lanes >= SHARED) & (column >= 0)

    exist = classes < CLASSES
    pointers = input + image * input_strides[0] + classes.to(tl.int64)[:, None, None, None] * input_strides[1]
    target += image * target_strides[0]
    first_out_column = up.first_positions(column, columns, GRID)
    column_taps = up.tap_offsets(column, width, input_strides[3], GRID, INDEX)
    columns_hold = up.holds(first_out_column, column, columns, GRID)
    grad = tl.zeros((1,), ACC)
    if SIGMOID:
        grads = load_sigmoid_grads(
            grad_overlap + image * grad_overlap_strides[1], classes[:, None, None, None], grad_overlap_strides, CLASSES,
            SUMS,
        )  # fmt: skip
    else:
        statistics += image * out_height * out_width
        if REDUCED:
            grad += tl.load(grad_loss).to(ACC)
            if MEAN:
                grad /= tl.load(total_weight)
        else:
            grad_loss += image * grad_loss_strides[0]
    if SMOOTHED:
        share = tl.zeros((1,), ACC)
        q = smoothed_share(weight, smoothing_bits, classes, CLASSES, ACC)[:, None, None, None]
        for start in range(0, CLASSES, BLOCK_C):
            others = start + tl.arange(0, BLOCK_C)
            share += tl.sum(smoothed_share(weight, smoothing_bits, others, CLASSES, ACC), 0)
    if OVERLAP:
        of_intersection, of_predicted = load_overlap_grads(
            grad_overlap + image * grad_overlap_strides[1], classes[:, None, None, None], grad_overlap_strides, CLASSES
        )
        mean_grads += image * out_height * out_width

    zeros = tl.zeros((BLOCK_C, BLOCK_G), ACC)
    near_near, near_far, far_near, far_far = zeros, zeros, zeros, zeros
    for step in range(SEGMENT + HALO_H):
        row = first_row + step
        row_taps = up.tap_offsets(row, height, input_strides[2], GRID, INDEX)
        first_out_row = up.first_positions(row, rows, GRID)
        mask = exist[:, None, None, None] & columns_hold & up.holds(first_out_row, row, rows, GRID)
        taps = up.load_taps(pointers, (row_taps, column_taps), mask, GRID, ACC)
        second = (row == 0) & BORDER
        near_near, far_near = far_near, tl.where(second, near_near, 0.0)
        near_far, far_far = far_far, tl.where(second, near_far, 0.0)
        for row_pass in range(row_passes):
            opened_rows = up.open_groups(first_out_row + row_pass * GRID.group[0], row, rows, GRID, 0)
            group_row_weights = opened_rows[2]  # [GROUP_H, BLOCK_G]
            for column_pass in range(column_passes):
                first = first_out_column + column_pass * GRID.group[1]
                opened_columns = up.open_groups(first, column, columns, GRID, 1)
                opened = up.pixels_of(opened_rows, opened_columns)
                out_rows, out_columns, inside, weights, _ = opened
                if SIGMOID:
                    logits = up.interpolate(taps, weights, GRID)
                    share, counts, known = load_shares(
                        target, target_strides, classes[:, None, None, None], opened, ignore_index, CLASSES, OF_LABELS,
                        INDEX, ACC,
                    )  # fmt: skip
                    gradient = sigmoid_gradients(
                        logits, share, grads, gamma_bits, scale_bits, threshold_bits, SUMS, SMALLER, FOCAL, ACC
                    )
                    gradient = tl.where(counts, tl.where(known, gradient, float("nan")), 0.0)
                else:
                    pixel_grad = grad
                    if not REDUCED:
                        offsets = (
                            out_rows.to(INDEX) * grad_loss_strides[1] + out_columns.to(INDEX) * grad_loss_strides[2]
                        )
                        pixel_grad = up.flat(up.load(grad_loss + offsets, inside, other=0).to(ACC))
                    offsets = out_rows.to(INDEX) * target_strides[1] + out_columns.to(INDEX) * target_strides[2]
                    labels, pixel_grad, label_grad = label_gradients(
                        target, up.flat(offsets), up.flat(inside), pixel_grad, weight, ignore_index, smoothing_bits,
                        CLASSES, SMOOTHED, ACC,
                    )  # fmt: skip
                    labels = tl.reshape(labels, inside.shape)
                    pixel_grad = tl.reshape(pixel_grad, inside.shape)
                    label_grad = tl.reshape(label_grad, inside.shape)
                    at = out_rows.to(INDEX) * out_width + out_columns
                    logits = up.interpolate(taps, weights, GRID)
                    probability = up.probabilities(logits, statistics, at, pixels, inside)
                    hit = classes[:, None, None, None] == labels
                    gradient = probability * label_grad - tl.where(hit, label_grad, 0.0)
                    if SMOOTHED:
                        gradient += (probability * share - q) * pixel_grad
                    if OVERLAP:
                        counts = labels >= 0
                        mean_grad = up.load(mean_grads + at, counts, other=0)
                        factor = (of_predicted - mean_grad) + tl.where(hit, of_intersection, 0.0)
                        gradient += probability * tl.where(counts, factor, 0.0)
                near, far = _to_taps(gradient, weights[1], 2, GRID.taps[1])  # [BLOCK_C, GROUP_H, BLOCK_G]
                upper, lower = _to_taps(near, group_row_weights, 1, GRID.taps[0])
                near_near += upper
                far_near += lower
                if HALO_W > 0:
                    upper, lower = _to_taps(far, group_row_weights, 1, GRID.taps[0])
                    near_far += upper
                    far_far += lower
        total = near_near
        if HALO_W > 0:
            total += _from_lanes_before(near_far, 1)
        if HALO_W > 0 and BORDER:
            total += tl.where(column == 1, _from_lanes_before(near_near, 2), 0.0)
        offsets = row.to(INDEX) * grad_input_strides[2] + column.to(INDEX) * grad_input_strides[3]
        stored = exist[:, None] & owned & (row < height) & (step >= HALO_H)
        if CLASSES_INNER:  # threads side by side then store what is: the compiler sees it
            tl.store(grad_input + classes[:, None] + offsets, total, stored)
        else:
            of_classes = classes.to(INDEX)[:, None] * grad_input_strides[1]
            up.store(grad_input + of_classes + offsets, total, stored)


# ---- the gradient of the overlap ----


@triton.jit
def load_overlap_grads(grad_overlap, classes, strides, CLASSES: tl.constexpr):
    """The gradients of sum(P [target = c]) and of sum(P), for an image."""
    at = grad_overlap + classes * strides[2]
    exist = classes < CLASSES
    return tl.load(at, exist, other=0), tl.load(at + strides[0], exist, other=0)


@triton.jit(do_not_specialize=[*up.GRID_ARGUMENTS, "ignore_index"])
def upsample_overlap_mean_grads(
    grad_overlap, input, target, statistics, mean_grads,
    height, width, out_height, out_width, row_step, column_step, row_passes, column_passes, column_groups, blocks,
    pixels, grad_overlap_strides, input_strides, target_strides, ignore_index,
    CLASSES: tl.constexpr, GRID: tl.constexpr, INDEX: tl.constexpr, ACC: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_G: tl.constexpr,
):  # fmt: skip
    """For each pixel that counts, the mean under P of the gradients of its probabilities."""
    image, opened, taps = up.locate_groups(
        tl.program_id(0), height, width, out_height, out_width, row_step, column_step, row_passes, column_passes,
        column_groups, blocks, input_strides, GRID, INDEX, ACC, BLOCK_G,
    )  # fmt: skip
    out_rows, out_columns, inside, weights, some = opened
    grad_overlap += image * grad_overlap_strides[1]
    input += image * input_strides[0]
    target += image * target_strides[0]
    offsets = out_rows.to(INDEX) * target_strides[1] + out_columns.to(INDEX) * target_strides[2]
    labels, ignored, _ = load_labels(target, up.flat(offsets), up.flat(inside), ignore_index, CLASSES)
    labels, counts = tl.reshape(labels, inside.shape), tl.reshape(ignored == 0, inside.shape)
    at = image * out_height * out_width + (out_rows.to(INDEX) * out_width + out_columns)
    GROUP_H: tl.constexpr = GRID.group[0]
    GROUP_W: tl.constexpr = GRID.group[1]
    total = tl.zeros((GROUP_H, GROUP_W, BLOCK_G), ACC)
    for start in range(0, CLASSES, BLOCK_C):
        classes = start + tl.arange(0, BLOCK_C)[:, None, None, None]
        exist = classes < CLASSES
        pointers = input + classes.to(tl.int64) * input_strides[1]
        logits = up.load_logits(pointers, taps, weights, exist & some, GRID, ACC)
        of_intersection, of_predicted = load_overlap_grads(grad_overlap, classes, grad_overlap_strides, CLASSES)
        gradient = of_predicted + tl.where(classes == labels, of_intersection, 0.0)
        terms = up.probabilities(logits, statistics, at, pixels, counts) * gradient
        total += tl.sum(tl.where(exist, terms, 0.0), 0)
    up.store(mean_grads + at, total, counts)


# ---- launchers ----

# One warp, so that neighbours' sums pass through shuffles: two and four were 6% to 15% slower. "dense" is what has more
# numbers for each class: smoothed labels, and the overlap's gradients. Only groups of 8 pixels were measured (H200,
# Triton 3.6, 2026-11-26; 16 x 150 x 128^2 to 512^2): half of the classes and 128 registers are twice the programs, 0.89
# ms instead of 1.01. With 136 registers, one program less of 16, no shape spills.
_DOWN_THE_ROWS = Plan({"BLOCK_C": 8, "BLOCK_G": 32, "SEGMENT": 32}, num_warps=1, max_registers=255)
BACKWARD_PLANS = {
    **up.plans_of({pixels: {} for pixels in (1, 2, 4, 8)}, _DOWN_THE_ROWS),
    **up.plans_of({pixels: {"BLOCK_C": 4} for pixels in (1, 2, 4, 8)}, _DOWN_THE_ROWS, ["-dense"]),
    # Estimates, until a GPU has run them.
    **up.plans_of(
        {1: {"BLOCK_C": 4}, 2: {"BLOCK_C": 4}, 4: {"BLOCK_C": 2}, 8: {"BLOCK_C": 1}}, _DOWN_THE_ROWS, ["-sigmoid"]
    ),
    "8-pixels-sigmoid-double": Plan({"BLOCK_C": 1, "BLOCK_G": 16, "SEGMENT": 32}, num_warps=1, max_registers=255),
    "8-pixels": Plan({"BLOCK_C": 4, "BLOCK_G": 32, "SEGMENT": 16}, num_warps=1, max_registers=136),
}
MEAN_GRADS_PLANS = up.plans_of(
    {pixels: {"BLOCK_C": 4} for pixels in (1, 2, 4, 8)}, Plan({"BLOCK_G": 128}, max_registers=192)
)
LEAST_SEGMENT = 4  # rows; a row of cells at a segment's end is computed twice
SMALL_PROGRAMS = 8  # of one warp, that a multiprocessor needs where it would need one of the usual size


class BackwardTensors(NamedTuple):
    """What backward reads and fills; see `fastseg.ops.upsample_cross_entropy`."""

    grad_loss: Tensor
    grad_overlap: Tensor
    input: Tensor
    target: Tensor
    weight: Tensor | None
    statistics: Tensor
    total_weight: Tensor
    grad_input: Tensor


# What the backward kernel takes of sigmoids' sums where there are none.
_WITHOUT_SIGMOIDS = {
    "gamma_bits": 0, "scale_bits": 0, "threshold_bits": 0, "SUMS": 0, "SMALLER": False, "FOCAL": False,
    "OF_LABELS": True,
}  # fmt: skip


def common(tensors: Any, options: LossOptions) -> dict[str, Any]:
    """What the kernels of both passes take."""
    target = tensors.target
    return {
        "target": target, "weight": tensors.weight, "statistics": tensors.statistics,
        "total_weight": tensors.total_weight, "pixels": target.numel(), "target_strides": target.stride(),
        "ignore_index": options.ignore_index, "smoothing_bits": bits_of(options.label_smoothing),
        "SMOOTHED": options.label_smoothing > 0, "REDUCED": options.reduction != "none", **_WITHOUT_SIGMOIDS,
    }  # fmt: skip


@replayed
def backward(tensors: BackwardTensors, options: LossOptions, upsampling: Upsampling) -> None:
    """Fills grad_input; see `fastseg.ops.upsample_cross_entropy`."""
    grad_overlap, target, grad_input = tensors.grad_overlap, tensors.target, tensors.grad_input
    grid, arguments = up.grid_of(up.in_planes(tensors.input), target, upsampling)
    arguments |= common(tensors, options) | {
        "INDEX": up.index_of(target, arguments["input"], grad_input), "grad_overlap": None, "mean_grads": None,
        "grad_overlap_strides": grad_overlap.stride(),
    }  # fmt: skip
    if len(grad_overlap) > 0:
        mean_grads = scratch(target.shape, tensors.statistics.dtype, target.device)
        arguments |= {"grad_overlap": grad_overlap, "mean_grads": mean_grads}
        up.launch_groups(upsample_overlap_mean_grads, MEAN_GRADS_PLANS, grid, arguments)
    arguments |= {
        "grad_loss": tensors.grad_loss, "MEAN": options.reduction == "mean",
        "grad_loss_strides": tensors.grad_loss.stride() if options.reduction == "none" else (0, 0, 0),
    }  # fmt: skip
    dense = options.label_smoothing > 0 or len(grad_overlap) > 0
    launch_backward(grad_input, grid, arguments, "-dense" if dense else "")


def launch_backward(grad_input: Tensor, grid: up.Grid, arguments: dict[str, Any], suffix: str) -> None:
    """Launches the backward kernel, cut into programs by the plan of a bucket; ``arguments`` has the rest."""
    input, device, (images, classes, height, width) = arguments["input"], grad_input.device, grad_input.shape
    bucket = up.bucket_of(grid, input, suffix)
    plan = up.clip_classes(choose(upsample_cross_entropy_backward, bucket, BACKWARD_PLANS, device), classes)
    class_blocks, intervals = cdiv(classes, plan.tile["BLOCK_C"]), width + grid.taps[1] - 1
    owned = plan.tile["BLOCK_G"] - (grid.taps[1] - 1) * (1 + (not grid.corners))
    work = images * class_blocks * height * intervals // owned
    plan = fit(plan, "SEGMENT", LEAST_SEGMENT, work // SMALL_PROGRAMS, device)
    arguments |= {
        "blocks": cdiv(cdiv(height, plan.tile["SEGMENT"]) * intervals, owned), "class_blocks": class_blocks,
        "grad_input": grad_input, "grad_input_strides": grad_input.stride(),
        "CLASSES_INNER": grad_input.stride(1) == 1,
    }  # fmt: skip
    programs = images * arguments["blocks"] * class_blocks
    launch(upsample_cross_entropy_backward, bucket, plan, programs, arguments)
