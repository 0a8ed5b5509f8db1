"""conv_relu_pool2d on pixels and weights that aren't finite, and on values between two numbers of a half type.

The Triton kernel for first layers multiplies a window's whole field by weights that are zero where a position doesn't
look: what a position doesn't see must not reach it all the same.
"""

import pytest
import torch
from torch import Tensor

from fastseg import _native, functional, reference
from fastseg.testing import MEMORY_FORMATS, assert_parity, make

NAN, INFINITY = float("nan"), float("inf")

# Pixels [row, column] and what they are; why they are here.
PIXELS = {
    "nan": {(4, 5): NAN},
    "infinity": {(4, 5): INFINITY},
    "negative-infinity": {(5, 4): -INFINITY},
    "infinities-that-meet": {(4, 5): INFINITY, (5, 6): -INFINITY},  # NaN where a patch holds both
    "infinity-beside-nan": {(2, 2): INFINITY, (2, 4): NAN},
    "corners": {(0, 0): NAN, (0, 13): INFINITY, (11, 0): -INFINITY, (11, 13): NAN},
    "everywhere": {(row, column): INFINITY for row in range(12) for column in range(14)},
}

# Kernel and arguments whose fields the kernel serves: 3 channels of up to 4x4 pixels, or one of up to 8x8.
GEOMETRIES = {
    "3x3": ((3, 3), 3, {"padding": 1}),
    "unpadded": ((3, 3), 3, {}),
    "1x1": ((1, 1), 3, {}),
    "dilated": ((3, 3), 1, {"dilation": 2, "padding": 2}),
    "strided": ((5, 5), 1, {"stride": 2, "padding": 2}),
    "clipped": ((3, 3), 3, {"padding": 1, "pool_padding": 1}),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def check(input: Tensor, weight: Tensor, bias: Tensor, **options: object) -> None:
    """Values as plain PyTorch's in float64, and indices wherever a window isn't finite.

    In half types, and on GPUs, a library's convolution may spread NaN itself.
    """
    tensors = (input, weight, bias)
    output, indices = (t.cpu() for t in functional.conv_relu_pool2d(*tensors, **options, return_indices=True))
    truth, expected = reference.conv_relu_pool2d(*(t.cpu().double() for t in tensors), **options, return_indices=True)
    assert_parity(output, truth.to(output.dtype), truth, terms=weight[0].numel())
    special = ~truth.isfinite()
    assert special.any()
    assert torch.equal(indices[special], expected[special])


def tensors_of(kernel: tuple[int, int], channels: int, dtype: torch.dtype, layout: str) -> list[Tensor]:
    """Two images, of which one stays ordinary; numbers that TF32 and the half types hold alike."""
    input = make((2, channels, 12, 14), torch.bfloat16, layout=layout)
    weight = make((20, channels, *kernel), torch.bfloat16, seed=1, scale=(channels * kernel[0] * kernel[1]) ** -0.5)
    return [tensor.to(dtype) for tensor in (input, weight, make((20,), torch.bfloat16, seed=2, scale=0.1))]


@pytest.mark.parametrize("pixels", PIXELS.values(), ids=PIXELS)
@pytest.mark.parametrize(("kernel", "channels", "options"), GEOMETRIES.values(), ids=GEOMETRIES)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pixels_that_are_not_finite(
    dtype: torch.dtype, layout: str, kernel: tuple[int, int], channels: int, options: dict, pixels: dict
) -> None:
    input, weight, bias = tensors_of(kernel, channels, dtype, layout)
    for (row, column), value in pixels.items():
        input[0, channels - 1, row, column] = value
    check(input, weight, bias, **options)


@pytest.mark.parametrize("pixel", [0.0, 1.0, INFINITY], ids=["on-zero", "on-a-number", "on-infinity"])
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_that_are_not_finite(dtype: torch.dtype, layout: str, pixel: float) -> None:
    input, weight, bias = tensors_of((3, 3), 3, dtype, layout)
    weight[3, 1, 0, 2], weight[5, 0, 1, 1], weight[7, 2, 2, 0] = INFINITY, -INFINITY, NAN
    input[0, :, 4, 5] = pixel
    check(input, weight, bias)


@pytest.mark.parametrize("scale", ["normal", "subnormal"])
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_ties_of_half_types_are_rounded_to_even(isa: str, dtype: torch.dtype, layout: str, scale: str) -> None:
    if _native.INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter cuts bfloat16 where a GPU rounds it")
    # Half a unit more than numbers whose last bit is 0 and 1: both ways from a tie.
    info, steps = torch.finfo(dtype), torch.arange(1, 65).view(1, 1, 8, 8)
    if scale == "normal":
        input, factor, shift = 1 + info.eps * steps, 1.0, info.eps / 2
    else:
        input, factor, shift = info.smallest_normal * info.eps * steps.double(), 0.5, 0.0
    input = input.to(dtype).contiguous(memory_format=MEMORY_FORMATS[layout])
    weight, bias = torch.full((16, 1, 1, 1), factor, dtype=dtype), torch.full((16,), shift, dtype=dtype)
    output = functional.conv_relu_pool2d(input, weight, bias, pool_size=1)
    assert torch.equal(output, (input.double() * factor + shift).to(dtype).expand_as(output))
