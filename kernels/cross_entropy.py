"""cross_entropy's Triton kernels.

For a pixel with logits x, m = max(x), s = log(sum(exp(x - m))) and the target distribution q (a weighted one-hot
vector, smoothed or not, or weighted class probabilities):

    loss = -sum(q * (x - m - s))      d loss / dx = exp(x - m - s) * sum(q) - q

Forward reads the logits once and keeps m and s; backward reads the logits once and writes the gradient once. A program
has a tile of [classes, pixels] and goes over the classes: in NCHW a few classes of many pixels at a time, in
channels_last all classes of a few pixels, so that neighbouring threads read neighbouring addresses in both. A label
outside the classes that isn't ignored makes its pixel's loss and gradient NaN; nothing is read for it.

All arithmetic is float32, for float64 logits float64. Sums over pixels: one per program, then those in a fixed order in
float64, so that two runs are bitwise equal and a mean over 10^8 pixels keeps its digits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastseg.kernels import cross_entropy_few as few
from fastseg.kernels import cross_entropy_pixels as ce
from fastseg.kernels import cross_entropy_rows as rows
from fastseg.kernels.launch import (
    Plan,
    bits_of,
    cdiv,
    choose,
    fit,
    fold,
    index_type,
    launch,
    next_power_of_2,
    replayed,
    scratch,
)
from fastseg.kernels.runs import Runs, pixel_strides, runs_of
from fastseg.ops.cross_entropy import has_few_classes

if TYPE_CHECKING:
    from fastseg.ops.losses.options import LossOptions

# ---- parts of both kernels ----


@triton.jit
def _tile(tensor, start, class_stride, pixels, CLASSES: tl.constexpr, INDEX: tl.constexpr, BLOCK_C: tl.constexpr):
    """Classes from ``start`` on, which of them exist, and pointers [BLOCK_C, BLOCK_P] to those of the pixels."""
    local = tl.arange(0, BLOCK_C)
    offsets = (local.to(INDEX) * class_stride)[:, None] + pixels[None, :]
    return start + local, start + local < CLASSES, tensor + tl.cast(start, tl.int64) * class_stride + offsets


# ---- forward ----


@triton.jit(do_not_specialize=["ignore_index", "smoothing_bits"])
def cross_entropy_forward(
    input, target, weight, loss, statistics, total_weight, partials,
    pixels, run_length, blocks, run_sizes,
    input_runs, input_class, input_pixel, target_runs, target_class, target_pixel,
    ignore_index, smoothing_bits,
    CLASSES: tl.constexpr, PROBABILITIES: tl.constexpr, SMOOTHED: tl.constexpr, REDUCED: tl.constexpr,
    INDEX: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Statistics of each pixel, and its loss, or the program's sums of losses and weights.

    Probabilities and smoothed labels have a dense share q of the loss: what ``spread`` adds up to is sum(q * (x - m)),
    for labels q = weight * smoothing / classes.
    """
    ACC: tl.constexpr = tl.float64 if input.dtype.element_ty == tl.float64 else tl.float32
    DENSE: tl.constexpr = PROBABILITIES or SMOOTHED
    run, first, local, inside = ce.locate(run_length, blocks, BLOCK_P)
    input += ce.offset_of(run, first, run_sizes, input_runs, input_pixel)
    target += ce.offset_of(run, first, run_sizes, target_runs, target_pixel)
    input_pixels, target_pixels = local.to(INDEX) * input_pixel, local.to(INDEX) * target_pixel

    labels, logit = None, None
    if not PROBABILITIES:
        labels = ce.load_labels(target, target_pixels, inside, ignore_index, CLASSES)
        logit = tl.load(input + input_pixels + labels[0] * input_class, labels[2], other=0).to(ACC)

    sums = ce.no_classes(tl.zeros((BLOCK_P,), ACC))
    for start in tl.range(0, CLASSES, BLOCK_C, num_stages=STAGES):
        _, exist, pointers = _tile(input, start, input_class, input_pixels, CLASSES, INDEX, BLOCK_C)
        mask = exist[:, None] & inside[None, :]
        logits = tl.load(pointers, mask, other=float("-inf")).to(ACC)
        base = sums[4]
        sums = ce.add_classes(sums, logits)
        if DENSE:
            q = _dense_share(
                target, weight, smoothing_bits, start, target_class, target_pixels, inside, ACC, CLASSES, PROBABILITIES,
                SMOOTHED, INDEX, BLOCK_C,
            )  # fmt: skip
            sums = ce.add_shares(sums, base, logits, q, mask)
    at = run * run_length + first + local
    ce.store_losses(
        ce.of_all_classes(sums), logit, labels, weight, smoothing_bits, loss, statistics, total_weight, partials, at,
        inside, pixels, SMOOTHED, REDUCED, ACC,
    )  # fmt: skip


