"""cross_entropy's registration: schemas, fakes, CPU, GPU and fallback implementations, and the gradient.

The operators take what `fastseg.functional.cross_entropy` has resolved: input ``[N, C, d1, ...]``; class labels
``[N, d1, ...]`` of an integer dtype, or class probabilities of input's shape; weight ``[C]``, contiguous. Weight, loss,
statistics and total_weight have the accumulation dtype: float64 for float64 input, else float32. So have probabilities,
or a half dtype instead of float32.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from fastseg import _triton, reference
from fastseg._native import _C, INTERPRETED, describe, log_fallback, native
from fastseg.ops.layouts import lie_alike
from fastseg.ops.losses import plain
from fastseg.ops.losses.options import SCHEMA, LossOptions, accumulation_dtype, no_statistics
from fastseg.ops.registration import register_gradient, register_plain

MAX_DIMS: int = getattr(_C, "MAX_DIMS", 0)  # of the C++ kernels

# Logits up to which torch's own operator is ahead on a CPU: it spares Python's overhead (about 0.1 ms forward and
# backward), the kernels 3 ns a logit. Measured on 2 cores with AVX2, 2026-11-22.
PLAIN_MAX_LOGITS = 32768

# Classes up to which the GPU's kernels have all of a pixel's in one thread.
FEW_CLASSES = 32


def has_few_classes(input: Tensor, target: Tensor) -> bool:
    """Whether there are labels of few classes that lie apart: then backward on a GPU finds the statistics by itself."""
    apart = input.stride(1) != 1 or input.shape[1] == 1
    return input.shape[1] <= FEW_CLASSES and apart and target.ndim < input.ndim


def choose_algorithm(input: Tensor, target: Tensor, weight: Tensor | None) -> Literal["kernel", "plain"]:
    """Which algorithm serves a call on a CPU, from shapes and dtypes alone: "plain" is torch's own operator."""
    small = 0 < input.numel() <= PLAIN_MAX_LOGITS and input.ndim > 1 and input.is_cpu and not INTERPRETED
    usual = input.dtype == torch.float32 and target.dtype == torch.int64  # what torch has no other operator for
    usual_weight = weight is None or (weight.dtype == torch.float32 and weight.ndim == 1)  # torch takes [1, C], too
    return "plain" if small and usual and usual_weight else "kernel"


def cross_entropy(input: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions) -> Tensor:
    """The loss, of logits that may have no batch; arguments checked by `fastseg.functional`."""
    overload, numbers = torch.ops.fastseg.cross_entropy.default, options[:3]
    if input.ndim > 1:
        return overload(input, target, weight, *numbers, False)[0]
    loss = overload(input.unsqueeze(0), target.unsqueeze(0), weight, *numbers, False)[0]
    return loss.squeeze(0) if loss.ndim == 1 else loss


# ---- schemas ----

_library = torch.library.Library("fastseg", "FRAGMENT")
_library.define(
    f"cross_entropy(Tensor input, Tensor target, Tensor? weight, {SCHEMA}, bool with_statistics)"
    " -> (Tensor loss, Tensor statistics, Tensor total_weight)"
)
_library.define(
    "cross_entropy_backward(Tensor grad_output, Tensor input, Tensor target, Tensor? weight, Tensor statistics, "
    f"Tensor total_weight, {SCHEMA}) -> Tensor"
)


