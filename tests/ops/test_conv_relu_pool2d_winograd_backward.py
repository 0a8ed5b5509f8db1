"""conv_relu_pool2d's Winograd algorithm backward: parity, what its transforms can't carry, and which calls take it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastseg import _native, functional, reference
from fastseg.ops.convolution import algorithms
from fastseg.ops.convolution.algorithms import WINOGRAD_MIN_PIXELS, choose_cpu_backward
from fastseg.testing import make
from tests.kernels.poison import fresh_memory_of_nan
from tests.ops.test_conv_relu_pool2d import DTYPES, check, tensors
from tests.ops.test_conv_relu_pool2d_winograd import arguments, chosen_algorithm

pytestmark = pytest.mark.skipif(_native.INTERPRETED, reason="an algorithm of the C++ kernels alone")

# N, C, H, W, K.
SHAPES = {
    "few": (2, 3, 17, 19, 5),
    "one-channel": (1, 1, 7, 6, 1),
    "uneven": (1, 37, 12, 11, 20),  # channels that fill neither a vector nor a tile of registers
    "groups": (1, 70, 9, 10, 131),  # of channels: two of the input, three of the output
    "parts": (3, 10, 40, 70, 12),  # several parts of the sums, bands of images, and pieces of bands
}

# So many channels that the transformed weights are made in passes, and the sums of the weight's gradient, too.
DEEP = (1, 600, 9, 10, 450)

# Every kind of gradient that isn't sparse, and every padding.
OPTIONS = {
    "no-pool": {"pool_size": 1},
    "no-pool-padded": {"pool_size": 1, "padding": (1, 2)},
    "no-pool-indices": {"pool_size": 1, "padding": (2, 0), "return_indices": True},
    "skip": {"padding": 1, "return_skip": True},
    "skip-ceil": {"padding": (0, 1), "ceil_mode": True, "return_skip": True},
    "overlapping-pool": {"padding": 1, "pool_size": 3, "pool_stride": 1, "pool_padding": 1},
}

NO_POOL = OPTIONS["no-pool-padded"]


@pytest.fixture(autouse=True)
def winograd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(algorithms, "choose_cpu_backward", lambda *arguments: "winograd")
    monkeypatch.setattr(algorithms, "MASKED_MIN_BYTES", 0)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_parity(isa: str, options: dict, dtype: torch.dtype, layout: str, shape: tuple[int, ...]) -> None:
    check(arguments(shape, dtype, layout), **options)


@pytest.mark.parametrize("options", [OPTIONS["no-pool"], OPTIONS["skip"]], ids=["no-pool", "skip"])
@pytest.mark.strength(1)
def test_parity_of_deep_layers(isa: str, options: dict) -> None:
    check(arguments(DEEP), **options)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_masking_as_it_reads_changes_no_bit(
    isa: str, dtype: torch.dtype, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = arguments((2, 12, 20, 19, 20), dtype, layout)
    incoming = make((2, 20, 20, 21), dtype, layout=layout, seed=5)
    results = [gradients(functional.conv_relu_pool2d, called, incoming, **NO_POOL)]
    monkeypatch.setattr(algorithms, "MASKED_MIN_BYTES", incoming.nbytes + 1)
    results.append(gradients(functional.conv_relu_pool2d, called, incoming, **NO_POOL))
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("needed", [0, 1, 2], ids=["input", "weight", "bias"])
def test_one_gradient(isa: str, needed: int) -> None:
    called = [t.detach().requires_grad_(i == needed) for i, t in enumerate(arguments(SHAPES["uneven"]))]
    check(called, **NO_POOL)


def test_any_strides(isa: str) -> None:
    base, kernels = make((4, 12, 18, 22)), make((9, 24, 5, 3), seed=1, scale=0.2)
    for input in (base[::2, :, :, 1:-3], base.transpose(2, 3), base[:1].expand(2, -1, -1, -1)):
        for weight in (kernels[:, ::2, 1:-1], kernels[:, :12, :3].contiguous(memory_format=torch.channels_last)):
            check([input.requires_grad_(), weight.requires_grad_(), None], padding=1, pool_size=1)


def gradients(function: object, called: list[Tensor], incoming: Tensor, **options: object) -> tuple[Tensor, ...]:
    return torch.autograd.grad(function(*called, **options), called, incoming)


def test_small_integers_are_exact(isa: str) -> None:
    generator = torch.Generator().manual_seed(0)

    def integers(*shape: int) -> Tensor:
        return torch.randint(-4, 5, shape, generator=generator).float()

    called = [t.requires_grad_() for t in (integers(2, 12, 15, 16), integers(20, 12, 3, 3), integers(20))]
    incoming = integers(2, 20, 15, 18)
    results = [
        gradients(f, called, incoming, **NO_POOL) for f in (functional.conv_relu_pool2d, reference.conv_relu_pool2d)
    ]
    torch.testing.assert_close(*results, rtol=0, atol=0)


NAN, INFINITY = float("nan"), float("inf")
OUT_OF_RANGE = [(which, value) for which in ("input", "weight", "incoming") for value in (NAN, -INFINITY, 3e37)]


@pytest.mark.parametrize(("which", "value"), OUT_OF_RANGE)
def test_what_transforms_cannot_carry_takes_the_library(
    isa: str, which: str, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = [t.detach() for t in arguments((2, 12, 40, 36, 20))]
    incoming = make((2, 20, 40, 38), seed=5)
    {"input": called[0], "weight": called[1], "incoming": incoming}[which].view(-1)[-7] = value
    if which == "incoming":
        called[2] += 10  # no ReLU cuts it
    for tensor in called:
        tensor.requires_grad_()
    results = [gradients(functional.conv_relu_pool2d, called, incoming, **NO_POOL)]
    monkeypatch.setattr(algorithms, "choose_cpu_backward", lambda *arguments: "library")
    results.append(gradients(functional.conv_relu_pool2d, called, incoming, **NO_POOL))
    torch.testing.assert_close(*results, rtol=0, atol=0, equal_nan=True)


def test_other_numbers_take_winograd(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called = [t.detach() for t in arguments((2, 12, 40, 36, 20))]
    called[0].view(-1)[-7] = 1e30  # far from the others, but in range
    for tensor in called:
        tensor.requires_grad_()
    incoming = make((2, 20, 40, 38), seed=5)
    results = [gradients(functional.conv_relu_pool2d, called, incoming, **NO_POOL)]
    monkeypatch.setattr(algorithms, "choose_cpu_backward", lambda *arguments: "library")
    results.append(gradients(functional.conv_relu_pool2d, called, incoming, **NO_POOL))
    for winograd, library in zip(*results, strict=True):
        assert not torch.equal(winograd, library)  # rounded in other places


@pytest.mark.parametrize("shape", [SHAPES["parts"], SHAPES["groups"], DEEP], ids=str)
@pytest.mark.parametrize("options", [NO_POOL, OPTIONS["skip"]], ids=["no-pool", "skip"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_bitwise_equal_for_any_number_of_threads_and_in_poisoned_memory(
    dtype: torch.dtype, shape: tuple, options: dict, threads: Callable[[int], None]
) -> None:
    called = arguments(shape, dtype)
    results = []
    with fresh_memory_of_nan():
        for count in (1, 2, 3):
            threads(count)
            outputs = functional.conv_relu_pool2d(*called, **options)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            incoming = [make(tuple(output.shape), dtype, seed=i) for i, output in enumerate(outputs)]
            results.append(torch.autograd.grad(outputs, called, incoming))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=0)


def test_no_images() -> None:
    input = torch.empty(0, 3, 9, 9, requires_grad=True)
    weight = torch.ones(4, 3, 3, 3, requires_grad=True)
    output = functional.conv_relu_pool2d(input, weight, pool_size=1)
    grad_input, grad_weight = torch.autograd.grad(output, (input, weight), torch.empty_like(output))
    assert grad_input.shape == input.shape
    torch.testing.assert_close(grad_weight, torch.zeros_like(weight), rtol=0, atol=0)


@pytest.mark.parametrize(("kernel", "options"), [(3, {"padding": 3}), (5, {"padding": 2}), (3, {"stride": 2})], ids=str)
def test_kernel_refuses_what_it_does_not_compute(kernel: int, options: dict) -> None:
    called = tensors((1, 5, 12, 13, 6, kernel, kernel), torch.float32)
    output = functional.conv_relu_pool2d(*called, pool_size=1, **options)
    with pytest.raises(ValueError, match=r"the Winograd kernels' gradients are for|the convolution's size"):
        output.sum().backward()


# Input, weight, options, whether the skip has a gradient, and the algorithm.
CHOICES = {
    "no-pool": ((4, 64, 56, 56), (64, 64, 3, 3), {"pool_size": 1}, False, "winograd"),
    "no-pool-first-layer": ((4, 3, 224, 224), (32, 3, 3, 3), {"pool_size": 1}, False, "winograd"),
    "fewest-pixels": ((1, 64, 8, WINOGRAD_MIN_PIXELS // 8), (64, 64, 3, 3), {"pool_size": 1}, False, "winograd"),
    "too-few-pixels": ((1, 64, 8, WINOGRAD_MIN_PIXELS // 8 - 1), (64, 64, 3, 3), {"pool_size": 1}, False, "library"),
    "too-few-pixels-and-taps": ((1, 32, 8, 8), (64, 32, 3, 3), {"pool_size": 1}, False, "direct"),
    "skip": ((4, 64, 56, 56), (64, 64, 3, 3), {}, True, "winograd"),
    "skip-without-gradient": ((4, 64, 56, 56), (64, 64, 3, 3), {}, False, "direct"),
    "padded-far": ((4, 64, 56, 56), (64, 64, 3, 3), {"pool_size": 1, "padding": 3}, False, "library"),
    "overlapping-pool": ((4, 64, 56, 56), (64, 64, 3, 3), {"pool_stride": 1}, False, "winograd"),
    "strided-pool": ((4, 64, 56, 56), (64, 64, 3, 3), {"pool_size": 3, "pool_stride": 2}, False, "direct"),
    "strided-pool-and-skip": ((4, 64, 56, 56), (64, 64, 3, 3), {"pool_size": 3, "pool_stride": 2}, True, "winograd"),
    "groups": ((4, 64, 64, 64), (64, 32, 3, 3), {"groups": 2, "pool_size": 1}, False, "library"),
    "strided": ((4, 64, 64, 64), (64, 64, 3, 3), {"stride": 2, "pool_size": 1}, False, "library"),
    "dilated": ((4, 16, 64, 64), (64, 16, 3, 3), {"dilation": 2, "pool_size": 1}, False, "direct"),
    "kernel-1": ((4, 16, 64, 64), (64, 16, 1, 1), {"pool_size": 1}, False, "library"),
    "kernel-5": ((4, 3, 64, 64), (64, 3, 5, 5), {"pool_size": 1}, False, "direct"),
    "many-taps": ((4, 1025, 32, 32), (8, 1025, 3, 3), {}, False, "library"),
    "no-images": ((0, 64, 56, 56), (64, 64, 3, 3), {}, True, "library"),
}


@pytest.mark.parametrize(("input", "weight", "options", "with_skip", "algorithm"), CHOICES.values(), ids=CHOICES)
def test_choice(
    input: tuple[int, ...], weight: tuple[int, ...], options: dict, with_skip: bool, algorithm: str
) -> None:
    assert chosen_algorithm(choose_cpu_backward, input, weight, options, with_skip) == algorithm
