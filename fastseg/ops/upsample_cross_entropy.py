"""upsample_cross_entropy's registration: schemas, fake, CPU, GPU and fallback implementations, and the gradient.

The operators take what `fastseg.functional` has resolved: input ``[N, C, h, w]``; class labels ``[N, H, W]`` of an
integer dtype; weight ``[C]``, contiguous, of the accumulation dtype (float64 for float64 input, else float32), which
loss, statistics, total_weight and overlap have too.

``overlap`` is what soft Dice losses need: of each image and class the sums ``[3, N, C]`` that
`fastseg.reference.overlap` defines; ``[0, N, C]`` where it isn't asked for. Statistics that aren't asked for are
``[2, 0, H, W]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastseg import _triton, reference
from fastseg._native import describe, native
from fastseg.ops import cross_entropy
from fastseg.ops.cross_entropy import REDUCTIONS, accumulation_dtype
from fastseg.ops.layouts import lie_alike
from fastseg.ops.registration import register_plain
from fastseg.ops.upsampling import MODES, steps

OVERLAP_SUMS = 3


# ---- schemas ----

OPTIONS = "SymInt ignore_index, str reduction, float label_smoothing, str mode, bool align_corners"
_library = torch.library.Library("fastseg", "FRAGMENT")
_library.define(
    f"upsample_cross_entropy(Tensor input, Tensor target, Tensor? weight, {OPTIONS}, bool with_overlap, "
    "bool with_statistics) -> (Tensor loss, Tensor statistics, Tensor total_weight, Tensor overlap)"
)
_library.define(
    "upsample_cross_entropy_backward(Tensor grad_loss, Tensor grad_overlap, Tensor input, Tensor target, "
    f"Tensor? weight, Tensor statistics, Tensor total_weight, {OPTIONS}) -> Tensor"
)


def _allocate_outputs(
    input: Tensor, target: Tensor, reduction: str, with_overlap: bool, with_statistics: bool
) -> tuple[Tensor, ...]:
    """Loss, statistics, total_weight and overlap.

    Statistics are each pixel's m and log(sum(exp(x - m))), for the backward of the same device alone: on GPUs m is the
    largest logit, on CPUs both are of logits relative to their input pixels' largest.
    """
    images, *size = target.shape
    statistics = input.new_empty((2, images if with_statistics else 0, *size), dtype=accumulation_dtype(input))
    total_weight = statistics.new_empty(())
    loss = statistics.new_empty(target.shape if reduction == "none" else ())
    return loss, statistics, total_weight, statistics.new_empty((OVERLAP_SUMS * with_overlap, *input.shape[:2]))


@torch.library.register_fake("fastseg::upsample_cross_entropy", lib=_library)
def _forward_fake(
    input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str, label_smoothing: float,
    mode: str, align_corners: bool, with_overlap: bool, with_statistics: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    return _allocate_outputs(input, target, reduction, with_overlap, with_statistics)


@torch.library.register_fake("fastseg::upsample_cross_entropy_backward", lib=_library)
def _backward_fake(grad_loss: Tensor, grad_overlap: Tensor, input: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(input)


# ---- implementations ----


def _forward_cpu(
    input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str, label_smoothing: float,
    mode: str, align_corners: bool, with_overlap: bool, with_statistics: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    kernels = native("upsample_cross_entropy")
    if kernels is None:
        options = (ignore_index, reduction, label_smoothing, mode, align_corners)
        return forward_plain(input, target, weight, *options, with_overlap, with_statistics)
    outputs = _allocate_outputs(input, target, reduction, with_overlap, True)
    kernels.upsample_cross_entropy_forward(
        describe(input), describe(target), describe(weight), *map(describe, outputs), None,
        ignore_index, REDUCTIONS.index(reduction), label_smoothing,
        MODES.index(mode), align_corners, *_steps(input, target, mode, align_corners), torch.get_num_threads(),
    )  # fmt: skip
    return _asked_for(outputs, target, with_statistics)


def _backward_cpu(
    grad_loss: Tensor, grad_overlap: Tensor, input: Tensor, target: Tensor, weight: Tensor | None, statistics: Tensor,
    total_weight: Tensor, ignore_index: int, reduction: str, label_smoothing: float, mode: str, align_corners: bool,
) -> Tensor:  # fmt: skip
    tensors = (grad_loss, grad_overlap, input, target, weight, statistics, total_weight)
    kernels = native("upsample_cross_entropy")
    if kernels is None:
        return backward_plain(*tensors, ignore_index, reduction, label_smoothing, mode, align_corners)
    grad_input = torch.empty_like(input)
    kernels.upsample_cross_entropy_backward(
        *map(describe, tensors), describe(grad_input),
        ignore_index, REDUCTIONS.index(reduction), label_smoothing,
        MODES.index(mode), align_corners, *_steps(input, target, mode, align_corners), torch.get_num_threads(),
    )  # fmt: skip
    return grad_input


def _steps(input: Tensor, target: Tensor, mode: str, align_corners: bool) -> tuple[float, float]:
    return steps(input.shape[2:], target.shape[1:], mode, align_corners)


def _forward_triton(
    input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str, label_smoothing: float,
    mode: str, align_corners: bool, with_overlap: bool, with_statistics: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    kernels = _triton.kernels("upsample_cross_entropy")
    if kernels is None:
        options = (ignore_index, reduction, label_smoothing, mode, align_corners)
        return forward_plain(input, target, weight, *options, with_overlap, with_statistics)
    kept = with_statistics or with_overlap  # the overlap's kernels read them
    outputs = _allocate_outputs(input, target, reduction, with_overlap, kept)
    loss, statistics, total_weight, overlap = outputs
    filled = (loss, statistics if kept else None, total_weight, overlap)
    steps_of_grid = _steps(input, target, mode, align_corners)
    options_of_grid = kernels.Options(ignore_index, reduction, label_smoothing, mode, align_corners, steps_of_grid)
    kernels.forward(kernels.ForwardTensors(input, target, weight, *filled), options_of_grid)
    return _asked_for(outputs, target, with_statistics) if kept else outputs


def _backward_triton(
    grad_loss: Tensor, grad_overlap: Tensor, input: Tensor, target: Tensor, weight: Tensor | None, statistics: Tensor,
    total_weight: Tensor, ignore_index: int, reduction: str, label_smoothing: float, mode: str, align_corners: bool,
) -> Tensor:  # fmt: skip
    tensors = (grad_loss, grad_overlap, input, target, weight, statistics, total_weight)
    kernels = _triton.kernels("upsample_cross_entropy")
    if kernels is None:
        return backward_plain(*tensors, ignore_index, reduction, label_smoothing, mode, align_corners)
    grad_input = torch.empty_like(input)
    steps_of_grid = _steps(input, target, mode, align_corners)
    options = kernels.Options(ignore_index, reduction, label_smoothing, mode, align_corners, steps_of_grid)
    kernels.backward(kernels.BackwardTensors(*tensors, grad_input), options)
    return grad_input


def forward_plain(
    input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str, label_smoothing: float,
    mode: str, align_corners: bool, with_overlap: bool, with_statistics: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The operator from torch's own, for devices without a kernel."""
    logits = reference.upsample(input.to(accumulation_dtype(input)), target.shape[1:], None, mode, align_corners)
    loss, statistics, total_weight = cross_entropy.forward_plain(
        logits, target, weight, ignore_index, reduction, label_smoothing
    )
    sums = reference.overlap(logits, target, ignore_index) if with_overlap else loss.new_empty((0, *input.shape[:2]))
    return _asked_for((loss, statistics, total_weight, sums), target, with_statistics)


