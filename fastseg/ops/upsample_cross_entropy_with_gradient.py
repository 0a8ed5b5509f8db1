"""upsample_cross_entropy whose forward pass makes the gradient, too: registration, fake, implementations, gradient.

On a CPU that spares the backward pass the probabilities, which are more than half of both passes' work, and the
statistics of every pixel. The operators take what those of `fastseg.ops.upsample_cross_entropy` do. ``gradient`` is
that of the sum of all pixels' weighted losses, of input's shape and strides in the accumulation dtype; the backward
pass scales it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastseg import _triton
from fastseg._native import INTERPRETED, describe, native
from fastseg.ops import upsample_cross_entropy as apart
from fastseg.ops.cross_entropy import REDUCTIONS, accumulation_dtype
from fastseg.ops.layouts import lie_alike
from fastseg.ops.registration import register_gradient, register_plain
from fastseg.ops.upsampling import MODES, steps


def serves(input: Tensor, reduction: str) -> bool:
    """Whether the gradient is to be made in the forward pass, from shapes and devices alone.

    A loss for each pixel has incoming gradients that forward can't know.
    """
    return input.is_cpu and not INTERPRETED and reduction != "none"


# ---- schemas ----

_library = torch.library.Library("fastseg", "FRAGMENT")
_library.define(
    f"upsample_cross_entropy_with_gradient(Tensor input, Tensor target, Tensor? weight, {apart.OPTIONS})"
    " -> (Tensor loss, Tensor total_weight, Tensor gradient)"
)
_library.define(
    "upsample_cross_entropy_with_gradient_backward(Tensor grad_loss, Tensor input, Tensor target, Tensor? weight, "
    f"Tensor total_weight, Tensor gradient, {apart.OPTIONS}) -> Tensor"
)


def _allocate_outputs(input: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(input)
    return input.new_empty((), dtype=dtype), input.new_empty((), dtype=dtype), torch.empty_like(input, dtype=dtype)


@torch.library.register_fake("fastseg::upsample_cross_entropy_with_gradient", lib=_library)
def _forward_fake(input: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _allocate_outputs(input)


@torch.library.register_fake("fastseg::upsample_cross_entropy_with_gradient_backward", lib=_library)
def _backward_fake(grad_loss: Tensor, input: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(input)


# ---- implementations ----


def _forward_cpu(
    input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str, label_smoothing: float,
    mode: str, align_corners: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    kernels = native("upsample_cross_entropy")
    options = (ignore_index, reduction, label_smoothing, mode, align_corners)
    if kernels is None:
        return forward_plain(input, target, weight, *options)
    loss, total_weight, gradient = outputs = _allocate_outputs(input)
    no_statistics, no_overlap = loss.new_empty((2, 0, *target.shape[1:])), loss.new_empty((0, *input.shape[:2]))
    kernels.upsample_cross_entropy_forward(
        *map(describe, (input, target, weight, loss, no_statistics, total_weight, no_overlap, gradient)),
        ignore_index, REDUCTIONS.index(reduction), label_smoothing, MODES.index(mode), align_corners,
        *steps(input.shape[2:], target.shape[1:], mode, align_corners), torch.get_num_threads(),
    )  # fmt: skip
    return outputs


def forward_plain(
    input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str, label_smoothing: float,
    mode: str, align_corners: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The operator from torch's own, for devices without a kernel."""
    options = (label_smoothing, mode, align_corners)
    wide = input.to(accumulation_dtype(input))
    loss, statistics, total_weight, no_overlap = apart.forward_plain(
        wide, target, weight, ignore_index, reduction, *options, False, True
    )
    saved = (wide, target, weight, statistics, total_weight)
    gradient = apart.backward_plain(torch.ones_like(loss), no_overlap, *saved, ignore_index, "sum", *options)
    return loss, total_weight, lie_alike(gradient, input, gradient.dtype)