@triton.jit
def _dense_share(
    target, weight, smoothing_bits, start, target_class, target_pixels, inside, ACC: tl.constexpr,
    CLASSES: tl.constexpr, PROBABILITIES: tl.constexpr, SMOOTHED: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The share q of the classes from ``start`` on.

    Of probabilities [BLOCK_C, BLOCK_P], of smoothed labels [BLOCK_C, 1].
    """
    classes, exist, pointers = _tile(target, start, target_class, target_pixels, CLASSES, INDEX, BLOCK_C)
    if PROBABILITIES:
        q = tl.load(pointers, exist[:, None] & inside[None, :], other=0).to(ACC)
        if SMOOTHED:
            smoothing = ce.from_bits(smoothing_bits, ACC)
            q = q * (1 - smoothing) + smoothing / CLASSES
        if weight is not None:
            q *= tl.load(weight + classes, exist, other=0)[:, None]
        q = tl.where(exist[:, None], q, 0.0)
    else:
        q = ce.smoothed_share(weight, smoothing_bits, classes, CLASSES, ACC)[:, None]
    return q


# ---- backward ----


@triton.jit(do_not_specialize=["ignore_index", "smoothing_bits"])
def cross_entropy_backward(
    grad_output, input, target, weight, statistics, total_weight, grad_input,
    pixels, run_length, blocks, run_sizes,
    grad_output_runs, grad_output_pixel, input_runs, input_class, input_pixel, target_runs, target_class, target_pixel,
    grad_input_runs, grad_input_class, grad_input_pixel,
    ignore_index, smoothing_bits,
    CLASSES: tl.constexpr, PROBABILITIES: tl.constexpr, SMOOTHED: tl.constexpr, REDUCED: tl.constexpr,
    MEAN: tl.constexpr, INDEX: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """grad_input = (exp(x - m - s) * sum(q) - q) * grad_output.

    The label's share and the smoothing's are differences of their own, which vanish where the probability is 1.
    """
    ACC: tl.constexpr = statistics.dtype.element_ty
    run, first, local, inside = ce.locate(run_length, blocks, BLOCK_P)
    input += ce.offset_of(run, first, run_sizes, input_runs, input_pixel)
    target += ce.offset_of(run, first, run_sizes, target_runs, target_pixel)
    grad_input += ce.offset_of(run, first, run_sizes, grad_input_runs, grad_input_pixel)
    input_pixels, target_pixels = local.to(INDEX) * input_pixel, local.to(INDEX) * target_pixel
    grad_input_pixels = local.to(INDEX) * grad_input_pixel

    statistics += run * run_length + first
    largest = tl.load(statistics + local, inside, other=0)
    log_sum = tl.load(statistics + pixels + local, inside, other=0)
    at = ce.offset_of(run, first, run_sizes, grad_output_runs, grad_output_pixel) + local.to(INDEX) * grad_output_pixel
    grad = ce.load_grads(grad_output, at, inside, total_weight, REDUCED, MEAN, ACC)

    share = tl.zeros((BLOCK_P,), ACC)  # sum(q), for smoothed labels of their dense part
    if PROBABILITIES or SMOOTHED:
        for start in range(0, CLASSES, BLOCK_C):
            q = _dense_share(
                target, weight, smoothing_bits, start, target_class, target_pixels, inside, ACC, CLASSES, PROBABILITIES,
                SMOOTHED, INDEX, BLOCK_C,
            )  # fmt: skip
            share += tl.sum(q, 0)
    if not PROBABILITIES:
        labels, grad, label_grad = ce.label_gradients(
            target, target_pixels, inside, grad, weight, ignore_index, smoothing_bits, CLASSES, SMOOTHED, ACC
        )

    for start in range(0, CLASSES, BLOCK_C):
        classes, exist, pointers = _tile(input, start, input_class, input_pixels, CLASSES, INDEX, BLOCK_C)
        mask = exist[:, None] & inside[None, :]
        logits = tl.load(pointers, mask, other=0).to(ACC)
        probability = ce.exp((logits - largest[None, :]) - log_sum[None, :])
        if PROBABILITIES or SMOOTHED:
            q = _dense_share(
                target, weight, smoothing_bits, start, target_class, target_pixels, inside, ACC, CLASSES, PROBABILITIES,
                SMOOTHED, INDEX, BLOCK_C,
            )  # fmt: skip
            gradient = (probability * share[None, :] - q) * grad[None, :]
        if not PROBABILITIES:
            one_hot = tl.where(classes[:, None] == labels[None, :], 1.0, 0.0)
            label_gradient = (probability - one_hot) * label_grad[None, :]
            gradient = gradient + label_gradient if SMOOTHED else label_gradient
        _, _, pointers = _tile(grad_input, start, grad_input_class, grad_input_pixels, CLASSES, INDEX, BLOCK_C)
        tl.store(pointers, gradient, mask)


# ---- launchers ----


def _plans(**more: int) -> dict[str, Plan]:
    """Tiles of a few classes where pixels are neighbours in memory, else of all classes (to 256)."""
    plans = {}
    for suffix, halves in (("", 1), ("-double", 2)):
        plans[f"pixels-inner{suffix}"] = Plan({"BLOCK_C": 4, "BLOCK_P": 1024 // halves, **more})
        for c in (2, 4, 8, 16, 32, 64, 128, 256):
            tile = {"BLOCK_C": c, "BLOCK_P": min(2048 // c, 256) // halves}
            plans[f"classes-inner-{c}{suffix}"] = Plan({**tile, **dict.fromkeys(more, 1)}, num_warps=1)
        tile = {"BLOCK_C": 256, "BLOCK_P": 4 // halves}
        plans[f"classes-inner-more{suffix}"] = Plan({**tile, **dict.fromkeys(more, 1)}, num_warps=1)
    return plans


# Pixels: 8 of them for each thread are 16 bytes of a half type. Forward, tiles are on their way to shared memory while
# another one is summed: 4 stages took 0.135 ms where one took 0.245 (16 x 19 x 512 x 1024, H200, bfloat16, 2026-11-27).
# Classes: several warps would share each row and pass numbers through shared memory.
FORWARD_PLANS = _plans(STAGES=4)
BACKWARD_PLANS = _plans()
LEAST_PIXELS = 2  # smallest BLOCK_P


def _bucket(input: Tensor) -> str:
    classes, suffix = input.shape[1], "-double" if input.dtype == torch.float64 else ""
    if input.stride(1) != 1 or classes == 1:
        return f"pixels-inner{suffix}"
    return f"classes-inner-{next_power_of_2(classes) if classes <= 256 else 'more'}{suffix}"


class ForwardTensors(NamedTuple):
    """What forward reads and fills; see `fastseg.ops.cross_entropy`."""

    input: Tensor
    target: Tensor
    weight: Tensor | None
    loss: Tensor
    statistics: Tensor | None
    total_weight: Tensor


class BackwardTensors(NamedTuple):
    """What backward reads and fills."""

    grad_output: Tensor
    input: Tensor
    target: Tensor
    weight: Tensor | None
    statistics: Tensor | None
    total_weight: Tensor
    grad_input: Tensor


def _common(tensors: ForwardTensors | BackwardTensors, runs: Runs, options: LossOptions) -> dict[str, Any]:
    """What all kernels but the finishing one take."""
    return {
        "input": tensors.input, "target": tensors.target, "weight": tensors.weight, "statistics": tensors.statistics,
        "total_weight": tensors.total_weight, "pixels": runs.count * runs.length, "target_pixel": runs.steps[1],
        "ignore_index": options.ignore_index, "smoothing_bits": bits_of(options.label_smoothing),
        "CLASSES": tensors.input.shape[1], "SMOOTHED": options.label_smoothing > 0,
        "REDUCED": options.reduction != "none",
    }  # fmt: skip


def _tiles(tensors: list[Tensor], runs: Runs, plan: Plan) -> dict[str, Any]:
    """How pixels lie, for the kernels that take any layout; the tensors are input, target, and what has classes."""
    input, target, *_ = tensors
    class_strides = [tensor.stride(1) if tensor.ndim == input.ndim else 0 for tensor in tensors]
    farthest = plan.tile.get("BLOCK_C", 0) * max(class_strides) + plan.tile["BLOCK_P"] * max(runs.steps)
    return {
        "run_length": runs.length, "blocks": cdiv(runs.length, plan.tile["BLOCK_P"]), "run_sizes": runs.sizes,
        "input_runs": runs.strides[0], "input_class": class_strides[0], "input_pixel": runs.steps[0],
        "target_runs": runs.strides[1], "target_class": class_strides[1],
        "PROBABILITIES": target.ndim == input.ndim, "INDEX": index_type(farthest),
    }  # fmt: skip


def _plan(kernel: Any, bucket: str, defaults: dict[str, Plan], input: Tensor, runs: Runs) -> Plan:
    plan = choose(kernel, bucket, defaults, input.device)
    if "BLOCK_C" in plan.tile:
        plan = fold(plan, "BLOCK_P", runs.length, "BLOCK_C", input.shape[1])
    return fit(plan, "BLOCK_P", LEAST_PIXELS, runs.count * runs.length, input.device)


@replayed
def forward(tensors: ForwardTensors, options: LossOptions) -> None:
    """Fills loss, statistics and total_weight; see `fastseg.ops.cross_entropy`."""
    input, target, device = tensors.input, tensors.target, tensors.input.device
    probabilities, sizes = target.ndim == input.ndim, (input.shape[0], *input.shape[2:])
    runs = runs_of(sizes, [pixel_strides(input, True), pixel_strides(target, probabilities)])
    arguments = _common(tensors, runs, options) | {"loss": tensors.loss}
    kernel: Any = cross_entropy_forward
    if rows.serves_forward(input, target, runs.count, runs.steps):
        kernel, bucket = rows.cross_entropy_forward_rows, f"rows-{next_power_of_2(input.shape[1], 2, 256)}"
        plan = choose(kernel, bucket, rows.PLANS, device)
        arguments["CHUNK"] = plan.tile["BLOCK_P"] * next_power_of_2(input.shape[1])
        programs = cdiv(runs.length, plan.tile["BLOCK_P"])
    else:
        bucket, plans = _bucket(input), FORWARD_PLANS
        if has_few_classes(input, target):
            kernel, bucket, plans = few.cross_entropy_forward_few, few.bucket_of(input), few.PLANS
        plan = _plan(kernel, bucket, plans, input, runs)
        arguments |= _tiles([input, target], runs, plan)
        programs = runs.count * arguments["blocks"]
    reduced = options.reduction != "none"
    partials = scratch((2, programs), torch.float64, device) if reduced else None
    launch(kernel, bucket, plan, programs, arguments | {"partials": partials})
    if partials is not None:
        ce.finish(partials, tensors.loss, tensors.total_weight, options, not probabilities)


@replayed
def backward(tensors: BackwardTensors, options: LossOptions) -> None:
    """Fills grad_input; see `fastseg.ops.cross_entropy`."""
    input, target, grad_input = tensors.input, tensors.target, tensors.grad_input
    probabilities, sizes = target.ndim == input.ndim, (input.shape[0], *input.shape[2:])
    of_pixels = [(input, True), (target, probabilities), (grad_input, True)]
    if options.reduction == "none":
        of_pixels.append((tensors.grad_output, False))
    runs = runs_of(sizes, [pixel_strides(tensor, has_classes) for tensor, has_classes in of_pixels])
    arguments = _common(tensors, runs, options) | {
        "grad_output": tensors.grad_output, "grad_input": grad_input, "grad_output_pixel": runs.steps[-1],
        "MEAN": options.reduction == "mean",
    }  # fmt: skip
    kernel: Any = cross_entropy_backward
    if tensors.statistics is not None and rows.serves_backward(input, target, grad_input, runs.count, runs.steps):
        kernel, bucket, vector = rows.cross_entropy_backward_rows, "rows", rows.vector_of(input)
        plan = choose(kernel, bucket, rows.BACKWARD_PLANS, input.device)
        arguments |= {"VECTOR": vector, "ALL_CLASSES": next_power_of_2(input.shape[1])}
        programs = cdiv(input.numel(), plan.tile["BLOCK"] * vector)
    else:
        bucket, plans = _bucket(input), BACKWARD_PLANS
        if tensors.statistics is None:
            kernel, bucket, plans = few.cross_entropy_backward_few, few.bucket_of(input), few.PLANS
        plan = _plan(kernel, bucket, plans, input, runs)
        arguments |= {
            "grad_input_runs": runs.strides[2], "grad_input_class": grad_input.stride(1),
            "grad_input_pixel": runs.steps[2], "grad_output_runs": runs.strides[-1],
            **_tiles([input, target, grad_input], runs, plan),
        }  # fmt: skip
        programs = runs.count * arguments["blocks"]
    launch(kernel, bucket, plan, programs, arguments)
