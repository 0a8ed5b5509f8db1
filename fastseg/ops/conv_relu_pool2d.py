"""conv_relu_pool2d's registration: schemas, fake, CPU, GPU and fallback implementations, and the gradient.

The operator has three algorithms. "direct": one fused kernel; the full-resolution map is never in memory.
"winograd": on a CPU, the forward of 3x3 convolutions and of a ResNet's stem, fused too, and the gradients of 3x3
convolutions where they are dense. "library": torch's own convolution, then one kernel for (bias,) ReLU, pooling and
positions. `choose_cpu_forward` and `choose_cpu_backward` decide on a CPU, `choose_gpu` on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastseg import _triton, reference
from fastseg._native import describe, native
from fastseg.ops.conv2d import (
    allocate_gradients,
    describe_needed,
    library_backward,
    output_format,
    winograd_backward,
)
from fastseg.ops.convolution.algorithms import (
    DIRECT_FORWARD_MAX_TAPS,
    choose_cpu_backward,
    choose_cpu_forward,
    choose_gpu,
    direct_or_library,
)
from fastseg.ops.convolution.geometry import (
    CUT,
    Geometry,
    expand_indices,
    flatten,
    local_positions,
    output_shapes,
    unflatten,
)
from fastseg.ops.layouts import ANY_LAYOUT, empty
from fastseg.ops.registration import register_gradient, register_plain

# ---- schemas ----

# The geometry is `flatten`ed.
_library = torch.library.Library("fastseg", "FRAGMENT")
_library.define(
    "conv_relu_pool2d(Tensor input, Tensor weight, Tensor? bias, int[] geometry, bool with_positions, bool with_skip)"
    " -> (Tensor output, Tensor positions, Tensor skip)",
    tags=ANY_LAYOUT,
)
_library.define(
    "conv_relu_pool2d_backward(Tensor? grad_output, Tensor? grad_skip, Tensor input, Tensor weight, Tensor positions, "
    "Tensor? skip, int[] geometry, bool[3] needs) -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)",
    tags=ANY_LAYOUT,
)


@torch.library.register_fake("fastseg::conv_relu_pool2d", lib=_library)
def _forward_fake(
    input: Tensor, weight: Tensor, bias: Tensor | None, geometry: list[int], with_positions: bool, with_skip: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _allocate_outputs(input, weight, unflatten(tuple(geometry)), with_positions, with_skip)


def _allocate_outputs(
    input: Tensor, weight: Tensor, geometry: Geometry, with_positions: bool, with_skip: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, positions and skip; those that weren't asked for have no elements."""
    pooled, convolved = output_shapes(input.shape, weight.shape, geometry)
    layout = output_format(input, weight)
    output = empty(input, pooled, layout)
    return (
        output,
        torch.empty_like(output, dtype=torch.uint8) if with_positions else input.new_empty((0,), dtype=torch.uint8),
        empty(input, convolved, layout) if with_skip else input.new_empty((0,)),
    )


