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
    """The operator from `fastseg.ops.upsample_cross_entropy`'s passes, for devices that have no kernel of its own."""
    options = (label_smoothing, mode, align_corners)
    passes = torch.ops.fastseg.upsample_cross_entropy, torch.ops.fastseg.upsample_cross_entropy_backward
    wide = input.to(accumulation_dtype(input))
    loss, statistics, total_weight, no_overlap = passes[0](
        wide, target, weight, ignore_index, reduction, *options, False
    )
    saved = (wide, target, weight, statistics, total_weight)
    gradient = passes[1](torch.ones_like(loss), no_overlap, *saved, ignore_index, "sum", *options)
    return loss, total_weight, torch.empty_like(input, dtype=gradient.dtype).copy_(gradient)


def _backward(
    grad_loss: Tensor, input: Tensor, target: Tensor, weight: Tensor | None, total_weight: Tensor, gradient: Tensor,
    ignore_index: int, reduction: str, label_smoothing: float, mode: str, align_corners: bool,
) -> Tensor:  # fmt: skip
    if reduction == "mean" and input.is_cpu and total_weight == 0:
        # A mean over nothing: torch tells ignored pixels, whose gradient is zero, from those of no weight, where it is
        # NaN, which the sum's gradient doesn't.
        options = (ignore_index, reduction, label_smoothing, mode, align_corners)
        _, statistics, _, no_overlap = torch.ops.fastseg.upsample_cross_entropy(input, target, weight, *options, False)
        saved = (input, target, weight, statistics, total_weight)
        return torch.ops.fastseg.upsample_cross_entropy_backward(grad_loss, no_overlap, *saved, *options)
    scale = grad_loss / total_weight if reduction == "mean" else grad_loss
    return (gradient * scale).to(input.dtype)  # of gradient's strides, which are dense


_triton.register(_library, "upsample_cross_entropy_with_gradient", forward_plain, _forward_cpu)
_library.impl("upsample_cross_entropy_with_gradient", forward_plain, "CompositeExplicitAutograd")
_library.impl("upsample_cross_entropy_with_gradient_backward", _backward, "CompositeExplicitAutograd")


# ---- gradient ----


class _UpsampleCrossEntropyWithGradient(torch.autograd.Function):
    """The gradient around the operator; forward and backward are both operators, so that compilers can trace them."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, target: Tensor, weight: Tensor | None, *options: Any) -> Tensor:
        loss, total_weight, gradient = torch.ops.fastseg.upsample_cross_entropy_with_gradient.default(
            input, target, weight, *options
        )
        ctx.save_for_backward(input, target, weight, total_weight, gradient)
        ctx.options = options
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # create_graph=True: this gradient will be differentiated itself, which plain PyTorch can.
            grad_input = apart.differentiable_gradient(grad_loss, None, ctx.saved_tensors[:3], *ctx.options)
        else:
            grad_input = torch.ops.fastseg.upsample_cross_entropy_with_gradient_backward.default(
                grad_loss, *ctx.saved_tensors, *ctx.options
            )
        return grad_input, *[None] * 7


def upsample_cross_entropy_with_gradient(
    input: Tensor, target: Tensor, weight: Tensor | None, options: tuple[Any, ...]
) -> Tensor:
    """The reduced loss with its gradient for input; see `fastseg.ops.upsample_cross_entropy.upsample_cross_entropy`."""
    return _UpsampleCrossEntropyWithGradient.apply(input, target, weight, *options)
