"""conv_relu_pool2d's Winograd algorithm: parity, ties, what its transforms can't carry, and which calls take it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastseg import _bfloat16, _native, functional, reference
from fastseg.ops.convolution import algorithms
from fastseg.ops.convolution.algorithms import WINOGRAD_MIN_PIXELS, choose_cpu_forward
from fastseg.ops.convolution.geometry import resolve
from fastseg.testing import make
from tests.kernels.poison import fresh_memory_of_nan
from tests.ops.test_conv_relu_pool2d import DTYPES, check, tensors

pytestmark = pytest.mark.skipif(_native.INTERPRETED, reason="an algorithm of the C++ kernels alone")

# N, C, H, W, K. Up to 4 input channels vectors run along the windows, beyond along the channels.
SHAPES = {
    "rgb": (2, 3, 17, 19, 20),
    "gray-two-steps": (1, 1, 8, 70, 3),  # more windows in a row than any vectors hold at a time
    "one-window": (1, 2, 4, 4, 1),
    "four": (1, 4, 9, 23, 5),
    "five": (1, 5, 11, 13, 37),  # neither input nor output channels fill their vectors
    "several-pieces": (2, 40, 21, 30, 24),  # more windows than are worked on together
    "few-windows": (1, 33, 6, 5, 70),  # the output channels are divided among tasks
    "small-maps": (19, 12, 7, 6, 20),  # windows of several images are multiplied together
    "deep": (3, 360, 9, 11, 70),  # a slice of the channels at a time
    "deep-and-wide": (1, 350, 4, 230, 5),  # a slice of them of a part of a row at a time
}

STEM = {"stride": 2, "padding": 3, "pool_size": 3, "pool_stride": 2, "pool_padding": 1}

# How each of its kernels is reached: input channels, the kernel's side, and options.
KERNELS = {
    "windows": (3, 3, {}),
    "channels": (12, 3, {}),
    "no-pool": (12, 3, {"pool_size": 1}),
    "stem": (3, 7, STEM | {"padding": 0}),
}

STEM_SHAPES = {
    "rgb": (2, 3, 40, 46, 20),
    "odd": (1, 1, 33, 27, 5),  # the convolution's last row and column end a tile early
    "even-tiles": (1, 2, 30, 34, 9),
    "bands": (1, 5, 70, 90, 40),  # several tasks, and several pieces of a row
    "smallest": (1, 3, 2, 2, 1),
}

# What may cut windows, or lie outside the input.
OPTIONS = {
    "default": {},
    "padded": {"padding": 1, "return_indices": True},
    "ceil": {"padding": (0, 1), "ceil_mode": True, "return_indices": True},
    "ceil-odd": {"padding": (1, 2), "ceil_mode": True},
    "padded-far": {"padding": 5, "return_indices": True},  # windows that see padding alone
    "skip": {"return_skip": True},
    "skip-ceil": {"padding": (0, 1), "ceil_mode": True, "return_indices": True, "return_skip": True},
    "skip-odd": {"padding": (1, 0), "return_skip": True},  # a last row or column that no window holds
    "no-pool": {"padding": 1, "pool_size": 1},
    "no-pool-indices": {"padding": (1, 2), "pool_size": 1, "return_indices": True},
}


def force(monkeypatch: pytest.MonkeyPatch, algorithm: str) -> None:
    def choose(*arguments: object, winograd: bool = True) -> str:
        return algorithm if winograd else choose_cpu_forward(*arguments, winograd=False)

    monkeypatch.setattr(algorithms, "choose_cpu_forward", choose)


@pytest.fixture(autouse=True)
def winograd(monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch, "winograd")


def arguments(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, layout: str = "nchw") -> list[Tensor]:
    return tensors((*shape, 3, 3), dtype, layout)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_parity(isa: str, options: dict, dtype: torch.dtype, layout: str, shape: tuple[int, ...]) -> None:
    check(arguments(shape, dtype, layout), **options)


@pytest.mark.parametrize("shape", STEM_SHAPES.values(), ids=STEM_SHAPES)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(
    "changes",
    [{}, {"return_indices": True}, {"padding": (4, 3), "ceil_mode": True}],
    ids=["default", "indices", "ceil"],
)
def test_stem_parity(isa: str, changes: dict, dtype: torch.dtype, layout: str, shape: tuple[int, ...]) -> None:
    check(tensors((*shape, 7, 7), dtype, layout), **(STEM | changes))


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_windows_without_a_pool_that_see_padding_alone(isa: str, layout: str) -> None:
    check(arguments((1, 5, 9, 22, 6), layout=layout), pool_size=1, padding=5)


@pytest.mark.parametrize("channels", [3, 12])
def test_any_strides(isa: str, channels: int) -> None:
    base, kernels = make((4, channels, 18, 22)), make((9, 2 * channels, 5, 3), seed=1, scale=0.2)
    for input in (base[::2, :, :, 1:-3], base.transpose(2, 3), base[:1].expand(2, -1, -1, -1)):
        for weight in (kernels[:, ::2, 1:-1], kernels[:, :channels, :3].contiguous(memory_format=torch.channels_last)):
            check([input, weight, None], padding=1, return_indices=True)


# A tile that is constant along an axis, or symmetric, has exact ties, as it has under plain convolution: what the
# transforms give beside the terms that all of them share are exact zeros.
TIES = {
    "constant": (torch.full((24, 24), 0.3), True),
    "zeros": (torch.zeros(24, 24), True),
    "by-row": (torch.linspace(0.1, 1.7, 24)[:, None].expand(24, 24), False),
}


@pytest.mark.parametrize("kernel", [KERNELS[name] for name in ("windows", "channels", "stem")])
@pytest.mark.parametrize(("map", "first_row"), TIES.values(), ids=TIES)
def test_ties_take_the_first_position(isa: str, map: Tensor, first_row: bool, kernel: tuple) -> None:
    channels, side, options = kernel
    input = map.expand(1, channels, 24, 24) * make((channels, 1, 1), seed=3)
    weight, bias = make((40, channels, side, side), seed=1, scale=0.1), torch.ones(40)
    options = {"pool_padding": 0} | options
    _, indices = functional.conv_relu_pool2d(input, weight, bias, **options, return_indices=True)
    width = (24 - side) // options.get("stride", 1) + 1
    first = (torch.arange(indices.shape[-1]) * 2 - options["pool_padding"]).clamp(min=0)
    torch.testing.assert_close(indices % width, first.expand_as(indices))
    if first_row:
        torch.testing.assert_close(indices // width, first[:, None].expand_as(indices))


@pytest.mark.parametrize("channels", [3, 12])
def test_small_integers_are_exact(isa: str, channels: int) -> None:
    generator = torch.Generator().manual_seed(0)
    input = torch.randint(-4, 5, (2, channels, 15, 16), generator=generator).float()
    weight = torch.randint(-4, 5, (20, channels, 3, 3), generator=generator).float()
    results = [
        f(input, weight, padding=1, return_indices=True)
        for f in (functional.conv_relu_pool2d, reference.conv_relu_pool2d)
    ]
    torch.testing.assert_close(*results, rtol=0, atol=0)


NAN, INFINITY = float("nan"), float("inf")
# The argument, and the value of one of its elements. 3e37 is finite, but not so much of it as a transform adds.
OUT_OF_RANGE = [
    *((0, value) for value in (NAN, INFINITY, -INFINITY, 3e37)),
    *((1, value) for value in (NAN, -INFINITY, 3e37)),
    *((2, value) for value in (NAN, INFINITY)),
]


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
@pytest.mark.parametrize(("argument", "value"), OUT_OF_RANGE)
def test_what_transforms_cannot_carry_takes_the_direct_kernel(
    isa: str, argument: int, value: float, kernel: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    channels, side, options = kernel
    called = [t.detach() for t in tensors((2, channels, 40, 36, 20, side, side), torch.float32)]
    called[argument].view(-1)[-7] = value
    check(called, **options)
    results = [functional.conv_relu_pool2d(*called, **options, return_indices=True)]
    force(monkeypatch, "direct")
    results.append(functional.conv_relu_pool2d(*called, **options, return_indices=True))
    torch.testing.assert_close(*results, rtol=0, atol=0, equal_nan=True)


def test_a_skip_that_transforms_cannot_carry_takes_the_library(isa: str) -> None:
    called = [t.detach() for t in tensors((2, 12, 20, 18, 20, 3, 3), torch.float32)]
    called[0].view(-1)[-7] = NAN
    check(called, return_skip=True, return_indices=True)


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
def test_other_numbers_take_winograd(isa: str, kernel: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    channels, side, options = kernel
    called = [t.detach() for t in tensors((2, channels, 40, 36, 20, side, side), torch.float32)]
    called[0].view(-1)[-7] = 1e30  # far from the others, but in range
    results = [functional.conv_relu_pool2d(*called, **options)]
    force(monkeypatch, "direct")
    results.append(functional.conv_relu_pool2d(*called, **options))
    assert not torch.equal(*results)  # rounded in other places


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
@pytest.mark.parametrize("size", [(3, 33, 31, 19), (1, 12, 14, 96)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_bitwise_equal_for_any_number_of_threads_and_in_poisoned_memory(
    dtype: torch.dtype, size: tuple, kernel: tuple, threads: Callable[[int], None]
) -> None:
    channels, side, options = kernel
    called = tensors((size[0], channels, *size[1:], side, side), dtype)
    results = []
    with fresh_memory_of_nan():
        for count in (1, 2, 3):
            threads(count)
            results.append(functional.conv_relu_pool2d(*called, **options, return_indices=True))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=0)


def test_a_window_does_not_depend_on_its_neighbours() -> None:
    """Images are cut into tasks, and tasks into chunks: where, must not show."""
    for channels in (3, 20):
        input, weight, bias = arguments((1, channels, 40, 66, 24))
        whole = functional.conv_relu_pool2d(input, weight, bias)
        part = functional.conv_relu_pool2d(input[:, :, 10:30, 14:40], weight, bias)
        torch.testing.assert_close(part, whole[:, :, 5:14, 7:19], rtol=0, atol=0)


def test_no_images() -> None:
    output = functional.conv_relu_pool2d(torch.empty(0, 3, 9, 9), torch.ones(4, 3, 3, 3))
    assert output.shape == (0, 4, 3, 3)


@pytest.mark.parametrize(
    "options",
    [{"stride": 2}, {"dilation": 2}, {"pool_size": 3, "pool_stride": 2}, {"pool_stride": 1}, {"pool_padding": 1}],
    ids=str,
)
def test_kernel_refuses_what_it_does_not_compute(options: dict) -> None:
    with pytest.raises(ValueError, match="the Winograd kernels are for"):
        functional.conv_relu_pool2d(*arguments(SHAPES["rgb"]), **options)


# Input, weight, options, whether there is a skip, and the algorithm.
CHOICES = {
    "first-layer": ((4, 3, 224, 224), (32, 3, 3, 3), {}, False, "winograd"),
    "deep-layer": ((4, 128, 56, 56), (128, 128, 3, 3), {}, False, "winograd"),
    "fewest-pixels": ((1, 64, 8, WINOGRAD_MIN_PIXELS // 8), (64, 64, 3, 3), {}, False, "winograd"),
    "too-few-pixels": ((1, 64, 8, WINOGRAD_MIN_PIXELS // 8 - 1), (64, 64, 3, 3), {}, False, "library"),
    "no-images": ((0, 3, 8, 8), (4, 3, 3, 3), {}, False, "direct"),
    "stem": ((4, 3, 224, 224), (64, 3, 7, 7), STEM, False, "winograd"),
    "stem-with-skip": ((4, 3, 224, 224), (64, 3, 7, 7), STEM, True, "library"),
    "stem-without-pool-padding": ((4, 3, 224, 224), (64, 3, 7, 7), STEM | {"pool_padding": 0}, False, "direct"),
    "overlapping-pool": ((4, 3, 224, 224), (64, 3, 3, 3), {"pool_size": 3, "pool_stride": 2}, False, "direct"),
    "groups": ((4, 64, 64, 64), (64, 32, 3, 3), {"groups": 2}, False, "library"),
    "skip": ((4, 64, 56, 56), (64, 64, 3, 3), {}, True, "winograd"),
    "skip-of-few-channels": ((4, 3, 224, 224), (32, 3, 3, 3), {}, True, "library"),
    "no-pool": ((4, 64, 56, 56), (64, 64, 3, 3), {"pool_size": 1}, False, "winograd"),
    "no-pool-of-few-channels": ((4, 3, 224, 224), (32, 3, 3, 3), {"pool_size": 1}, False, "direct"),
    "no-pool-with-skip": ((4, 64, 56, 56), (64, 64, 3, 3), {"pool_size": 1}, True, "library"),
}


def chosen_algorithm(
    choose: Callable[..., str], input: tuple[int, ...], weight: tuple[int, ...], options: dict, with_skip: bool,
    dtype: torch.dtype = torch.float32,
) -> str:  # fmt: skip
    numbers = {"stride": 1, "padding": 1, "dilation": 1, "groups": 1, "pool_size": 2, "pool_stride": None}
    numbers |= {"pool_padding": 0, "ceil_mode": False}  # in resolve's order
    geometry, _ = resolve(weight[2:], *(numbers | options).values())
    called = (torch.empty(shape, dtype=dtype, device="meta") for shape in (input, weight))
    return choose(*called, geometry, with_skip)


@pytest.mark.parametrize(("input", "weight", "options", "with_skip", "algorithm"), CHOICES.values(), ids=CHOICES)
def test_choice(
    input: tuple[int, ...], weight: tuple[int, ...], options: dict, with_skip: bool, algorithm: str
) -> None:
    assert chosen_algorithm(choose_cpu_forward, input, weight, options, with_skip) == algorithm


@pytest.mark.parametrize("multiplies", [False, True])
@pytest.mark.parametrize("name", ["deep-layer", "stem", "skip", "no-pool", "no-pool-of-few-channels"])
def test_choice_in_bfloat16(name: str, multiplies: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_bfloat16, "cpu_multiplies_bfloat16", lambda: multiplies)
    *call, algorithm = CHOICES[name]
    expected = "library" if multiplies and name == "no-pool" else algorithm
    assert chosen_algorithm(choose_cpu_forward, *call, torch.bfloat16) == expected