@torch.library.register_fake("fastseg::conv_relu_pool2d_backward", lib=_library)
def _backward_fake(
    grad_output: Tensor | None, grad_skip: Tensor | None, input: Tensor, weight: Tensor, positions: Tensor,
    skip: Tensor | None, geometry: list[int], needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return allocate_gradients(input, weight, needs)


# ---- implementations ----


def _forward_cpu(
    input: Tensor, weight: Tensor, bias: Tensor | None, numbers: list[int], with_positions: bool, with_skip: bool
) -> tuple[Tensor, Tensor, Tensor]:
    kernels = native("conv_relu_pool2d")
    if kernels is None:
        return forward_plain(input, weight, bias, numbers, with_positions, with_skip)
    geometry = unflatten(tuple(numbers))
    algorithm = choose_cpu_forward(input, weight, geometry, with_skip)
    output, positions, skip = _allocate_outputs(
        input, weight, geometry, with_positions, with_skip and algorithm == "winograd"
    )
    tensors = (describe(input), describe(weight), describe(bias))
    outputs = (describe(output), describe(positions) if with_positions else None)
    threads = torch.get_num_threads()
    if algorithm == "winograd":
        skipped = describe(skip) if with_skip else None
        if kernels.conv_relu_pool2d_winograd_forward(*tensors, *outputs, skipped, numbers, threads):
            return output, positions, skip
        # Its sums might overflow, or something isn't finite.
        algorithm = direct_or_library(weight, geometry.groups, with_skip, DIRECT_FORWARD_MAX_TAPS)
    if algorithm == "direct":
        kernels.conv_relu_pool2d_forward(*tensors, *outputs, numbers, threads)
        return output, positions, skip

    convolved = torch.conv2d(input, weight, bias, geometry.stride, geometry.padding, geometry.dilation, geometry.groups)
    # Where windows overlap, two of them read one row: it can't be rewritten in passing.
    in_place = with_skip and not geometry.windows_overlap
    if with_skip and not in_place:
        convolved.relu_()
    kernels.relu_pool2d_forward(describe(convolved), *outputs, numbers, in_place, threads)
    return output, positions, convolved.contiguous(memory_format=output_format(input, weight)) if with_skip else skip


def _backward_cpu(
    grad_output: Tensor | None, grad_skip: Tensor | None, input: Tensor, weight: Tensor, positions: Tensor,
    skip: Tensor | None, numbers: list[int], needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    kernels = native("conv_relu_pool2d")
    if kernels is None:
        return backward_plain(grad_output, grad_skip, input, weight, positions, skip, numbers, needs)
    geometry = unflatten(tuple(numbers))
    algorithm = choose_cpu_backward(input, weight, geometry, grad_skip is not None)
    threads = torch.get_num_threads()
    if grad_output is not None and algorithm == "direct":
        gradients = allocate_gradients(input, weight, needs)
        kernels.conv_relu_pool2d_backward(
            describe(grad_output), describe(positions), describe(input), describe(weight),
            *describe_needed(gradients, needs), numbers, threads,
        )  # fmt: skip
        return gradients

    _, convolved = output_shapes(input.shape, weight.shape, geometry)
    grad_convolved = empty(input, convolved, output_format(input, weight))
    kernels.relu_pool2d_backward(
        describe(grad_output), describe(positions) if grad_output is not None else None,
        describe(skip) if grad_skip is not None else None, describe(grad_skip), describe(grad_convolved),
        numbers, threads,
    )  # fmt: skip
    if algorithm == "winograd":
        found = winograd_backward(kernels, grad_convolved, input, weight, geometry.padding, needs)
        if found is not None:
            return found
    return library_backward(grad_convolved, input, weight, *geometry[:4], needs)


def _forward_triton(
    input: Tensor, weight: Tensor, bias: Tensor | None, numbers: list[int], with_positions: bool, with_skip: bool
) -> tuple[Tensor, Tensor, Tensor]:
    geometry = unflatten(tuple(numbers))
    algorithm = choose_gpu(weight, geometry, with_skip)
    kernels = _triton.kernels("conv_relu_pool2d", "conv_relu_pool2d_fields" if algorithm == "direct" else "relu_pool2d")
    if kernels is None:
        return forward_plain(input, weight, bias, numbers, with_positions, with_skip)
    if algorithm == "direct" and not kernels.serves(weight, geometry):
        kernels = _triton.kernels("conv_relu_pool2d")
    output, positions, skip = _allocate_outputs(input, weight, geometry, with_positions, False)
    kept_positions = positions if with_positions else None
    if algorithm == "direct":
        _, convolved_shape = output_shapes(input.shape, weight.shape, geometry)
        tensors = kernels.ForwardTensors(input, weight, bias, output, kept_positions)
        kernels.forward(tensors, kernels.options_of(weight, convolved_shape[2:], geometry))
        return output, positions, skip
    convolved = torch.conv2d(input, weight, None, geometry.stride, geometry.padding, geometry.dilation, geometry.groups)
    if with_skip:
        # The map is overwritten by the skip, unless overlapping windows read it twice, or it lies another way.
        layout = output_format(input, weight)
        in_place = not geometry.windows_overlap and convolved.is_contiguous(memory_format=layout)
        skip = convolved if in_place else empty(convolved, tuple(convolved.shape), layout)
    tensors = kernels.ForwardTensors(convolved, bias, output, kept_positions, skip if with_skip else None)
    kernels.forward(tensors, geometry)
    return output, positions, skip


def _backward_triton(
    grad_output: Tensor | None, grad_skip: Tensor | None, input: Tensor, weight: Tensor, positions: Tensor,
    skip: Tensor | None, numbers: list[int], needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    geometry = unflatten(tuple(numbers))
    _, convolved = output_shapes(input.shape, weight.shape, geometry)
    direct = choose_gpu(weight, geometry, grad_skip is not None) == "direct" and grad_output is not None
    kernels = _triton.kernels("conv_relu_pool2d", "conv_relu_pool2d_backward" if direct else "relu_pool2d")
    if kernels is None:
        return backward_plain(grad_output, grad_skip, input, weight, positions, skip, numbers, needs)
    if direct:
        gradients = allocate_gradients(input, weight, needs)
        options = kernels.options_of(weight, convolved[2:], geometry)
        if needs[1] or needs[2]:
            tensors = kernels.WeightTensors(grad_output, positions, input, weight)
            grad_weight, grad_bias = kernels.backward_weight(tensors, needs[1], options)
            if needs[1]:
                gradients[1].copy_(grad_weight.permute(0, 3, 1, 2))
            if needs[2]:
                gradients[2].copy_(grad_bias)
        if needs[0]:
            kernels.backward_input(kernels.InputTensors(grad_output, positions, weight, gradients[0]), options)
        return gradients
    grad_convolved = empty(input, convolved, output_format(input, weight))
    kept = skip if grad_skip is not None else None
    grad_bias = kernels.backward(
        kernels.BackwardTensors(grad_convolved, grad_output, positions, kept, grad_skip), needs[2], geometry
    )
    grad_input, grad_weight, nothing = library_backward(
        grad_convolved, input, weight, *geometry[:4], [*needs[:2], False]
    )
    return grad_input, grad_weight, grad_bias.to(weight.dtype) if needs[2] else nothing


def _plain(input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> tuple[Tensor, Tensor, Tensor]:
    """Output, indices and skip from the reference, but for its ReLU in place, which decompositions mustn't have."""
    return reference.relu_pool2d(  # type: ignore[return-value]  # three of them, with both flags
        torch.conv2d(input, weight, bias, *geometry[:4]), *geometry.pool, geometry.ceil_mode,
        return_indices=True, return_skip=True,
    )  # fmt: skip


def forward_plain(
    input: Tensor, weight: Tensor, bias: Tensor | None, numbers: list[int], with_positions: bool, with_skip: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator for devices without a kernel, from torch's own operators."""
    geometry, layout = unflatten(tuple(numbers)), output_format(input, weight)
    output, indices, skip = _plain(input, weight, bias, geometry)
    positions = local_positions(indices, output, skip.shape[-1], geometry) if with_positions else None
    return (
        output.contiguous(memory_format=layout),
        input.new_empty((0,), dtype=torch.uint8) if positions is None else positions.contiguous(memory_format=layout),
        skip.contiguous(memory_format=layout) if with_skip else input.new_empty((0,)),
    )


def backward_plain(
    grad_output: Tensor | None, grad_skip: Tensor | None, input: Tensor, weight: Tensor, positions: Tensor,
    skip: Tensor | None, numbers: list[int], needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Its gradient from torch's own operators."""
    geometry = unflatten(tuple(numbers))
    _, convolved = output_shapes(input.shape, weight.shape, geometry)
    grad_convolved = input.new_zeros(convolved)
    if grad_output is not None:
        indices = expand_indices(positions, convolved[2:], geometry).flatten(2)
        passed = grad_output.masked_fill(positions == CUT, 0).flatten(2)
        grad_convolved = grad_convolved.flatten(2).scatter_add(2, indices, passed).view(convolved)
    if grad_skip is not None and skip is not None:
        grad_convolved = grad_convolved + grad_skip.masked_fill(skip <= 0, 0)
    return library_backward(grad_convolved, input, weight, *geometry[:4], needs)


def cast_for_autocast(input: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The tensors in autocast's dtype where it is on for their device, as it treats conv2d; float64 stays."""
    device = input.device.type
    # TorchDynamo can't trace is_autocast_available (torch 2.11); what it compiles for has autocast.
    available = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device)
    if not available or not torch.is_autocast_enabled(device):
        return input, weight, bias
    dtype = torch.get_autocast_dtype(device)

    def cast(tensor: Tensor) -> Tensor:
        return tensor if tensor.dtype == torch.float64 else tensor.to(dtype)

    return cast(input), cast(weight), None if bias is None else cast(bias)


def _forward_autocast(input: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    tensors = cast_for_autocast(input, weight, bias)
    with torch.autocast(input.device.type, enabled=False):
        return torch.ops.fastseg.conv_relu_pool2d.default(*tensors, *rest)


_library.impl("conv_relu_pool2d", _forward_autocast, "AutocastCPU")
_library.impl("conv_relu_pool2d", _forward_autocast, "AutocastCUDA")
_KERNELS = _triton.register(_library, "conv_relu_pool2d", _forward_triton, _forward_cpu)
_triton.register(_library, "conv_relu_pool2d_backward", _backward_triton, _backward_cpu)
register_plain(_library, "conv_relu_pool2d", forward_plain, _forward_fake)
register_plain(_library, "conv_relu_pool2d_backward", backward_plain, _backward_fake)


# ---- gradient ----


class _ConvReLUPool2d(torch.autograd.Function):
    """The operator's gradient; forward and backward are both operators, so that compilers can trace them."""

    @staticmethod
    def forward(
        ctx: Any, call: Any, input: Tensor, weight: Tensor, bias: Tensor | None, numbers: list[int],
        with_positions: bool, with_skip: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        output, positions, skip = call(input, weight, bias, numbers, True, with_skip)
        ctx.save_for_backward(input, weight, bias, positions, skip if with_skip else None)
        ctx.numbers = numbers
        ctx.set_materialize_grads(False)
        if not with_positions:
            positions = positions.new_empty((0,))
        ctx.mark_non_differentiable(positions, *(() if with_skip else (skip,)))
        return output, positions, skip

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, _: Any, grad_skip: Tensor | None) -> tuple[Tensor | None, ...]:
        input, weight, bias, positions, skip = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[1:4])
        if skip is None:  # compilers make up a gradient for the output that stands for no skip
            grad_skip = None
        if grad_output is None and grad_skip is None:
            return (None,) * 7
        if torch.is_grad_enabled():
            # create_graph=True: this gradient will be differentiated itself, which plain PyTorch can.
            gradients = _differentiable_backward(grad_output, grad_skip, input, weight, bias, ctx.numbers, needs)
        else:
            gradients = torch.ops.fastseg.conv_relu_pool2d_backward.default(
                grad_output, grad_skip, input, weight, positions, skip, ctx.numbers, needs
            )
        found = (gradient if need else None for gradient, need in zip(gradients, needs, strict=True))
        return None, *found, None, None, None


def _differentiable_backward(
    grad_output: Tensor | None, grad_skip: Tensor | None, input: Tensor, weight: Tensor, bias: Tensor | None,
    numbers: list[int], needs: list[bool],
) -> list[Tensor | None]:  # fmt: skip
    output, _, skip = _plain(input, weight, bias, unflatten(tuple(numbers)))
    pairs = [(o, g) for o, g in ((output, grad_output), (skip, grad_skip)) if g is not None]
    wanted = [t for t, need in zip((input, weight, bias), needs, strict=True) if need and t is not None]
    outputs, gradients = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(outputs, wanted, gradients, create_graph=True))
    return [next(found) if need else None for need in needs]


register_gradient(
    _library, "conv_relu_pool2d", _KERNELS, _ConvReLUPool2d.apply, forward_plain, tensors=3, differentiable=3
)


def conv_relu_pool2d(
    input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, return_indices: bool, return_skip: bool
) -> Tensor | tuple[Tensor, ...]:
    """What of the operator's results was asked for; arguments checked and resolved by `fastseg.functional`."""
    output, positions, skip = torch.ops.fastseg.conv_relu_pool2d.default(
        input, weight, bias, flatten(geometry), return_indices, return_skip
    )
    if not (return_indices or return_skip):
        return output
    results = [output]
    if return_indices:
        results.append(expand_indices(positions, output_shapes(input.shape, weight.shape, geometry)[1][2:], geometry))
    if return_skip:
        results.append(skip)
    return tuple(results)
