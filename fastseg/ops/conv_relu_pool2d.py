"""conv_relu_pool2d's registration: schemas, fake, CPU, GPU and fallback implementations, and the gradient.

`fastseg.ops.convolution.algorithms` decides how a call is computed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastseg import _triton, reference
from fastseg._native import describe, native
from fastseg.ops.convolution import algorithms, convolve, pooling
from fastseg.ops.convolution.geometry import Geometry, flatten, output_shapes, unflatten
from fastseg.ops.layouts import ANY_LAYOUT, empty
from fastseg.ops.registration import register_gradient, register_plain

# ---- schemas ----

# The geometry is `flatten`ed.
_library = torch.library.Library("fastseg", "FRAGMENT")
_library.define(
    "conv_relu_pool2d(Tensor input, Tensor weight, Tensor? bias, Tensor? scale, int[] geometry, bool with_positions, "
    "bool with_skip, bool keep) -> (Tensor output, Tensor positions, Tensor skip)",
    tags=ANY_LAYOUT,
)
_library.define(
    "conv_relu_pool2d_backward(Tensor? grad_output, Tensor? grad_skip, Tensor input, Tensor weight, Tensor positions, "
    "Tensor? skip, int[] geometry, bool[3] needs) -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)",
    tags=ANY_LAYOUT,
)


@torch.library.register_fake("fastseg::conv_relu_pool2d", lib=_library)
def _allocate(
    input: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, numbers: list[int],
    with_positions: bool, with_skip: bool, keep: bool,
) -> pooling.Results:  # fmt: skip
    shapes = output_shapes(input.shape, weight.shape, unflatten(tuple(numbers)))
    return pooling.allocate_results(input, shapes, convolve.output_format(input, weight), with_positions, with_skip)


@torch.library.register_fake("fastseg::conv_relu_pool2d_backward", lib=_library)
def _backward_fake(
    grad_output: Tensor | None, grad_skip: Tensor | None, input: Tensor, weight: Tensor, positions: Tensor,
    skip: Tensor | None, numbers: list[int], needs: list[bool],
) -> convolve.Gradients:  # fmt: skip
    return convolve.allocate_gradients(input, weight, needs)


# ---- implementations ----


def _forward_cpu(
    input: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, numbers: list[int],
    with_positions: bool, with_skip: bool, keep: bool,
) -> pooling.Results:  # fmt: skip
    kernels = native("conv_relu_pool2d")
    if kernels is None:
        return forward_plain(input, weight, bias, scale, numbers, with_positions, with_skip, keep)
    geometry = unflatten(tuple(numbers))
    algorithm = algorithms.choose_cpu_forward(input, weight, geometry, with_skip, keep)
    fused_skip = with_skip and algorithm == "winograd"
    output, positions, skip = _allocate(input, weight, bias, scale, numbers, with_positions, fused_skip, keep)
    kept = positions if with_positions else None
    filled = (input, weight, bias, output, kept, skip if fused_skip else None)
    if convolve.fill_outputs(kernels, algorithm, filled, numbers, scale=scale, keep=keep):
        return output, positions, skip

    convolved = convolve.library_forward(input, weight, bias, scale, geometry)
    # Where windows overlap, two of them read one row: it can't be rewritten in passing.
    in_place = with_skip and not geometry.windows_overlap
    if with_skip and not in_place:
        convolved.relu_()
    described = (describe(convolved), describe(output), describe(kept))
    kernels.relu_pool2d_forward(described, numbers, in_place, torch.get_num_threads())
    skip = convolved.contiguous(memory_format=convolve.output_format(input, weight)) if with_skip else skip
    return output, positions, skip


def _backward_cpu(
    grad_output: Tensor | None, grad_skip: Tensor | None, input: Tensor, weight: Tensor, positions: Tensor,
    skip: Tensor | None, numbers: list[int], needs: list[bool],
) -> convolve.Gradients:  # fmt: skip
    kernels = native("conv_relu_pool2d")
    if kernels is None:
        return backward_plain(grad_output, grad_skip, input, weight, positions, skip, numbers, needs)
    algorithm = algorithms.choose_cpu_backward(input, weight, unflatten(tuple(numbers)), grad_skip is not None)
    if grad_output is not None and algorithm == "direct":
        gradients = convolve.allocate_gradients(input, weight, needs)
        described = map(describe, (grad_output, positions, input, weight))
        tensors = (*described, *convolve.describe_needed(gradients, needs))
        kernels.conv_relu_pool2d_backward(tensors, numbers, torch.get_num_threads())
        return gradients
    full = grad_skip if grad_output is None else None  # where it is the whole gradient
    if full is not None and algorithm == "winograd" and algorithms.masks_as_it_reads(full):
        found = convolve.winograd_backward(kernels, (full, skip, input, weight), numbers, needs)
        if found is not None:
            return found
        algorithm = "library"
    dense = _allocate_dense(input, weight, numbers)
    pooling.unpool_cpu(kernels, (grad_output, grad_skip, positions, skip), dense, numbers)
    return convolve.dense_backward(kernels, algorithm, (dense, input, weight), numbers, needs)


def _allocate_dense(input: Tensor, weight: Tensor, numbers: list[int]) -> Tensor:
    """Memory for the gradient of the convolution's output."""
    _, convolved = output_shapes(input.shape, weight.shape, unflatten(tuple(numbers)))
    return empty(input, convolved, convolve.output_format(input, weight))


