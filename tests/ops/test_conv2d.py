"""conv2d against plain PyTorch: values, gradients, and which calls are torch's own.

The gradients' kernels, which conv_relu_pool2d has too: test_conv_relu_pool2d_winograd_backward.py.
"""

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fastseg
from fastseg import functional, reference
from fastseg.ops import conv2d as operator
from fastseg.ops.convolution import algorithms, convolve
from fastseg.testing import assert_parity, make, values_and_gradients
from tests.kernels.poison import fresh_memory_of_nan
from tests.ops.test_conv_relu_pool2d_winograd import arguments

DTYPES = {"float64": torch.float64, "float32": torch.float32}

# N, C, H, W, K: channels that fill neither a vector nor a tile of registers, and pixels enough.
SHAPES = {
    "five": (1, 5, 21, 13, 37),
    "uneven": (2, 37, 12, 11, 20),
    "groups": (1, 70, 15, 14, 131),  # of channels: two of the input, three of the output
    "one-output": (2, 12, 30, 17, 1),
    "wide": (1, 9, 13, 61, 18),  # in NCHW, several vectors of windows in a row, the last one cut
}

PADDINGS = {"none": 0, "one": 1, "oblong": (2, 1), "same": "same", "valid": "valid"}


@pytest.fixture
def by_winograd(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets nothing be plain PyTorch's in the operator."""

    def refuse(*arguments: object) -> None:
        raise AssertionError("plain PyTorch was called")

    monkeypatch.setattr(operator, "forward_plain", refuse)
    monkeypatch.setattr(convolve, "library_backward", refuse)


def check(called: list[Tensor | None], **options: object) -> list[Tensor]:
    results = [
        values_and_gradients(module.conv2d, called, dtype, **options)
        for module, dtype in ((functional, None), (reference, None), (reference, torch.float64))
    ]
    input, weight = called[0], called[1]
    assert_parity(*results, terms=max(input[:, 0].numel(), max(weight.shape[:2]) * 9))
    return results[0]


@pytest.mark.usefixtures("by_winograd")
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("padding", PADDINGS.values(), ids=PADDINGS)
def test_parity(isa: str, padding: object, dtype: torch.dtype, layout: str, shape: tuple[int, ...]) -> None:
    output, grad_input, *_ = check(arguments(shape, dtype, layout), padding=padding)
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    assert output.is_contiguous(memory_format=memory_format)
    assert grad_input.is_contiguous(memory_format=memory_format)


@pytest.mark.usefixtures("by_winograd")
@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 2)], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
def test_some_gradients(bias: bool, needed: tuple[int, ...]) -> None:
    called = [t.detach().requires_grad_(i in needed) for i, t in enumerate(arguments(SHAPES["uneven"]))]
    check(called if bias else [*called[:2], None], padding=1)


@pytest.mark.usefixtures("by_winograd")
def test_negative_values_stay(isa: str) -> None:
    """conv_relu_pool2d's kernel, which computes the values, cuts them."""
    output = functional.conv2d(*arguments(SHAPES["uneven"]), padding=1)
    assert (output < 0).float().mean() > 0.4


@pytest.mark.usefixtures("by_winograd")
def test_small_integers_are_exact(isa: str) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 12, 15, 16), (20, 12, 3, 3), (20,))
    called = [torch.randint(-4, 5, shape, generator=generator).float() for shape in shapes]
    torch.testing.assert_close(
        functional.conv2d(*called, padding=1), reference.conv2d(*called, padding=1), rtol=0, atol=0
    )


NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize("value", [NAN, -INFINITY, 3e37])
@pytest.mark.parametrize("which", [0, 1, 2], ids=["input", "weight", "bias"])
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_what_transforms_cannot_carry_is_torchs_own(isa: str, layout: str, which: int, value: float) -> None:
    called = [t.detach() for t in arguments((2, 12, 40, 31, 20), layout=layout)]
    called[which][(-1,) * called[which].ndim] = value
    output = functional.conv2d(*called, padding=1)
    torch.testing.assert_close(output, reference.conv2d(*called, padding=1), rtol=0, atol=0, equal_nan=True)


