"""A convolution's results and gradients as conv2d and conv_relu_pool2d share them: tensors, and kernels on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastseg import _triton
from fastseg._native import INTERPRETED, describe
from fastseg._tf32 import convolutions_take_tf32
from fastseg.ops.convolution import algorithms
from fastseg.ops.convolution.geometry import Geometry, idle_taps, unflatten
from fastseg.ops.convolution.kept import memory_for, stamp_of
from fastseg.ops.layouts import empty, is_channels_last, memory_format_of

Gradients = tuple[Tensor, Tensor, Tensor]  # of input, weight and bias; those that aren't needed have no elements


def output_format(input: Tensor, weight: Tensor) -> torch.memory_format:
    """Layout of the outputs: channels_last where input or weight is, as torch's convolution on a CPU."""
    return torch.channels_last if is_channels_last(input) or is_channels_last(weight) else torch.contiguous_format


def allocate_gradients(input: Tensor, weight: Tensor, needs: list[bool]) -> Gradients:
    """Fresh memory."""
    return (
        empty(input, input.shape, memory_format_of(input)) if needs[0] else input.new_empty((0,)),
        empty(weight, weight.shape, memory_format_of(weight)) if needs[1] else weight.new_empty((0,)),
        weight.new_empty((weight.shape[0] if needs[2] else 0,)),
    )


def describe_needed(gradients: Gradients, needs: list[bool]) -> list[Any]:
    """What the C++ side gets of gradients: None for those that aren't needed."""
    return [describe(gradient) if need else None for gradient, need in zip(gradients, needs, strict=True)]


def scaled(weight: Tensor, scale: Tensor | None) -> Tensor:
    """The kernels of a convolution whose output channels are multiplied by ``scale``."""
    return weight if scale is None else weight * scale.reshape(-1, 1, 1, 1)


def for_prediction(weight: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor | None, bool]:
    """Weight and scale, and whether what is made of them is to be kept; where gradients are recorded, one weight."""
    # torch.jit.trace checks itself without gradients, and wants the same graph: what it traces may be trained.
    recorded = torch.is_grad_enabled() or torch.jit.is_tracing()
    if scale is not None and recorded and (weight.requires_grad or scale.requires_grad):
        weight, scale = scaled(weight, scale), None
    return weight, scale, not (recorded and weight.requires_grad)


def fill_outputs(
    kernels: Any, algorithm: str, tensors: tuple[Tensor | None, ...], numbers: list[int], relu: bool = True,
    scale: Tensor | None = None, keep: bool = False,
) -> bool:  # fmt: skip
    """Fills a convolution's outputs on a CPU by "winograd" or "direct"; False where a library has to convolve.

    The one place that knows that Winograd's kernel may refuse a call: its transforms add what a convolution never adds,
    so that sums might overflow, or spread what isn't finite.

    Args:
        kernels: The extension.
        algorithm: What `algorithms.choose_cpu_forward` says.
        tensors: Input, weight, bias; and to be filled, output, positions, and the skip (by "winograd" alone).
        numbers: The geometry, `flatten`ed.
        relu: Without it the convolution is all there is: by "winograd", and without a pool.
        scale: By which output channels are multiplied, ``[K]``.
        keep: Whether the weight is likely to come again, so that what is made of it is kept.
    """
    if algorithm == "library":
        return False
    input, weight, *_, skip = tensors
    assert input is not None
    assert weight is not None
    threads = torch.get_num_threads()
    if algorithm == "winograd":
        by_products = weight.shape[2] == 3 and weight.shape[1] > algorithms.WINOGRAD_FEW_CHANNELS
        memory = memory_for(kernels, weight) if keep and by_products else None
        folded = weight if by_products else scaled(weight, scale)  # a tensor is described while it lives
        described = (describe(input), describe(folded), *map(describe, tensors[2:]))
        extra = (describe(scale) if by_products else None, describe(memory))
        stamp = 0 if memory is None else stamp_of(weight)
        if kernels.winograd_forward((*described, *extra), numbers, relu, stamp, threads):
            return True
        geometry = unflatten(tuple(numbers))
        algorithm = algorithms.choose_cpu_forward(input, weight, geometry, skip is not None, winograd=False)
    if algorithm == "direct" and relu:
        folded = scaled(weight, scale)
        described = (describe(input), describe(folded), *map(describe, tensors[2:-1]))
        kernels.conv_relu_pool2d_forward(described, numbers, threads)
        return True
    return False