def _asked_for(outputs: tuple[Tensor, ...], target: Tensor, with_statistics: bool) -> tuple[Tensor, ...]:
    """The outputs without the statistics that a kernel writes whether they were asked for or not."""
    loss, statistics, total_weight, overlap = outputs
    return loss, statistics if with_statistics else no_statistics(loss, target), total_weight, overlap


def no_statistics(loss: Tensor, target: Tensor) -> Tensor:
    """Statistics that weren't asked for."""
    return loss.new_empty((2, 0, *target.shape[1:]))


def backward_plain(
    grad_loss: Tensor, grad_overlap: Tensor, input: Tensor, target: Tensor, weight: Tensor | None, statistics: Tensor,
    total_weight: Tensor, ignore_index: int, reduction: str, label_smoothing: float, mode: str, align_corners: bool,
) -> Tensor:  # fmt: skip
    """Its gradient from torch's own operators."""
    logits = reference.upsample(input.to(statistics.dtype), target.shape[1:], None, mode, align_corners)
    grad_logits = cross_entropy.backward_plain(
        grad_loss, logits, target, weight, statistics, total_weight, ignore_index, reduction, label_smoothing
    )
    if len(grad_overlap) > 0:
        grad_logits = grad_logits + _grad_of_overlap(grad_overlap, logits, target, statistics, ignore_index)
    sizes = (list(target.shape[1:]), list(input.shape))
    if mode == "bilinear":
        grad_input = torch.ops.aten.upsample_bilinear2d_backward(grad_logits, *sizes, align_corners)
    else:
        grad_input = torch.ops.aten.upsample_nearest2d_backward(grad_logits, *sizes)
    return lie_alike(grad_input, input, input.dtype)


