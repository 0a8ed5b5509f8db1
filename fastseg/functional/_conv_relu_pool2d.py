"""conv_relu_pool2d: what it means, what it accepts, and the checks of its arguments."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastseg import reference
from fastseg._native import log_fallback
from fastseg.functional._checks import FLOATING_DTYPES, without_batch
from fastseg.ops import conv_relu_pool2d as operator
from fastseg.ops.arguments import integer
from fastseg.ops.convolution import geometry as geometries
from fastseg.ops.convolution.convolve import scaled

IntOrPair = int | tuple[int, ...]


def conv_relu_pool2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntOrPair = 1,
    padding: str | IntOrPair = 0,
    dilation: IntOrPair = 1,
    groups: int = 1,
    *,
    pool_size: IntOrPair = 2,
    pool_stride: IntOrPair | None = None,
    pool_padding: IntOrPair = 0,
    ceil_mode: bool = False,
    return_indices: bool = False,
    return_skip: bool = False,
    scale: Tensor | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Convolution, bias, ReLU and max pooling in one operator: ``max_pool2d(relu(conv2d(input, weight, bias)))``.

    Equals the three torch functions for every argument that they accept; see `torch.nn.functional.conv2d` and
    `torch.nn.functional.max_pool2d` for the formulas of the sizes. Of equal maxima the first in scan order takes the
    gradient, NaN propagates, and a window whose maximum ReLU cut passes no gradient. Where a fused kernel serves the
    call, the full-resolution map is never in memory. Differentiable to any order; second derivatives run as plain
    PyTorch. In half types the maximum is found before the values are rounded, so that among values that round to one
    the indices may differ from torch's. On a CPU, 3x3 convolutions (and, where a skip or no pool makes them dense,
    their gradients) and the stem of a ResNet run Winograd's algorithm (Lavin and Gray, 2015), whose rounding errors are
    relative to the largest value of a patch that is a pixel or two wider than the kernel's own.

    Args:
        input: Images ``[N, C, H, W]`` or ``[C, H, W]``; float32, float64, bfloat16 or float16. Read by its strides;
            channels_last in gives channels_last out.
        weight: Kernels ``[K, C / groups, kernel height, kernel width]`` of input's dtype.
        bias: ``[K]`` of input's dtype, or None.
        stride: Step of the convolution, in pixels: one number or (height, width), as all that follow.
        padding: Zeros on each side of the input, in pixels; or "valid" (none), or "same" (the convolution keeps the
            size; needs stride 1).
        dilation: Distance between the kernel's taps, in pixels.
        groups: Blocks of channels that are convolved apart.
        pool_size: Size of the pooling window, in positions of the convolution's output.
        pool_stride: Step of the pooling window; None for ``pool_size``.
        pool_padding: Implicit -inf on each side before pooling; at most half of ``pool_size``.
        ceil_mode: Round the pooled size up instead of down.
        return_indices: Also return the maxima's flat positions in the convolution's output, as max_pool2d does.
        return_skip: Also return the un-pooled ``relu(conv2d(...))``, with a gradient of its own (a U-Net's skip).
        scale: ``[K]`` of input's dtype, by which the kernels are multiplied; as batch normalisation does in evaluation.

    Returns:
        The pooled tensor ``[N, K, PH, PW]`` in input's dtype; then, where asked, the indices (int64, of the same
        shape) and the skip ``[N, K, CH, CW]``, in this order.

    Raises:
        ValueError: Shapes or numbers don't fit; the message names the argument.
        TypeError: A dtype that isn't supported, or dtypes that differ.
    """
    if scale is not None and scale.shape != weight.shape[:1]:
        raise ValueError(f"scale: expected shape ({weight.shape[0]},), got {tuple(scale.shape)}")
    input, weight, bias, scale = operator.cast_for_autocast(input, weight, bias, scale)
    _check_tensors(input, weight, bias, groups)
    geometry, (extra_h, extra_w) = geometries.resolve(
        weight.shape[2:], stride, padding, dilation, groups, pool_size, pool_stride, pool_padding, ceil_mode
    )
    unbatched = input.ndim == 3
    if unbatched:
        input = input.unsqueeze(0)
    if extra_h or extra_w:
        input = F.pad(input, (0, extra_w, 0, extra_h))
    geometry = geometries.clamp_strides(geometry, input.shape[2:], weight.shape[2:])
    geometries.output_shapes(input.shape, weight.shape, geometry)  # refuses sizes that don't fit
    if geometry.pool_size[0] * geometry.pool_size[1] > geometries.MAX_WINDOW:
        if not torch.compiler.is_compiling():
            log_fallback("conv_relu_pool2d", f"a pool window of more than {geometries.MAX_WINDOW} positions")
        results = reference.conv_relu_pool2d(
            input, scaled(weight, scale), bias, *geometry[:4],
            pool_size=geometry.pool_size, pool_stride=geometry.pool_stride,
            pool_padding=geometry.pool_padding, ceil_mode=geometry.ceil_mode,
            return_indices=return_indices, return_skip=return_skip,
        )  # fmt: skip
    else:
        results = operator.conv_relu_pool2d(input, weight, bias, scale, geometry, return_indices, return_skip)
    return without_batch(results) if unbatched else results


def _check_tensors(input: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> None:
    if input.ndim not in (3, 4):
        raise ValueError(f"input: expected [N, C, H, W] or [C, H, W], got shape {tuple(input.shape)}")
    if weight.ndim != 4:
        raise ValueError(f"weight: expected [K, C / groups, height, width], got shape {tuple(weight.shape)}")
    if weight.shape[0] == 0:
        raise ValueError(f"weight: expected at least one output channel, got shape {tuple(weight.shape)}")
    groups = integer("groups", groups, 1)
    if weight.shape[0] % groups:
        raise ValueError(f"groups: expected a divisor of weight's {weight.shape[0]} output channels, got {groups}")
    if input.shape[-3] != weight.shape[1] * groups:
        raise ValueError(
            f"input: expected {weight.shape[1] * groups} channels (weight {tuple(weight.shape)}, groups {groups}), "
            f"got {input.shape[-3]}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: expected shape ({weight.shape[0]},), got {tuple(bias.shape)}")
    if input.dtype not in FLOATING_DTYPES:
        raise TypeError(f"input: expected float32, float64, bfloat16 or float16, got {input.dtype}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != input.dtype:
            raise TypeError(f"{name}: expected input's dtype {input.dtype}, got {tensor.dtype}")
        if tensor is not None and tensor.device != input.device:
            raise ValueError(f"{name}: expected input's device {input.device}, got {tensor.device}")
