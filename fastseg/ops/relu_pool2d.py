"""relu_pool2d's registration: schemas, fake, CPU, GPU and fallback implementations, and the gradient.

Its kernels are those that follow a library's convolution in conv_relu_pool2d, and so are its numbers: it is that
operator with a convolution that does nothing.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from fastseg import _triton, reference
from fastseg._native import INTERPRETED, describe, native
from fastseg.ops.convolution.geometry import (
    CUT,
    Geometry,
    clamp_strides,
    expand_indices,
    flatten,
    local_positions,
    pooled_size,
    unflatten,
)
from fastseg.ops.convolution.geometry import resolve as resolve_convolution
from fastseg.ops.layouts import ANY_LAYOUT, empty, is_channels_last, memory_format_of
from fastseg.ops.registration import register_gradient, register_plain

# Values of a map up to which torch's own operators are ahead on a CPU: they spare the way through Python (about 0.1 ms
# forward and backward), and read channels_last nearly as fast. Measured on 2 cores with AVX2, 2026-11-23.
PLAIN_MAX_VALUES = 2**14
PLAIN_MAX_VALUES_CHANNELS_LAST = 2**17


def choose_algorithm(input: Tensor) -> Literal["kernel", "plain"]:
    """Which algorithm serves a call on a CPU, from shape and dtype alone: "plain" is torch's own operators.

    A graph for any size takes the kernels: it is compiled once.
    """
    most = PLAIN_MAX_VALUES_CHANNELS_LAST if is_channels_last(input) else PLAIN_MAX_VALUES
    values = input.numel()
    small = not isinstance(values, torch.SymInt) and 0 < values <= most and input.is_cpu and not INTERPRETED
    return "plain" if small and input.dtype == torch.float32 else "kernel"


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
def _forward_fake(
    input: Tensor, geometry: list[int], with_positions: bool, with_skip: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _allocate_outputs(input, unflatten(tuple(geometry)), with_positions, with_skip)


def _allocate_outputs(
    input: Tensor, geometry: Geometry, with_positions: bool, with_skip: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, positions and skip; those that weren't asked for have no elements."""
    layout = memory_format_of(input)
    images, channels, height, width = input.shape
    output = empty(input, (images, channels, *pooled_size(height, width, geometry)), layout)
    return (
        output,
        torch.empty_like(output, dtype=torch.uint8) if with_positions else input.new_empty((0,), dtype=torch.uint8),
        empty(input, (images, channels, height, width), layout) if with_skip else input.new_empty((0,)),
    )


@torch.library.register_fake("fastseg::relu_pool2d_backward", lib=_library)
def _backward_fake(
    grad_output: Tensor | None, grad_skip: Tensor | None, positions: Tensor, skip: Tensor | None, size: list[int],
    geometry: list[int],
) -> Tensor:  # fmt: skip
    return _allocate_gradient(grad_output, grad_skip, positions, size)


def _allocate_gradient(
    grad_output: Tensor | None, grad_skip: Tensor | None, positions: Tensor, size: list[int]
) -> Tensor:
    """The map's gradient, which lies as the positions do."""
    given = grad_skip if grad_output is None else grad_output
    assert given is not None
    return empty(given, (*positions.shape[:2], *size), memory_format_of(positions))


# ---- implementations ----


def _forward_cpu(
    input: Tensor, numbers: list[int], with_positions: bool, with_skip: bool
) -> tuple[Tensor, Tensor, Tensor]:
    kernels = native("relu_pool2d")
    if kernels is None:
        return forward_plain(input, numbers, with_positions, with_skip)
    output, positions, skip = _allocate_outputs(input, unflatten(tuple(numbers)), with_positions, with_skip)
    if with_skip:
        input = torch.clamp_min(input, 0, out=skip)
    kernels.relu_pool2d_forward(
        describe(input), describe(output), describe(positions) if with_positions else None, numbers, False,
        torch.get_num_threads(),
    )  # fmt: skip
    return output, positions, skip


def _backward_cpu(
    grad_output: Tensor | None, grad_skip: Tensor | None, positions: Tensor, skip: Tensor | None, size: list[int],
    numbers: list[int],
) -> Tensor:  # fmt: skip
    kernels = native("relu_pool2d")
    if kernels is None:
        return backward_plain(grad_output, grad_skip, positions, skip, size, numbers)
    grad_input = _allocate_gradient(grad_output, grad_skip, positions, size)
    kernels.relu_pool2d_backward(
        describe(grad_output), describe(positions) if grad_output is not None else None,
        describe(skip) if grad_skip is not None else None, describe(grad_skip), describe(grad_input),
        numbers, torch.get_num_threads(),
    )  # fmt: skip
    return grad_input


