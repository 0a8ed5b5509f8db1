"""conv_relu_pool2d under torch's machinery: opcheck, compile, export, tracing, fake tensors, autocast, checkpoint."""

import copy

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import fastseg
from fastseg import _native, functional, reference
from fastseg.ops import conv_relu_pool2d as operator
from fastseg.ops.convolution.algorithms import choose_cpu_forward
from fastseg.ops.convolution.geometry import flatten, resolve, unflatten
from fastseg.testing import assert_parity, make, values_and_gradients

GEOMETRY = flatten(resolve((3, 3), 1, 1, 1, 1, 2, None, 0, False)[0])
# Images and input channels with which a 3x3 kernel is served by each algorithm forward.
ALGORITHMS = {"winograd": (2, 3), "direct": (1, 3), "library": (1, 66)}


def arguments(images: int = 2, channels: int = 3, layout: str = "nchw", **options: object) -> list[Tensor]:
    return [
        make((images, channels, 10, 12), layout=layout, **options),
        make((8, channels, 3, 3), seed=1, scale=0.2, **options),
        make((8,), seed=2, **options),
    ]


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("with_skip", [False, True], ids=["pooled", "with-skip"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_opcheck(algorithm: str, with_skip: bool, layout: str) -> None:
    input, weight, bias = arguments(*ALGORITHMS[algorithm], layout)
    assert choose_cpu_forward(input, weight, unflatten(tuple(GEOMETRY)), False) == algorithm
    forward = torch.ops.fastseg.conv_relu_pool2d
    torch.library.opcheck(forward.default, (input, weight, bias, GEOMETRY, True, with_skip))
    torch.library.opcheck(forward.default, (input.transpose(2, 3), weight, None, GEOMETRY, False, with_skip))
    output, positions, skip = forward(input, weight, bias, GEOMETRY, True, with_skip)
    for needs in ([True, True, True], [False, True, False]):
        skips = (torch.randn_like(skip), skip) if with_skip else (None, None)
        torch.library.opcheck(
            torch.ops.fastseg.conv_relu_pool2d_backward.default,
            (torch.randn_like(output), skips[0], input, weight, positions, skips[1], GEOMETRY, needs),
        )


def compiled_and_plain(
    options: dict, backend: str, input: Tensor, weight: Tensor, bias: Tensor, compiled: object = None
) -> None:
    function = compiled or torch.compile(functional.conv_relu_pool2d, fullgraph=True, backend=backend)
    tensors = [input, weight, bias]
    assert_parity(
        values_and_gradients(function, tensors, **options),
        values_and_gradients(reference.conv_relu_pool2d, tensors, **options),
        values_and_gradients(reference.conv_relu_pool2d, tensors, torch.float64, **options),
        terms=input[:, 0].numel(),
    )


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("options", [{"padding": 1}, {"padding": "same", "return_indices": True, "return_skip": True}],
                         ids=["plain", "indices-skip"])  # fmt: skip
def test_compile(backend: str, options: dict) -> None:
    torch.compiler.reset()
    compiled_and_plain(options, backend, *arguments(requires_grad=True))


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
    compiled_and_plain({"padding": 1}, "aot_eager", *arguments(requires_grad=True))
    assert seen
    assert all(grad_skip is None for grad_skip in seen)  # else the direct kernels would not serve compiled networks


def test_compile_dynamic_sizes_without_recompiling() -> None:
    torch.compiler.reset()
    compiled = torch.compile(functional.conv_relu_pool2d, fullgraph=True, backend="aot_eager", dynamic=True)
    _, weight, bias = arguments(requires_grad=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for shape in ((2, 3, 10, 12), (3, 3, 14, 9), (5, 3, 21, 33)):
            compiled_and_plain({"padding": 1}, "", make(shape, requires_grad=True), weight, bias, compiled)


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
def test_export(strict: bool) -> None:
    layer = fastseg.ConvReLUPool2d(3, 8, 3, padding="same").eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(layer, (make((2, 3, 10, 12)),), dynamic_shapes={"input": {0: batch}}, strict=strict)
    input = make((5, 3, 10, 12), seed=3)
    torch.testing.assert_close(program.module()(input), layer(input), rtol=0, atol=0)


def test_make_fx_records_the_operator() -> None:
    input, weight, bias = arguments(requires_grad=True)

    def gradient(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.autograd.grad(functional.conv_relu_pool2d(input, weight, bias).sum(), weight)[0]

    graph = make_fx(gradient)(input, weight, bias)
    assert {"conv_relu_pool2d", "conv_relu_pool2d_backward"} <= {
        node.target._opname for node in graph.graph.nodes if hasattr(node.target, "_opname")
    }
    other = make(weight.shape, seed=9, requires_grad=True)
    torch.testing.assert_close(graph(input, other, bias), gradient(input, other, bias), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["fake", "meta"])
def test_tensors_without_memory(kind: str) -> None:
    with FakeTensorMode() if kind == "fake" else torch.device("meta"):
        leaves = [torch.empty(s, requires_grad=True) for s in ((2, 3, 10, 12), (8, 3, 3, 3), (8,))]
        output, skip = functional.conv_relu_pool2d(*leaves, return_skip=True)
        gradients = torch.autograd.grad(output.sum() + skip.sum(), leaves)
    assert output.shape == (2, 8, 4, 5)
    assert skip.shape == (2, 8, 8, 10)
    assert [g.shape for g in gradients] == [leaf.shape for leaf in leaves]


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint(reentrant: bool) -> None:
    leaves = arguments(requires_grad=True)
    expected = torch.autograd.grad(functional.conv_relu_pool2d(*leaves).sum(), leaves)
    torch.utils.checkpoint.checkpoint(functional.conv_relu_pool2d, *leaves, use_reentrant=reentrant).sum().backward()
    torch.testing.assert_close([leaf.grad for leaf in leaves], list(expected), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_autocast(dtype: torch.dtype, algorithm: str) -> None:
    leaves = arguments(*ALGORITHMS[algorithm], requires_grad=True)

    def under_autocast(function: object, enabled: bool = True) -> object:
        def call(*tensors: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype, enabled=enabled):
                return function(*tensors, padding=1)

        return call

    actual = values_and_gradients(under_autocast(functional.conv_relu_pool2d), leaves)
    plain = values_and_gradients(under_autocast(reference.conv_relu_pool2d), leaves)
    rounded = [leaf.detach().to(dtype).float().requires_grad_() for leaf in leaves]
    truth = values_and_gradients(reference.conv_relu_pool2d, rounded, torch.float64, padding=1)
    assert actual[0].dtype == dtype
    # Gradients come back in float32 but were computed in `dtype`: plain PyTorch's own error is the measure.
    assert_parity(actual, plain, truth, terms=leaves[0][:, 0].numel())
    off = under_autocast(functional.conv_relu_pool2d, enabled=False)
    torch.testing.assert_close(off(*leaves), functional.conv_relu_pool2d(*leaves, padding=1), rtol=0, atol=0)


def test_autocast_of_the_bare_operator() -> None:
    input, weight, bias = arguments()
    with torch.autocast("cpu", torch.bfloat16):
        output, _, _ = torch.ops.fastseg.conv_relu_pool2d(input, weight, bias, GEOMETRY, False, False)
    assert output.dtype == torch.bfloat16


def test_deepcopy_and_pickle_keep_the_layer() -> None:
    layer = fastseg.ConvReLUPool2d(3, 8, 3, pool_size=3, pool_stride=2)
    input = make((1, 3, 12, 12))
    torch.testing.assert_close(copy.deepcopy(layer)(input), layer(input), rtol=0, atol=0)


class Chain(nn.Module):
    """A layer amid others, whose inputs and gradients come from torch's own operators."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 1), fastseg.ConvReLUPool2d(8, 8, 3, padding=1), nn.Conv2d(8, 2, 1))

    def forward(self, input: Tensor) -> Tensor:
        return self.layers(input).mean()


def test_compiled_chain_gives_the_eager_gradients() -> None:
    torch.compiler.reset()
    torch.manual_seed(0)
    model = Chain()
    twin = copy.deepcopy(model)
    input = make((2, 3, 12, 12))
    model(input).backward()
    torch.compile(twin, fullgraph=True)(input).backward()
    for mine, theirs in zip(twin.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


@pytest.mark.skipif(_native.INTERPRETED, reason="the Triton kernels run here, not the extension")
def test_import_without_extension_takes_plain_pytorch_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(_native, "_C", None)
    monkeypatch.setattr(_native, "load_error", "ImportError: broken")
    _native.log_fallback.cache_clear()
    leaves = arguments(requires_grad=True)
    for options in ({"padding": 1}, {"return_skip": True, "return_indices": True, "pool_size": 3, "pool_stride": 1}):
        assert_parity(
            values_and_gradients(functional.conv_relu_pool2d, leaves, **options),
            values_and_gradients(reference.conv_relu_pool2d, leaves, **options),
            values_and_gradients(reference.conv_relu_pool2d, leaves, torch.float64, **options),
            terms=leaves[0][:, 0].numel(),
        )
    assert caplog.text.count("couldn't be loaded (ImportError: broken)") == 1
    assert fastseg.info()["cpu"] == "plain PyTorch (ImportError: broken)"