def winograd_backward(
    kernels: Any, tensors: tuple[Tensor, Tensor | None, Tensor, Tensor], numbers: list[int], needs: list[bool]
) -> Gradients | None:
    """A convolution's gradients by Winograd's kernel on a CPU; None where that refuses the call, see `fill_outputs`.

    Args:
        kernels: The extension.
        tensors: Gradient of the output, what ReLU passed of the output or None, input, weight. With the second, the
            gradient is that of ReLU's output: it counts where that is above zero.
        numbers: The geometry, `flatten`ed.
        needs: Which gradients are needed.
    """
    gradients = allocate_gradients(*tensors[2:], needs)
    described = (*map(describe, tensors), *describe_needed(gradients, needs))
    return gradients if kernels.winograd_backward(described, numbers, torch.get_num_threads()) else None


def dense_backward(
    kernels: Any, algorithm: str, tensors: tuple[Tensor, Tensor, Tensor], numbers: list[int], needs: list[bool]
) -> Gradients:
    """A convolution's gradients on a CPU, from those of its output, input and weight: by "winograd", else a library."""
    dense, input, weight = tensors
    found = (
        winograd_backward(kernels, (dense, None, input, weight), numbers, needs) if algorithm == "winograd" else None
    )
    if found is not None:
        return found
    geometry = unflatten(tuple(numbers))
    used, cropped = without_idle_taps(input, weight, geometry)
    if used is weight:
        return library_backward(dense, input, weight, geometry, needs)
    grad_input, grad_used, grad_bias = library_backward(dense, input, used, cropped, needs)
    if not needs[1]:
        return grad_input, grad_used, grad_bias
    grad_weight = torch.zeros_like(weight)
    without_idle_taps(input, grad_weight, geometry)[0].copy_(grad_used)
    return grad_input, grad_weight, grad_bias


def for_library(input: Tensor, groups: int) -> Tensor:
    """The input of a library's convolution on a GPU, in the memory format that the library is faster in.

    On tensor cores, cuDNN convolves in channels_last: for NCHW it copies input and output, four to seven times as
    slowly as `in_channels_last` does (H200, 2026-11-27).
    """
    on_nvidia = (input.is_cuda and torch.version.hip is None) or INTERPRETED
    on_tensor_cores = input.dtype.itemsize == 2 or (input.dtype == torch.float32 and convolutions_take_tf32())
    copies = on_nvidia and on_tensor_cores and groups == 1 and input.shape[1] > 1
    return in_channels_last(input) if copies else input


def in_channels_last(map: Tensor) -> Tensor:
    """A map, copied on a GPU where it lies in another way."""
    return map if is_channels_last(map) else relaid(map, torch.channels_last)


def relaid(map: Tensor, memory_format: torch.memory_format) -> Tensor:
    """A copy of a map in a memory format, on a GPU."""
    kernels = _triton.kernels("conv_relu_pool2d", "layouts")
    return map.contiguous(memory_format=memory_format) if kernels is None else kernels.relaid(map, memory_format)


def without_idle_taps(input: Tensor, weight: Tensor, geometry: Geometry) -> tuple[Tensor, Geometry]:
    """A view of the taps that see something of the input, and their geometry: the same convolution."""
    height, width = weight.shape[2:]
    rows, columns = idle_taps((input.shape[2], input.shape[3]), (height, width), geometry)
    if not (rows or columns):
        return weight, geometry
    (top, left), (down, across) = geometry.padding, geometry.dilation
    padding = top - rows * down, left - columns * across
    return weight[:, :, rows : height - rows, columns : width - columns], geometry._replace(padding=padding)


def library_forward(
    input: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, geometry: Geometry
) -> Tensor:
    """PyTorch's own convolution on a CPU, of the taps that see something of the input."""
    weight, geometry = without_idle_taps(input, weight, geometry)
    return torch.conv2d(input, scaled(weight, scale), bias, *geometry[:4])


def library_backward(
    grad_output: Tensor, input: Tensor, weight: Tensor, geometry: Geometry, needs: list[bool]
) -> Gradients:
    """PyTorch's own gradients of a convolution, in the layouts that the fake promises."""
    stride, padding, dilation, groups = geometry[:4]
    grad_input, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
        grad_output, input, weight, list(weight.shape[:1]), stride, padding, dilation, False, [0, 0], groups, needs
    )
    return (
        grad_input.contiguous(memory_format=memory_format_of(input)) if needs[0] else input.new_empty((0,)),
        grad_weight.contiguous(memory_format=memory_format_of(weight)) if needs[1] else weight.new_empty((0,)),
        grad_bias if needs[2] else weight.new_empty((0,)),
    )
