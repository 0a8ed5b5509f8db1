"""conv2d_packed's registration: schema, fake, CPU and fallback implementations; for predictions.

The operator is a convolution by oneDNN, of weights that are laid out for it once and kept: torch's own does that at
each call. Dilated 3x3 kernels run Winograd's algorithm where the windows of their phases cover little beside the map.
It serves graphs that the backend rewrites: no gradient has a formula here, plain PyTorch gives it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastseg._native import native
from fastseg.ops.convolution import algorithms, convolve
from fastseg.ops.convolution.geometry import output_shapes, unflatten
from fastseg.ops.convolution.kept import packed_weight
from fastseg.ops.layouts import empty
from fastseg.ops.registration import register_gradient, register_plain

# The weight's output channels are multiplied by the scale; the geometry is `flatten`ed.
_library = torch.library.Library("fastseg", "FRAGMENT")
_library.define("conv2d_packed(Tensor input, Tensor weight, Tensor? bias, Tensor? scale, int[] geometry) -> Tensor")


@torch.library.register_fake("fastseg::conv2d_packed", lib=_library)
def _allocate_output(
    input: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, numbers: list[int]
) -> Tensor:
    _, shape = output_shapes(input.shape, weight.shape, unflatten(tuple(numbers)))
    return empty(input, shape, convolve.output_format(input, weight))


def _forward_cpu(
    input: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, numbers: list[int]
) -> Tensor:
    kernels, geometry = native("conv2d_packed"), unflatten(tuple(numbers))
    dilated = geometry.dilation != (1, 1)
    if dilated and kernels is not None and input.dtype in (torch.float32, torch.float64):
        algorithm = algorithms.choose_cpu_forward(input, weight, geometry, False, keep=True)
        if algorithm == "winograd":
            output = _allocate_output(input, weight, bias, scale, numbers)
            tensors = (input, weight, bias, output, None, None)
            if convolve.fill_outputs(kernels, algorithm, tensors, numbers, relu=False, scale=scale, keep=True):
                return output
    # In NCHW oneDNN would copy input and output; without elements it has nothing to convolve.
    in_channels_last = input.is_contiguous(memory_format=torch.channels_last)
    in_channels_last = in_channels_last and convolve.output_format(input, weight) == torch.channels_last
    if kernels is None or not in_channels_last or input.numel() == 0 or input.dtype != torch.float32:
        return forward_plain(input, weight, bias, scale, numbers)
    # Of axes of one number any stride is in channels_last; oneDNN's operator looks at them, too, and would copy.
    if 1 in input.shape:
        _, channels, height, width = input.shape
        input = input.as_strided(input.shape, (channels * height * width, 1, channels * width, channels))
    used, cropped = convolve.without_idle_taps(input, weight, geometry)
    stride, padding, dilation, groups = cropped[:4]

    def folded() -> Tensor:
        return convolve.scaled(used, scale)

    def pack() -> Tensor:
        return torch.ops.mkldnn._reorder_convolution_weight.default(
            folded().contiguous(), padding, stride, dilation, groups, input.shape
        )

    packed = packed_weight(kernels, weight, scale, (input.shape, *numbers), pack)
    return torch.ops.mkldnn._convolution_pointwise.default(
        input, folded() if packed is None else packed, bias, padding, stride, dilation, groups, "none", [], ""
    )


def forward_plain(
    input: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, numbers: list[int]
) -> Tensor:
    """The operator from torch's own, in the layout that the fake promises."""
    convolved = torch.conv2d(input, convolve.scaled(weight, scale), bias, *unflatten(tuple(numbers))[:4])
    return convolved.contiguous(memory_format=convolve.output_format(input, weight))


_library.impl("conv2d_packed", _forward_cpu, "CPU")
register_plain(_library, "conv2d_packed", forward_plain, _allocate_output, channels_last=True)
register_gradient(
    _library, "conv2d_packed", {"CPU": _forward_cpu}, forward_plain, forward_plain, tensors=4, differentiable=0
)
