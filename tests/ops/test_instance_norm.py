"""instance_norm, to which the backend leads instance normalisation and the leaky ReLU that follows it."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from fastseg import reference
from fastseg.testing import MEMORY_FORMATS, assert_parity, lay_out, make, values_and_gradients
from tests.kernels.poison import fresh_memory_of_nan

EPS = 1e-5
SHAPES = {
    "blocks": (2, 32, 40, 41),  # of channels_last's pixels, and of planes with a rest
    "odd": (3, 5, 7, 9),  # channels without a vector, or with one for small vectors
    "wide": (2, 71, 6, 5),  # several vectors of channels, one, and single ones
    "large-planes": (1, 3, 150, 101),  # several blocks to a plane
    "column": (2, 12, 9, 1),
    "row": (2, 12, 1, 9),
    "volumes": (2, 9, 3, 8, 5),
    "long": (2, 6, 7),
}
each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
each_layout = pytest.mark.parametrize("layout", MEMORY_FORMATS)
each_slope = pytest.mark.parametrize("slope", [0.0, 0.1, 1.0])


def fused(input: Tensor, weight: Tensor | None, bias: Tensor | None, slope: float = 0.1) -> Tensor:
    return torch.ops.fastseg.instance_norm(input, weight, bias, EPS, slope)[0]


def plain(input: Tensor, weight: Tensor | None, bias: Tensor | None, slope: float = 0.1) -> Tensor:
    return reference.instance_norm(input, weight, bias, EPS, slope)


def tensors(shape: tuple[int, ...], layout: str = "nchw", dtype: torch.dtype = torch.float32) -> list[Tensor]:
    if len(shape) == 3:
        layout = "nchw"
    return [
        make(shape, dtype, seed=1, layout=layout, scale=2.0, requires_grad=True),
        make(shape[1:2], dtype, seed=2, requires_grad=True),
        make(shape[1:2], dtype, seed=3, requires_grad=True),
    ]


def assert_plain_parity(args: list[Any], slope: float = 0.1) -> None:
    input = args[0]
    truth = values_and_gradients(functools.partial(plain, slope=slope), args, torch.float64)
    expected = values_and_gradients(functools.partial(plain, slope=slope), args)
    found = values_and_gradients(functools.partial(fused, slope=slope), args)
    assert found[0].is_contiguous()  # as plain PyTorch's
    assert found[1].stride() == input.stride() or not input.is_contiguous()
    assert_parity(found, expected, truth, terms=input.numel() // input.shape[1])


@each_shape
@each_layout
@each_slope
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_parity(implementation: str, dtype: torch.dtype, slope: float, layout: str, shape: tuple[int, ...]) -> None:
    assert_plain_parity(tensors(shape, layout, dtype), slope)


@each_layout
def test_one_channel(isa: str, layout: str) -> None:
    """Without the parameters' gradients: one number, which may be much smaller than the terms that it is the sum of."""
    input, *affine = tensors((2, 1, 16, 15), layout)
    assert_plain_parity([input, *(tensor.detach() for tensor in affine)])


@each_layout
def test_without_weight_and_bias(isa: str, layout: str) -> None:
    input, weight, bias = tensors(SHAPES["odd"], layout)
    for args in ([input, None, None], [input, weight, None], [input, None, bias]):
        assert_plain_parity(args)


@each_layout
def test_far_from_zero(isa: str, layout: str) -> None:
    input, weight, bias = tensors((2, 16, 90, 60), layout)
    assert_plain_parity([(input.detach() + 1000).requires_grad_(), weight, bias])


@each_layout
@pytest.mark.parametrize("gradient", MEMORY_FORMATS)
def test_gradients_of_any_layout(isa: str, gradient: str, layout: str) -> None:
    args = tensors(SHAPES["blocks"], layout)
    incoming = make(SHAPES["blocks"], seed=4, layout=gradient)
    sparse = torch.repeat_interleave(incoming, 2, -1)[..., ::2]
    found = [torch.autograd.grad(fused(*args), args, each) for each in (incoming, sparse)]
    expected = torch.autograd.grad(plain(*args), args, incoming)
    for results in found:
        torch.testing.assert_close(results, expected, rtol=1e-4, atol=1e-4)


