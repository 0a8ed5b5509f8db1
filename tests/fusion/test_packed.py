"""Predictions' convolutions by oneDNN with weights that are kept: what becomes of them, and what must stay."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastseg
from fastseg.ops.convolution import kept
from fastseg.testing import MEMORY_FORMATS, assert_parity, make
from tests.fusion.cases import compiled, operators

SHAPE = (2, 32, 40, 44)
each_layout = pytest.mark.parametrize("layout", MEMORY_FORMATS)


@pytest.fixture(autouse=True)
def none_kept() -> Iterator[None]:
    kept._packed.clear()
    yield
    kept._packed.clear()


class Block(nn.Module):
    """A bottleneck of a ResNet with a stride, then a depthwise convolution, and a padding that isn't zero's."""

    def __init__(self) -> None:
        super().__init__()
        self.reduce = nn.Sequential(nn.Conv2d(32, 48, 1, bias=False), nn.BatchNorm2d(48), nn.ReLU(inplace=True))
        self.middle = nn.Sequential(nn.Conv2d(48, 48, 3, 2, 1, groups=2), nn.BatchNorm2d(48), nn.SiLU(inplace=True))
        self.expand = nn.Sequential(nn.Conv2d(48, 64, 1), nn.BatchNorm2d(64, affine=False))
        self.skip = nn.Sequential(nn.Conv2d(32, 64, 1, 2), nn.BatchNorm2d(64))
        self.depthwise = nn.Conv2d(64, 128, 5, padding="same", groups=64)
        self.reflecting = nn.Conv2d(128, 8, 1, padding=1, padding_mode="reflect")

    def forward(self, x: Tensor) -> Tensor:
        y = self.expand(self.middle(self.reduce(x)))
        y += self.skip(x)
        return self.reflecting(F.relu6(self.depthwise(F.relu(y, inplace=True))))


PLACES = 6


def block() -> Block:
    torch.manual_seed(0)
    network = Block().eval()
    for name, buffer in network.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 2)
    return network


def assert_same(network: nn.Module, call: Callable[..., Any], input: Tensor) -> None:
    with torch.no_grad():
        truth = network.double()(input.double())
        expected, found = network.float()(input), call(input)
    assert found.stride() == expected.stride()
    assert_parity(found, expected, truth, terms=128)


@each_layout
@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_a_block_gives_what_it_gave(inner: str, layout: str) -> None:
    network, input = block(), make(SHAPE, layout=layout)
    network.to(memory_format=MEMORY_FORMATS[layout])
    torch._dynamo.reset()
    call = torch.compile(network, backend="fastseg", options={"inner": inner})
    for _ in range(3):
        assert_same(network, call, input)
    assert operators(fastseg.report(network)) == ["conv2d"] * PLACES
    assert not fastseg.report(network).left
    assert (fastseg.report(network).kept_bytes > 0) == (inner == "inductor" or layout == "channels_last")
    assert fastseg.info()["kept_weights"] == fastseg.report(network).kept_bytes


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_goes_through_every_activation(value: float) -> None:
    """oneDNN's own ReLU after a convolution makes 0 of NaN; torch's, and Inductor's, keep it."""
    network, input = block().to(memory_format=torch.channels_last), make(SHAPE, layout="channels_last")
    input[0, 3, 5, 7] = value
    torch._dynamo.reset()
    call = torch.compile(network, backend="fastseg")
    with torch.no_grad():
        expected = network(input)
        assert expected.isnan().any()
        for _ in range(2):
            torch.testing.assert_close(call(input).isnan(), expected.isnan(), rtol=0, atol=0)


def test_every_change_of_weights_and_statistics_is_seen() -> None:
    network, input = block().to(memory_format=torch.channels_last), make(SHAPE, layout="channels_last")
    call = compiled(network)
    other = block().state_dict()
    norm = network.reduce[1]
    changes: list[Callable[[], Any]] = [
        lambda: network.reduce[0].weight.mul_(2),
        lambda: network.depthwise.weight.data[3].add_(1),
        lambda: norm.weight.add_(1),
        lambda: norm.bias.add_(1),
        lambda: norm.running_mean.data.add_(1),
        lambda: norm.running_var.data.mul_(2),
        lambda: network.load_state_dict(other),
    ]
    assert_same(network, call, input)
    with torch.no_grad():
        for change in changes:
            assert_same(network, call, input)
            change()
            assert_same(network, call, input)


@pytest.mark.parametrize(
    ("everywhere", "here", "gradients"),
    [(False, True, False), (True, None, False), (False, True, True), (False, None, False)],
    ids=["option", "setting", "with-gradients", "neither"],
)
def test_inductors_freezing_is_that_of_kept_weights(everywhere: bool, here: bool | None, gradients: bool) -> None:
    network, input = block().to(memory_format=torch.channels_last), make(SHAPE, layout="channels_last")
    torch._dynamo.reset()
    call = torch.compile(network, backend="fastseg", options=None if here is None else {"freezing": here})
    with torch._inductor.config.patch(freezing=everywhere), torch.set_grad_enabled(gradients):
        expected = network(input)
        for _ in range(3):
            torch.testing.assert_close(call(input), expected)
        frozen = (everywhere or bool(here)) and not gradients
        assert (kept.stamp_of(network.reduce[0].weight) != 0) is frozen
        network.reduce[0].weight.data[3].add_(1)
        seen = not torch.equal(call(input), expected) and torch.allclose(call(input), network(input), atol=1e-4)
        assert seen is not frozen


