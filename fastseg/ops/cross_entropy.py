"""cross_entropy's registration: schemas, fake, CPU, GPU and fallback implementations, and the gradient.

The operators take what `fastseg.functional.cross_entropy` has resolved: input ``[N, C, d1, ...]``; class labels
``[N, d1, ...]`` of an integer dtype, or class probabilities of input's shape; weight ``[C]``, contiguous. Weight, loss,
statistics and total_weight have the accumulation dtype: float64 for float64 input, else float32. So have probabilities,
or a half dtype instead of float32.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastseg import _triton, reference
from fastseg._native import INTERPRETED, describe, log_fallback, native
from fastseg.ops.layouts import lie_alike
from fastseg.ops.registration import register_gradient, register_plain

REDUCTIONS = ("none", "mean", "sum")  # in the order of csrc/loss/cross_entropy.h's Reduction
MAX_DIMS = 8  # csrc/core/tensor.h's kMaxDims
# The ignore_index where no label is to be ignored: kIgnoreNone of csrc/upsampling/upsample_confusion_matrix.h.
IGNORE_NONE = torch.iinfo(torch.int64).min

# Logits up to which torch's own operator is ahead on a CPU: it spares the way through Python (about 0.1 ms forward and
# backward), the kernels 3 ns a logit. Measured on 2 cores with AVX2, 2026-11-22.
PLAIN_MAX_LOGITS = 32768


def accumulation_dtype(input: Tensor) -> torch.dtype:
    """The dtype of the arithmetic."""
    return torch.float64 if input.dtype == torch.float64 else torch.float32


def choose_algorithm(input: Tensor, target: Tensor, weight: Tensor | None) -> Literal["kernel", "plain"]:
    """Which algorithm serves a call on a CPU, from shapes and dtypes alone: "plain" is torch's own operator."""
    small = 0 < input.numel() <= PLAIN_MAX_LOGITS and input.ndim > 1 and input.is_cpu and not INTERPRETED
    usual = input.dtype == torch.float32 and target.dtype == torch.int64  # what torch has no other operator for
    usual_weight = weight is None or (weight.dtype == torch.float32 and weight.ndim == 1)  # torch takes [1, C], too
    return "plain" if small and usual and usual_weight else "kernel"


# ---- schemas ----

_OPTIONS = "SymInt ignore_index, str reduction, float label_smoothing"
_library = torch.library.Library("fastseg", "FRAGMENT")
_library.define(
    f"cross_entropy(Tensor input, Tensor target, Tensor? weight, {_OPTIONS})"
    " -> (Tensor loss, Tensor statistics, Tensor total_weight)"
)
_library.define(
    "cross_entropy_backward(Tensor grad_output, Tensor input, Tensor target, Tensor? weight, Tensor statistics, "
    f"Tensor total_weight, {_OPTIONS}) -> Tensor"
)


