"""relu_pool2d's registration: schemas, fake, CPU, GPU and fallback implementations, and the gradient.

Its kernels are those that follow a library's convolution in conv_relu_pool2d, and so are its numbers: it is that
operator with a convolution that does nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastseg import _triton
from fastseg._native import describe, native
from fastseg.ops.convolution import pooling
from fastseg.ops.convolution.geometry import Geometry, clamp_strides, flatten, pooled_size, unflatten
from fastseg.ops.convolution.geometry import resolve as resolve_convolution
from fastseg.ops.layouts import ANY_LAYOUT, empty, memory_format_of
from fastseg.ops.registration import register_gradient, register_plain


def resolve(input: tuple[int, ...], pool_size: Any, pool_stride: Any, pool_padding: Any, ceil_mode: bool) -> Geometry:
    """The arguments of `fastseg.functional.relu_pool2d` as a `Geometry`.

    Raises:
        ValueError: A number is out of its range, or no window fits; the message names the argument.
    """
    geometry, _ = resolve_convolution((1, 1), 1, 0, 1, 1, pool_size, pool_stride, pool_padding, ceil_mode)
    geometry = clamp_strides(geometry, input[2:], (1, 1))
    pooled_size(input[2], input[3], geometry)
    return geometry


# ---- schemas ----

# The geometry is `flatten`ed; size is the map's height and width.
_library = torch.library.Library("fastseg", "FRAGMENT")
_library.define(
    "relu_pool2d(Tensor input, int[] geometry, bool with_positions, bool with_skip)"
    " -> (Tensor output, Tensor positions, Tensor skip)",
    tags=ANY_LAYOUT,
)
_library.define(
    "relu_pool2d_backward(Tensor? grad_output, Tensor? grad_skip, Tensor positions, Tensor? skip, SymInt[2] size, "
    "int[] geometry) -> Tensor grad_input",
    tags=ANY_LAYOUT,
)


@torch.library.register_fake("fastseg::relu_pool2d", lib=_library)
def _allocate(input: Tensor, numbers: list[int], with_positions: bool, with_skip: bool) -> pooling.Results:
    shape = tuple(input.shape)
    pooled = (*shape[:2], *pooled_size(shape[2], shape[3], unflatten(tuple(numbers))))
    return pooling.allocate_results(input, (pooled, shape), memory_format_of(input), with_positions, with_skip)


@torch.library.register_fake("fastseg::relu_pool2d_backward", lib=_library)
def _allocate_gradient(
    grad_output: Tensor | None, grad_skip: Tensor | None, positions: Tensor, skip: Tensor | None, size: list[int],
    numbers: list[int],
) -> Tensor:  # fmt: skip
    """The map's gradient, which lies as the positions do."""
    given = grad_skip if grad_output is None else grad_output
    assert given is not None
    return empty(given, (*positions.shape[:2], *size), memory_format_of(positions))


# ---- implementations ----


def _forward_cpu(input: Tensor, numbers: list[int], with_positions: bool, with_skip: bool) -> pooling.Results:
    kernels = native("relu_pool2d")
    if kernels is None:
        return forward_plain(input, numbers, with_positions, with_skip)
    output, positions, skip = _allocate(input, numbers, with_positions, with_skip)
    if with_skip:
        input = torch.clamp_min(input, 0, out=skip)
    tensors = (describe(input), describe(output), describe(positions) if with_positions else None)
    kernels.relu_pool2d_forward(tensors, numbers, False, torch.get_num_threads())
    return output, positions, skip


def _backward_cpu(
    grad_output: Tensor | None, grad_skip: Tensor | None, positions: Tensor, skip: Tensor | None, size: list[int],
    numbers: list[int],
) -> Tensor:  # fmt: skip
    kernels = native("relu_pool2d")
    if kernels is None:
        return backward_plain(grad_output, grad_skip, positions, skip, size, numbers)
    gradient = _allocate_gradient(grad_output, grad_skip, positions, skip, size, numbers)
    return pooling.unpool_cpu(kernels, (grad_output, grad_skip, positions, skip), gradient, numbers)


