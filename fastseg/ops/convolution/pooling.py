"""ReLU and pooling as conv_relu_pool2d and relu_pool2d share them.

Results are the pooled output, the positions of its maxima in their windows, and the skip, which is the map after ReLU;
those that weren't asked for have no elements. Dense gradients are those of the map before ReLU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastseg import reference
from fastseg._native import describe
from fastseg.ops.convolution.geometry import CUT, Geometry, expand_indices, local_positions
from fastseg.ops.layouts import empty

Results = tuple[Tensor, Tensor, Tensor]
Kept = tuple[Tensor | None, Tensor | None, Tensor, Tensor | None]  # gradients of output and skip, positions, skip
Shapes = tuple[tuple[int, ...], tuple[int, ...]]  # of the pooled output and of the map


def allocate_results(
    like: Tensor, shapes: Shapes, layout: torch.memory_format, with_positions: bool, with_skip: bool
) -> Results:
    """Fresh memory."""
    output = empty(like, shapes[0], layout)
    return (
        output,
        torch.empty_like(output, dtype=torch.uint8) if with_positions else like.new_empty((0,), dtype=torch.uint8),
        empty(like, shapes[1], layout) if with_skip else like.new_empty((0,)),
    )


def pool_plain(
    map: Tensor, geometry: Geometry, layout: torch.memory_format, with_positions: bool, with_skip: bool
) -> Results:
    """The results from torch's own operators; but for a ReLU in place, which decompositions mustn't have."""
    output, indices, skip = reference.relu_pool2d(
        map, *geometry.pool, geometry.ceil_mode, return_indices=True, return_skip=True
    )
    positions = local_positions(indices, output, map.shape[-1], geometry) if with_positions else None
    return (
        output.contiguous(memory_format=layout),
        map.new_empty((0,), dtype=torch.uint8) if positions is None else positions.contiguous(memory_format=layout),
        skip.contiguous(memory_format=layout) if with_skip else map.new_empty((0,)),
    )


def unpool_plain(kept: Kept, zeros: Tensor, geometry: Geometry) -> Tensor:
    """The dense gradient from torch's own operators; ``zeros`` are of its shape."""
    grad_output, grad_skip, positions, skip = kept
    gradient = zeros
    if grad_output is not None:
        indices = expand_indices(positions, tuple(zeros.shape[2:]), geometry).flatten(2)
        passed = grad_output.masked_fill(positions == CUT, 0).flatten(2)
        gradient = gradient.flatten(2).scatter_add(2, indices, passed).view_as(gradient)
    if grad_skip is not None and skip is not None:
        gradient = gradient + grad_skip.masked_fill(skip <= 0, 0)
    return gradient


def unpool_cpu(kernels: Any, kept: Kept, gradient: Tensor, numbers: list[int]) -> Tensor:
    """The dense gradient, filled by the C++ kernel."""
    grad_output, grad_skip, positions, skip = kept
    sparse = (None, None) if grad_output is None else (describe(grad_output), describe(positions))
    full = (None, None) if grad_skip is None else (describe(skip), describe(grad_skip))
    kernels.relu_pool2d_backward((*sparse, *full, describe(gradient)), numbers, torch.get_num_threads())
    return gradient


def save(
    ctx: Any, tensors: tuple[Tensor | None, ...], results: Results, with_positions: bool, with_skip: bool,
    by_output: bool = False,
) -> Results:  # fmt: skip
    """What forward returns: the results, of which the context keeps for backward what it needs, beside the tensors.

    With ``by_output`` nothing is pooled, and the output is kept where a skip would be: it says what ReLU passed.
    """
    output, positions, skip = results
    passed = output if by_output else skip if with_skip else None
    ctx.save_for_backward(*tensors, positions, passed)
    ctx.set_materialize_grads(False)
    if not with_positions:
        positions = positions.new_empty((0,))
    ctx.mark_non_differentiable(positions, *(() if with_skip else (skip,)))
    return output, positions, skip


def asked_for(
    results: Results, map: tuple[int, ...], geometry: Geometry, return_indices: bool, return_skip: bool
) -> Tensor | tuple[Tensor, ...]:
    """Of the results those that a user asked for; ``map`` is its shape."""
    output, positions, skip = results
    if not (return_indices or return_skip):
        return output
    indices = (expand_indices(positions, map[-2:], geometry),) if return_indices else ()
    return (output, *indices, skip) if return_skip else (output, *indices)
