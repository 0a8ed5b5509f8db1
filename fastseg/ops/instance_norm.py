"""instance_norm's registration: schemas, fake, CPU and fallback implementations, and the gradient.

The operator is an instance normalisation with the leaky ReLU that follows it. It serves graphs that the backend
rewrites, on a CPU: Inductor computes such maps in one layout or reads them once for every few channels, and PyTorch's
own copies them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastseg import reference
from fastseg._native import describe, native
from fastseg.ops.layouts import ANY_LAYOUT
from fastseg.ops.registration import register_gradient, register_plain

Gradients = tuple[Tensor, Tensor, Tensor]

# ---- schemas ----

# The leaky ReLU's slope is 0 for a ReLU and 1 for none. The statistics, [2, N, C], are the means and 1 / the standard
# deviations.
_library = torch.library.Library("fastseg", "FRAGMENT")
_library.define(
    "instance_norm(Tensor input, Tensor? weight, Tensor? bias, float eps, float negative_slope)"
    " -> (Tensor output, Tensor statistics)",
    tags=ANY_LAYOUT,
)
_library.define(
    "instance_norm_backward(Tensor grad_output, Tensor input, Tensor statistics, Tensor? weight, Tensor? bias, float"
    " negative_slope) -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)",
    tags=ANY_LAYOUT,
)


def _layout(input: Tensor) -> torch.memory_format:
    """channels_last where a map lies so, in one piece, else contiguous."""
    format = {4: torch.channels_last, 5: torch.channels_last_3d}.get(input.ndim, torch.contiguous_format)
    if not input.is_contiguous() and input.is_contiguous(memory_format=format):
        return format
    return torch.contiguous_format


@torch.library.register_fake("fastseg::instance_norm", lib=_library)
def _allocate(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, negative_slope: float
) -> tuple[Tensor, Tensor]:
    return input.new_empty(input.shape), input.new_empty((2, *input.shape[:2]))


@torch.library.register_fake("fastseg::instance_norm_backward", lib=_library)
def _allocate_gradients(
    grad_output: Tensor, input: Tensor, statistics: Tensor, weight: Tensor | None, bias: Tensor | None,
    negative_slope: float,
) -> Gradients:  # fmt: skip
    gradient = torch.empty_like(input, memory_format=_layout(input))
    return gradient, input.new_empty(input.shape[1]), input.new_empty(input.shape[1])


# ---- implementations ----


def _forward_cpu(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, negative_slope: float
) -> tuple[Tensor, Tensor]:
    kernels = native("instance_norm")
    if kernels is None or not _are_served(input):
        return forward_plain(input, weight, bias, eps, negative_slope)
    output, statistics = _allocate(input, weight, bias, eps, negative_slope)
    input = input.contiguous(memory_format=_layout(input))
    tensors = (*map(describe, (input, *_dense(weight, bias), statistics, output)),)
    kernels.instance_norm_forward(tensors, eps, negative_slope, torch.get_num_threads())
    return output, statistics


def _backward_cpu(
    grad_output: Tensor, input: Tensor, statistics: Tensor, weight: Tensor | None, bias: Tensor | None,
    negative_slope: float,
) -> Gradients:  # fmt: skip
    kernels = native("instance_norm")
    if kernels is None or not _are_served(input):
        return backward_plain(grad_output, input, statistics, weight, bias, negative_slope)
    layout = _layout(input)
    gradient, sums = torch.empty_like(input, memory_format=layout), torch.empty_like(statistics)
    input = input.contiguous(memory_format=layout)
    if not grad_output.is_contiguous():
        grad_output = grad_output.contiguous(memory_format=layout)
    given = (input, *_dense(weight, bias, statistics), grad_output)
    tensors = (*map(describe, (*given, gradient, sums)),)
    kernels.instance_norm_backward(tensors, negative_slope, torch.get_num_threads())
    return gradient, sums[0].sum(0), sums[1].sum(0)


def _are_served(input: Tensor) -> bool:
    return input.dtype in (torch.float32, torch.float64) and input.numel() > 0


def _dense(*tensors: Tensor | None) -> list[Tensor | None]:
    return [tensor if tensor is None else tensor.contiguous() for tensor in tensors]


def forward_plain(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, negative_slope: float
) -> tuple[Tensor, Tensor]:
    """The operator from torch's own."""
    return reference.instance_norm(input, weight, bias, eps, negative_slope).contiguous(), _statistics(input, eps)


def _statistics(input: Tensor, eps: float) -> Tensor:
    variance, mean = torch.var_mean(input, tuple(range(2, input.ndim)), correction=0)
    return torch.stack((mean, (variance + eps).rsqrt()))


def backward_plain(
    grad_output: Tensor, input: Tensor, statistics: Tensor, weight: Tensor | None, bias: Tensor | None,
    negative_slope: float,
) -> Gradients:  # fmt: skip
    """Its gradients from torch's own operators."""
    pixels, by_channel = tuple(range(2, input.ndim)), (1, -1, *(1,) * (input.ndim - 2))
    mean, rstd = statistics.view(*statistics.shape, *by_channel[2:])
    normal = (input - mean) * rstd
    scaled = normal if weight is None else normal * weight.view(by_channel)
    shifted = scaled if bias is None else scaled + bias.view(by_channel)
    gradient = torch.where(shifted > 0, grad_output, grad_output * negative_slope)
    grad_weight, grad_bias = (gradient * normal).sum((0, *pixels)), gradient.sum((0, *pixels))
    if weight is not None:
        gradient = gradient * weight.view(by_channel)
    gradient = gradient - gradient.mean(pixels, True) - normal * (gradient * normal).mean(pixels, True)
    return (gradient * rstd).contiguous(memory_format=_layout(input)), grad_weight, grad_bias


_library.impl("instance_norm", _forward_cpu, "CPU")
_library.impl("instance_norm_backward", _backward_cpu, "CPU")
register_plain(_library, "instance_norm", forward_plain, _allocate)
register_plain(_library, "instance_norm_backward", backward_plain, _allocate_gradients)


# ---- gradient ----


class _InstanceNorm(torch.autograd.Function):
    """The operator's gradient; forward and backward are both operators, so that compilers can trace them."""

    @staticmethod
    def forward(
        ctx: Any, call: Any, input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float,
        negative_slope: float,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        output, statistics = call(input, weight, bias, eps, negative_slope)
        ctx.save_for_backward(input, statistics, weight, bias)
        ctx.numbers = eps, negative_slope
        ctx.mark_non_differentiable(statistics)
        return output, statistics

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        input, statistics, weight, bias = ctx.saved_tensors
        eps, slope = ctx.numbers
        if torch.is_grad_enabled():  # create_graph=True: this gradient will be differentiated itself
            found = backward_plain(grad_output, input, _statistics(input, eps), weight, bias, slope)
        else:
            call = torch.ops.fastseg.instance_norm_backward.default
            found = call(grad_output, input, statistics, weight, bias, slope)
        needed = zip(found, ctx.needs_input_grad[1:4], strict=True)
        return None, *(gradient if needs else None for gradient, needs in needed), None, None


register_gradient(
    _library, "instance_norm", {"CPU": _forward_cpu}, _InstanceNorm.apply, forward_plain, tensors=3, differentiable=3
)
