"""upsample_cross_entropy's Triton kernels: forward, and the sums that soft Dice losses need.

Logits z are interpolated where they are needed. With m = max(z) and s = log(sum(exp(z - m))), forward keeps m and s of
each pixel, and nothing that has both pixels and classes. `fastseg.kernels.upsampling` says what a thread has,
`fastseg.kernels.cross_entropy` what becomes of labels outside the classes, and how pixels are summed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastseg.kernels import cross_entropy_pixels as ce
from fastseg.kernels import upsampling as up
from fastseg.kernels.launch import Plan, cdiv, choose, launch, multiprocessors, replayed, scratch
from fastseg.kernels.upsample_cross_entropy_backward import BackwardTensors as BackwardTensors
from fastseg.kernels.upsample_cross_entropy_backward import backward as backward
from fastseg.kernels.upsample_cross_entropy_backward import common

if TYPE_CHECKING:
    from fastseg.ops.losses.options import LossOptions
    from fastseg.ops.upsampling import Upsampling

# ---- forward ----


@triton.jit
def _add_block(
    sums, start, input, weight, smoothing_bits, class_stride, taps, weights, some,
    ACC: tl.constexpr, CLASSES: tl.constexpr, SMOOTHED: tl.constexpr, GRID: tl.constexpr, BLOCK_C: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """Adds the classes from ``start`` on, all of which exist where WHOLE, to the sums of pixels."""
    classes = start + tl.arange(0, BLOCK_C)[:, None, None, None]
    exist = classes < CLASSES
    mask = some if WHOLE else exist & some
    logits = up.load_logits(input + classes.to(tl.int64) * class_stride, taps, weights, mask, GRID, ACC)
    if not WHOLE:
        logits = tl.where(exist, logits, float("-inf"))
    base = sums[4]
    sums = ce.add_classes(sums, logits)
    if SMOOTHED:
        q = ce.smoothed_share(weight, smoothing_bits, classes, CLASSES, ACC)
        sums = ce.add_shares(sums, base, logits, q, None if WHOLE else exist)
    return sums


@triton.jit(do_not_specialize=[*up.GRID_ARGUMENTS, "ignore_index", "smoothing_bits"])
def upsample_cross_entropy_forward(
    input, target, weight, loss, statistics, total_weight, partials,
    height, width, out_height, out_width, row_step, column_step, row_passes, column_passes, column_groups, blocks,
    pixels, input_strides, target_strides, ignore_index, smoothing_bits,
    CLASSES: tl.constexpr, SMOOTHED: tl.constexpr, REDUCED: tl.constexpr, GRID: tl.constexpr, INDEX: tl.constexpr,
    ACC: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Statistics of each pixel, where they are wanted, and its loss, or the program's sums of losses and weights."""
    image, opened, taps = up.locate_groups(
        tl.program_id(0), height, width, out_height, out_width, row_step, column_step, row_passes, column_passes,
        column_groups, blocks, input_strides, GRID, INDEX, ACC, BLOCK_G,
    )  # fmt: skip
    out_rows, out_columns, inside, weights, some = opened
    input += image * input_strides[0]
    GROUP_H: tl.constexpr = GRID.group[0]
    GROUP_W: tl.constexpr = GRID.group[1]
    sums = ce.no_classes(tl.zeros((GROUP_H, GROUP_W, BLOCK_G), ACC))
    WHOLE: tl.constexpr = CLASSES // BLOCK_C * BLOCK_C
    for start in range(0, WHOLE, BLOCK_C):
        sums = _add_block(
            sums, start, input, weight, smoothing_bits, input_strides[1], taps, weights, some, ACC, CLASSES, SMOOTHED,
            GRID, BLOCK_C, True,
        )  # fmt: skip
    if WHOLE < CLASSES:
        sums = _add_block(
            sums, WHOLE, input, weight, smoothing_bits, input_strides[1], taps, weights, some, ACC, CLASSES, SMOOTHED,
            GRID, BLOCK_C, False,
        )  # fmt: skip
    largest, log_sum, dense_loss = ce.of_all_classes(sums)

    target += image * target_strides[0]
    offsets = out_rows.to(INDEX) * target_strides[1] + out_columns.to(INDEX) * target_strides[2]
    labels = ce.load_labels(target, up.flat(offsets), up.flat(inside), ignore_index, CLASSES)
    of_labels, valid = tl.reshape(labels[0], inside.shape) * input_strides[1], tl.reshape(labels[2], inside.shape)
    logit = up.flat(up.load_logits(input + of_labels, taps, weights, valid, GRID, ACC))
    at = image * out_height * out_width + (out_rows.to(INDEX) * out_width + out_columns)
    classes = up.flat(largest), up.flat(log_sum), up.flat(dense_loss)
    ce.store_losses(
        classes, logit, labels, weight, smoothing_bits, loss, statistics, total_weight, partials, up.flat(at),
        up.flat(inside), pixels, SMOOTHED, REDUCED, ACC,
    )  # fmt: skip


