"""upsample_sigmoid_sums' registration: schemas, fakes, CPU, GPU and fallback implementations, and the gradient.

What every loss of sigmoids, each class against the rest, is made of: sums over an image's pixels. With z the logit of
a class, upsampled to the target's size, p its sigmoid and t the class's share of the pixel, they are of

* ``p t``, ``p`` and ``t``: `fastseg.functional.class_sums`, for Dice and its relatives; where ``smaller``, of the
  smaller of p and t in place of ``p t``, which soft targets need for a perfect score;

and where gamma is given, with q the sigmoid of ``z (2 t - 1)``, the probability of what the target says, of

* ``f t -log(sigmoid(z))``, ``f (1 - t) -log(sigmoid(-z))`` and f, with the focal factor ``f = (1 - q)^gamma``: binary
  cross-entropy for gamma 0. A threshold divides 1 - q, and where q is less than it f is 1.

The operators take input ``[N, C, h, w]``; labels ``[N, H, W]`` of an integer dtype, which give one class all of a
pixel; or shares ``[N, C, H, W]`` of an integer or a floating dtype, float64 where input is and only there. A label or
a share that is ignore_index adds nothing. ``sums`` are ``[3, N, C]`` or ``[6, N, C]`` in the accumulation dtype.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastseg import _triton, reference
from fastseg._native import describe, native
from fastseg.ops.losses.options import accumulation_dtype
from fastseg.ops.registration import register_gradient, register_plain
from fastseg.ops.upsampling import Upsampling, upsampling_between

CLASS_SUMS, ALL_SUMS = 3, 6


class SigmoidOptions(NamedTuple):
    """What is summed, of which grid; the C++ bindings and the Triton launchers read it by name.

    Attributes:
        ignore_index: The label or share that doesn't count.
        gamma: The focal factor's exponent; None for the class sums alone.
        threshold: What 1 - q is divided by; None for nothing.
        smaller: Whether the smaller of p and t is summed in place of ``p t``; for class sums alone.
        mode: As in `fastseg.ops.losses.options.LossOptions`.
        align_corners: As there.
    """

    ignore_index: int
    gamma: float | None = None
    threshold: float | None = None
    smaller: bool = False
    mode: str = "nearest"
    align_corners: bool = False


def upsample_sigmoid_sums(input: Tensor, target: Tensor, options: SigmoidOptions) -> Tensor:
    """The sums; arguments checked by the caller."""
    return torch.ops.fastseg.upsample_sigmoid_sums.default(input, target, *options)


# ---- schemas ----

_OPTIONS = "SymInt ignore_index, float? gamma, float? threshold, bool smaller, str mode, bool align_corners"
_library = torch.library.Library("fastseg", "FRAGMENT")
_library.define(f"upsample_sigmoid_sums(Tensor input, Tensor target, {_OPTIONS}) -> Tensor")
_library.define(f"upsample_sigmoid_sums_backward(Tensor grad_sums, Tensor input, Tensor target, {_OPTIONS}) -> Tensor")


@torch.library.register_fake("fastseg::upsample_sigmoid_sums", lib=_library)
def _forward_fake(input: Tensor, target: Tensor, *options: Any) -> Tensor:
    sums = CLASS_SUMS if SigmoidOptions(*options).gamma is None else ALL_SUMS
    return input.new_empty((sums, *input.shape[:2]), dtype=accumulation_dtype(input))


@torch.library.register_fake("fastseg::upsample_sigmoid_sums_backward", lib=_library)
def _backward_fake(grad_sums: Tensor, input: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(input)


# ---- implementations ----


def _upsampling(input: Tensor, target: Tensor, options: SigmoidOptions) -> Upsampling:
    return upsampling_between(input.shape[2:], target.shape[-2:], options.mode, options.align_corners)


def _forward_cpu(input: Tensor, target: Tensor, *options: Any) -> Tensor:
    kernels, given = native("upsample_sigmoid_sums"), SigmoidOptions(*options)
    if kernels is None:
        return forward_plain(input, target, *options)
    sums = _forward_fake(input, target, *options)
    tensors, upsampling = tuple(map(describe, (input, target, sums))), _upsampling(input, target, given)
    kernels.upsample_sigmoid_sums_forward(tensors, given, upsampling, torch.get_num_threads())
    return sums


def _backward_cpu(grad_sums: Tensor, input: Tensor, target: Tensor, *options: Any) -> Tensor:
    kernels, given = native("upsample_sigmoid_sums"), SigmoidOptions(*options)
    if kernels is None:
        return backward_plain(grad_sums, input, target, *options)
    grad_input = torch.empty_like(input)
    tensors = tuple(map(describe, (grad_sums, input, target, grad_input)))
    kernels.upsample_sigmoid_sums_backward(tensors, given, _upsampling(input, target, given), torch.get_num_threads())
    return grad_input


def _forward_triton(input: Tensor, target: Tensor, *options: Any) -> Tensor:
    kernels, given = _triton.kernels("upsample_sigmoid_sums"), SigmoidOptions(*options)
    if kernels is None:
        return forward_plain(input, target, *options)
    sums = _forward_fake(input, target, *options)
    kernels.forward((input, target, sums), given, _upsampling(input, target, given))
    return sums


def _backward_triton(grad_sums: Tensor, input: Tensor, target: Tensor, *options: Any) -> Tensor:
    kernels, given = _triton.kernels("upsample_sigmoid_sums"), SigmoidOptions(*options)
    if kernels is None:
        return backward_plain(grad_sums, input, target, *options)
    grad_input = torch.empty_like(input)
    tensors = grad_sums, input, target, grad_input
    kernels.backward(tensors, given, _upsampling(input, target, given))
    return grad_input


def forward_plain(input: Tensor, target: Tensor, *options: Any) -> Tensor:
    """The operator from torch's own, for devices without a kernel."""
    *summed, mode, align_corners = options
    wide = input.to(accumulation_dtype(input))
    logits = reference.upsample(wide, target.shape[-2:], None, mode, align_corners)
    return reference.sigmoid_sums(logits, target, *summed)


