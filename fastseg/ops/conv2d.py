"""conv2d's registration: schemas, fake, CPU and fallback implementations, and the gradient.

A CPU computes 3x3 kernels with a step of one pixel by Winograd's algorithm, and leaves out taps that see nothing but
padding. Every other convolution is torch's own: `fastseg.functional.conv2d` doesn't come here with it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastseg._native import native
from fastseg.ops.convolution import algorithms, convolve
from fastseg.ops.convolution.geometry import output_shapes, unflatten
from fastseg.ops.layouts import ANY_LAYOUT, empty
from fastseg.ops.registration import register_gradient, register_plain

# ---- schemas ----

# The weight's output channels are multiplied by the scale; what is made of weights that are likely to come again is
# kept. Both are for predictions. The geometry is `flatten`ed.
_library = torch.library.Library("fastseg", "FRAGMENT")
_library.define(
    "conv2d(Tensor input, Tensor weight, Tensor? bias, Tensor? scale, int[] geometry, bool keep) -> Tensor",
    tags=ANY_LAYOUT,
)
_library.define(
    "conv2d_backward(Tensor grad_output, Tensor input, Tensor weight, int[] geometry, bool[3] needs)"
    " -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)",
    tags=ANY_LAYOUT,
)


@torch.library.register_fake("fastseg::conv2d", lib=_library)
def _allocate_output(
    input: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, numbers: list[int], keep: bool
) -> Tensor:
    _, shape = output_shapes(input.shape, weight.shape, unflatten(tuple(numbers)))
    return empty(input, shape, convolve.output_format(input, weight))


@torch.library.register_fake("fastseg::conv2d_backward", lib=_library)
def _backward_fake(
    grad_output: Tensor, input: Tensor, weight: Tensor, numbers: list[int], needs: list[bool]
) -> convolve.Gradients:
    return convolve.allocate_gradients(input, weight, needs)


# ---- implementations ----


def _forward_cpu(
    input: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, numbers: list[int], keep: bool
) -> Tensor:
    kernels, geometry = native("conv2d"), unflatten(tuple(numbers))
    if kernels is None:
        return forward_plain(input, weight, bias, scale, numbers, keep)
    if algorithms.choose_cpu_forward(input, weight, geometry, False, keep) == "winograd":
        output = _allocate_output(input, weight, bias, scale, numbers, keep)
        tensors = (input, weight, bias, output, None, None)
        if convolve.fill_outputs(kernels, "winograd", tensors, numbers, relu=False, scale=scale, keep=keep):
            return output
    output = convolve.library_forward(input, weight, bias, scale, geometry)
    return output.contiguous(memory_format=convolve.output_format(input, weight))


def _backward_cpu(
    grad_output: Tensor, input: Tensor, weight: Tensor, numbers: list[int], needs: list[bool]
) -> convolve.Gradients:
    kernels = native("conv2d")
    if kernels is None:
        return backward_plain(grad_output, input, weight, numbers, needs)
    algorithm = algorithms.choose_cpu_backward(input, weight, unflatten(tuple(numbers)), False)
    return convolve.dense_backward(kernels, algorithm, (grad_output, input, weight), numbers, needs)


def forward_plain(
    input: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, numbers: list[int], keep: bool
) -> Tensor:
    """The operator from torch's own, in the layout that the fake promises."""
    output = torch.conv2d(input, convolve.scaled(weight, scale), bias, *unflatten(tuple(numbers))[:4])
    return output.contiguous(memory_format=convolve.output_format(input, weight))


def backward_plain(
    grad_output: Tensor, input: Tensor, weight: Tensor, numbers: list[int], needs: list[bool]
) -> convolve.Gradients:
    """Its gradients from torch's own operator."""
    return convolve.library_backward(grad_output, input, weight, unflatten(tuple(numbers)), needs)


_library.impl("conv2d", _forward_cpu, "CPU")
_library.impl("conv2d_backward", _backward_cpu, "CPU")
register_plain(_library, "conv2d", forward_plain, _allocate_output)
register_plain(_library, "conv2d_backward", backward_plain, _backward_fake)


# ---- gradient ----


class _Conv2d(torch.autograd.Function):
    """The operator's gradient; forward and backward are both operators, so that compilers can trace them."""

    @staticmethod
    def forward(
        ctx: Any, call: Any, input: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None,
        numbers: list[int], keep: bool,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(input, weight, scale)
        ctx.numbers = numbers
        return call(input, weight, bias, scale, numbers, keep)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, scale = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[1:4])
        # create_graph=True: this gradient will be differentiated itself, which plain PyTorch's can.
        backward = backward_plain if torch.is_grad_enabled() else torch.ops.fastseg.conv2d_backward.default
        grad_input, grad_weight, grad_bias = backward(
            grad_output, input, convolve.scaled(weight, scale), ctx.numbers, needs
        )
        gradients = grad_input, convolve.scaled(grad_weight, scale) if needs[1] else None, grad_bias
        found = (gradient if need else None for gradient, need in zip(gradients, needs, strict=True))
        return None, *found, None, None, None


register_gradient(_library, "conv2d", {"CPU": _forward_cpu}, _Conv2d.apply, forward_plain, tensors=4, differentiable=3)