def _allocate_outputs(input: Tensor, reduction: str, with_statistics: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, statistics (each pixel's largest logit m, and log(sum(exp(x - m)))), and what "mean" divides by."""
    images, _, *pixels = input.shape
    statistics = input.new_empty((2, images if with_statistics else 0, *pixels), dtype=accumulation_dtype(input))
    total_weight = statistics.new_empty(())
    return statistics.new_empty((images, *pixels) if reduction == "none" else ()), statistics, total_weight


@torch.library.register_fake("fastseg::cross_entropy", lib=_library)
def _forward_fake(
    input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str, label_smoothing: float,
    with_statistics: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _allocate_outputs(input, reduction, with_statistics)


@torch.library.register_fake("fastseg::cross_entropy_backward", lib=_library)
def _backward_fake(grad_output: Tensor, input: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(input)


# ---- implementations ----


def _native_kernels(input: Tensor) -> Any:
    """The extension where it serves the call, else None and a line in the log."""
    kernels = native("cross_entropy")
    if kernels is not None and input.ndim > MAX_DIMS:
        log_fallback("cross_entropy", f"the kernels take at most {MAX_DIMS} dimensions")
        return None
    return kernels


def _forward_cpu(input: Tensor, target: Tensor, weight: Tensor | None, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    *numbers, with_statistics = options
    kernels, loss_options = _native_kernels(input), LossOptions(*numbers)
    if kernels is None:
        return forward_plain(input, target, weight, *options)
    outputs = loss, statistics, total_weight = _allocate_outputs(input, loss_options.reduction, with_statistics)
    filled = (loss, statistics if with_statistics else None, total_weight)
    kernels.cross_entropy_forward(
        tuple(map(describe, (input, target, weight, *filled))), loss_options, torch.get_num_threads()
    )
    return outputs


def _backward_cpu(
    grad_output: Tensor, input: Tensor, target: Tensor, weight: Tensor | None, statistics: Tensor, total_weight: Tensor,
    *options: Any,
) -> Tensor:  # fmt: skip
    tensors = (grad_output, input, target, weight, statistics, total_weight)
    kernels = _native_kernels(input)
    if kernels is None:
        return backward_plain(*tensors, *options)
    grad_input = torch.empty_like(input)
    described = tuple(map(describe, (*tensors, grad_input)))
    kernels.cross_entropy_backward(described, LossOptions(*options), torch.get_num_threads())
    return grad_input


def _forward_triton(
    input: Tensor, target: Tensor, weight: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *numbers, with_statistics = options
    kernels, loss_options = _triton.kernels("cross_entropy"), LossOptions(*numbers)
    if kernels is None:
        return forward_plain(input, target, weight, *options)
    outputs = loss, statistics, total_weight = _allocate_outputs(input, loss_options.reduction, with_statistics)
    kept = statistics if with_statistics else None
    kernels.forward(kernels.ForwardTensors(input, target, weight, loss, kept, total_weight), loss_options)
    return outputs


def _backward_triton(
    grad_output: Tensor, input: Tensor, target: Tensor, weight: Tensor | None, statistics: Tensor, total_weight: Tensor,
    *options: Any,
) -> Tensor:  # fmt: skip
    kernels = _triton.kernels("cross_entropy")
    if kernels is None:
        return backward_plain(grad_output, input, target, weight, statistics, total_weight, *options)
    grad_input = torch.empty_like(input)
    kept = statistics if len(input) == statistics.shape[1] else None
    tensors = (grad_output, input, target, weight, kept, total_weight, grad_input)
    kernels.backward(kernels.BackwardTensors(*tensors), LossOptions(*options))
    return grad_input


def forward_plain(input: Tensor, target: Tensor, weight: Tensor | None, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The operator from torch's own, for devices without a kernel."""
    *numbers, with_statistics = options
    wide = input.to(accumulation_dtype(input))
    loss, statistics, total_weight = plain.cross_entropy(wide, target, weight, LossOptions(*numbers))
    return loss, statistics if with_statistics else no_statistics(loss, input.shape[2:]), total_weight


def backward_plain(
    grad_output: Tensor, input: Tensor, target: Tensor, weight: Tensor | None, statistics: Tensor, total_weight: Tensor,
    *options: Any,
) -> Tensor:  # fmt: skip
    """Its gradient from torch's own operators."""
    if len(input) != statistics.shape[1]:  # forward kept none
        _, statistics, _ = forward_plain(input, target, weight, *options, True)
    saved = (input, target, weight, statistics, total_weight)
    grad_input = plain.cross_entropy_backward(grad_output, saved, LossOptions(*options))
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
        *numbers, with_statistics = options
        keeps = with_statistics or not ((input.is_cuda or INTERPRETED) and has_few_classes(input, target))
        loss, statistics, total_weight = call(input, target, weight, *numbers, keeps)
        ctx.save_for_backward(input, target, weight, statistics, total_weight)
        ctx.options = numbers
        ctx.set_materialize_grads(False)
        statistics = statistics if with_statistics else no_statistics(loss, input.shape[2:])
        ctx.mark_non_differentiable(statistics, total_weight)
        return loss, statistics, total_weight

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad_loss is None:
            return (None,) * 8
        input, target, weight, statistics, total_weight = ctx.saved_tensors
        if torch.is_grad_enabled():
            # create_graph=True: this gradient will be differentiated itself, which plain PyTorch can.
            loss = reference.cross_entropy(input.to(grad_loss.dtype), target, weight, *ctx.options)
            (grad_input,) = torch.autograd.grad(loss, input, grad_loss, create_graph=True)
        else:
            grad_input = torch.ops.fastseg.cross_entropy_backward.default(
                grad_loss, input, target, weight, statistics, total_weight, *ctx.options
            )
        return None, grad_input, None, None, None, None, None, None


register_gradient(_library, "cross_entropy", _KERNELS, _CrossEntropy.apply, forward_plain, tensors=3, differentiable=1)