_KERNELS_OF_ALGORITHMS = {"fields": "conv_relu_pool2d_fields", "direct": "conv_relu_pool2d", "library": "relu_pool2d"}


def _forward_triton(
    input: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, numbers: list[int],
    with_positions: bool, with_skip: bool, keep: bool,
) -> pooling.Results:  # fmt: skip
    geometry = unflatten(tuple(numbers))
    weight, scale = convolve.scaled(weight, scale), None
    algorithm = algorithms.choose_gpu_forward(weight, geometry, with_skip)
    kernels = _triton.kernels("conv_relu_pool2d", _KERNELS_OF_ALGORITHMS[algorithm])
    if kernels is None:
        return forward_plain(input, weight, bias, scale, numbers, with_positions, with_skip, keep)
    output, positions, skip = _allocate(input, weight, bias, scale, numbers, with_positions, False, keep)
    kept = positions if with_positions else None
    if algorithm != "library":
        _, convolved_shape = output_shapes(input.shape, weight.shape, geometry)
        options = kernels.options_of(weight, convolved_shape[2:], geometry)
        kernels.forward(kernels.ForwardTensors(input, weight, bias, output, kept), options)
        return output, positions, skip
    source = input if with_skip else convolve.for_library(input, geometry.groups)  # the skip lies as the input does
    convolved = torch.conv2d(source, weight, None, *geometry[:4])
    if with_skip:
        # The map is overwritten by the skip, unless overlapping windows read it twice, or it lies another way.
        layout = convolve.output_format(input, weight)
        in_place = not geometry.windows_overlap and convolved.is_contiguous(memory_format=layout)
        skip = convolved if in_place else empty(convolved, tuple(convolved.shape), layout)
    kernels.forward(kernels.ForwardTensors(convolved, bias, output, kept, skip if with_skip else None), geometry)
    return output, positions, skip


def _backward_triton(
    grad_output: Tensor | None, grad_skip: Tensor | None, input: Tensor, weight: Tensor, positions: Tensor,
    skip: Tensor | None, numbers: list[int], needs: list[bool],
) -> convolve.Gradients:  # fmt: skip
    geometry = unflatten(tuple(numbers))
    algorithm = algorithms.choose_gpu_backward(weight, geometry, grad_skip is not None)
    direct = algorithm == "direct" and grad_output is not None
    kernels = _triton.kernels("conv_relu_pool2d", "conv_relu_pool2d_backward" if direct else "relu_pool2d")
    if kernels is None:
        return backward_plain(grad_output, grad_skip, input, weight, positions, skip, numbers, needs)
    if direct:
        gradients = convolve.allocate_gradients(input, weight, needs)
        _, convolved = output_shapes(input.shape, weight.shape, geometry)
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
    source = input if grad_skip is not None else convolve.for_library(input, geometry.groups)
    if source is not input and grad_output is not None:  # the kernel reads what lies as it writes
        grad_output, positions = convolve.in_channels_last(grad_output), convolve.in_channels_last(positions)
    dense = _allocate_dense(source, weight, numbers)
    kept = skip if grad_skip is not None else None
    tensors = kernels.BackwardTensors(dense, grad_output, positions, kept, grad_skip)
    grad_bias = kernels.backward(tensors, needs[2], geometry)
    grad_input, grad_weight, nothing = convolve.library_backward(dense, source, weight, geometry, [*needs[:2], False])
    if needs[0] and source is not input:
        del dense, source, tensors  # as large as the copy
        grad_input = convolve.relaid(grad_input, torch.contiguous_format)
    return grad_input, grad_weight, grad_bias.to(weight.dtype) if needs[2] else nothing


def forward_plain(
    input: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, numbers: list[int],
    with_positions: bool, with_skip: bool, keep: bool,
) -> pooling.Results:  # fmt: skip
    """The operator for devices without a kernel, from torch's own operators."""
    geometry = unflatten(tuple(numbers))
    convolved = torch.conv2d(input, convolve.scaled(weight, scale), bias, *geometry[:4])
    return pooling.pool_plain(convolved, geometry, convolve.output_format(input, weight), with_positions, with_skip)


def backward_plain(
    grad_output: Tensor | None, grad_skip: Tensor | None, input: Tensor, weight: Tensor, positions: Tensor,
    skip: Tensor | None, numbers: list[int], needs: list[bool],
) -> convolve.Gradients:  # fmt: skip
    """Its gradient from torch's own operators."""
    geometry = unflatten(tuple(numbers))
    zeros = input.new_zeros(output_shapes(input.shape, weight.shape, geometry)[1])
    dense = pooling.unpool_plain((grad_output, grad_skip, positions, skip), zeros, geometry)
    return convolve.library_backward(dense, input, weight, geometry, needs)


