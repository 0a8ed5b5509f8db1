"""Transformed weights that predictions keep: always those of the weights as they are, and gone with them."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastseg
from fastseg import functional
from fastseg.ops.convolution import kept
from fastseg.testing import MEMORY_FORMATS, assert_parity, make

SHAPE = (2, 12, 18, 22)
CALLS: dict[str, Callable[..., Any]] = {
    "conv2d": lambda *tensors, **o: functional.conv2d(*tensors, padding=1, **o),
    "conv_relu": lambda *tensors, **o: functional.conv_relu_pool2d(*tensors, padding=1, pool_size=1, **o),
    "conv_relu_pool2d": lambda *tensors, **o: functional.conv_relu_pool2d(*tensors, padding=1, **o),
    "skip": lambda *tensors, **o: functional.conv_relu_pool2d(*tensors, padding=1, return_skip=True, **o)[1],
}


@pytest.fixture(autouse=True)
def none_kept() -> Iterator[None]:
    kept._kept.clear()
    yield
    kept._kept.clear()


def tensors(layout: str = "nchw", dtype: torch.dtype = torch.float32) -> tuple[Tensor, nn.Parameter, Tensor]:
    weight = nn.Parameter(make((20, 12, 3, 3), dtype, seed=1, layout=layout))
    return make(SHAPE, dtype, layout=layout), weight, make((20,), dtype, seed=2)


def anew(call: str, input: Tensor, weight: Tensor, bias: Tensor, **options: Tensor) -> Tensor:
    """The result for weights that nothing is kept of."""
    return CALLS[call](input, weight.detach().clone(memory_format=torch.preserve_format), bias, **options)


@pytest.mark.parametrize("layout", MEMORY_FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("call", CALLS)
def test_follow_every_change(call: str, dtype: torch.dtype, layout: str, isa: str) -> None:
    input, weight, bias = tensors(layout, dtype)
    changes: list[Callable[[], Any]] = [
        lambda: None,
        lambda: weight.mul_(1.5),
        lambda: weight.data[0, 0, 0, 1].add_(1),  # past the version counter
        lambda: weight.data[[0, 1]].copy_(weight.data[[1, 0]]),
        lambda: setattr(weight, "data", torch.roll(weight.data, 1, 0)),
        lambda: bias.add_(1),
        lambda: weight.data[3, 3].neg_(),
    ]
    with torch.no_grad():
        CALLS[call](input, weight, bias)
        for change in changes:
            change()
            found = CALLS[call](input, weight, bias)
            assert fastseg.info()["kept_weights"] > weight.numel() * weight.itemsize
            assert torch.equal(found, anew(call, input, weight, bias))
            assert torch.equal(CALLS[call](input, weight, bias), found)


@pytest.mark.parametrize("call", CALLS)
def test_follow_versions_and_addresses_of_frozen_weights(call: str) -> None:
    input, weight, bias = tensors()
    kept.freeze([weight])
    with torch.no_grad():
        for change in (
            lambda: None,
            lambda: weight.mul_(1.5),
            lambda: setattr(weight, "data", torch.roll(weight.data, 1, 0)),
            lambda: bias.add_(1),
        ):
            CALLS[call](input, weight, bias)
            change()
            found = CALLS[call](input, weight, bias)
            assert torch.equal(found, anew(call, input, weight, bias))
        weight.data[0, 0, 0, 1].add_(1)  # which nobody looks at
        assert torch.equal(CALLS[call](input, weight, bias), found)


def test_follow_state_dicts_and_instruction_sets() -> None:
    layers = [fastseg.Conv2d(12, 20, 3, padding=1) for _ in range(2)]
    input = make(SHAPE)
    isas = fastseg._native._C.runnable_isas()
    with torch.no_grad():
        for isa in (*isas, *isas):  # a wider one needs more memory than was made for the first
            fastseg._native._C.select_isa(isa)
            layers[0].load_state_dict(layers[1].state_dict())
            layers[1].weight.neg_()
            found = layers[0](input)
            assert torch.equal(found, anew("conv2d", input, layers[0].weight, layers[0].bias))


@pytest.mark.parametrize("channels", [3, 12])  # 3: of conv_relu_pool2d, kernels that take no scale
@pytest.mark.parametrize("call", CALLS)
def test_scale_is_that_of_the_weights(call: str, channels: int, isa: str) -> None:
    input, weight, bias = (tensor[:, :channels] if tensor.ndim == 4 else tensor for tensor in tensors())
    scale = make((20,), seed=3)
    with torch.no_grad():
        expected = CALLS[call](input, weight * scale.view(-1, 1, 1, 1), bias)
        for _ in range(3):
            assert torch.equal(CALLS[call](input, weight, bias, scale=scale), expected)
        scale.mul_(2)
        expected = CALLS[call](input, weight * scale.view(-1, 1, 1, 1), bias)
        assert torch.equal(CALLS[call](input, weight, bias, scale=scale), expected)


@pytest.mark.parametrize("name", ["conv2d", "conv_relu_pool2d"])
def test_gradients_of_a_call_that_was_captured_for_predictions(name: str) -> None:
    input, weight, bias = (tensor.detach().double().requires_grad_() for tensor in tensors())
    scale = make((20,), torch.float64, seed=3)
    plain = torch.conv2d(input, weight * scale.view(-1, 1, 1, 1), bias, padding=1)
    if name == "conv2d":
        found = torch.ops.fastseg.conv2d(input, weight, bias, scale, [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 1, 0], True)
    else:
        numbers = [1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 0, 0, 1, 0]
        found = torch.ops.fastseg.conv_relu_pool2d(input, weight, bias, scale, numbers, False, False, True)[0]
        plain = torch.max_pool2d(plain.relu(), 2)
    for order in (1, 2):
        grads = [torch.autograd.grad((y**2).sum(), (input, weight, bias), create_graph=True) for y in (found, plain)]
        torch.testing.assert_close(*grads)
        found, plain = (sum((grad**2).sum() for grad in one) for one in grads)
        assert order == 2 or found.requires_grad


def test_nothing_is_kept_where_gradients_are_recorded_nor_of_passing_weights() -> None:
    input, weight, bias = tensors()
    for _ in range(3):
        functional.conv2d(input, weight, bias, padding=1).sum().backward()
        with torch.no_grad():
            functional.conv2d(input, weight * 2, bias, padding=1)
            functional.conv2d(input, weight[:, ::2].repeat(1, 2, 1, 1)[:, :12], bias, padding=1)
    assert fastseg.info()["kept_weights"] == 0


def test_what_is_kept_goes_with_its_weights() -> None:
    input, weight, bias = tensors()
    with torch.no_grad():
        for _ in range(2):
            functional.conv2d(input, weight, bias, padding=1)
    assert fastseg.info()["kept_weights"] > 0
    del weight
    gc.collect()
    assert fastseg.info()["kept_weights"] == 0


def test_compiled_predictions_keep_the_weights_beside_batch_normalisation() -> None:
    network = nn.Sequential(
        nn.Conv2d(12, 20, 3, padding=1), nn.BatchNorm2d(20), nn.ReLU(), nn.Conv2d(20, 20, 3, padding=1),
        nn.BatchNorm2d(20), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(20, 20, 3, padding=1), nn.BatchNorm2d(20),
    ).eval()  # fmt: skip
    for name, buffer in network.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 2)
    input = make((2, 12, 40, 44))
    compiled = torch.compile(network, backend="fastseg", options={"inner": "eager"})
    with torch.no_grad():
        for _ in range(3):
            truth = network.double()(input.double())
            network.float()
            assert_parity(compiled(input), network(input), truth)
            network[3].weight.mul_(1.25)
    weights = sum(network[index].weight.numel() * 4 for index in (0, 3, 7))
    report = fastseg.report(network)
    assert fastseg.info()["kept_weights"] == report.kept_bytes > 16 / 9 * weights
    assert f"{report.kept_bytes / 2**10:.1f} KiB of transformed weights kept" in report.summary()


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")  # sizes are fixed in it
def test_a_trace_is_the_same_with_and_without_gradients() -> None:
    layer = fastseg.ConvReLUPool2d(3, 8, 3, padding=1)
    images = torch.rand(2, 3, 16, 16)
    traced = torch.jit.trace(layer, (images,))  # which compares both graphs
    torch.testing.assert_close(traced(images), layer(images), rtol=0, atol=0)