def other(shape: tuple[int, ...] = (2, 8, 20, 20), kernel: tuple[int, ...] = (6, 8, 3, 3), **options: object) -> tuple:
    return shape, kernel, options


# Calls that the kernels don't serve.
OTHERS = {
    "kernel-5": other(kernel=(6, 8, 5, 5)),
    "kernel-1": other(kernel=(6, 8, 1, 1)),
    "stride": other(stride=2, padding=1),
    "dilation": other(dilation=(1, 2)),
    "groups": other(kernel=(6, 4, 3, 3), groups=2),
    "few-channels": other((2, 4, 20, 20), (6, 4, 3, 3)),
    "padded-far": other(padding=3),
    "no-batch": other((8, 20, 20)),
    "bfloat16": other(dtype=torch.bfloat16),
    "autocast": other(autocast=True),
}


@pytest.mark.parametrize(("shape", "kernel", "options"), OTHERS.values(), ids=OTHERS)
def test_other_calls_are_torchs_own(
    shape: tuple, kernel: tuple, options: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.ops.fastseg, "conv2d", None)
    options = dict(options)
    dtype, autocast = options.pop("dtype", torch.float32), options.pop("autocast", False)
    called = [make(shape, dtype), make(kernel, dtype, seed=1), make(kernel[:1], dtype, seed=2)]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        results = [module.conv2d(*called, **options) for module in (functional, reference)]
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize(("least", "own"), [(16 * 15 * 8 * 9 * 12, False), (16 * 15 * 8 * 9 * 12 + 1, True)])
def test_few_products_are_torchs_own(least: int, own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(algorithms, "CONV2D_MIN_PRODUCTS", least)
    output = functional.conv2d(*arguments((1, 8, 16, 15, 12)))
    assert ("_Conv2d" in type(output.grad_fn).__name__) != own


def test_few_pixels_are_torchs_own() -> None:
    called = arguments((1, 64, 12, 12, 32))
    results = [values_and_gradients(module.conv2d, called, padding=1) for module in (functional, reference)]
    torch.testing.assert_close(*results, rtol=0, atol=0)


# ---- taps that see nothing but padding ----

IDLE = {
    "middle": {"dilation": 14, "padding": 14},  # nothing else sees any of the map
    "column": {"dilation": (12, 1), "padding": (12, 1)},
    "row": {"dilation": (2, 13), "padding": (2, 13)},
    "stride": {"dilation": 16, "padding": 16, "stride": (2, 3)},
    "wide": {"dilation": 20, "padding": 24},
}
USED = {"middle": (1, 1), "column": (1, 3), "row": (3, 1), "stride": (1, 1), "wide": (1, 1)}


def idle_call(dtype: torch.dtype = torch.float32, layout: str = "nchw") -> list[Tensor]:
    return arguments((2, 72, 11, 12, 96), dtype, layout)


@pytest.fixture
def kernels_seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Height and width of the kernels of which the operator asks gradients."""
    seen, backward = [], convolve.library_backward

    def spy(grad_output: Tensor, input: Tensor, weight: Tensor, *rest: object) -> convolve.Gradients:
        seen.append(tuple(weight.shape[2:]))
        return backward(grad_output, input, weight, *rest)

    monkeypatch.setattr(convolve, "library_backward", spy)
    return seen


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", IDLE)
def test_taps_that_see_nothing_are_left_out(
    name: str, dtype: torch.dtype, layout: str, kernels_seen: list[tuple[int, ...]]
) -> None:
    _, grad_input, grad_weight, _ = check(idle_call(dtype, layout), **IDLE[name])
    assert kernels_seen == [USED[name]]
    assert grad_input.is_contiguous(
        memory_format=torch.channels_last if layout == "channels_last" else torch.contiguous_format
    )
    height, width = USED[name]
    idle = torch.ones(3, 3, dtype=torch.bool)
    idle[(3 - height) // 2 : (3 + height) // 2, (3 - width) // 2 : (3 + width) // 2] = False
    assert (grad_weight[:, :, idle] == 0).all()
    assert (grad_weight[:, :, ~idle] != 0).all()


@pytest.mark.parametrize("value", [NAN, INFINITY])
def test_what_taps_hold_that_see_nothing_does_not_count(value: float) -> None:
    """torch agrees in channels_last; in NCHW it depends on the size."""
    called = [tensor.detach() for tensor in idle_call(layout="channels_last")]
    expected = functional.conv2d(*called, **IDLE["middle"])
    called[1][3, 5, 0, 2] = value
    assert torch.equal(functional.conv2d(*called, **IDLE["middle"]), expected)
    torch.testing.assert_close(reference.conv2d(*called, **IDLE["middle"]), expected)


def test_second_derivatives_with_taps_left_out() -> None:
    called = idle_call(torch.float64)
    found, expected = (module.conv2d(*called, **IDLE["middle"]) for module in (functional, reference))
    for _ in range(2):
        grads = [torch.autograd.grad((y**2).sum(), called, create_graph=True) for y in (found, expected)]
        torch.testing.assert_close(*grads)
        found, expected = (sum((grad**2).sum() for grad in of) for of in grads)


def test_a_graph_of_any_size_leaves_out_what_each_size_lets_it(kernels_seen: list[tuple[int, ...]]) -> None:
    class Network(torch.nn.Module):
        def forward(self, input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return functional.conv2d(input, weight, bias, **IDLE["middle"])

    height, width = torch.export.Dim("height"), torch.export.Dim("width")
    with torch.enable_grad():
        program = torch.export.export(
            Network(), tuple(idle_call(torch.float64)), dynamic_shapes=({2: height, 3: width}, None, None), strict=False
        )
    for size in ((11, 12), (40, 21), (9, 30)):
        called = arguments((2, 72, *size, 96), torch.float64)
        results = [
            values_and_gradients(function, called)
            for function in (program.module(), functools.partial(reference.conv2d, **IDLE["middle"]))
        ]
        torch.testing.assert_close(*results)
    assert kernels_seen == [(1, 1), (3, 3), (1, 3)]


# ---- memory, determinism, graphs ----


@pytest.mark.parametrize("shape", [SHAPES["uneven"], SHAPES["groups"]], ids=str)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_bitwise_equal_for_any_number_of_threads_and_in_poisoned_memory(
    dtype: torch.dtype, shape: tuple, threads: Callable[[int], None]
) -> None:
    results = []
    with fresh_memory_of_nan():
        for count in (1, 2, 3):
            threads(count)
            results.append(values_and_gradients(functional.conv2d, arguments(shape, dtype), padding=1))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=0)


# ---- layer and errors ----


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect"])
def test_layer(padding_mode: str) -> None:
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(8, 12, 3, padding=1, padding_mode=padding_mode)
    layer = fastseg.Conv2d.from_torch(conv)
    assert layer.weight is conv.weight
    assert layer.bias is conv.bias
    input = make((2, 8, 20, 17), requires_grad=True)
    results = [values_and_gradients(of, [input]) for of in (layer, conv)]
    truth = values_and_gradients(layer.to_torch().double(), [input], torch.float64)
    assert_parity(*results, truth, terms=8 * 9)
    assert not torch.equal(results[0][0], results[1][0])  # rounded in other places


def test_layer_loads_a_convolutions_state_dict() -> None:
    conv = torch.nn.Conv2d(8, 12, 3, bias=False)
    layer = fastseg.Conv2d(8, 12, 3, bias=False)
    layer.load_state_dict(conv.state_dict())
    assert torch.equal(layer.weight, conv.weight)
    assert repr(layer) == repr(conv)