def backward_plain(grad_sums: Tensor, input: Tensor, target: Tensor, *options: Any) -> Tensor:
    """Its gradient from torch's own operators."""
    with torch.enable_grad():
        leaf = input.detach().requires_grad_()
        (grad_input,) = torch.autograd.grad(forward_plain(leaf, target, *options), leaf, grad_sums)
    return grad_input


_KERNELS = _triton.register(_library, "upsample_sigmoid_sums", _forward_triton, _forward_cpu)
_triton.register(_library, "upsample_sigmoid_sums_backward", _backward_triton, _backward_cpu)
register_plain(_library, "upsample_sigmoid_sums", forward_plain, _forward_fake)
register_plain(_library, "upsample_sigmoid_sums_backward", backward_plain, _backward_fake)


# ---- gradient ----


class _SigmoidSums(torch.autograd.Function):
    """The operator's gradient; forward and backward are both operators, so that compilers can trace them."""

    @staticmethod
    def forward(ctx: Any, call: Any, input: Tensor, target: Tensor, *options: Any) -> Tensor:
        ctx.save_for_backward(input, target)
        ctx.options = options
        return call(input, target, *options)

    @staticmethod
    def backward(ctx: Any, grad_sums: Tensor) -> tuple[Tensor | None, ...]:
        input, target = ctx.saved_tensors
        if torch.is_grad_enabled():
            # create_graph=True: this gradient will be differentiated itself, which plain PyTorch can.
            sums = forward_plain(input, target, *ctx.options)
            (grad_input,) = torch.autograd.grad(sums, input, grad_sums, create_graph=True)
        else:
            grad_input = torch.ops.fastseg.upsample_sigmoid_sums_backward.default(
                grad_sums, input, target, *ctx.options
            )
        return None, grad_input, *(None,) * 7


register_gradient(
    _library, "upsample_sigmoid_sums", _KERNELS, _SigmoidSums.apply, forward_plain, tensors=2, differentiable=1
)
