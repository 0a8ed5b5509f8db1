"""relu_pool2d against plain PyTorch: values, gradients, memory, which calls are torch's own."""

import pytest
import torch
from torch import Tensor

import fastseg
from fastseg import _native, functional, reference
from fastseg.ops.convolution import algorithms
from fastseg.testing import MEMORY_FORMATS, assert_parity, make, values_and_gradients
from tests.ops.upsample_cases import peak_growth, slow_under_the_interpreter

pytestmark = pytest.mark.usefixtures("kernels_for_small_maps")

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Arguments, and why they are here.
OPTIONS = {
    "default": {},
    "stem": {"pool_size": 3, "pool_stride": 2, "pool_padding": 1},  # overlapping windows that start in the padding
    "indices-skip": {"return_indices": True, "return_skip": True},
    "overlap-skip": {"pool_size": 3, "pool_stride": 1, "pool_padding": 1, "return_skip": True},
    "ceil": {"pool_size": 3, "pool_stride": 2, "ceil_mode": True, "return_indices": True},  # a cut last window
    "gaps": {"pool_size": 2, "pool_stride": 3, "return_skip": True},  # rows and columns that no window holds
    "oblong": {"pool_size": (1, 3), "pool_stride": (2, 3), "pool_padding": (0, 1)},
    "rows-overlap": {"pool_size": 3, "pool_stride": (2, 4), "return_skip": True},
    "one-position": {"pool_size": 1},
    "far-apart": {"pool_size": 2, "pool_stride": (9, 2**31 - 1), "return_skip": True},
}

# Odd sizes; channels that fill no vector, a whole block, and more than one.
SHAPES = {"few": (2, 5, 13, 18), "one": (1, 1, 12, 33), "blocks": (1, 37, 11, 9), "whole": (2, 16, 8, 7)}


def check(input: Tensor, **options: object) -> list[Tensor]:
    actual, plain = (values_and_gradients(module.relu_pool2d, [input], **options) for module in (functional, reference))
    truth = values_and_gradients(reference.relu_pool2d, [input], torch.float64, **options)
    assert_parity(actual, plain, truth)
    for mine, theirs in zip(actual[:-1], plain[:-1], strict=True):  # all but the gradient, which may be a sum
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)
    return actual


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("options", [
    pytest.param(options, id=name, marks=pytest.mark.full if _native.INTERPRETED and name == "far-apart" else ())
    for name, options in OPTIONS.items()
])  # fmt: skip
def test_parity(isa: str, options: dict, dtype: torch.dtype, layout: str, shape: tuple[int, ...]) -> None:
    results = check(make(shape, dtype, layout=layout, requires_grad=True), **options)
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    kept = results[0], *([results[-2]] if options.get("return_skip") else []), results[-1]
    assert all(tensor.is_contiguous(memory_format=memory_format) for tensor in kept)


@pytest.mark.parametrize("name", ["default", "gaps", "one-position"])
def test_gradients_are_exact_where_windows_do_not_overlap(name: str) -> None:
    results = (values_and_gradients(m.relu_pool2d, [make(SHAPES["few"], requires_grad=True)], **OPTIONS[name])
               for m in (functional, reference))  # fmt: skip
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("which", [(0,), (1,), (0, 1)], ids=["pooled", "skip", "both"])
@pytest.mark.parametrize("expanded", [False, True])
def test_incoming_gradients(which: tuple[int, ...], expanded: bool) -> None:
    """Of one output alone, or of both; as sum() makes them, and with other strides than the outputs."""
    gradients = []
    for module in (functional, reference):
        leaf = make(SHAPES["few"], torch.float64, requires_grad=True)
        outputs = [module.relu_pool2d(leaf, return_skip=True)[at] for at in which]
        if expanded:
            given = [torch.ones((), dtype=torch.float64).expand_as(output) for output in outputs]
        else:
            given = [make(o.shape, torch.float64).transpose(1, 3).contiguous().transpose(1, 3) for o in outputs]
        gradients.append(torch.autograd.grad(outputs, leaf, given)[0])
    torch.testing.assert_close(*gradients)


# The smallest shapes that backward cuts into pieces, on each of its ways.
PIECES = {
    "planes": ((2, 3, 5, 6), torch.float32, "nchw"),  # a channel each, summed where it lies
    "planes-of-halves": ((1, 2, 131, 512), torch.bfloat16, "nchw"),  # 65 rows and a window are held in float32
    "bands": ((1, 16, 13, 512), torch.float32, "channels_last"),  # of 4 rows, summed where they lie: whole vectors
    "bands-of-float64": ((1, 16, 7, 512), torch.float64, "channels_last"),  # of 2 rows
    "bands-packed": ((1, 3, 13, 512), torch.float32, "channels_last"),  # channels that fill no vector: of 2 to 8 rows
    "bands-of-halves": ((1, 37, 13, 512), torch.bfloat16, "channels_last"),  # packed too, blocks of channels
}


