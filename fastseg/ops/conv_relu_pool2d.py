"""conv_relu_pool2d's registration: schemas, fake, CPU and fallback implementations, and the gradient.

Two roads lead through the operator on a CPU. "direct": one fused C++ kernel; the full-resolution map is never in
memory. "library": torch's own convolution, then one C++ kernel for ReLU, pooling and positions. `choose_road` decides.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fastseg import reference
from fastseg._native import describe, log_slow_road, native

MAX_WINDOW = 255  # positions in a pool window: they are kept as uint8, and CUT takes one value
CUT = 255  # the position of a window whose maximum ReLU cut: it has no gradient

# Kernel taps (channels x height x width) up to which the direct kernel beats oneDNN's convolution plus a pool; a
# convolution with more is bound by arithmetic, where oneDNN is ahead. Measured on 2 cores with AVX2, 2026-11-22.
DIRECT_MAX_TAPS = 160


class Geometry(NamedTuple):
    """All numbers of the operator, in the schema's order; pairs are (height, width)."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    pool_size: tuple[int, int]
    pool_stride: tuple[int, int]
    pool_padding: tuple[int, int]
    ceil_mode: bool

    @property
    def pool(self) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
        """What the pooling kernels get."""
        return self.pool_size, self.pool_stride, self.pool_padding


def convolved_size(input: Tensor, weight: Tensor, geometry: Geometry) -> tuple[int, int]:
    """Height and width of the convolution's output."""
    height, width = (
        (input.shape[2 + i] + 2 * geometry.padding[i] - geometry.dilation[i] * (weight.shape[2 + i] - 1) - 1)
        // geometry.stride[i]
        + 1
        for i in range(2)
    )
    return height, width


