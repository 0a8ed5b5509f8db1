"""conv2d: what it means, and which calls the kernels serve."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastseg.ops.convolution.algorithms import serves_conv2d
from fastseg.ops.convolution.convolve import for_prediction, scaled
from fastseg.ops.convolution.geometry import flatten, resolve

IntOrPair = int | tuple[int, ...]


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntOrPair = 1,
    padding: str | IntOrPair = 0,
    dilation: IntOrPair = 1,
    groups: int = 1,
    *,
    scale: Tensor | None = None,
) -> Tensor:
    """`torch.nn.functional.conv2d`: on a CPU, 3x3 kernels with a step of one pixel run Winograd's algorithm.

    For a convolution that neither ReLU nor a pool follows, such as those before batch normalisation in training; where
    one does, `conv_relu_pool2d` takes it in. Winograd's algorithm (F(2x2, 3x3); Lavin and Gray, 2015) needs 4/9 of the
    multiplications, and F(3x3, 2x2) does for the weight's gradient. Its rounding errors are relative to the largest
    value of a patch of 4x4 pixels. It serves float32 and float64, one group, no dilation, at most 2 pixels of padding
    and more than 4 input channels, from ten million products on, outside autocast. Of dilated 3x3 kernels on maps so
    small that a row or column of taps sees nothing but padding (DeepLab's), forward and gradients leave these taps out.
    Every other call is torch's own, and so is one whose values aren't finite or might overflow in its sums.
    Differentiable to any order; second derivatives run as plain PyTorch.

    Args:
        input: Images ``[N, C, H, W]`` or ``[C, H, W]``. Read by its strides; channels_last in gives channels_last out.
        weight: Kernels ``[K, C / groups, kernel height, kernel width]`` of input's dtype.
        bias: ``[K]`` of input's dtype, or None.
        stride: Step of the convolution, in pixels: one number or (height, width), as all that follow.
        padding: Zeros on each side of the input, in pixels; or "valid" (none), or "same" (the convolution keeps the
            size; needs stride 1).
        dilation: Distance between the kernel's taps, in pixels.
        groups: Blocks of channels that are convolved apart.
        scale: ``[K]`` of input's dtype, by which the kernels are multiplied; as batch normalisation does in evaluation.

    Returns:
        ``[N, K, CH, CW]`` in input's dtype; see `torch.nn.functional.conv2d` for the formula and the sizes.

    Raises:
        ValueError: A number is out of its range; the message names the argument.
        RuntimeError: Shapes or dtypes don't fit: torch's own error.
    """
    weight, scale, keep = for_prediction(weight, scale)
    if _are_served(input, weight, bias):
        geometry, _ = resolve((3, 3), stride, padding, dilation, groups)
        if serves_conv2d(input, weight, geometry, keep):
            return torch.ops.fastseg.conv2d.default(input, weight, bias, scale, flatten(geometry), keep)
    return F.conv2d(input, scaled(weight, scale), bias, stride, padding, dilation, groups)


def _are_served(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the kernels take these tensors; those that don't fit each other are left to torch and its errors."""
    tensors = (input, weight) if bias is None else (input, weight, bias)
    return (
        input.ndim == weight.ndim == 4
        and not torch.is_autocast_enabled("cpu")
        and weight.shape[2:] == (3, 3)
        and weight.shape[0] > 0
        and weight.shape[1] == input.shape[1]
        and (bias is None or bias.shape == weight.shape[:1])
        and all(tensor.device.type == "cpu" for tensor in tensors)
        and input.dtype in (torch.float32, torch.float64)
        and all(tensor.dtype == input.dtype for tensor in tensors)
    )
