"""1x1 convolutions of upsampled maps come before the upsampling: what becomes of them, and what must stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastseg
from fastseg.testing import assert_parity, make, values_and_gradients
from tests.fusion.cases import compiled, operators

OUTPUTS = 32
PATTERN = "interpolate + [cat] + 1x1 conv2d"
FUSED: dict[str, Callable[..., Any]] = {}
STAYING: dict[str, Callable[..., Any]] = {}


def tensors(dtype: torch.dtype, layout: str) -> list[Tensor]:
    """Maps of 48, 32 and 40 channels, each of half the size of the one before; the weight of all, and a bias."""
    shapes = [(2, 48, 80, 96), (2, 32, 40, 48), (2, 40, 20, 24), (OUTPUTS, 120, 1, 1)]
    maps = [make(shape, dtype, seed=seed, layout=layout, requires_grad=True) for seed, shape in enumerate(shapes)]
    return [*maps, make((OUTPUTS,), dtype, seed=5, requires_grad=True)]


def fused(function: Callable[..., Any]) -> Callable[..., Any]:
    FUSED[function.__name__] = function
    return function


def stays(function: Callable[..., Any]) -> Callable[..., Any]:
    STAYING[function.__name__] = function
    return function


def up(input: Tensor, mode: str = "bilinear", **options: Any) -> Tensor:
    return F.interpolate(input, (80, 96), mode=mode, **options)


@fused
def head_of_segformer(a: Tensor, b: Tensor, c: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The largest map is resized, too, to its own size."""
    return F.relu(F.conv2d(torch.cat([up(c), up(b), up(a)], 1), weight, bias)).square()


@fused
def neighbours_of_one_size(a: Tensor, b: Tensor, c: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Beside a map that isn't upsampled; one convolution for both."""
    corners = {"mode": "bicubic", "align_corners": True}
    small = c.tanh(), F.max_pool2d(b, 2)
    return F.conv2d(torch.concat((a, *(up(part, **corners) for part in small)), dim=-3), weight, bias)


@fused
def one_map(a: Tensor, b: Tensor, c: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    convolved = F.conv2d(F.interpolate(b, scale_factor=3.3), weight[:, :32], bias + c.sum(), padding="same")
    return convolved * a.sum()


@fused
def one_of_them_used_elsewhere(a: Tensor, b: Tensor, c: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    other = up(b, mode="nearest-exact")
    return F.conv2d(torch.cat([up(c, antialias=True), a, other], 1), weight, bias), other.sin()


@stays
def more_outputs_than_channels(a: Tensor, b: Tensor, c: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv2d(torch.cat([up(b[:, :24]), a], 1), weight[:, :72])


@stays
def downsampled(a: Tensor, b: Tensor, c: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv2d(F.interpolate(a, (26, 37), mode="bilinear"), weight[:, :48])


@stays
def few_products(a: Tensor, b: Tensor, c: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv2d(F.interpolate(c, (40, 48), mode="bilinear"), weight[:, :40])


@stays
def more_taps(a: Tensor, b: Tensor, c: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv2d(up(b), weight[:, :96].reshape(OUTPUTS, 32, 1, 3), bias)


@stays
def strides(a: Tensor, b: Tensor, c: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv2d(F.interpolate(b, scale_factor=8), weight[:, :32], bias, stride=(1, 2))


@stays
def padded(a: Tensor, b: Tensor, c: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv2d(up(b), weight[:, :32], bias, padding=1)


@stays
def groups(a: Tensor, b: Tensor, c: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv2d(up(torch.cat([b, b], 1)), weight[:, :32], bias, groups=2)


@stays
def concatenated_below_each_other(a: Tensor, b: Tensor, c: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv2d(torch.cat([up(b), up(b.sin())], 2), weight[:, :32], bias)


@stays
def concatenation_used_elsewhere(a: Tensor, b: Tensor, c: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    maps = torch.cat([a, up(b), up(c)], 1)
    return F.conv2d(maps, weight, bias), maps.sin()


@stays
def under_autocast(a: Tensor, b: Tensor, c: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return F.conv2d(torch.cat([a, up(b), up(c)], 1), weight, bias)


def replaced(report: fastseg.fusion.Report) -> int:
    return sum(replacement.pattern == PATTERN for replacement in report.replaced)


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_the_same_values_and_gradients(name: str, layout: str) -> None:
    given = tensors(torch.float32, layout)
    function = compiled(FUSED[name], fullgraph=True)
    actual, plain = (values_and_gradients(f, given) for f in (function, FUSED[name]))
    truth = values_and_gradients(FUSED[name], given, torch.float64)
    assert replaced(fastseg.report(function)) == 1
    assert not fastseg.report(function).left
    assert_parity(actual, plain, truth, terms=4 * 80 * 96)


@pytest.mark.parametrize("frozen", [False, True])
def test_by_inductor_in_predictions(frozen: bool) -> None:
    given = [tensor.detach() for tensor in tensors(torch.float32, "channels_last")]
    torch._dynamo.reset()
    function = torch.compile(head_of_segformer, backend="fastseg", options={"freezing": frozen}, fullgraph=True)
    with torch.no_grad():
        actual, plain = function(*given), head_of_segformer(*given)
    assert replaced(fastseg.report(function)) == 1
    assert actual.stride() == plain.stride()
    assert_parity(actual, plain, head_of_segformer(*(tensor.double() for tensor in given)), terms=120)


def test_sizes_may_change() -> None:
    def function(small: Tensor, large: Tensor, weight: Tensor) -> Tensor:
        maps = (F.interpolate(map, large.shape[2:], mode="bilinear") for map in (small, large))
        return F.conv2d(torch.cat(list(maps), 1), weight)

    given = [tensor.detach() for tensor in tensors(torch.float32, "nchw")]
    dynamic, (a, b, _, weight, _) = compiled(function, dynamic=True), given
    for large in (a, a[..., :66], a[:1, :, :75].contiguous(), a[:, :, ::2, ::2]):
        arguments = b[: large.shape[0]], large, weight[:, :80]
        torch.testing.assert_close(dynamic(*arguments), function(*arguments))
    assert replaced(fastseg.report(dynamic)) > 0


@pytest.mark.parametrize("name", STAYING)
def test_stays(name: str) -> None:
    given = tensors(torch.float32, "nchw")
    function = compiled(STAYING[name], fullgraph=True)
    torch.testing.assert_close(function(*given), STAYING[name](*given))
    assert replaced(fastseg.report(function)) == 0


def test_the_concatenation_is_not_kept() -> None:
    function = compiled(head_of_segformer)
    function(*tensors(torch.float32, "nchw"))
    (replacement,) = (r for r in fastseg.report(function).replaced if r.pattern == PATTERN)
    assert replacement.saved_bytes == 4 * 2 * 120 * 80 * 96
    assert operators(fastseg.report(function)) == ["conv2d"]