def _grad_of_overlap(
    grad_overlap: Tensor, logits: Tensor, target: Tensor, statistics: Tensor, ignore_index: int
) -> Tensor:
    """What `fastseg.reference.overlap` passes on to its input."""
    largest, log_sum = statistics.unsqueeze(2)
    ignored = reference.is_ignored(target, ignore_index).unsqueeze(1)
    probabilities = (logits - largest - log_sum).exp().masked_fill(ignored, 0)
    labels = target.unsqueeze(1).long().masked_fill(ignored, 0)
    of_intersection, of_predicted, _ = grad_overlap[..., None, None]
    one_hot = torch.zeros_like(probabilities).scatter(1, labels, 1)
    grad = of_predicted + one_hot * of_intersection
    return probabilities * (grad - (probabilities * grad).sum(1, keepdim=True))


KERNELS = _triton.register(_library, "upsample_cross_entropy", _forward_triton, _forward_cpu)
_triton.register(_library, "upsample_cross_entropy_backward", _backward_triton, _backward_cpu)
register_plain(_library, "upsample_cross_entropy", forward_plain, _forward_fake)
register_plain(_library, "upsample_cross_entropy_backward", backward_plain, _backward_fake)


# ---- gradient ----


class _UpsampleCrossEntropy(torch.autograd.Function):
    """The operator's gradient; forward and backward are both operators, so that compilers can trace them."""

    @staticmethod
    def forward(
        ctx: Any, call: Any, input: Tensor, target: Tensor, weight: Tensor | None, *options: Any
    ) -> tuple[Tensor, ...]:
        *numbers, with_overlap, with_statistics = options
        loss, statistics, total_weight, overlap = call(input, target, weight, *numbers, with_overlap, True)
        ctx.save_for_backward(input, target, weight, statistics, total_weight)
        ctx.options = numbers
        ctx.set_materialize_grads(False)
        outputs = _asked_for((loss, statistics, total_weight, overlap), target, with_statistics)
        ctx.mark_non_differentiable(*outputs[1:3], *(() if with_overlap else (overlap,)))
        return outputs

    @staticmethod
    def backward(
        ctx: Any, grad_loss: Tensor | None, _: Any, __: Any, grad_overlap: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: a checkpoint without re-entering lets nothing be unpacked twice
        input, target, _, statistics, _ = saved
        if grad_loss is None:
            if grad_overlap is None:
                return (None,) * 11
            grad_loss = statistics.new_zeros(target.shape if ctx.options[1] == "none" else ())
        if grad_overlap is None:
            grad_overlap = statistics.new_empty((0, *input.shape[:2]))
        if torch.is_grad_enabled():
            # create_graph=True: this gradient will be differentiated itself, which plain PyTorch can.
            grad_input = differentiable_gradient(grad_loss, grad_overlap, saved[:3], *ctx.options)
        else:
            grad_input = torch.ops.fastseg.upsample_cross_entropy_backward.default(
                grad_loss, grad_overlap, *saved, *ctx.options
            )
        return None, grad_input, *(None,) * 9


# `fastseg.ops.upsample_cross_entropy_with_gradient` registers this, for where it has no better one.
record_gradient = _UpsampleCrossEntropy.apply


def differentiable_gradient(
    grad_loss: Tensor, grad_overlap: Tensor | None, tensors: tuple[Tensor, Tensor, Tensor | None],
    ignore_index: int, reduction: str, label_smoothing: float, mode: str, align_corners: bool,
) -> Tensor:  # fmt: skip
    """The gradient for input from plain PyTorch, to be differentiated again; grad_overlap is None or empty for none."""
    input, target, weight = tensors
    logits = reference.upsample(input.to(grad_loss.dtype), target.shape[1:], None, mode, align_corners)
    outputs = [reference.cross_entropy(logits, target, weight, ignore_index, reduction, label_smoothing)]
    grads = [grad_loss]
    if grad_overlap is not None and len(grad_overlap) > 0:
        outputs.append(reference.overlap(logits, target, ignore_index))
        grads.append(grad_overlap)
    return torch.autograd.grad(outputs, input, grads, create_graph=True)[0]


def upsample_cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None, options: Sequence[Any], with_overlap: bool = False
) -> tuple[Tensor, Tensor]:
    """The loss and the overlap; arguments checked by `fastseg.functional`.

    ``options`` are the operator's from ignore_index to align_corners, in its order.
    """
    loss, _, _, overlap = torch.ops.fastseg.upsample_cross_entropy.default(
        input, target, weight, *options, with_overlap, False
    )
    return loss, overlap