@pytest.mark.parametrize(("dilation", "placed"), [(1, []), (30, ["conv2d"])], ids=["every-tap", "idle-taps"])
def test_a_frozen_graph_leaves_inductor_what_it_does_itself(dilation: int, placed: list[str]) -> None:
    last = nn.Conv2d(8, 192, 3, stride=1 if dilation > 1 else 2, padding=dilation, dilation=dilation)
    network, input = block(), make(SHAPE, layout="channels_last")
    network.reflecting = nn.Sequential(network.reflecting, last)
    network.to(memory_format=torch.channels_last)
    torch._dynamo.reset()
    call = torch.compile(network, backend="fastseg")
    with torch._inductor.config.patch(freezing=True):
        for _ in range(2):
            assert_same(network, call, input)
    assert operators(fastseg.report(network)) == placed


def test_what_is_kept_goes_with_its_weights() -> None:
    network, input = block().to(memory_format=torch.channels_last), make(SHAPE, layout="channels_last")
    call = compiled(network)
    with torch.no_grad():
        for _ in range(2):
            call(input)
    assert fastseg.info()["kept_weights"] > 0
    del network, call
    torch._dynamo.reset()
    assert fastseg.info()["kept_weights"] == 0


def test_sizes_may_change() -> None:
    network, call = block(), torch.compile(block(), backend="fastseg", options={"inner": "eager"}, dynamic=True)
    for shape in (SHAPE, (3, 32, 37, 51), SHAPE):
        for layout in MEMORY_FORMATS:
            with torch.no_grad():
                torch.testing.assert_close(call(make(shape, layout=layout)), network(make(shape, layout=layout)))


def pointwise(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Input, weight, bias, and batch normalisation's mean, variance, weight and bias."""
    rest = [make((48,), dtype, seed=seed).abs() + 0.5 for seed in range(2, 7)]
    return [make(SHAPE, dtype, layout="channels_last"), make((48, 32, 1, 1), dtype, seed=1), *rest]


STAYING: dict[str, Callable[..., Any]] = {}
OTHERWISE: dict[str, Callable[..., Any]] = {}  # a part of them is replaced


def stays(function: Callable[..., Any]) -> Callable[..., Any]:
    STAYING[function.__name__] = function
    return function


def is_replaced_in_part(function: Callable[..., Any]) -> Callable[..., Any]:
    OTHERWISE[function.__name__] = function
    return function


@stays
def weight_of_the_graphs_own(x: Tensor, weight: Tensor, *rest: Tensor) -> Tensor:
    return F.conv2d(x, weight * 2)


@stays
def few_products(x: Tensor, weight: Tensor, *rest: Tensor) -> Tensor:
    return F.conv2d(x[..., :8, :8].contiguous(), weight)


@stays
def in_double(x: Tensor, weight: Tensor, bias: Tensor, *rest: Tensor) -> Tensor:
    return F.conv2d(x.double(), weight.double(), bias.double())


@stays
def under_autocast(x: Tensor, weight: Tensor, *rest: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return F.conv2d(x, weight)


@stays
def with_gradient(x: Tensor, weight: Tensor, bias: Tensor, *rest: Tensor) -> Tensor:
    with torch.enable_grad():
        return F.conv2d(x.requires_grad_(), weight, bias).sum() * 1.0


@is_replaced_in_part
def norm_in_training(x: Tensor, weight: Tensor, bias: Tensor, *norm: Tensor) -> Tensor:
    return F.batch_norm(F.conv2d(x, weight, bias), None, None, *norm[2:], training=True)


@is_replaced_in_part
def convolution_used_before_norm(x: Tensor, weight: Tensor, bias: Tensor, *norm: Tensor) -> tuple[Tensor, Tensor]:
    convolved = F.conv2d(x, weight, bias)
    return F.batch_norm(convolved, *norm), convolved


@is_replaced_in_part
def convolution_changed_before_norm(x: Tensor, weight: Tensor, bias: Tensor, *norm: Tensor) -> Tensor:
    convolved = F.conv2d(x, weight, bias)
    convolved[:, 0] += 1
    return F.batch_norm(convolved, *norm)


@is_replaced_in_part
def relu_in_place_before_norm(x: Tensor, weight: Tensor, bias: Tensor, *norm: Tensor) -> Tensor:
    return F.batch_norm(F.conv2d(x, weight, bias).relu_(), *norm)


@pytest.mark.parametrize("name", [*STAYING, *OTHERWISE])
def test_what_must_stay(name: str) -> None:
    function = (STAYING | OTHERWISE)[name]
    tensors = pointwise()
    fused = compiled(function)
    with torch.no_grad():
        for _ in range(2):
            found, expected = fused(*tensors), function(*tensors)
            exact = {"rtol": 0, "atol": 0} if name in STAYING else {}
            torch.testing.assert_close(found, expected, **exact)
    assert operators(fastseg.report(fused)) == ([] if name in STAYING else ["conv2d"])


def test_a_graph_whose_gradients_are_recorded_stays() -> None:
    input, weight, bias, *norm = pointwise()
    weight.requires_grad_()

    def function(x: Tensor, weight: Tensor) -> Tensor:
        return F.batch_norm(F.conv2d(x, weight, bias), *norm)

    fused = compiled(function)
    torch.testing.assert_close(fused(input, weight), function(input, weight), rtol=0, atol=0)
    assert operators(fastseg.report(fused)) == []


def test_bfloat16_stays() -> None:
    tensors = pointwise(torch.bfloat16)
    fused = compiled(lambda x, weight, bias, *norm: F.batch_norm(F.conv2d(x, weight, bias), *norm))
    with torch.no_grad():
        fused(*tensors)
    assert operators(fastseg.report(fused)) == []