def pooled_size(convolved: tuple[int, int], geometry: Geometry) -> tuple[int, int]:
    """Height and width of the pooled output, as max_pool2d counts them."""
    sizes = []
    for size, window, stride, padding in zip(convolved, *geometry.pool, strict=True):
        room = size + 2 * padding - window
        steps = -(-room // stride) if geometry.ceil_mode else room // stride
        # With ceil_mode, the last window must start inside the input or its left padding.
        if geometry.ceil_mode and steps * stride >= size + padding:
            steps -= 1
        sizes.append(steps + 1)
    return sizes[0], sizes[1]


def expand_indices(positions: Tensor, convolved: tuple[int, int], geometry: Geometry) -> Tensor:
    """Window-local positions (uint8) as max_pool2d's indices: int64 offsets in the convolution's output.

    A window that ReLU cut is all zeros after it, so its first position inside the output is its maximum.
    """
    height, width = positions.shape[-2:]
    rows = torch.arange(height, device=positions.device) * geometry.pool_stride[0] - geometry.pool_padding[0]
    columns = torch.arange(width, device=positions.device) * geometry.pool_stride[1] - geometry.pool_padding[1]
    local = positions.long()
    cut = local == CUT
    row = torch.where(cut, rows.clamp(min=0)[:, None], rows[:, None] + local // geometry.pool_size[1])
    column = torch.where(cut, columns.clamp(min=0), columns + local % geometry.pool_size[1])
    return row * convolved[1] + column


def local_positions(indices: Tensor, output: Tensor, width: int, geometry: Geometry) -> Tensor:
    """The inverse of `expand_indices`, given the pooled values (those not above zero were cut by ReLU)."""
    rows = torch.arange(output.shape[-2], device=output.device) * geometry.pool_stride[0] - geometry.pool_padding[0]
    columns = torch.arange(output.shape[-1], device=output.device) * geometry.pool_stride[1] - geometry.pool_padding[1]
    local = (indices // width - rows[:, None]) * geometry.pool_size[1] + indices % width - columns
    return torch.where(output <= 0, CUT, local).to(torch.uint8)


def choose_road(input: Tensor, weight: Tensor, groups: int, with_skip: bool) -> Literal["direct", "library"]:
    """Which road serves a call on a CPU, from shapes and dtype alone."""
    if groups > 1 or with_skip:  # the direct kernel has no groups, and a skip is the full-resolution map itself
        return "library"
    return "direct" if weight[0].numel() <= DIRECT_MAX_TAPS else "library"


def _is_channels_last(tensor: Tensor) -> bool:
    return tensor.stride(1) == 1 and tensor.shape[1] > 1 and tensor.stride(3) >= tensor.shape[1]


def _memory_format(input: Tensor, weight: Tensor) -> torch.memory_format:
    """Layout of the outputs: channels_last where input or weight is, as torch's convolution on a CPU."""
    either = _is_channels_last(input) or _is_channels_last(weight)
    return torch.channels_last if either else torch.contiguous_format


def _empty(
    like: Tensor, shape: tuple[int, ...], layout: torch.memory_format, dtype: torch.dtype | None = None
) -> Tensor:
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device, memory_format=layout)


# ---- schemas ----

_GEOMETRY = (
    "int[2] stride, int[2] padding, int[2] dilation, int groups, "
    "int[2] pool_size, int[2] pool_stride, int[2] pool_padding, bool ceil_mode"
)
_library = torch.library.Library("fastseg", "FRAGMENT")
_library.define(
    f"conv_relu_pool2d(Tensor input, Tensor weight, Tensor? bias, {_GEOMETRY}, bool with_positions, bool with_skip)"
    " -> (Tensor output, Tensor positions, Tensor skip)"
)
_library.define(
    "conv_relu_pool2d_backward(Tensor? grad_output, Tensor? grad_skip, Tensor input, Tensor weight, Tensor positions, "
    f"Tensor? skip, {_GEOMETRY}, bool[3] needs) -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)"
)


@torch.library.register_fake("fastseg::conv_relu_pool2d", lib=_library)
def _forward_fake(input: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    geometry, (with_positions, with_skip) = Geometry(*rest[:8]), rest[8:]
    return _allocate_outputs(input, weight, geometry, with_positions, with_skip)


def _allocate_outputs(
    input: Tensor, weight: Tensor, geometry: Geometry, with_positions: bool, with_skip: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, positions and skip; those that weren't asked for have no elements."""
    layout = _memory_format(input, weight)
    convolved = convolved_size(input, weight, geometry)
    leading = (input.shape[0], weight.shape[0])
    shape = (*leading, *pooled_size(convolved, geometry))
    nothing = torch.contiguous_format
    return (
        _empty(input, shape, layout),
        _empty(input, shape, layout, torch.uint8) if with_positions else _empty(input, (0,), nothing, torch.uint8),
        _empty(input, (*leading, *convolved), layout) if with_skip else _empty(input, (0,), nothing),
    )


@torch.library.register_fake("fastseg::conv_relu_pool2d_backward", lib=_library)
def _backward_fake(
    grad_output: Tensor | None, grad_skip: Tensor | None, input: Tensor, weight: Tensor, positions: Tensor,
    skip: Tensor | None, *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _allocate_gradients(input, weight, rest[8])


def _allocate_gradients(input: Tensor, weight: Tensor, needs: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input, weight and bias; those that aren't needed have no elements."""
    layout, weight_layout = (
        torch.channels_last if _is_channels_last(t) else torch.contiguous_format for t in (input, weight)
    )
    nothing = torch.contiguous_format
    return (
        _empty(input, input.shape, layout) if needs[0] else _empty(input, (0,), nothing),
        _empty(weight, weight.shape, weight_layout) if needs[1] else _empty(weight, (0,), nothing),
        _empty(weight, weight.shape[:1] if needs[2] else (0,), nothing),
    )


# ---- implementations ----


def _forward_cpu(input: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    geometry, (with_positions, with_skip) = Geometry(*rest[:8]), rest[8:]
    kernels = native("conv_relu_pool2d")
    if kernels is None:
        return _forward_plain(input, weight, bias, *rest)
    output, positions, skip = _allocate_outputs(input, weight, geometry, with_positions, False)
    threads = torch.get_num_threads()
    outputs = (describe(output), describe(positions) if with_positions else None)
    if choose_road(input, weight, geometry.groups, with_skip) == "direct":
        kernels.conv_relu_pool2d_forward(
            describe(input), describe(weight), describe(bias), *outputs,
            geometry.stride, geometry.padding, geometry.dilation, *geometry.pool, threads,
        )  # fmt: skip
        return output, positions, skip

    convolved = torch.conv2d(input, weight, bias, geometry.stride, geometry.padding, geometry.dilation, geometry.groups)
    # Where windows overlap, two of them read one row: it can't be rewritten in passing.
    overlap = any(s < p for s, p in zip(geometry.pool_stride, geometry.pool_size, strict=True))
    if with_skip and overlap:
        convolved.relu_()
    kernels.relu_pool2d_forward(describe(convolved), *outputs, *geometry.pool, with_skip and not overlap, threads)
    return output, positions, convolved.contiguous(memory_format=_memory_format(input, weight)) if with_skip else skip


def _backward_cpu(
    grad_output: Tensor | None, grad_skip: Tensor | None, input: Tensor, weight: Tensor, positions: Tensor,
    skip: Tensor | None, *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    geometry, needs = Geometry(*rest[:8]), rest[8]
    kernels = native("conv_relu_pool2d")
    if kernels is None:
        return _backward_plain(grad_output, grad_skip, input, weight, positions, skip, *rest)
    threads = torch.get_num_threads()
    if choose_road(input, weight, geometry.groups, grad_skip is not None) == "direct" and grad_output is not None:
        gradients = _allocate_gradients(input, weight, needs)
        kernels.conv_relu_pool2d_backward(
            describe(grad_output), describe(positions), describe(input), describe(weight),
            *(describe(gradient) if need else None for gradient, need in zip(gradients, needs, strict=True)),
            geometry.stride, geometry.padding, geometry.dilation, *geometry.pool, threads,
        )  # fmt: skip
        return gradients

    shape = (input.shape[0], weight.shape[0], *convolved_size(input, weight, geometry))
    grad_convolved = _empty(input, shape, _memory_format(input, weight))
    kernels.relu_pool2d_backward(
        describe(grad_output), describe(positions) if grad_output is not None else None,
        describe(skip) if grad_skip is not None else None, describe(grad_skip), describe(grad_convolved),
        *geometry.pool, threads,
    )  # fmt: skip
    return _convolution_backward(grad_convolved, input, weight, geometry, needs)


def _convolution_backward(
    grad_convolved: Tensor, input: Tensor, weight: Tensor, geometry: Geometry, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """PyTorch's own gradients of the convolution, in the layout that the fake promises."""
    gradients = torch.ops.aten.convolution_backward(
        grad_convolved, input, weight, list(weight.shape[:1]), geometry.stride, geometry.padding, geometry.dilation,
        False, [0, 0], geometry.groups, needs,
    )  # fmt: skip
    results = _allocate_gradients(input, weight, [False] * 3)
    layouts = (torch.channels_last if _is_channels_last(t) else torch.contiguous_format for t in (input, weight))
    grad_input, grad_weight = (
        gradient.contiguous(memory_format=layout) if need else nothing
        for gradient, need, layout, nothing in zip(gradients, needs, layouts, results, strict=False)
    )
    return grad_input, grad_weight, gradients[2] if needs[2] else results[2]


def _forward_plain(input: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The operator for devices without a kernel, from torch's own operators."""
    geometry, (with_positions, with_skip) = Geometry(*rest[:8]), rest[8:]
    if input.device.type != "cpu":
        log_slow_road("conv_relu_pool2d", f"no kernel for device type {input.device.type!r}")
    layout = _memory_format(input, weight)
    output, indices, skip = reference.conv_relu_pool2d(
        input, weight, bias, *geometry[:4], pool_size=geometry.pool_size, pool_stride=geometry.pool_stride,
        pool_padding=geometry.pool_padding, ceil_mode=geometry.ceil_mode, return_indices=True, return_skip=True,
    )  # fmt: skip
    _, no_positions, no_skip = _allocate_outputs(input[:0], weight, geometry, False, False)
    positions = local_positions(indices, output, skip.shape[-1], geometry) if with_positions else no_positions
    return (
        output.contiguous(memory_format=layout),
        positions.contiguous(memory_format=layout) if with_positions else no_positions,
        skip.contiguous(memory_format=layout) if with_skip else no_skip,
    )


def _backward_plain(
    grad_output: Tensor | None, grad_skip: Tensor | None, input: Tensor, weight: Tensor, positions: Tensor,
    skip: Tensor | None, *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    geometry, needs = Geometry(*rest[:8]), rest[8]
    convolved = convolved_size(input, weight, geometry)
    grad_convolved = input.new_zeros((input.shape[0], weight.shape[0], convolved[0] * convolved[1]))
    if grad_output is not None:
        indices = expand_indices(positions, convolved, geometry)
        grad_convolved.scatter_add_(2, indices.flatten(2), grad_output.masked_fill(positions == CUT, 0).flatten(2))
    grad_convolved = grad_convolved.unflatten(2, convolved)
    if grad_skip is not None and skip is not None:
        grad_convolved += grad_skip.masked_fill(skip <= 0, 0)
    return _convolution_backward(grad_convolved, input, weight, geometry, needs)


def cast_for_autocast(input: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The tensors in autocast's dtype where it is on for their device, as it treats conv2d; float64 stays."""
    device = input.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return input, weight, bias
    dtype = torch.get_autocast_dtype(device)

    def cast(tensor: Tensor) -> Tensor:
        return tensor if tensor.dtype == torch.float64 else tensor.to(dtype)

    return cast(input), cast(weight), None if bias is None else cast(bias)


def _forward_autocast(input: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    tensors = cast_for_autocast(input, weight, bias)
    with torch.autocast(input.device.type, enabled=False):
        return torch.ops.fastseg.conv_relu_pool2d(*tensors, *rest)


_library.impl("conv_relu_pool2d", _forward_autocast, "AutocastCPU")
_library.impl("conv_relu_pool2d", _forward_autocast, "AutocastCUDA")
_library.impl("conv_relu_pool2d", _forward_cpu, "CPU")
_library.impl("conv_relu_pool2d_backward", _backward_cpu, "CPU")
_library.impl("conv_relu_pool2d", _forward_plain, "CompositeExplicitAutograd")
_library.impl("conv_relu_pool2d_backward", _backward_plain, "CompositeExplicitAutograd")


# ---- gradient ----


class _ConvReLUPool2d(torch.autograd.Function):
    """The gradient around the operator; forward and backward are both operators, so that compilers can trace them."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, with_skip: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        output, positions, skip = torch.ops.fastseg.conv_relu_pool2d(input, weight, bias, *geometry, True, with_skip)
        ctx.save_for_backward(input, weight, bias, positions, skip if with_skip else None)
        ctx.geometry = geometry
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(positions, *(() if with_skip else (skip,)))
        return output, positions, skip

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, _: Any, grad_skip: Tensor | None) -> tuple[Tensor | None, ...]:
        input, weight, bias, positions, skip = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:3])
        if grad_output is None and grad_skip is None:
            return None, None, None, None, None
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # create_graph=True: this gradient will be differentiated itself, which plain PyTorch can.
            gradients = _differentiable_backward(grad_output, grad_skip, input, weight, bias, ctx.geometry, needs)
        else:
            gradients = torch.ops.fastseg.conv_relu_pool2d_backward(
                grad_output, grad_skip, input, weight, positions, skip, *ctx.geometry, needs
            )
        return *(gradient if need else None for gradient, need in zip(gradients, needs, strict=True)), None, None


def _differentiable_backward(
    grad_output: Tensor | None, grad_skip: Tensor | None, input: Tensor, weight: Tensor, bias: Tensor | None,
    geometry: Geometry, needs: list[bool],
) -> list[Tensor | None]:  # fmt: skip
    output, skip = reference.conv_relu_pool2d(
        input, weight, bias, *geometry[:4], pool_size=geometry.pool_size, pool_stride=geometry.pool_stride,
        pool_padding=geometry.pool_padding, ceil_mode=geometry.ceil_mode, return_skip=True,
    )  # fmt: skip
    pairs = [(o, g) for o, g in ((output, grad_output), (skip, grad_skip)) if g is not None]
    wanted = [t for t, need in zip((input, weight, bias), needs, strict=True) if need and t is not None]
    outputs, gradients = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(outputs, wanted, gradients, create_graph=True))
    return [next(found) if need else None for need in needs]


def conv_relu_pool2d(
    input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, return_indices: bool, return_skip: bool
) -> Tensor | tuple[Tensor, ...]:
    """The operator with its gradient; arguments checked and resolved by `fastseg.functional.conv_relu_pool2d`."""
    if torch.is_grad_enabled() and (
        input.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        output, positions, skip = _ConvReLUPool2d.apply(input, weight, bias, geometry, return_skip)
    else:
        output, positions, skip = torch.ops.fastseg.conv_relu_pool2d(
            input, weight, bias, *geometry, return_indices, return_skip
        )
    if not (return_indices or return_skip):
        return output
    results = [output]
    if return_indices:
        results.append(expand_indices(positions, convolved_size(input, weight, geometry), geometry))
    if return_skip:
        results.append(skip)
    return tuple(results)
