"""relu_pool2d: what it means, what it accepts, and the checks of its arguments."""

from __future__ import annotations

import torch
from torch import Tensor

from fastseg import reference
from fastseg._native import log_fallback
from fastseg.functional._checks import FLOATING_DTYPES, without_batch
from fastseg.ops import relu_pool2d as operator
from fastseg.ops.convolution.algorithms import serves_relu_pool2d
from fastseg.ops.convolution.geometry import MAX_WINDOW

IntOrPair = int | tuple[int, ...]


def relu_pool2d(
    input: Tensor,
    pool_size: IntOrPair = 2,
    pool_stride: IntOrPair | None = None,
    pool_padding: IntOrPair = 0,
    ceil_mode: bool = False,
    *,
    return_indices: bool = False,
    return_skip: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """ReLU and max pooling in one operator: ``max_pool2d(relu(input), pool_size, ...)``.

    For maps that something else than a convolution makes, such as batch normalisation in training; where a convolution
    does, `conv_relu_pool2d` takes it in. Values, gradients and indices are those of the two torch functions, bit for
    bit where windows don't overlap. For the backward pass one byte is kept for each pooled value, where the two
    functions keep the un-pooled map and eight bytes. A small map on a CPU is left to the two functions. Differentiable
    to any order. Autocast changes nothing.

    Args:
        input: A map ``[N, C, H, W]`` or ``[C, H, W]``; float32, float64, bfloat16 or float16. Read by its strides, and
            never written to; channels_last in gives channels_last out.
        pool_size: Size of the pooling window, in pixels: one number or (height, width), as all that follow.
        pool_stride: Step of the pooling window; None for ``pool_size``.
        pool_padding: Implicit -inf on each side before pooling; at most half of ``pool_size``.
        ceil_mode: Round the pooled size up instead of down.
        return_indices: Also return the maxima's flat positions in the map, as max_pool2d does.
        return_skip: Also return ``relu(input)``, with a gradient of its own.

    Returns:
        The pooled tensor ``[N, C, PH, PW]`` in input's dtype; then, where asked, the indices (int64, of the same
        shape) and the skip ``[N, C, H, W]``, in this order.

    Raises:
        ValueError: Shapes or numbers don't fit; the message names the argument.
        TypeError: A dtype that isn't supported.
    """
    _check_map(input)
    unbatched = input.ndim == 3
    if unbatched:
        input = input.unsqueeze(0)
    geometry = operator.resolve(input.shape, pool_size, pool_stride, pool_padding, ceil_mode)
    large = geometry.pool_size[0] * geometry.pool_size[1] > MAX_WINDOW
    if large and not torch.compiler.is_compiling():
        log_fallback("relu_pool2d", f"a pool window of more than {MAX_WINDOW} positions")
    if large or not serves_relu_pool2d(input):
        results = reference.relu_pool2d(
            input, *geometry.pool, ceil_mode, return_indices=return_indices, return_skip=return_skip
        )
    else:
        results = operator.relu_pool2d(input, geometry, return_indices, return_skip)
    return without_batch(results) if unbatched else results


def _check_map(input: Tensor) -> None:
    if input.ndim not in (3, 4):
        raise ValueError(f"input: expected [N, C, H, W] or [C, H, W], got shape {tuple(input.shape)}")
    if 0 in input.shape[-3:]:
        raise ValueError(f"input: expected channels, rows and columns, got shape {tuple(input.shape)}")
    if input.dtype not in FLOATING_DTYPES:
        raise TypeError(f"input: expected float32, float64, bfloat16 or float16, got {input.dtype}")