# ---- the sums of soft Dice losses ----


@triton.jit(do_not_specialize=[*up.GRID_ARGUMENTS, "shares", "class_blocks", "ignore_index"])
def upsample_overlap_forward(
    input, target, statistics, partials,
    height, width, out_height, out_width, row_step, column_step, row_passes, column_passes, column_groups, blocks,
    shares, class_blocks, pixels, input_strides, target_strides, ignore_index,
    CLASSES: tl.constexpr, GRID: tl.constexpr, INDEX: tl.constexpr, ACC: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_G: tl.constexpr,
):  # fmt: skip
    """A program's part of sum(P [target = c]), sum(P) and |{target = c}|, in double [images, shares, 3, CLASSES].

    It has some classes of every ``shares``-th block of an image's groups.
    """
    program = tl.program_id(0)
    row = program // class_blocks
    image = (row // shares).to(tl.int64)
    classes = program % class_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    exist = (classes < CLASSES)[:, None, None, None]
    input += image * input_strides[0]
    pointers = input + classes[:, None, None, None].to(tl.int64) * input_strides[1]
    target += image * target_strides[0]
    statistics += image * out_height * out_width
    intersection = tl.zeros((BLOCK_C, BLOCK_G), tl.float64)
    predicted = tl.zeros((BLOCK_C, BLOCK_G), tl.float64)
    labelled = tl.zeros((BLOCK_C, BLOCK_G), tl.int32)
    for block in range(row % shares, blocks, shares):
        _, opened, taps = up.locate_groups(
            block, height, width, out_height, out_width, row_step, column_step, row_passes, column_passes,
            column_groups, blocks, input_strides, GRID, INDEX, ACC, BLOCK_G,
        )  # fmt: skip
        out_rows, out_columns, inside, weights, some = opened
        offsets = out_rows.to(INDEX) * target_strides[1] + out_columns.to(INDEX) * target_strides[2]
        labels, ignored, valid = ce.load_labels(target, up.flat(offsets), up.flat(inside), ignore_index, CLASSES)
        labels, counts = tl.reshape(labels, inside.shape), tl.reshape(ignored == 0, inside.shape)
        known = tl.reshape(valid | ignored, inside.shape)
        logits = up.load_logits(pointers, taps, weights, exist & some, GRID, ACC)
        at = out_rows.to(INDEX) * out_width + out_columns
        probability = up.probabilities(logits, statistics, at, pixels, counts)
        probability = tl.where(known, probability, float("nan"))  # a label outside the classes
        hit = (classes[:, None, None, None] == labels) & counts
        predicted += tl.sum(tl.sum(probability, 1), 1)
        intersection += tl.sum(tl.sum(tl.where(hit, probability, 0.0), 1), 1)
        labelled += tl.sum(tl.sum(hit.to(tl.int32), 1), 1)
    at = partials + row.to(tl.int64) * (3 * CLASSES) + classes  # 3 sums
    tl.store(at, tl.sum(intersection, 1), classes < CLASSES)
    tl.store(at + CLASSES, tl.sum(predicted, 1), classes < CLASSES)
    tl.store(at + 2 * CLASSES, tl.sum(labelled, 1), classes < CLASSES)


@triton.jit(do_not_specialize=["shares", "images", "sums"])
def upsample_overlap_finish(
    partials, overlap, shares, images, sums, CLASSES: tl.constexpr, SUMS: tl.constexpr, BLOCK: tl.constexpr
):
    """Sums [SUMS, images, CLASSES], as the overlap's are, from the parts [images, shares, SUMS, CLASSES]."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    kind, image, label = at // (images * CLASSES), at // CLASSES % images, at % CLASSES
    total = tl.zeros((BLOCK,), tl.float64)
    for share in range(shares):
        part = ((image * shares + share) * SUMS + kind) * CLASSES + label
        total += tl.load(partials + part, at < sums, other=0)
    tl.store(overlap + at, total, at < sums)


# ---- launchers ----


# Groups of 8 pixels were measured (H200, Triton 3.6, 2026-11-26): tiles of 2 and 4 classes, and of 64 columns, are 3%
# faster to 19% slower; `tuned/nvidia-h200.json` has what limiting the registers gains. The others are estimates.
CLASSES_AT_A_TIME = {1: {"BLOCK_C": 16}, 2: {"BLOCK_C": 16}, 4: {"BLOCK_C": 8}, 8: {"BLOCK_C": 8}}
FORWARD_PLANS = up.plans_of(CLASSES_AT_A_TIME, Plan({"BLOCK_G": 128}))
OVERLAP_PLANS = up.plans_of(CLASSES_AT_A_TIME, Plan({"BLOCK_G": 128}))
OVERLAP_FINISH_PLANS = {"all": Plan({"BLOCK": 128})}
SHARES_PER_MULTIPROCESSOR = 4  # programs of the overlap's sums; each goes over many blocks


class ForwardTensors(NamedTuple):
    """What forward reads and fills; see `fastseg.ops.upsample_cross_entropy`."""

    input: Tensor
    target: Tensor
    weight: Tensor | None
    loss: Tensor
    statistics: Tensor
    total_weight: Tensor
    overlap: Tensor


@replayed
def forward(tensors: ForwardTensors, options: LossOptions, upsampling: Upsampling) -> None:
    """Fills loss, statistics, total_weight and overlap; see the operator's registration."""
    target, device = tensors.target, tensors.input.device
    grid, arguments = up.grid_of(up.in_planes(tensors.input), target, upsampling)
    arguments |= common(tensors, options) | {"loss": tensors.loss, "statistics": _statistics_to_fill(tensors)}
    bucket, plan, cut = up.cut_groups(upsample_cross_entropy_forward, FORWARD_PLANS, grid, arguments)
    programs, reduced = target.shape[0] * cut["blocks"], options.reduction != "none"
    partials = scratch((2, programs), torch.float64, device) if reduced else None
    launch(upsample_cross_entropy_forward, bucket, plan, programs, arguments | cut | {"partials": partials})
    if partials is not None:
        ce.finish(partials, tensors.loss, tensors.total_weight, options, True)
    if len(tensors.overlap) > 0:
        fill_class_sums(upsample_overlap_forward, OVERLAP_PLANS, tensors.overlap, grid, arguments)


def _statistics_to_fill(tensors: ForwardTensors) -> Tensor | None:
    """Those that are asked for, else scratch memory for the overlap's kernels, which read them."""
    if len(tensors.overlap) > 0 and tensors.statistics.numel() == 0:
        return scratch((2, *tensors.target.shape), tensors.statistics.dtype, tensors.input.device)
    return tensors.statistics if tensors.statistics.numel() > 0 else None


def fill_class_sums(
    kernel: Any, defaults: dict[str, Plan], overlap: Tensor, grid: up.Grid, arguments: dict[str, Any]
) -> None:
    """Launches a kernel for the parts of sums [SUMS, images, CLASSES], and the one that adds them up."""
    device, (sums, images, classes) = overlap.device, overlap.shape
    bucket, plan, cut = up.cut_groups(kernel, defaults, grid, arguments)
    blocks, class_blocks = cut["blocks"], cdiv(classes, plan.tile["BLOCK_C"])
    programs = SHARES_PER_MULTIPROCESSOR * multiprocessors(device)
    shares = min(blocks, cdiv(programs, max(images, 1) * class_blocks))
    partials = scratch((images, shares, sums, classes), torch.float64, device)
    of_parts = {**cut, "partials": partials, "shares": shares, "class_blocks": class_blocks, "SUMS": sums}
    launch(kernel, bucket, plan, images * shares * class_blocks, arguments | of_parts)
    finish_plan = choose(upsample_overlap_finish, "all", OVERLAP_FINISH_PLANS, device)
    of_sums = {
        "partials": partials, "overlap": overlap, "shares": shares, "images": images, "sums": overlap.numel(),
        "CLASSES": classes, "SUMS": sums,
    }  # fmt: skip
    launch(upsample_overlap_finish, "all", finish_plan, cdiv(overlap.numel(), finish_plan.tile["BLOCK"]), of_sums)
