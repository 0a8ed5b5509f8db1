"""conv2d_packed, to which the backend leads predictions' convolutions that no kernel of fastseg's own serves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastseg
from fastseg.ops.convolution import kept
from fastseg.ops.convolution.algorithms import choose_cpu_forward
from fastseg.ops.convolution.geometry import flatten, idle_taps, resolve, unflatten
from fastseg.testing import MEMORY_FORMATS, assert_parity, make
from tests.kernels.poison import fresh_memory_of_nan

each_layout = pytest.mark.parametrize("layout", MEMORY_FORMATS)

# Channels, output channels, kernel, and the convolution's numbers.
CONVOLUTIONS: dict[str, tuple[int, int, tuple[int, int], dict[str, Any]]] = {
    "1x1": (12, 20, (1, 1), {}),
    "1x1-stride": (12, 20, (1, 1), {"stride": 2}),
    "3x3-stride": (12, 20, (3, 3), {"stride": 2, "padding": 1}),
    "3x3-dilation": (12, 20, (3, 3), {"dilation": 2, "padding": 2}),
    "depthwise": (16, 16, (3, 3), {"groups": 16, "padding": 1}),
    "depthwise-multiplied": (8, 16, (3, 3), {"groups": 8, "padding": 1, "stride": (2, 1)}),
    "groups": (12, 20, (3, 3), {"groups": 4, "padding": 1}),
    "first": (3, 16, (7, 7), {"stride": 2, "padding": 3}),
    "one-channel": (1, 9, (5, 3), {"padding": (2, 0)}),
    "one-output": (12, 1, (1, 1), {}),
    "idle-taps": (12, 20, (3, 3), {"dilation": 20, "padding": 20}),  # the middle one sees something
    "idle-taps-depthwise": (16, 16, (5, 3), {"groups": 16, "dilation": (9, 2), "padding": (18, 2)}),
}


@pytest.fixture(autouse=True)
def none_kept() -> Iterator[None]:
    kept._packed.clear()
    yield
    kept._packed.clear()


def tensors(name: str, layout: str = "channels_last", size: tuple[int, int] = (13, 18)) -> list[Tensor]:
    """Input, weight, bias and scale."""
    channels, outputs, kernel, numbers = CONVOLUTIONS[name]
    inputs = channels // numbers.get("groups", 1)
    return [
        make((2, channels, *size), seed=1, layout=layout, scale=2.0),
        make((outputs, inputs, *kernel), seed=2, scale=(inputs * kernel[0] * kernel[1]) ** -0.5),
        make((outputs,), seed=3),
        make((outputs,), seed=4).abs() + 0.5,
    ]


def geometry_of(name: str) -> list[int]:
    defaults = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    pool = {"pool_size": 1, "pool_stride": None, "pool_padding": 0, "ceil_mode": False}
    return flatten(resolve(CONVOLUTIONS[name][2], **(defaults | CONVOLUTIONS[name][3]), **pool)[0])


def fused(name: str, *args: Tensor | None) -> Tensor:
    return torch.ops.fastseg.conv2d_packed(*args, geometry_of(name))


def plain(name: str, input: Tensor, weight: Tensor, bias: Any, scale: Any) -> Tensor:
    scaled = weight if scale is None else weight * scale.view(-1, 1, 1, 1)
    return F.conv2d(input, scaled, bias, **CONVOLUTIONS[name][3])


def assert_plain_parity(name: str, args: list[Any]) -> None:
    truth = plain(name, *(None if arg is None else arg.double() for arg in args))
    expected = plain(name, *args)
    with torch.no_grad():
        for _ in range(3):  # the weights are laid out in the second call
            found = fused(name, *args)
            assert found.stride() == expected.stride()
            assert_parity(found, expected, truth, terms=args[1][0].numel())


@each_layout
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name: str, layout: str) -> None:
    assert_plain_parity(name, tensors(name, layout))
    assert_plain_parity(name, [*tensors(name, layout)[:2], None, None])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite(value: float) -> None:
    args = tensors("1x1")
    args[0][0, 0, 3, 4] = value
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(fused("1x1", *args), plain("1x1", *args), equal_nan=True)


def test_no_images_and_strided_tensors() -> None:
    input, weight, bias, scale = tensors("1x1")
    none = torch.empty(0, 12, 13, 18, memory_format=torch.channels_last)
    assert fused("1x1", none, weight, bias, scale).shape == (0, 20, 13, 18)
    assert_plain_parity("1x1", [input[..., 1:-2], weight, bias, scale])
    wide = make((20, 24, 1, 1), seed=5)
    assert_plain_parity("1x1", [input, wide[:, ::2], bias, scale])


@each_layout
def test_follows_every_change(layout: str) -> None:
    input, weight, bias, scale = tensors("3x3-stride")
    weight = weight.contiguous(memory_format=MEMORY_FORMATS[layout])
    changes = [
        lambda: weight.mul_(1.5),
        lambda: weight.data[0, 0, 0, 1].add_(1),  # past the version counter
        lambda: weight.data[[0, 1]].copy_(weight.data[[1, 0]]),
        lambda: setattr(weight, "data", torch.roll(weight.data, 1, 0)),
        lambda: scale.mul_(2),
        lambda: bias.add_(1),
    ]
    with torch.no_grad():
        for change in changes:
            fused("3x3-stride", input, weight, bias, scale)
            change()
            found = fused("3x3-stride", input, weight, bias, scale)
            fresh = weight.clone(memory_format=torch.preserve_format)
            torch.testing.assert_close(found, fused("3x3-stride", input, fresh, bias, scale))
            assert fastseg.info()["kept_weights"] >= weight.numel() * 4


def test_one_weight_serves_inputs_and_geometries_of_all_sizes() -> None:
    weight = tensors("3x3-stride")[1]
    for size in ((13, 18), (40, 7), (13, 18)):
        for name in ("3x3-stride", "3x3-dilation"):
            input, _, bias, scale = tensors(name, size=size)
            assert_plain_parity(name, [input, weight, bias, scale])


def test_gradients_are_those_of_plain_pytorch() -> None:
    args = [tensor.double().requires_grad_() for tensor in tensors("1x1", size=(3, 4))]
    assert torch.autograd.gradcheck(lambda *args: fused("1x1", *args), args, fast_mode=True)


@each_layout
@pytest.mark.parametrize("name", ["1x1", "3x3-stride"])
def test_opcheck(name: str, layout: str) -> None:
    args = tensors(name, layout)
    torch.library.opcheck(torch.ops.fastseg.conv2d_packed.default, (*args, geometry_of(name)))


def test_strides_of_axes_of_one_number_say_nothing() -> None:
    tokens = make((1, 13 * 18, 12), seed=1)
    image = tokens.transpose(1, 2).reshape(1, 12, 13, 18)[0].unsqueeze(0)  # as a transformer makes one of its tokens
    assert image.stride(0) == image.stride(3) == 12
    args = [image, *tensors("3x3-stride")[1:]]
    torch.library.opcheck(torch.ops.fastseg.conv2d_packed.default, (*args, geometry_of("3x3-stride")))


@pytest.mark.parametrize("size", [1, 2, 5, 6, 11])
@pytest.mark.parametrize("kernel", [1, 2, 3, 4, 5, 7])
def test_idle_taps_see_nothing(kernel: int, size: int) -> None:
    for stride in (1, 2, 3):
        for padding in range(14):
            for dilation in (1, 2, 5, 6):
                if size + 2 * padding < dilation * (kernel - 1) + 1:
                    continue
                geometry, _ = resolve((kernel, 1), (stride, 1), (padding, 0), (dilation, 1), 1, 1, None, 0, False)
                idle, none = idle_taps((size, 1), (kernel, 1), geometry)
                assert none == 0
                signal, weight = torch.ones(1, 1, size, 1), torch.rand(1, 1, kernel, 1)
                expected = F.conv2d(signal, weight, None, (stride, 1), (padding, 0), (dilation, 1))
                used = weight[:, :, idle : kernel - idle]
                found = F.conv2d(signal, used, None, (stride, 1), (padding - idle * dilation, 0), (dilation, 1))
                torch.testing.assert_close(found, expected)


# ---- dilated 3x3 kernels by Winograd's algorithm ----

PHASES: dict[str, dict[str, Any]] = {
    "2": {"dilation": 2, "padding": 2},
    "2-unpadded": {"dilation": 2},
    "2-wide": {"dilation": 2, "padding": (4, 0)},
    "3": {"dilation": 3, "padding": 3},
    "rows": {"dilation": (2, 1), "padding": (2, 1)},
}
each_phase = pytest.mark.parametrize("numbers", PHASES.values(), ids=PHASES)
SIZE = (37, 40)


def dilated(layout: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [
        make((2, 12, *SIZE), dtype, seed=1, layout=layout),
        make((20, 12, 3, 3), dtype, seed=2, scale=0.1),
        make((20,), dtype, seed=3),
        make((20,), dtype, seed=4).abs() + 0.5,
    ]


def numbers_of(numbers: dict[str, Any]) -> list[int]:
    defaults = {"stride": 1, "padding": 0, "groups": 1, "pool_size": 1, "pool_stride": None, "pool_padding": 0}
    return flatten(resolve((3, 3), **(defaults | numbers), ceil_mode=False)[0])


@each_layout
@each_phase
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_dilated(isa: str, dtype: torch.dtype, numbers: dict[str, Any], layout: str) -> None:
    input, weight, bias, scale = dilated(layout, dtype)
    geometry = unflatten(tuple(numbers_of(numbers)))
    assert choose_cpu_forward(input, weight, geometry, False, keep=True) == "winograd"
    assert choose_cpu_forward(input, weight, geometry, False, keep=False) != "winograd"
    scaled = weight * scale.view(-1, 1, 1, 1)
    for name, function in (("conv2d", lambda x: x), ("conv_relu", torch.relu)):
        truth = function(F.conv2d(input.double(), scaled.double(), bias.double(), **numbers))
        expected = function(F.conv2d(input, scaled, bias, **numbers))
        with torch.no_grad():
            for _ in range(3):
                if name == "conv2d":
                    found = torch.ops.fastseg.conv2d_packed(input, weight, bias, scale, numbers_of(numbers))
                else:
                    found = fastseg.functional.conv_relu_pool2d(
                        input, weight, bias, **numbers, pool_size=1, scale=scale
                    )  # type: ignore[assignment]
                assert found.stride() == expected.stride()
                assert_parity(found, expected, truth, terms=12 * 9)


# N, C, H, W, K, and the dilation: maps of few windows, those of several phases and images are multiplied together.
SMALL = {
    "phases": (3, 12, 12, 12, 20, 2),
    "larger-and-smaller-phases": (5, 12, 15, 12, 37, 2),
    "many-phases": (1, 12, 16, 15, 20, 4),
    "deep": (4, 352, 12, 12, 70, 2),  # a slice of the channels at a time
}


@each_layout
@pytest.mark.parametrize("shape", SMALL.values(), ids=SMALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_dilated_small_maps(
    isa: str, dtype: torch.dtype, shape: tuple[int, ...], layout: str, threads: Callable[[int], None]
) -> None:
    images, channels, height, width, outputs, dilation = shape
    numbers = {"dilation": dilation, "padding": dilation}
    input = make((images, channels, height, width), dtype, seed=1, layout=layout)
    weight = make((outputs, channels, 3, 3), dtype, seed=2, scale=(9 * channels) ** -0.5)
    bias = make((outputs,), dtype, seed=3)
    assert choose_cpu_forward(input, weight, unflatten(tuple(numbers_of(numbers))), False, keep=True) == "winograd"
    expected = F.conv2d(input, weight, bias, **numbers)
    truth = F.conv2d(input.double(), weight.double(), bias.double(), **numbers)
    results = []
    with torch.no_grad(), fresh_memory_of_nan():
        for count in (1, 2, 3):
            threads(count)
            results.append(torch.ops.fastseg.conv2d_packed(input, weight, bias, None, numbers_of(numbers)))
    assert_parity(results[0], expected, truth, terms=channels * 9)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("map", range(3))
def test_one_of_many_small_maps_that_is_not_finite(map: int) -> None:
    input, weight, bias = make((3, 12, 12, 12), layout="channels_last"), make((20, 12, 3, 3)), make((20,))
    input[map, 5, 3, 8] = torch.nan
    with torch.no_grad():
        for _ in range(2):
            found = torch.ops.fastseg.conv2d_packed(input, weight, bias, None, numbers_of(PHASES["2"]))
            torch.testing.assert_close(found, F.conv2d(input, weight, bias, **PHASES["2"]), equal_nan=True)


# Dilations that oneDNN serves: windows would cover too much beside the map, or there are too few pixels.
@pytest.mark.parametrize("shape", [(4, 12, 12, 4), (4, 10, 10, 2), (1, 8, 8, 2), (4, 12, 12, 12)], ids=str)
def test_dilated_maps_that_stay(shape: tuple[int, ...]) -> None:
    images, height, width, dilation = shape
    input, weight = torch.empty(images, 12, height, width), torch.empty(20, 12, 3, 3)
    numbers = numbers_of({"dilation": dilation, "padding": dilation})
    assert choose_cpu_forward(input, weight, unflatten(tuple(numbers)), False, keep=True) == "direct"


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_dilated_values_that_are_not_finite(value: float) -> None:
    input, weight, bias, scale = dilated("channels_last")
    input[1, 2, 30, 3] = value
    expected = F.conv2d(input, weight * scale.view(-1, 1, 1, 1), bias, **PHASES["2"])
    with torch.no_grad():
        for _ in range(2):
            found = torch.ops.fastseg.conv2d_packed(input, weight, bias, scale, numbers_of(PHASES["2"]))
            torch.testing.assert_close(found, expected, equal_nan=True)


@each_phase
def test_gradients_through_a_dilated_forward(numbers: dict[str, Any]) -> None:
    """Of weights that are frozen: the forward is a prediction's, the backward torch's."""
    input, weight, bias, _ = dilated("nchw", torch.float64)
    input.requires_grad_()
    found = fastseg.functional.conv_relu_pool2d(input, weight, bias, **numbers, pool_size=1)
    expected = F.relu(F.conv2d(input, weight, bias, **numbers))
    gradients = [torch.autograd.grad(y.square().sum(), input)[0] for y in (found, expected)]  # type: ignore[union-attr]
    torch.testing.assert_close(gradients[0], gradients[1])


def test_dilated_bitwise_equal_for_any_number_of_threads(threads: Callable[[int], None]) -> None:
    results = []
    tensors = dilated("channels_last", torch.float64)
    with torch.no_grad():
        for count in (1, 2, 3):
            threads(count)
            results.append(torch.ops.fastseg.conv2d_packed(*tensors, numbers_of(PHASES["2"])))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
