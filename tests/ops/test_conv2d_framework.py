"""conv2d under torch's machinery: opcheck, compile, export, fake tensors, autocast."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fastseg
from fastseg import _native, functional, reference
from fastseg.testing import assert_parity, make, values_and_gradients
from tests.ops.test_conv_relu_pool2d import tensors

SHAPE = (2, 6, 13, 18, 8, 3, 3)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("pixels", [13, 4], ids=["winograd", "few-pixels"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_opcheck(pixels: int, layout: str) -> None:
    input, weight, bias = (t.detach() for t in tensors((2, 6, pixels, 18, 8, 3, 3), torch.float32, layout))
    forward, backward = torch.ops.fastseg.conv2d.default, torch.ops.fastseg.conv2d_backward.default
    torch.library.opcheck(forward, (input, weight, bias, [1, 0]))
    torch.library.opcheck(forward, (input.transpose(2, 3), weight, None, [0, 2]))
    incoming = make((2, 8, pixels, 16), seed=5)
    torch.library.opcheck(backward, (incoming, input, weight, [1, 0], [True, True, True]))
    torch.library.opcheck(backward, (incoming, input, weight, [1, 0], [False, True, False]))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_compile(layout: str, backend: str) -> None:
    """Between convolutions of torch's, which Inductor turns to channels_last."""
    torch.compiler.reset()
    called = tensors(SHAPE, torch.float32, layout)
    pointwise = make((6, 6, 1, 1), seed=8, requires_grad=True)

    def network(conv2d: object) -> object:
        def forward(input: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
            *of_conv, pointwise = parameters
            return conv2d(torch.conv2d(input, pointwise).sin(), *of_conv, padding=1) * 2

        return forward

    compiled = torch.compile(network(functional.conv2d), fullgraph=True, backend=backend)
    results = [values_and_gradients(f, [*called, pointwise]) for f in (compiled, network(reference.conv2d))]
    truth = values_and_gradients(network(reference.conv2d), [*called, pointwise], torch.float64)
    assert_parity(*results, truth, terms=2 * 13 * 18)
    assert results[0][0].stride() == results[1][0].stride()


def test_compile_dynamic_sizes_without_recompiling() -> None:
    torch.compiler.reset()
    compiled = torch.compile(functional.conv2d, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for size in ((2, 6, 10, 12), (3, 6, 14, 9), (5, 6, 21, 33)):
            called = tensors((*size, 8, 3, 3), torch.float32)
            results = [values_and_gradients(f, called, padding=1) for f in (compiled, reference.conv2d)]
            truth = values_and_gradients(reference.conv2d, called, torch.float64, padding=1)
            assert_parity(*results, truth, terms=size[0] * size[2] * size[3])


def test_export() -> None:
    layer, batch = fastseg.Conv2d(6, 8, 3), torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(layer, (make((2, 6, 13, 18)),), dynamic_shapes={"input": {0: batch}})
    assert any(node.target is torch.ops.fastseg.conv2d.default for node in program.graph.nodes)
    input = make((5, 6, 13, 18), seed=3)
    torch.testing.assert_close(program.module()(input), layer(input), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["fake", "meta"])
def test_tensors_without_memory(kind: str) -> None:
    with FakeTensorMode() if kind == "fake" else torch.device("meta"):
        leaf, weight = torch.empty((2, 6, 13, 18), requires_grad=True), torch.empty((8, 6, 3, 3))
        output = functional.conv2d(leaf, weight, padding=1)
        gradient = torch.autograd.grad(output.sum(), leaf)[0]
    assert (output.shape, gradient.shape) == ((2, 8, 13, 18), leaf.shape)


def test_without_extension_it_is_plain_pytorch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(_native, "_C", None)
    monkeypatch.setattr(_native, "load_error", "ImportError: broken")
    _native.log_fallback.cache_clear()
    called = tensors(SHAPE, torch.float32)
    results = [values_and_gradients(module.conv2d, called, padding=1) for module in (functional, reference)]
    torch.testing.assert_close(*results, rtol=0, atol=0)
    assert "conv2d runs as plain PyTorch: the C++ extension couldn't be loaded" in caplog.text
