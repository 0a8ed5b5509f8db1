"""1x1 convolutions of upsampled maps come before the upsampling: what becomes of them, and what must stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._inductor.inductor_prims import force_stride_order
from torch.profiler import profile

import fastseg
from fastseg.fusion import Report
from fastseg.fusion.layouts import KeepLayouts
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


def projected(rows: Tensor, weight: Tensor, bias: Tensor | None = None, size: int = 40) -> Tensor:
    """A map of the size times 48, made by a linear layer as SegFormer makes it."""
    projection = F.linear(rows, weight, bias).transpose(1, 2)
    return projection.reshape(len(rows), -1, size, 48)


@fused
def linear_layers_before(a: Tensor, b: Tensor, c: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Of 8 channels and of 16; the last has no fewer products with the convolution's weight than without."""
    few, more = (b[:, :n].flatten(2).transpose(1, 2) for n in (8, 16))
    maps = projected(few, weight[:, :8, 0, 0], bias), projected(more, weight[:, 8:24, 0, 0])
    rows = F.adaptive_avg_pool2d(c, (4, 5)).flatten(2).mT
    small = F.linear(rows, weight[:, 24:64, 0, 0]).permute(0, 2, 1).view(2, OUTPUTS, 4, 5)
    return F.conv2d(torch.cat([*(up(part) for part in (*maps, small)), a[:, :24]], 1), weight, bias)


@fused
def rows_of_another_order(a: Tensor, b: Tensor, c: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """As many images as pixels: what looks like the map of a linear layer by its shape is none."""
    rows = F.linear(b[0, :8].reshape(8, 240, 8).permute(1, 2, 0)[:8], weight[:, :8, 0, 0])  # [8, 8, 32]
    map = rows.permute(1, 2, 0).reshape(8, OUTPUTS, 2, 4)
    upsampled = F.interpolate(map, (160, 192), mode="bilinear")
    return F.conv2d(upsampled, weight[:, :32], bias + a.sum() + c.sum())


@fused
def linear_layer_used_elsewhere(a: Tensor, b: Tensor, c: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    map = projected(b[:, :8].flatten(2).transpose(1, 2), weight[:, :8, 0, 0])
    return F.conv2d(torch.cat([up(map), a], 1), weight[:, :80], bias + c.sum()), map.sin()


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
    return F.conv2d(torch.cat([up(b), a], 1), torch.cat([weight[:, :80], weight[:, 40:]]))


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


def replaced(report: Report) -> int:
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


def test_linear_layers_and_the_convolution_are_one_product() -> None:
    function, given = compiled(linear_layers_before), tensors(torch.float32, "nchw")
    with torch.no_grad():
        function(*given)
        with profile(record_shapes=True) as events:
            function(*given)
    products = [event.input_shapes for event in events.events() if event.name == "aten::mm"]
    of_weights = [shapes for shapes in products if shapes[0] == [OUTPUTS, OUTPUTS]]
    assert of_weights == [[[OUTPUTS, OUTPUTS], [OUTPUTS, channels]] for channels in (8, 16)]


def test_upsampled_maps_lie_in_channels_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor would read and write them with steps of a pixel: one layout for the sum of two, and one for the next."""
    forced: list[list[Any]] = []
    keep = KeepLayouts.__call__

    def spy(self: KeepLayouts, graph: torch.fx.Graph) -> None:
        keep(self, graph)
        demands = graph.find_nodes(op="call_function", target=force_stride_order)
        forced.append([node.args[0].target for node in demands])

    monkeypatch.setattr(KeepLayouts, "__call__", spy)
    add, clone = torch.ops.aten.add.Tensor, torch.ops.aten.clone.default
    for layout, function, expected in (
        ("channels_last", head_of_segformer, [add]),
        ("channels_last", up, [clone]),
        ("nchw", head_of_segformer, []),
    ):
        given = [tensor.detach() for tensor in tensors(torch.float32, layout)]
        torch._dynamo.reset()
        given = given if function is head_of_segformer else given[:1]
        call = torch.compile(function, backend="fastseg", options={"fx_graph_cache": False}, fullgraph=True)
        truth = function(*(tensor.double() for tensor in given))
        assert_parity(call(*given), function(*given), truth, terms=120)
        assert forced.pop() == expected


def test_batches_of_any_size_and_inductor() -> None:
    def function(rows: Tensor, large: Tensor, inner: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(torch.cat([up(projected(rows, inner)), large], 1), weight)

    torch._dynamo.reset()
    dynamic = torch.compile(function, backend="fastseg", dynamic=True, fullgraph=True)
    for batch in (2, 3, 5):
        shapes = [(batch, 40 * 48, 8), (batch, 48, 80, 96), (32, 8), (OUTPUTS, 80, 1, 1)]
        given = [make(shape, seed=seed) for seed, shape in enumerate(shapes)]
        given[1] = given[1].contiguous(memory_format=torch.channels_last)
        truth = function(*(tensor.double() for tensor in given))
        assert_parity(dynamic(*given), function(*given), truth, terms=120)
    assert [replaced(Report([graph])) for graph in fastseg.report(dynamic).graphs] == [1]


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
