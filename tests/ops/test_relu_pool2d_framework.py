"""relu_pool2d under torch's machinery: opcheck, compile, export, fake tensors, autocast."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fastseg
from fastseg import _native, functional, reference
from fastseg.ops import relu_pool2d as operator
from fastseg.ops.convolution.geometry import flatten
from fastseg.testing import assert_parity, make, values_and_gradients

pytestmark = pytest.mark.usefixtures("kernels_for_small_maps")

WINDOW = flatten(operator.resolve((2, 3, 10, 12), 3, 2, 1, False))


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("with_skip", [False, True], ids=["pooled", "with-skip"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_opcheck(with_skip: bool, layout: str) -> None:
    input, forward = make((2, 3, 10, 12), layout=layout), torch.ops.fastseg.relu_pool2d
    torch.library.opcheck(forward.default, (input, WINDOW, True, with_skip))
    torch.library.opcheck(forward.default, (input.transpose(2, 3), WINDOW, False, with_skip))
    output, positions, skip = forward(input, WINDOW, True, with_skip)
    skips = (torch.randn_like(skip), skip) if with_skip else (None, None)
    backward = torch.ops.fastseg.relu_pool2d_backward.default
    torch.library.opcheck(backward, (torch.randn_like(output), skips[0], positions, skips[1], [10, 12], WINDOW))
    if with_skip:
        torch.library.opcheck(backward, (None, skips[0], positions, skips[1], [10, 12], WINDOW))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("options", [{}, {"return_indices": True, "return_skip": True}], ids=["plain", "indices-skip"])
def test_compile(backend: str, options: dict) -> None:
    torch.compiler.reset()
    input = make((2, 3, 10, 12), requires_grad=True)
    compiled = torch.compile(functional.relu_pool2d, fullgraph=True, backend=backend)
    actual = values_and_gradients(compiled, [input], **options)
    torch.testing.assert_close(actual, values_and_gradients(reference.relu_pool2d, [input], **options))


def test_compile_dynamic_sizes_without_recompiling() -> None:
    torch.compiler.reset()
    compiled = torch.compile(functional.relu_pool2d, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for shape in ((2, 3, 10, 12), (3, 3, 14, 9), (5, 3, 21, 33)):
            input = make(shape, requires_grad=True)
            actual = values_and_gradients(compiled, [input], pool_size=3, pool_stride=2)
            plain = values_and_gradients(reference.relu_pool2d, [input], pool_size=3, pool_stride=2)
            torch.testing.assert_close(actual, plain)


def test_export() -> None:
    layer, batch = fastseg.ReLUPool2d(3, 2), torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(layer, (make((2, 3, 10, 12)),), dynamic_shapes={"input": {0: batch}})
    input = make((5, 3, 10, 12), seed=3)
    torch.testing.assert_close(program.module()(input), layer(input), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["fake", "meta"])
def test_tensors_without_memory(kind: str) -> None:
    with FakeTensorMode() if kind == "fake" else torch.device("meta"):
        leaf = torch.empty((2, 3, 10, 12), requires_grad=True)
        output, skip = functional.relu_pool2d(leaf, return_skip=True)
        gradient = torch.autograd.grad(output.sum() + skip.sum(), leaf)[0]
    assert (output.shape, skip.shape, gradient.shape) == ((2, 3, 5, 6), leaf.shape, leaf.shape)


def test_autocast_changes_nothing() -> None:
    input = make((2, 3, 10, 12))
    with torch.autocast("cpu", torch.bfloat16):
        output = functional.relu_pool2d(input)
    torch.testing.assert_close(output, functional.relu_pool2d(input), rtol=0, atol=0)


@pytest.mark.skipif(_native.INTERPRETED, reason="the Triton kernels run here, not the extension")
@pytest.mark.parametrize("options", [{}, {"pool_size": 3, "pool_stride": 2, "return_skip": True}],
                         ids=["plain", "overlap-skip"])  # fmt: skip
def test_without_extension_it_is_plain_pytorch(
    options: dict, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(_native, "_C", None)
    monkeypatch.setattr(_native, "load_error", "ImportError: broken")
    _native.log_fallback.cache_clear()
    input = make((2, 5, 13, 18), requires_grad=True)
    assert_parity(
        values_and_gradients(functional.relu_pool2d, [input], **options),
        values_and_gradients(reference.relu_pool2d, [input], **options),
        values_and_gradients(reference.relu_pool2d, [input], torch.float64, **options),
    )
    assert "relu_pool2d runs as plain PyTorch: the C++ extension couldn't be loaded" in caplog.text