def _forward_triton(
    input: Tensor, numbers: list[int], with_positions: bool, with_skip: bool
) -> tuple[Tensor, Tensor, Tensor]:
    kernels = _triton.kernels("relu_pool2d")
    if kernels is None:
        return forward_plain(input, numbers, with_positions, with_skip)
    geometry = unflatten(tuple(numbers))
    output, positions, skip = _allocate_outputs(input, geometry, with_positions, with_skip)
    kept = (positions if with_positions else None, skip if with_skip else None)
    kernels.forward(kernels.ForwardTensors(input, None, output, *kept), geometry)
    return output, positions, skip


def _backward_triton(
    grad_output: Tensor | None, grad_skip: Tensor | None, positions: Tensor, skip: Tensor | None, size: list[int],
    numbers: list[int],
) -> Tensor:  # fmt: skip
    kernels = _triton.kernels("relu_pool2d")
    if kernels is None:
        return backward_plain(grad_output, grad_skip, positions, skip, size, numbers)
    grad_input = _allocate_gradient(grad_output, grad_skip, positions, size)
    kept = skip if grad_skip is not None else None
    tensors = kernels.BackwardTensors(grad_input, grad_output, positions, kept, grad_skip)
    kernels.backward(tensors, False, unflatten(tuple(numbers)))
    return grad_input


def forward_plain(
    input: Tensor, numbers: list[int], with_positions: bool, with_skip: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator for devices without a kernel, from torch's own operators."""
    geometry, layout = unflatten(tuple(numbers)), memory_format_of(input)
    output, indices, skip = reference.relu_pool2d(
        input, *geometry.pool, geometry.ceil_mode, return_indices=True, return_skip=True
    )
    positions = local_positions(indices, output, input.shape[-1], geometry) if with_positions else None
    return (
        output.contiguous(memory_format=layout),
        input.new_empty((0,), dtype=torch.uint8) if positions is None else positions.contiguous(memory_format=layout),
        skip.contiguous(memory_format=layout) if with_skip else input.new_empty((0,)),
    )


def backward_plain(
    grad_output: Tensor | None, grad_skip: Tensor | None, positions: Tensor, skip: Tensor | None, size: list[int],
    numbers: list[int],
) -> Tensor:  # fmt: skip
    """Its gradient from torch's own operators, which is differentiable itself: positions have no gradient."""
    geometry = unflatten(tuple(numbers))
    grad_input = torch.zeros_like(_allocate_gradient(grad_output, grad_skip, positions, size))
    if grad_output is not None:
        indices = expand_indices(positions, tuple(size), geometry).flatten(2)
        passed = grad_output.masked_fill(positions == CUT, 0).flatten(2)
        grad_input = grad_input.flatten(2).scatter_add(2, indices, passed).view_as(grad_input)
    if grad_skip is not None and skip is not None:
        grad_input = grad_input + grad_skip.masked_fill(skip <= 0, 0)
    return grad_input.contiguous(memory_format=memory_format_of(positions))


_KERNELS = _triton.register(_library, "relu_pool2d", _forward_triton, _forward_cpu)
_triton.register(_library, "relu_pool2d_backward", _backward_triton, _backward_cpu)
register_plain(_library, "relu_pool2d", forward_plain, _forward_fake)
register_plain(_library, "relu_pool2d_backward", backward_plain, _backward_fake)


# ---- gradient ----


class _ReLUPool2d(torch.autograd.Function):
    """The operator's gradient; forward and backward are both operators, so that compilers can trace them."""

    @staticmethod
    def forward(
        ctx: Any, call: Any, input: Tensor, numbers: list[int], with_positions: bool, with_skip: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        output, positions, skip = call(input, numbers, True, with_skip)
        ctx.save_for_backward(positions, skip if with_skip else None)
        ctx.size, ctx.numbers = input.shape[2:], numbers
        ctx.set_materialize_grads(False)
        if not with_positions:
            positions = positions.new_empty((0,))
        ctx.mark_non_differentiable(positions, *(() if with_skip else (skip,)))
        return output, positions, skip

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
    output, positions, skip = torch.ops.fastseg.relu_pool2d.default(
        input, flatten(geometry), return_indices, return_skip
    )
    if not (return_indices or return_skip):
        return output
    results = [output]
    if return_indices:
        results.append(expand_indices(positions, tuple(input.shape[2:]), geometry))
    if return_skip:
        results.append(skip)
    return tuple(results)