def test_strided_tensors() -> None:
    input, weight, bias = tensors((2, 12, 9, 14))
    assert_plain_parity([input.detach()[:, ::2, :, 1:-2].requires_grad_(), weight.detach()[::2], bias.detach()[6:]])
    assert_plain_parity([input.detach().transpose(2, 3).requires_grad_(), weight, bias])


@each_layout
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite(isa: str, value: float, layout: str) -> None:
    input, weight, bias = (tensor.detach() for tensor in tensors(SHAPES["odd"], layout))
    input[1, 2, 3, 4] = value
    found, expected = fused(input, weight, bias), plain(input, weight, bias)
    assert found[1, 2].isnan().all()
    torch.testing.assert_close(found, expected, equal_nan=True)


@each_layout
@pytest.mark.parametrize("shape", ["blocks", "wide", "volumes"])
def test_bits_are_those_of_one_thread(isa: str, shape: str, layout: str) -> None:
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 1, 2, 3):
            torch.set_num_threads(threads)
            results.append(values_and_gradients(fused, tensors(SHAPES[shape], layout)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for value, first in zip(other, results[0], strict=True):
            assert torch.equal(value, first)


@each_layout
@each_shape
def test_reads_nothing_that_it_did_not_write(isa: str, shape: tuple[int, ...], layout: str) -> None:
    args = tensors(shape, layout)
    expected = values_and_gradients(fused, args)
    with fresh_memory_of_nan():
        found = values_and_gradients(fused, args)
    for value, other in zip(found, expected, strict=True):
        assert torch.equal(value, other)


@each_slope
def test_gradients_of_gradients(slope: float) -> None:
    args = tensors((2, 3, 3, 2), dtype=torch.float64)
    function = functools.partial(fused, slope=slope)
    assert torch.autograd.gradcheck(function, args)
    assert torch.autograd.gradgradcheck(function, args, fast_mode=True)


@each_layout
@pytest.mark.parametrize("shape", ["odd", "column", "volumes"])
def test_opcheck(shape: str, layout: str) -> None:
    args = tensors(SHAPES[shape], layout)
    torch.library.opcheck(torch.ops.fastseg.instance_norm.default, (*args, EPS, 0.1))
    input, weight, bias = (tensor.detach() for tensor in args)
    statistics = torch.ops.fastseg.instance_norm(input, weight, bias, EPS, 0.1)[1]
    for incoming in MEMORY_FORMATS:
        gradient = lay_out(make(input.shape, seed=5), incoming)
        torch.library.opcheck(
            torch.ops.fastseg.instance_norm_backward.default, (gradient, input, statistics, weight, bias, 0.1)
        )


def test_descriptions_that_do_not_fit() -> None:
    from fastseg._native import _C, describe

    input, output, statistics = make((2, 4, 3, 5)), torch.empty(2, 4, 3, 5), torch.empty(2, 2, 4)

    def forward(*changed: Any) -> None:
        names = ("input", "weight", "bias", "statistics", "output")
        given: dict[str, Any] = {"input": input, "weight": None, "bias": None, "statistics": statistics}
        given |= {"output": output, **dict(changed)}
        _C.instance_norm_forward(tuple(describe(given[name]) for name in names), EPS, 1.0, 1)

    forward()
    for name, wrong in (
        ("output", torch.empty(2, 4, 3, 4)), ("output", torch.empty(2, 4, 3, 5).double()),
        ("output", lay_out(output, "channels_last")), ("input", input[..., ::2]), ("statistics", torch.empty(2, 4)),
        ("weight", torch.empty(3)), ("bias", torch.empty(8)[::2]), ("input", input[0, 0]), ("input", input.half()),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"maps|map|weight and bias|statistics|float32"):
            forward((name, wrong))