def _allocate_outputs(input: Tensor, reduction: str) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, statistics (each pixel's largest logit m, and log(sum(exp(x - m)))), and what "mean" divides by."""
    images, _, *pixels = input.shape
    statistics = input.new_empty((2, images, *pixels), dtype=accumulation_dtype(input))
    total_weight = statistics.new_empty(())
    return torch.empty_like(statistics[0] if reduction == "none" else total_weight), statistics, total_weight


@torch.library.register_fake("fastseg::cross_entropy", lib=_library)
def _forward_fake(
    input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str, label_smoothing: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _allocate_outputs(input, reduction)


@torch.library.register_fake("fastseg::cross_entropy_backward", lib=_library)
def _backward_fake(grad_output: Tensor, input: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(input)


# ---- implementations ----


def _kernels(input: Tensor) -> Any:
    """The extension where it serves the call, else None and a line in the log."""
    if input.ndim > MAX_DIMS:
        log_fallback("cross_entropy", f"the kernels take at most {MAX_DIMS} dimensions")
        return None
    return native("cross_entropy")


def _forward_cpu(
    input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str, label_smoothing: float
) -> tuple[Tensor, Tensor, Tensor]:
    kernels = _kernels(input)
    if kernels is None:
        return forward_plain(input, target, weight, ignore_index, reduction, label_smoothing)
    outputs = _allocate_outputs(input, reduction)
    kernels.cross_entropy_forward(
        describe(input), describe(target), describe(weight), *map(describe, outputs),
        ignore_index, REDUCTIONS.index(reduction), label_smoothing, torch.get_num_threads(),
    )  # fmt: skip
    return outputs


def _backward_cpu(
    grad_output: Tensor, input: Tensor, target: Tensor, weight: Tensor | None, statistics: Tensor, total_weight: Tensor,
    ignore_index: int, reduction: str, label_smoothing: float,
) -> Tensor:  # fmt: skip
    kernels = _kernels(input)
    if kernels is None:
        return backward_plain(
            grad_output, input, target, weight, statistics, total_weight, ignore_index, reduction, label_smoothing
        )
    grad_input = torch.empty_like(input)
    kernels.cross_entropy_backward(
        describe(grad_output), describe(input), describe(target), describe(weight), describe(statistics),
        describe(total_weight), describe(grad_input),
        ignore_index, REDUCTIONS.index(reduction), label_smoothing, torch.get_num_threads(),
    )  # fmt: skip
    return grad_input


def _forward_triton(
    input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str, label_smoothing: float
) -> tuple[Tensor, Tensor, Tensor]:
    kernels = _triton.kernels("cross_entropy")
    if kernels is None:
        return forward_plain(input, target, weight, ignore_index, reduction, label_smoothing)
    outputs = _allocate_outputs(input, reduction)
    options = kernels.Options(ignore_index, reduction, label_smoothing)
    kernels.forward(kernels.ForwardTensors(input, target, weight, *outputs), options)
    return outputs


def _backward_triton(
    grad_output: Tensor, input: Tensor, target: Tensor, weight: Tensor | None, statistics: Tensor, total_weight: Tensor,
    ignore_index: int, reduction: str, label_smoothing: float,
) -> Tensor:  # fmt: skip
    tensors = (grad_output, input, target, weight, statistics, total_weight)
    kernels = _triton.kernels("cross_entropy")
    if kernels is None:
        return backward_plain(*tensors, ignore_index, reduction, label_smoothing)
    grad_input = torch.empty_like(input)
    options = kernels.Options(ignore_index, reduction, label_smoothing)
    kernels.backward(kernels.BackwardTensors(*tensors, grad_input), options)
    return grad_input


def forward_plain(
    input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str, label_smoothing: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator from torch's own, for devices without a kernel."""
    logits = input.to(accumulation_dtype(input))
    largest = logits.amax(1)
    statistics = torch.stack((largest, (logits - largest.unsqueeze(1)).exp().sum(1).log()))
    # In parts, since ONNX's translation of cross_entropy (torch 2.13, onnxscript 0.7) takes probabilities for labels,
    # and leaves out the smoothing.
    scores = F.log_softmax(logits, 1)
    if target.is_floating_point():
        total_weight = largest.new_full((), largest.numel())
        shares = target * (1 - label_smoothing) + label_smoothing / input.shape[1]
        losses = -(_weighed(scores, weight) * shares).sum(1)
        return _reduced(losses, total_weight, reduction), statistics, total_weight
    ignored = reference.is_ignored(target, ignore_index)
    labels = target.long()
    counts = ~ignored if weight is None else weight[labels.masked_fill(ignored, 0)].masked_fill(ignored, 0)
    total_weight = counts.sum().to(statistics.dtype)
    own = scores * (1 - label_smoothing) if label_smoothing > 0 else scores
    loss = F.nll_loss(own, labels, weight, ignore_index=ignore_index, reduction=reduction)
    if label_smoothing > 0:
        shares = _weighed(scores, weight) * (label_smoothing / input.shape[1])
        loss = loss - _reduced(shares.sum(1).masked_fill(ignored, 0), total_weight, reduction)
    return loss, statistics, total_weight


def _weighed(scores: Tensor, weight: Tensor | None) -> Tensor:
    return scores if weight is None else scores * weight.view(-1, *[1] * (scores.ndim - 2))


def _reduced(losses: Tensor, total_weight: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return losses
    return losses.sum() / total_weight if reduction == "mean" else losses.sum()


def backward_plain(
    grad_output: Tensor, input: Tensor, target: Tensor, weight: Tensor | None, statistics: Tensor, total_weight: Tensor,
    ignore_index: int, reduction: str, label_smoothing: float,
) -> Tensor:  # fmt: skip
    """Its gradient from torch's own operators."""
    largest, log_sum = statistics.unsqueeze(2)
    probabilities = (input - largest - log_sum).exp()
    grad = (grad_output / total_weight if reduction == "mean" else grad_output).expand_as(statistics[0])
    # How much a class counts: the target's share of it * scale + shift.
    weights = statistics.new_ones(input.shape[1]) if weight is None else weight
    scale, shift = (
        term.view(-1, *[1] * (input.ndim - 2))
        for term in (weights * (1 - label_smoothing), weights * label_smoothing / input.shape[1])
    )
    if target.is_floating_point():
        share = target * scale + shift
        grad_input = (probabilities * share.sum(1, keepdim=True) - share) * grad.unsqueeze(1)
    else:
        ignored = reference.is_ignored(target, ignore_index)
        labels = target.masked_fill(ignored, 0).long()
        grad = grad.masked_fill(ignored, 0)
        one_hot = torch.zeros_like(probabilities).scatter(1, labels.unsqueeze(1), 1)
        grad_input = (probabilities - one_hot) * (scale.flatten()[labels] * grad).unsqueeze(1)
        if label_smoothing > 0:
            grad_input = grad_input + (probabilities * shift.sum() - shift) * grad.unsqueeze(1)
    return lie_alike(grad_input, input, input.dtype)


_KERNELS = _triton.register(_library, "cross_entropy", _forward_triton, _forward_cpu)
_triton.register(_library, "cross_entropy_backward", _backward_triton, _backward_cpu)
register_plain(_library, "cross_entropy", forward_plain, _forward_fake)
register_plain(_library, "cross_entropy_backward", backward_plain, _backward_fake)


# ---- gradient ----


class _CrossEntropy(torch.autograd.Function):
    """The operator's gradient; forward and backward are both operators, so that compilers can trace them."""

    @staticmethod
    def forward(
        ctx: Any, call: Any, input: Tensor, target: Tensor, weight: Tensor | None, *options: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        loss, statistics, total_weight = call(input, target, weight, *options)
        ctx.save_for_backward(input, target, weight, statistics, total_weight)
        ctx.options = options
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(statistics, total_weight)
        return loss, statistics, total_weight

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad_loss is None:
            return (None,) * 7
        input, target, weight, statistics, total_weight = ctx.saved_tensors
        if torch.is_grad_enabled():
            # create_graph=True: this gradient will be differentiated itself, which plain PyTorch can.
            loss = reference.cross_entropy(input.to(grad_loss.dtype), target, weight, *ctx.options)
            (grad_input,) = torch.autograd.grad(loss, input, grad_loss, create_graph=True)
        else:
            grad_input = torch.ops.fastseg.cross_entropy_backward.default(
                grad_loss, input, target, weight, statistics, total_weight, *ctx.options
            )
        return None, grad_input, None, None, None, None, None


register_gradient(_library, "cross_entropy", _KERNELS, _CrossEntropy.apply, forward_plain, tensors=3, differentiable=1)
