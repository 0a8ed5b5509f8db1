"""conv2d's registration: schemas, fake, CPU and fallback implementations, and the gradient.

The operator is a convolution of 3x3 kernels with a step of one pixel, which a CPU computes by Winograd's algorithm.
Every other convolution is torch's own: `fastseg.functional.conv2d` doesn't come here with it. What conv_relu_pool2d
needs of a convolution and its gradients is here, too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastseg._native import describe, native
from fastseg.ops.convolution.algorithms import pays_for_winograd
from fastseg.ops.layouts import ANY_LAYOUT, empty, memory_format_of
from fastseg.ops.registration import register_gradient, register_plain

# ---- what conv_relu_pool2d shares ----


def output_format(input: Tensor, weight: Tensor) -> torch.memory_format:
    """Layout of the outputs: channels_last where input or weight is, as torch's convolution on a CPU."""
    return memory_format_of(weight if memory_format_of(input) == torch.contiguous_format else input)


def allocate_gradients(input: Tensor, weight: Tensor, needs: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input, weight and bias; those that aren't needed have no elements."""
    return (
        empty(input, input.shape, memory_format_of(input)) if needs[0] else input.new_empty((0,)),
        empty(weight, weight.shape, memory_format_of(weight)) if needs[1] else weight.new_empty((0,)),
        weight.new_empty((weight.shape[0] if needs[2] else 0,)),
    )


def describe_needed(gradients: tuple[Tensor, ...], needs: list[bool]) -> list[Any]:
    """What the C++ side gets of gradients: None for those that aren't needed."""
    return [describe(gradient) if need else None for gradient, need in zip(gradients, needs, strict=True)]


def winograd_backward(
    kernels: Any, grad_output: Tensor, input: Tensor, weight: Tensor, padding: Any, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor] | None:
    """The gradients; None where sums might overflow, or something isn't finite."""
    gradients = allocate_gradients(input, weight, needs)
    done = kernels.conv2d_winograd_backward(
        describe(grad_output), describe(input), describe(weight), *describe_needed(gradients, needs), padding,
        torch.get_num_threads(),
    )  # fmt: skip
    return gradients if done else None


def library_backward(
    grad_output: Tensor, input: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any, groups: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """PyTorch's own gradients of a convolution, in the layouts that the fake promises."""
    grad_input, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
        grad_output, input, weight, list(weight.shape[:1]), stride, padding, dilation, False, [0, 0], groups, needs
    )
    return (
        grad_input.contiguous(memory_format=memory_format_of(input)) if needs[0] else input.new_empty((0,)),
        grad_weight.contiguous(memory_format=memory_format_of(weight)) if needs[1] else weight.new_empty((0,)),
        grad_bias if needs[2] else weight.new_empty((0,)),
    )


# ---- schemas ----

_library = torch.library.Library("fastseg", "FRAGMENT")
_library.define("conv2d(Tensor input, Tensor weight, Tensor? bias, int[2] padding) -> Tensor", tags=ANY_LAYOUT)
_library.define(
    "conv2d_backward(Tensor grad_output, Tensor input, Tensor weight, int[2] padding, bool[3] needs)"
    " -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)",
    tags=ANY_LAYOUT,
)


@torch.library.register_fake("fastseg::conv2d", lib=_library)
def _allocate_output(input: Tensor, weight: Tensor, bias: Tensor | None, padding: list[int]) -> Tensor:
    size = (rows + 2 * pad - 2 for rows, pad in zip(input.shape[2:], padding, strict=True))
    return empty(input, (input.shape[0], weight.shape[0], *size), output_format(input, weight))


@torch.library.register_fake("fastseg::conv2d_backward", lib=_library)
def _backward_fake(
    grad_output: Tensor, input: Tensor, weight: Tensor, padding: list[int], needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    return allocate_gradients(input, weight, needs)


# ---- implementations ----


def _forward_cpu(input: Tensor, weight: Tensor, bias: Tensor | None, padding: list[int]) -> Tensor:
    kernels = native("conv2d") if pays_for_winograd(input) else None
    if kernels is not None:
        output = _allocate_output(input, weight, bias, padding)
        tensors = (describe(input), describe(weight), describe(bias), describe(output))
        if kernels.conv2d_winograd_forward(*tensors, padding, torch.get_num_threads()):
            return output
        # Its sums might overflow, or something isn't finite.
    return forward_plain(input, weight, bias, padding)


def _backward_cpu(
    grad_output: Tensor, input: Tensor, weight: Tensor, padding: list[int], needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    kernels = native("conv2d") if pays_for_winograd(input) else None
    gradients = None if kernels is None else winograd_backward(kernels, grad_output, input, weight, padding, needs)
    return backward_plain(grad_output, input, weight, padding, needs) if gradients is None else gradients


def forward_plain(input: Tensor, weight: Tensor, bias: Tensor | None, padding: list[int]) -> Tensor:
    """The operator from torch's own, in the layout that the fake promises."""
    output = torch.conv2d(input, weight, bias, 1, padding)
    return output.contiguous(memory_format=output_format(input, weight))


def backward_plain(
    grad_output: Tensor, input: Tensor, weight: Tensor, padding: list[int], needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Its gradients from torch's own operator."""
    return library_backward(grad_output, input, weight, [1, 1], padding, [1, 1], 1, needs)


_library.impl("conv2d", _forward_cpu, "CPU")
_library.impl("conv2d_backward", _backward_cpu, "CPU")
register_plain(_library, "conv2d", forward_plain, _allocate_output)
register_plain(_library, "conv2d_backward", backward_plain, _backward_fake)


# ---- gradient ----


class _Conv2d(torch.autograd.Function):
    """The operator's gradient; forward and backward are both operators, so that compilers can trace them."""

    @staticmethod
    def forward(ctx: Any, call: Any, input: Tensor, weight: Tensor, bias: Tensor | None, padding: list[int]) -> Tensor:
        ctx.save_for_backward(input, weight)
        ctx.padding = padding
        return call(input, weight, bias, padding)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[1:4])
        # create_graph=True: this gradient will be differentiated itself, which plain PyTorch's can.
        backward = backward_plain if torch.is_grad_enabled() else torch.ops.fastseg.conv2d_backward.default
        gradients = backward(grad_output, input, weight, ctx.padding, needs)
        return None, *(gradient if need else None for gradient, need in zip(gradients, needs, strict=True)), None


register_gradient(_library, "conv2d", {"CPU": _forward_cpu}, _Conv2d.apply, forward_plain, tensors=3, differentiable=3)