def _forward_triton(input: Tensor, numbers: list[int], with_positions: bool, with_skip: bool) -> pooling.Results:
    kernels = _triton.kernels("relu_pool2d")
    if kernels is None:
        return forward_plain(input, numbers, with_positions, with_skip)
    output, positions, skip = _allocate(input, numbers, with_positions, with_skip)
    kept = (positions if with_positions else None, skip if with_skip else None)
    kernels.forward(kernels.ForwardTensors(input, None, output, *kept), unflatten(tuple(numbers)))
    return output, positions, skip


def _backward_triton(
    grad_output: Tensor | None, grad_skip: Tensor | None, positions: Tensor, skip: Tensor | None, size: list[int],
    numbers: list[int],
) -> Tensor:  # fmt: skip
    kernels = _triton.kernels("relu_pool2d")
    if kernels is None:
        return backward_plain(grad_output, grad_skip, positions, skip, size, numbers)
    gradient = _allocate_gradient(grad_output, grad_skip, positions, skip, size, numbers)
    kept = skip if grad_skip is not None else None
    tensors = kernels.BackwardTensors(gradient, grad_output, positions, kept, grad_skip)
    kernels.backward(tensors, False, unflatten(tuple(numbers)))
    return gradient


def forward_plain(input: Tensor, numbers: list[int], with_positions: bool, with_skip: bool) -> pooling.Results:
    """The operator for devices without a kernel, from torch's own operators."""
    return pooling.pool_plain(input, unflatten(tuple(numbers)), memory_format_of(input), with_positions, with_skip)


def backward_plain(
    grad_output: Tensor | None, grad_skip: Tensor | None, positions: Tensor, skip: Tensor | None, size: list[int],
    numbers: list[int],
) -> Tensor:  # fmt: skip
    """Its gradient from torch's own operators, which is differentiable itself: positions have no gradient."""
    zeros = torch.zeros_like(_allocate_gradient(grad_output, grad_skip, positions, skip, size, numbers))
    gradient = pooling.unpool_plain((grad_output, grad_skip, positions, skip), zeros, unflatten(tuple(numbers)))
    return gradient.contiguous(memory_format=memory_format_of(positions))


_KERNELS = _triton.register(_library, "relu_pool2d", _forward_triton, _forward_cpu)
_triton.register(_library, "relu_pool2d_backward", _backward_triton, _backward_cpu)
register_plain(_library, "relu_pool2d", forward_plain, _allocate)
register_plain(_library, "relu_pool2d_backward", backward_plain, _allocate_gradient)


# ---- gradient ----


class _ReLUPool2d(torch.autograd.Function):
    """The operator's gradient; forward and backward are both operators, so that compilers can trace them."""

    @staticmethod
    def forward(
        ctx: Any, call: Any, input: Tensor, numbers: list[int], with_positions: bool, with_skip: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.size, ctx.numbers = input.shape[2:], numbers
        return pooling.save(ctx, (), call(input, numbers, True, with_skip), with_positions, with_skip)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, _: Any, grad_skip: Tensor | None) -> tuple[Tensor | None, ...]:
        positions, skip = ctx.saved_tensors
        if skip is None:  # compilers make up a gradient for the output that stands for no skip
            grad_skip = None
        if grad_output is None and grad_skip is None:
            return None, None, None, None, None
        # create_graph=True: this gradient will be differentiated itself, which plain PyTorch can.
        backward = backward_plain if torch.is_grad_enabled() else torch.ops.fastseg.relu_pool2d_backward.default
        return None, backward(grad_output, grad_skip, positions, skip, ctx.size, ctx.numbers), None, None, None


register_gradient(_library, "relu_pool2d", _KERNELS, _ReLUPool2d.apply, forward_plain, tensors=1, differentiable=1)


def relu_pool2d(
    input: Tensor, geometry: Geometry, return_indices: bool, return_skip: bool
) -> Tensor | tuple[Tensor, ...]:
    """What of the operator's results was asked for; arguments checked and resolved by `fastseg.functional`."""
    results = torch.ops.fastseg.relu_pool2d.default(input, flatten(geometry), return_indices, return_skip)
    return pooling.asked_for(results, tuple(input.shape), geometry, return_indices, return_skip)
