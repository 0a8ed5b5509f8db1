"""conv_relu_pool2d against plain PyTorch: values and gradients, by the direct and the library's algorithm and with
every instruction set. Winograd's: test_conv_relu_pool2d_winograd.py.
"""

import pytest
import torch
from torch import Tensor

from fastseg import _native, _triton, functional, reference
from fastseg._tf32 import convolutions_take_tf32
from fastseg.ops import conv_relu_pool2d as operator
from fastseg.ops.convolution import algorithms
from fastseg.ops.convolution.geometry import Geometry, flatten, resolve
from fastseg.testing import TF32_EPS, assert_parity, make, values_and_gradients

ALGORITHMS = ("direct", "library")
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SKIP = {"return_indices": True, "return_skip": True}
STEM = {"stride": 2, "padding": 3, "pool_size": 3, "pool_stride": 2, "pool_padding": 1}

# Arguments, and why they are here.
OPTIONS = {
    "default": {},
    "padded": {"padding": 1},
    "stem": STEM,  # overlapping windows that start in the pool's padding
    "same": {"padding": "same"},
    "valid-indices": {"padding": "valid", "return_indices": True},
    "indices-skip": {"padding": 1, "return_indices": True, "return_skip": True},
    "overlap-skip": {"pool_size": 3, "pool_stride": 1, "pool_padding": 1, "return_skip": True},
    "dilated": {"dilation": (2, 1), "padding": (2, 1)},
    "ceil": {"pool_size": 3, "pool_stride": 2, "ceil_mode": True, "return_indices": True},  # a cut last window
    "ceil-padded": {"pool_size": 2, "pool_padding": 1, "ceil_mode": True, "return_indices": True},
    "gaps": {"pool_size": 2, "pool_stride": (3, 4), "return_skip": True},  # rows and columns that no window holds
    "oblong": {"stride": (2, 1), "padding": (0, 2), "pool_size": (1, 3), "pool_stride": (3, 2)},
    "pool-1": {"pool_size": 1},  # ReLU alone
    "pool-tall": {"pool_size": (5, 1), "pool_stride": (1, 2)},  # taller than the stride: rows are reused
}

# N, C, H, W, K, kernel height, kernel width. Odd sizes; channels that fill neither a vector nor a block of two.
SHAPES = {
    "rgb": (2, 3, 17, 19, 20, 3, 3),
    "one-channel": (1, 1, 12, 33, 1, 5, 3),
    "blocks": (1, 5, 13, 16, 37, 4, 2),  # even kernels make "same" asymmetric
}