def cast_for_autocast(
    input: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The tensors in autocast's dtype where it is on for their device, as it treats conv2d; float64 stays."""
    device = input.device.type
    # TorchDynamo can't trace is_autocast_available (torch 2.11); what it compiles for has autocast.
    available = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device)
    if not available or not torch.is_autocast_enabled(device):
        return input, weight, bias, scale
    weight = convolve.scaled(weight, scale)
    dtype = torch.get_autocast_dtype(device)

    def cast(tensor: Tensor) -> Tensor:
        return tensor if tensor.dtype == torch.float64 else tensor.to(dtype)

    return cast(input), cast(weight), None if bias is None else cast(bias), None


def _forward_autocast(
    input: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, *rest: Any
) -> pooling.Results:  # fmt: skip
    tensors = cast_for_autocast(input, weight, bias, scale)
    with torch.autocast(input.device.type, enabled=False):
        return torch.ops.fastseg.conv_relu_pool2d.default(*tensors, *rest)


_library.impl("conv_relu_pool2d", _forward_autocast, "AutocastCPU")
_library.impl("conv_relu_pool2d", _forward_autocast, "AutocastCUDA")
_KERNELS = _triton.register(_library, "conv_relu_pool2d", _forward_triton, _forward_cpu)
_triton.register(_library, "conv_relu_pool2d_backward", _backward_triton, _backward_cpu)
register_plain(_library, "conv_relu_pool2d", forward_plain, _allocate)
register_plain(_library, "conv_relu_pool2d_backward", backward_plain, _backward_fake)


# ---- gradient ----


class _ConvReLUPool2d(torch.autograd.Function):
    """The operator's gradient; forward and backward are both operators, so that compilers can trace them."""

    @staticmethod
    def forward(
        ctx: Any, call: Any, input: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None,
        numbers: list[int], with_positions: bool, with_skip: bool, keep: bool,
    ) -> pooling.Results:  # fmt: skip
        ctx.numbers = numbers
        by_output = algorithms.differentiates_by_output(input, weight, unflatten(tuple(numbers))) and not with_skip
        ctx.by_output = by_output
        results = call(input, weight, bias, scale, numbers, with_positions or not by_output, with_skip, keep)
        return pooling.save(ctx, (input, weight, bias, scale), results, with_positions, with_skip, by_output)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, _: Any, grad_skip: Tensor | None) -> tuple[Tensor | None, ...]:
        input, weight, bias, scale, positions, skip = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[1:4])
        if skip is None or ctx.by_output:  # compilers make up a gradient for the output that stands for no skip
            grad_skip = None
        if grad_output is None and grad_skip is None:
            return (None,) * 9
        weight = convolve.scaled(weight, scale)
        if torch.is_grad_enabled():
            # create_graph=True: this gradient will be differentiated itself, which plain PyTorch can.
            grads: Any = _differentiable_backward(grad_output, grad_skip, input, weight, bias, ctx.numbers, needs)
        else:
            if ctx.by_output:
                grad_output, grad_skip = None, grad_output
            grads = torch.ops.fastseg.conv_relu_pool2d_backward.default(
                grad_output, grad_skip, input, weight, positions, skip, ctx.numbers, needs
            )
        gradients = (grads[0], convolve.scaled(grads[1], scale) if needs[1] else None, grads[2])
        found = (gradient if need else None for gradient, need in zip(gradients, needs, strict=True))
        return None, *found, None, None, None, None, None


def _differentiable_backward(
    grad_output: Tensor | None, grad_skip: Tensor | None, input: Tensor, weight: Tensor, bias: Tensor | None,
    numbers: list[int], needs: list[bool],
) -> list[Tensor | None]:  # fmt: skip
    geometry = unflatten(tuple(numbers))
    convolved = torch.conv2d(input, weight, bias, *geometry[:4])
    output, skip = reference.relu_pool2d(convolved, *geometry.pool, geometry.ceil_mode, return_skip=True)
    pairs = [(o, g) for o, g in ((output, grad_output), (skip, grad_skip)) if g is not None]
    wanted = [t for t, need in zip((input, weight, bias), needs, strict=True) if need and t is not None]
    outputs, gradients = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(outputs, wanted, gradients, create_graph=True))
    return [next(found) if need else None for need in needs]


register_gradient(
    _library, "conv_relu_pool2d", _KERNELS, _ConvReLUPool2d.apply, forward_plain, tensors=4, differentiable=3
)


def conv_relu_pool2d(
    input: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, geometry: Geometry,
    return_indices: bool, return_skip: bool,
) -> Tensor | tuple[Tensor, ...]:  # fmt: skip
    """What of the operator's results was asked for; arguments checked and resolved by `fastseg.functional`."""
    weight, scale, keep = convolve.for_prediction(weight, scale)
    results = torch.ops.fastseg.conv_relu_pool2d.default(
        input, weight, bias, scale, flatten(geometry), return_indices, return_skip, keep
    )
    convolved = output_shapes(input.shape, weight.shape, geometry)[1] if return_indices else ()
    return pooling.asked_for(results, convolved, geometry, return_indices, return_skip)