def backward_plain(
    grad_loss: Tensor, input: Tensor, target: Tensor, weight: Tensor | None, total_weight: Tensor, gradient: Tensor,
    *options: Any,
) -> Tensor:  # fmt: skip
    """Its gradient from torch's own operators, without a look at total_weight."""
    _, statistics, _, no_overlap = apart.forward_plain(input, target, weight, *(*options, False, True))
    return apart.backward_plain(grad_loss, no_overlap, input, target, weight, statistics, total_weight, *options)


def _backward(
    grad_loss: Tensor, input: Tensor, target: Tensor, weight: Tensor | None, total_weight: Tensor, gradient: Tensor,
    ignore_index: int, reduction: str, label_smoothing: float, mode: str, align_corners: bool,
) -> Tensor:  # fmt: skip
    if reduction == "mean" and input.is_cpu and total_weight == 0:
        # A mean over nothing: torch tells ignored pixels, whose gradient is zero, from those of no weight, where it is
        # NaN, which the sum's gradient doesn't.
        options = (ignore_index, reduction, label_smoothing, mode, align_corners)
        _, statistics, _, no_overlap = torch.ops.fastseg.upsample_cross_entropy(
            input, target, weight, *options, False, True
        )
        saved = (input, target, weight, statistics, total_weight)
        return torch.ops.fastseg.upsample_cross_entropy_backward(grad_loss, no_overlap, *saved, *options)
    scale = grad_loss / total_weight if reduction == "mean" else grad_loss
    return (gradient * scale).to(input.dtype)  # of gradient's strides, which are dense


_KERNELS = _triton.register(_library, "upsample_cross_entropy_with_gradient", forward_plain, _forward_cpu)
register_plain(_library, "upsample_cross_entropy_with_gradient", forward_plain, _forward_fake)
_triton.register(_library, "upsample_cross_entropy_with_gradient_backward", _backward, _backward)
register_plain(_library, "upsample_cross_entropy_with_gradient_backward", backward_plain, _backward_fake)


# ---- gradient ----


class _UpsampleCrossEntropyWithGradient(torch.autograd.Function):
    """The operator's gradient; forward and backward are both operators, so that compilers can trace them."""

    @staticmethod
    def forward(
        ctx: Any, call: Any, input: Tensor, target: Tensor, weight: Tensor | None, *options: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        loss, total_weight, gradient = call(input, target, weight, *options)
        ctx.save_for_backward(input, target, weight, total_weight, gradient)
        ctx.options = options
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(total_weight, gradient)
        return loss, total_weight, gradient

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad_loss is None:
            return (None,) * 9
        if torch.is_grad_enabled():
            # create_graph=True: this gradient will be differentiated itself, which plain PyTorch can.
            grad_input = apart.differentiable_gradient(grad_loss, None, ctx.saved_tensors[:3], *ctx.options)
        else:
            grad_input = torch.ops.fastseg.upsample_cross_entropy_with_gradient_backward.default(
                grad_loss, *ctx.saved_tensors, *ctx.options
            )
        return None, grad_input, *(None,) * 7


register_gradient(
    _library, "upsample_cross_entropy_with_gradient", _KERNELS, _UpsampleCrossEntropyWithGradient.apply,
    forward_plain, tensors=3, differentiable=1,
)  # fmt: skip


def _record_gradient(call: Any, input: Tensor, target: Tensor, weight: Tensor | None, *options: Any) -> Any:
    """upsample_cross_entropy with its gradient, which forward makes where it can."""
    *numbers, with_overlap, with_statistics = options
    if with_overlap or with_statistics or not serves(input, options[1]):
        return apart.record_gradient(call, input, target, weight, *options)
    tensors = (input, target, weight)
    if call is apart.KERNELS["CPU"]:
        loss, total_weight, _ = _UpsampleCrossEntropyWithGradient.apply(_KERNELS["CPU"], *tensors, *numbers)
    else:
        overload = torch.ops.fastseg.upsample_cross_entropy_with_gradient.default
        loss, total_weight, _ = overload(*tensors, *numbers)
    return loss, apart.no_statistics(loss, target), total_weight, loss.new_empty((0, *input.shape[:2]))


register_gradient(
    _library, "upsample_cross_entropy", apart.KERNELS, _record_gradient, apart.forward_plain,
    tensors=3, differentiable=1,
)  # fmt: skip