@pytest.fixture(params=ALGORITHMS)
def algorithm(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Serves calls by one algorithm both ways; those that the direct one can't serve go to the library all the same."""

    def choose(input: Tensor, weight: Tensor, geometry: Geometry, with_skip: bool, *rest: bool, **others: bool) -> str:
        return "library" if geometry.groups > 1 or with_skip else request.param

    def choose_gpu(weight: Tensor, geometry: Geometry, with_skip: bool) -> str:
        not_direct = with_skip or weight.dtype == torch.float64 or geometry.windows_overlap
        return choose(weight, weight, geometry, not_direct)

    monkeypatch.setattr(algorithms, "choose_cpu_forward", choose)
    monkeypatch.setattr(algorithms, "choose_cpu_backward", choose)
    monkeypatch.setattr(algorithms, "choose_gpu_backward", choose_gpu)
    return request.param


def tensors(shape: tuple[int, ...], dtype: torch.dtype, layout: str = "nchw", bias: bool = True) -> list[Tensor | None]:
    n, c, h, w, k, kernel_h, kernel_w = shape
    scale = (c * kernel_h * kernel_w) ** -0.5
    return [
        make((n, c, h, w), dtype, layout=layout, requires_grad=True),
        make((k, c, kernel_h, kernel_w), dtype, seed=1, scale=scale, requires_grad=True),
        make((k,), dtype, seed=2, scale=0.1, requires_grad=True) if bias else None,
    ]


def takes_tf32(tensor: Tensor) -> bool:
    return tensor.is_cuda and tensor.dtype == torch.float32 and convolutions_take_tf32()


def representable(tensor: Tensor | None) -> Tensor | None:
    """Rounded to TF32 where convolutions may: then none of them rounds a factor, and windows' maxima stay the same."""
    if tensor is None or not takes_tf32(tensor):
        return tensor
    bits = tensor.detach().view(torch.int32)
    return ((bits + 2**12) & -(2**13)).view(torch.float32).requires_grad_(tensor.requires_grad)


def assert_conv_parity(*results: list[Tensor], outputs: int, terms: int) -> None:
    """`assert_parity` of outputs, whose factors are `representable`, and gradients, of which TF32 cuts one factor."""
    assert_parity(*(tensors[:outputs] for tensors in results), terms=terms)
    eps = TF32_EPS if takes_tf32(results[0][0]) else None
    assert_parity(*(tensors[outputs:] for tensors in results), terms=terms, eps=eps)


def check(arguments: list[Tensor | None], **options: object) -> list[Tensor]:
    arguments = [representable(tensor) for tensor in arguments]
    actual = values_and_gradients(functional.conv_relu_pool2d, arguments, **options)
    plain = values_and_gradients(reference.conv_relu_pool2d, arguments, **options)
    truth = values_and_gradients(reference.conv_relu_pool2d, arguments, torch.float64, **options)
    input, weight = arguments[0], arguments[1]
    outputs = 1 + bool(options.get("return_indices")) + bool(options.get("return_skip"))
    if options.get("return_indices") and (input.is_cuda or actual[0].dtype in (torch.bfloat16, torch.float16)):
        # Plain PyTorch rounds the map before it looks for the maximum, fastseg doesn't: they may choose differently
        # among values that round to one, as on a GPU where a library adds in another order. So what stands at the
        # indices is compared, not the indices.
        map = reference.conv_relu_pool2d(*(t if t is None else t.double() for t in arguments), **options | SKIP)[2]
        for results in (actual, plain, truth):
            results[1] = map.flatten(-2).gather(-1, results[1].flatten(-2)).to(results[0].dtype)
    # The longest sum: a weight's gradient runs over all pixels, a value over the kernel's taps.
    terms = max(input[:, 0].numel(), weight[0].numel(), weight[:, 0].numel())
    assert_conv_parity(actual, plain, truth, outputs=outputs, terms=terms)
    return actual


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_parity(
    algorithm: str, isa: str, options: dict, dtype: torch.dtype, layout: str, shape: tuple[int, ...]
) -> None:
    check(tensors(shape, dtype, layout), **options)


# The direct backward cuts patches into chunks, channels into groups and images into bands; shape, options, and what
# they cut.
PIECES = {
    "channel-blocks": ((2, 40, 13, 15, 70, 5, 5), {"padding": 2}),  # and 70 output channels: two groups
    "uneven-blocks": ((1, 37, 12, 11, 3, 3, 3), {"padding": 1}),  # a last block that is no whole vector
    "dilated-blocks": ((1, 37, 17, 20, 9, 3, 3), {"dilation": (2, 3), "padding": 3}),  # columns by phase
    "strided-blocks": ((2, 100, 11, 12, 130, 3, 3), STEM),
    "wide-kernel": ((1, 5, 6, 47, 6, 2, 27), {"padding": (1, 4)}),  # a chunk longer than the registers
    "dilated-folded": ((1, 2, 15, 16, 5, 4, 3), {"dilation": (3, 2), "padding": 4}),
    "bands": ((1, 64, 150, 9, 8, 3, 3), {"padding": 1}),
    "bands-that-share-much": (
        (1, 48, 180, 8, 5, 5, 2),
        {"dilation": 2, "padding": 2, "pool_size": 3, "pool_stride": (1, 2)},
    ),
    "bands-with-gaps": ((2, 64, 120, 21, 3, 1, 1), {"stride": 2, "pool_size": 1, "pool_stride": (3, 2)}),
    "bands-folded": ((1, 3, 50, 700, 4, 3, 3), {"padding": 1, "pool_size": 3, "pool_stride": (3, 2)}),
}


@pytest.mark.parametrize(("shape", "options"), PIECES.values(), ids=PIECES)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_patches_cut_into_pieces(
    monkeypatch: pytest.MonkeyPatch, isa: str, shape: tuple[int, ...], options: dict, dtype: torch.dtype, layout: str
) -> None:
    monkeypatch.setattr(algorithms, "choose_cpu_backward", lambda *_: "direct")
    check(tensors(shape, dtype, layout), **options)


def test_infinite_gradient_stays_in_its_patch(algorithm: str, isa: str) -> None:
    arguments = tensors((1, 5, 13, 16, 37, 3, 3), torch.float64)  # 15 taps in a row: vectors reach over its end
    device, dtypes = arguments[0].device, (torch.float32, torch.float64)
    if device.type == "cuda":
        if algorithm == "library":
            pytest.skip("cuDNN's algorithms may spread it")
        dtypes = (torch.float32,)  # float64 is the library's

    def finite(function: object, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
        leaves = [t.detach().to(device, dtype).requires_grad_() for t in arguments]
        output = function(*leaves)
        incoming = torch.ones_like(output)
        incoming[0, 7, 2, 3] = torch.inf
        return [gradient.isfinite().cpu() for gradient in torch.autograd.grad(output, leaves, incoming)]

    for dtype in dtypes:
        expected = finite(reference.conv_relu_pool2d, torch.float64, torch.device("cpu"))
        assert not all(mask.all() for mask in expected)
        for actual, mask in zip(finite(functional.conv_relu_pool2d, dtype, device), expected, strict=True):
            assert torch.equal(actual, mask)


@pytest.mark.parametrize("groups", [2, 6])
def test_groups_and_no_bias(groups: int) -> None:
    weight = make((12, 6 // groups, 3, 3), seed=1, requires_grad=True)
    check([make((2, 6, 11, 12), requires_grad=True), weight, None], groups=groups, dilation=2, padding=2)


@pytest.mark.parametrize(
    "wanted", [(True, False, False), (False, True, False), (False, False, True), (True, True, True)]
)
def test_gradients_only_where_needed(algorithm: str, wanted: tuple[bool, ...]) -> None:
    arguments = [t.requires_grad_(w) for t, w in zip(tensors(SHAPES["rgb"], torch.float32), wanted, strict=True)]
    check(arguments, padding=1)


def test_unbatched(algorithm: str) -> None:
    arguments = tensors(SHAPES["rgb"], torch.float32)
    arguments[0] = arguments[0].detach()[0].requires_grad_()
    check(arguments, padding=1, return_indices=True, return_skip=True)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_output_layout_follows_input(algorithm: str, layout: str) -> None:
    arguments = tensors((2, 3, 8, 8, 4, 3, 3), torch.float32, layout)
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    outputs = functional.conv_relu_pool2d(*arguments, padding=1, return_skip=True)
    gradient = torch.autograd.grad(outputs[0].sum() + outputs[1].sum(), arguments[0])[0]
    for tensor in (*outputs, functional.conv_relu_pool2d(*arguments), gradient):
        assert tensor.is_contiguous(memory_format=memory_format)


def test_gradient_of_skip_alone() -> None:
    arguments = tensors(SHAPES["rgb"], torch.float64)
    actual = torch.autograd.grad(functional.conv_relu_pool2d(*arguments, return_skip=True)[1].square().sum(), arguments)
    plain = torch.autograd.grad(reference.conv_relu_pool2d(*arguments, return_skip=True)[1].square().sum(), arguments)
    torch.testing.assert_close(actual, plain)


# ---- the pool's hard cases, on an identity convolution so that the map is known ----


MAPS = {
    "ties": torch.ones(6, 6),
    "cut-by-relu": -torch.ones(6, 6),
    "zeros": torch.zeros(6, 6),
    "negative-zero": torch.full((6, 6), -0.0),
    "one-nan": torch.ones(6, 6).index_put((torch.tensor(2), torch.tensor(3)), torch.tensor(float("nan"))),
    "nan-after-larger": torch.arange(36.0).flip(0).view(6, 6).index_fill(1, torch.tensor([3]), float("nan")),
    "all-nan": torch.full((6, 6), float("nan")),
    "below-float32": torch.full((6, 6), 1e-60, dtype=torch.float64),  # above zero all the same
    "infinities": torch.tensor([float("inf"), -float("inf"), 1.0]).repeat(12).view(6, 6),
    "all-negative-infinity": torch.full((6, 6), -float("inf")),
}


@pytest.mark.parametrize("window", [(2, 2, 0), (3, 2, 1), (2, 1, 1)], ids=["2x2", "3x3-stride-2", "2x2-stride-1"])
@pytest.mark.parametrize("map", MAPS.values(), ids=MAPS)
def test_window_maximum(algorithm: str, isa: str, map: Tensor, window: tuple[int, int, int]) -> None:
    size, stride, padding = window
    leaf = map[None, None].clone().requires_grad_()
    identity = torch.ones(1, 1, 1, 1, dtype=map.dtype)
    options = {"pool_size": size, "pool_stride": stride, "pool_padding": padding, "return_indices": True}
    check([leaf, identity, None], **options)
    indices = (module.conv_relu_pool2d(leaf, identity, **options)[1] for module in (functional, reference))
    assert torch.equal(*indices)


def test_large_window_takes_plain_pytorch_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    _native.log_fallback.cache_clear()
    check([make((1, 1, 33, 40), requires_grad=True), make((2, 1, 2, 2), requires_grad=True), None], pool_size=16)
    assert "more than 255 positions" in caplog.text


def test_largest_window_of_the_kernels(algorithm: str) -> None:
    check([make((1, 1, 20, 36), requires_grad=True), make((9, 1, 2, 2), seed=1, requires_grad=True), None],
          pool_size=(15, 17), pool_stride=(2, 9), return_indices=True)  # fmt: skip


# ---- determinism, memory, graphs ----


# ---- torch's machinery ----


def test_compiled_gradient_without_a_skip_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    seen = []
    backward_plain = operator.backward_plain

    def backward(grad_output: Tensor, grad_skip: Tensor | None, *rest: object) -> tuple[Tensor, ...]:
        seen.append(grad_skip)
        return backward_plain(grad_output, grad_skip, *rest)

    for kernels in ("native", "_triton.kernels"):
        monkeypatch.setattr(f"fastseg.ops.conv_relu_pool2d.{kernels}", lambda *name: None)
    monkeypatch.setattr(operator, "backward_plain", backward)
    compiled = torch.compile(functional.conv_relu_pool2d, fullgraph=True, backend="aot_eager")
    values_and_gradients(compiled, tensors(SHAPES["rgb"], torch.float32), padding=1)
    assert seen
    assert all(grad_skip is None for grad_skip in seen)  # else the direct kernels would not serve compiled networks


def test_autocast_of_the_bare_operator() -> None:
    geometry = flatten(resolve((3, 3), 1, 1, 1, 1, 2, None, 0, False)[0])
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        output, _, _ = torch.ops.fastseg.conv_relu_pool2d(
            *tensors(SHAPES["rgb"], torch.float32), None, geometry, False, False, False
        )
    assert output.dtype == torch.bfloat16


@pytest.mark.skipif(
    not _native.INTERPRETED and torch.get_default_device().type == "cpu",
    reason="a kernel of GPUs",
)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("channels", [1, 3, 37])
def test_copies_in_either_memory_format(channels: int, dtype: torch.dtype) -> None:
    layouts = _triton.kernels("conv_relu_pool2d", "layouts")
    dense = torch.randint(0, 255, (2, channels, 9, 20)).to(dtype)
    whole = dense, dense.contiguous(memory_format=torch.channels_last)
    for map in (*whole, *(map[:, :, 1:-1, ::2] for map in whole), dense[:, :, :1].expand(dense.shape), dense[:0]):
        for memory_format in (torch.contiguous_format, torch.channels_last):
            copy = layouts.relaid(map, memory_format)
            assert torch.equal(copy, map)
            assert copy.is_contiguous(memory_format=memory_format)