@slow_under_the_interpreter
@pytest.mark.parametrize("name", ["default", "overlap-skip", "rows-overlap", "one-position"])
@pytest.mark.parametrize(("shape", "dtype", "layout"), PIECES.values(), ids=PIECES)
def test_gradients_in_pieces(isa: str, shape: tuple[int, ...], dtype: torch.dtype, layout: str, name: str) -> None:
    check(make(shape, dtype, layout=layout, requires_grad=True), **OPTIONS[name])


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_ties_of_half_types_are_rounded_to_even(isa: str, dtype: torch.dtype, layout: str) -> None:
    if _native.INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter cuts bfloat16 where a GPU rounds it")
    # Two windows share each peak. Half a unit is added to numbers whose last bit is 0 and 1: both ways from a tie.
    unit = torch.finfo(dtype).eps
    numbers = 1 + unit * torch.arange(16).view(1, 16, 1, 1)
    numbers = torch.cat((numbers, -numbers), 2)
    incoming = torch.cat((numbers, numbers.sign() * unit / 2), 3).to(dtype)
    input = torch.tensor([0.0, 1.0, 0.0]).repeat(1, 16, 2, 1).to(dtype, memory_format=MEMORY_FORMATS[layout])
    output = functional.relu_pool2d(input.requires_grad_(), (1, 2), 1)
    gradient = torch.autograd.grad(output, input, incoming.contiguous(memory_format=MEMORY_FORMATS[layout]))[0]
    assert torch.equal(gradient[..., 1], incoming.double().sum(3).to(dtype))


NAN, INF = float("nan"), float("inf")
MAPS = {
    "ties": torch.ones(6, 6),
    "cut-by-relu": -torch.ones(6, 6),
    "zeros": torch.zeros(6, 6),
    "one-nan": torch.ones(6, 6).index_put((torch.tensor(2), torch.tensor(3)), torch.tensor(NAN)),
    "nan-after-larger": torch.arange(36.0).flip(0).view(6, 6).index_fill(1, torch.tensor([3]), NAN),
    "nan-among-negatives": -torch.arange(36.0).view(6, 6).index_fill(1, torch.tensor([2]), NAN),
    "infinities": torch.tensor([INF, -INF, 1.0]).repeat(12).view(6, 6),
    "all-negative-infinity": torch.full((6, 6), -INF),
}


@pytest.mark.parametrize("skip", [False, True], ids=["pooled", "with-skip"])
@pytest.mark.parametrize("window", [(2, 2, 0), (3, 2, 1), (2, 1, 1)], ids=["2x2", "3x3-stride-2", "2x2-stride-1"])
@pytest.mark.parametrize("map", MAPS.values(), ids=MAPS)
def test_window_maximum(isa: str, map: Tensor, window: tuple[int, int, int], skip: bool) -> None:
    leaf = map[None, None].clone().requires_grad_()
    check(leaf, pool_size=window[0], pool_stride=window[1], pool_padding=window[2], return_indices=True,
          return_skip=skip)  # fmt: skip


def test_large_window_takes_plain_pytorch_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    _native.log_fallback.cache_clear()
    check(make((1, 2, 33, 40), requires_grad=True), pool_size=16, return_indices=True, return_skip=True)
    assert "relu_pool2d runs as plain PyTorch: a pool window of more than 255 positions" in caplog.text


@pytest.mark.skipif(_native.INTERPRETED, reason="the Triton kernels run here, whatever the size")
@pytest.mark.parametrize(("rows", "layout", "plain"), [
    (32, "nchw", True), (33, "nchw", False), (40, "channels_last", True), (41, "channels_last", False),
])  # fmt: skip
def test_small_maps_are_torchs_own(rows: int, layout: str, plain: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(algorithms, "PLAIN_POOL_MAX_VALUES", 16 * 32 * 32)
    monkeypatch.setattr(algorithms, "PLAIN_POOL_MAX_VALUES_CHANNELS_LAST", 16 * 40 * 32)
    output = functional.relu_pool2d(make((1, 16, rows, 32), layout=layout, requires_grad=True))
    assert ("MaxPool2D" in type(output.grad_fn).__name__) == (plain and output.is_cpu)  # a GPU has no small maps
    check(make((1, 16, rows, 32), requires_grad=True), return_skip=True, return_indices=True)


# ---- memory, determinism, graphs ----


BANDS = {"overlap": (3, 2, 1), "windows": (2, 2, 0), "gaps": (2, 700, 0), "tall": (255, 3, 100)}


@slow_under_the_interpreter
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("pool", BANDS.values(), ids=BANDS)
def test_planes_of_half_types_that_are_summed_piece_by_piece(
    pool: tuple[int, int, int], layout: str, skip: bool
) -> None:
    input = make(
        (1, 2, 1501, 70), torch.bfloat16, layout=layout, requires_grad=True
    )  # a piece is 468 rows and a window
    size, stride, padding = ((number, least) for number, least in zip(pool, (1, 1, 0), strict=True))
    check(input, pool_size=size, pool_stride=stride, pool_padding=padding, return_skip=skip)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("stride", [2, 1000])
def test_a_threads_memory_does_not_grow_with_the_plane(stride: int, layout: str) -> None:
    if _native.INTERPRETED or torch.get_default_device().type != "cpu":
        pytest.skip("threads that keep memory are the C++ kernels'")
    input = make((1, 1, 8192, 1024), torch.bfloat16, layout=layout, requires_grad=True)
    output = functional.relu_pool2d(input, 2, stride)
    incoming = torch.ones_like(output)
    grown = peak_growth(lambda: torch.autograd.grad(output, input, incoming, retain_graph=True))
    assert grown < input.nbytes + (8 << 20)  # a plane in float32 has 32 MB


# ---- layer and errors ----


def test_layer() -> None:
    input, pool = make(SHAPES["few"]), torch.nn.MaxPool2d(3, 2, 1, ceil_mode=True)
    layer = fastseg.ReLUPool2d(3, 2, 1, True, return_skip=True)
    output, skip = layer(input)
    torch.testing.assert_close(output, pool(input.relu()), rtol=0, atol=0)
    assert torch.equal(skip, input.relu())
    assert repr(layer) == "ReLUPool2d(pool_size=3, pool_stride=2, pool_padding=1, ceil_mode=True, return_skip=True)"
