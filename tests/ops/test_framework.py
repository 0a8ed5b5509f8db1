"""What holds for every operator under torch's machinery.

opcheck, Inductor, dynamic sizes, export, tracing, tensors without memory, autocast, checkpoints, copies of layers, and
a broken extension. How captured calls keep their gradients: test_capture.py.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import fastseg
from fastseg import _native
from fastseg.testing import assert_parity, make, values_and_gradients
from tests.ops.operators import (
    CALLS,
    CAPTURED,
    WITH_LAYERS,
    Call,
    assert_call_parity,
    each_call,
    each_gradient,
    kernels_for_small_calls,
    parametrize,
)

pytestmark = kernels_for_small_calls

each_operator = parametrize({name: call for name, call in CALLS.items() if name == call.operator})
# And with --full what else leads to other operators or results.
each_captured = pytest.mark.parametrize(
    "call",
    [
        pytest.param(call, id=name, marks=[pytest.mark.full] * (name != call.operator))
        for name, call in CAPTURED.items()
    ],
)


def results_of(function: Callable[..., Any], tensors: list[Tensor]) -> list[Tensor]:
    """The results, and the gradients of what requires one."""
    return values_and_gradients(function, tensors)


# ---- the operators that a call runs ----


class Recorder(TorchDispatchMode):
    """Keeps the calls of fastseg's operators, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[torch._ops.OpOverload, tuple[Any, ...]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fastseg":
            self.calls[func] = tuple(arg.detach() if isinstance(arg, Tensor) else arg for arg in args)
        return func(*args, **(kwargs or {}))


def operators_of(call: Call, tensors: list[Tensor]) -> dict[torch._ops.OpOverload, tuple[Any, ...]]:
    with Recorder() as recorder:
        results_of(call.fused, tensors)
    assert recorder.calls
    return recorder.calls


# Gradients' strides must be those that the fakes promise.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "permuted": lambda t: t.transpose(1, 3).contiguous().transpose(1, 3),  # dense in an order of its own
    "sliced": lambda t: torch.repeat_interleave(t, 2, -1)[..., ::2],  # not dense
}


@parametrize(CAPTURED)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.strength(1)
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_opcheck(layout: Callable[[Tensor], Tensor], call: Call) -> None:
    input, *others = call.tensors()
    for operator, args in operators_of(call, [input, *others]).items():
        args = [layout(arg) if isinstance(arg, Tensor) and arg.shape == input.shape else arg for arg in args]
        torch.library.opcheck(operator, args)


@each_call
def test_make_fx_records_the_operators(call: Call) -> None:
    tensors = call.tensors()

    def step(input: Tensor) -> list[Tensor]:
        outputs = call.outputs(input, *tensors[1:])
        sums = [output.sum() for output in outputs if output.requires_grad]
        return [*outputs, *(torch.autograd.grad(sums, input) if sums else ())]

    graph = make_fx(step)(tensors[0])
    assert operators_of(call, tensors).keys() <= {node.target for node in graph.graph.nodes}
    other = make(tensors[0].shape, seed=9, requires_grad=tensors[0].requires_grad)
    torch.testing.assert_close(graph(other), step(other), rtol=0, atol=0)


# ---- compile and export ----


class Step(nn.Module):
    """A call behind a convolution, so that its input is neither a leaf nor of the layout that came in."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.call = call
        input, *others = call.tensors()
        self.convolution = nn.Conv2d(3, input.shape[1], 1)
        self.others = nn.ParameterList(others[call.data - 1 :])

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Any:
        of_labels = () if labels is None else (labels,)
        return self.call.fused(self.convolution(images).sin(), *of_labels, *self.others)


def images_and_labels(call: Call, images: int = 2, **options: Any) -> list[Tensor]:
    """What `Step` is given."""
    input, *others = call.tensors(images, **options)
    return [make((images, 3, *input.shape[2:]), requires_grad=input.requires_grad), *others[: call.data - 1]]


@each_operator
def test_inductor(call: Call) -> None:
    """Which turns the convolution, and so the operator's input, to channels_last."""
    torch.compiler.reset()
    eager, given = Step(call), images_and_labels(call)
    compiled = torch.compile(copy.deepcopy(eager), fullgraph=True)
    results = [compiled(*given), eager(*given)]
    torch.testing.assert_close(*results)
    for result in results:
        outputs = result if isinstance(result, tuple) else (result,)
        # Random weights: the gradients of a softmax's sums cancel each other where they are alike.
        sums = [(output * make(output.shape, seed=7)).sum() for output in outputs if output.requires_grad]
        if sums:
            torch.stack(sums).sum().backward()
    for mine, theirs in zip(compiled.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


@each_captured
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_for_dynamic_sizes_without_recompiling(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the fakes, and not by the decompositions, which are ONNX's."""

    def refuse(*arguments: object) -> None:
        raise AssertionError("a decomposition was called")

    for overload in fastseg.decompositions():
        monkeypatch.setitem(torch._decomp.decomposition_table, overload, refuse)
    torch.compiler.reset()
    compiled = torch.compile(call.fused, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for images, size in ((2, (10, 13)), (3, (14, 9)), (7, (21, 33))):
            tensors = call.tensors(images, size)
            torch.testing.assert_close(results_of(compiled, tensors), results_of(call.fused, tensors))


@each_operator
def test_compiled_under_autocast(call: Call) -> None:
    torch.compiler.reset()
    tensors = call.tensors()
    with torch.autocast(tensors[0].device.type, torch.bfloat16):
        compiled = torch.compile(call.fused, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*tensors), call.fused(*tensors), rtol=0, atol=0)


@each_captured
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
@pytest.mark.strength(1)
def test_export_of_a_dynamic_batch(strict: bool, call: Call) -> None:
    step, example = Step(call).eval(), images_and_labels(call)
    batch = torch.export.Dim("batch", min=1, max=64)
    shapes = tuple({0: batch} for _ in example)
    program = torch.export.export(step, tuple(example), dynamic_shapes=shapes, strict=strict)
    assert any("fastseg" in str(node.target) for node in program.graph.nodes)
    given = images_and_labels(call, 7)
    torch.testing.assert_close(program.module()(*given), step(*given), rtol=0, atol=0)


# ---- tensors without memory ----


@each_call
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("kind", ["fake", "meta"])
def test_tensors_without_memory(kind: str, layout: str, call: Call) -> None:
    """Give results of the shapes, dtypes and strides of those with memory."""

    def described(call: Call, tensors: list[Tensor]) -> list[Any]:
        outputs = call.outputs(*tensors)
        sums = [output.sum() for output in outputs if output.requires_grad]
        wanted = [tensor for tensor in tensors if tensor.requires_grad]
        gradients = torch.autograd.grad(sums, wanted) if sums else ()
        # On the meta device a library's convolution has strides of its own.
        strides = [tensor.stride() if kind == "fake" else None for tensor in (*outputs, *gradients)]
        return [(t.shape, t.dtype, stride) for t, stride in zip((*outputs, *gradients), strides, strict=True)]

    def without_memory(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        empty = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
        return empty.requires_grad_(value.requires_grad)

    tensors = call.tensors(layout=layout)
    expected = described(call, tensors)
    with FakeTensorMode() if kind == "fake" else torch.device("meta"):
        options = {name: without_memory(value) for name, value in call.options.items()}
        assert described(replace(call, options=options), [without_memory(tensor) for tensor in tensors]) == expected


# ---- autocast ----


@each_gradient
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype, autocast: torch.dtype, call: Call) -> None:
    """Gives what it gives in plain PyTorch: a convolution in its dtype, a loss in float32."""
    tensors = call.tensors(dtype=dtype)

    def under_autocast(function: Callable[..., Any], enabled: bool = True) -> Callable[..., Any]:
        def run(*tensors: Tensor) -> Any:
            with torch.autocast(tensors[0].device.type, autocast, enabled=enabled):
                return function(*tensors)

        return run

    casts = "conv" in call.operator and dtype != torch.float64
    rounded = [t.detach().to(autocast).to(dtype).requires_grad_() for t in tensors] if casts else tensors
    actual, plain = (results_of(under_autocast(function), tensors) for function in (call.fused, call.plain))
    truth = values_and_gradients(call.plain, rounded, torch.float64)
    for results in zip(actual, plain, truth, strict=True):
        if results[0].is_floating_point():
            assert_parity(*results, terms=call.terms(tensors))
    off = under_autocast(call.fused, enabled=False)
    torch.testing.assert_close(off(*tensors), call.fused(*tensors), rtol=0, atol=0)


@each_call
def test_autocast_changes_no_prediction(call: Call) -> None:
    if call.is_loss or "conv" in call.operator:
        return
    tensors = call.tensors(dtype=torch.float16)
    with torch.autocast(tensors[0].device.type, torch.bfloat16):
        results = call.fused(*tensors)
    torch.testing.assert_close(results, call.fused(*tensors), rtol=0, atol=0)


# ---- checkpoints and copies ----


@each_gradient
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint(reentrant: bool, call: Call) -> None:
    def gradients(function: Callable[..., Any]) -> list[Tensor]:
        tensors = call.tensors()
        results = function(*tensors)
        outputs = results if isinstance(results, tuple) else (results,)
        torch.stack([output.square().sum() for output in outputs if output.requires_grad]).sum().backward()
        return [tensor.grad for tensor in tensors if tensor.requires_grad]

    def saving(*tensors: Tensor) -> Any:
        return torch.utils.checkpoint.checkpoint(call.fused, *tensors, use_reentrant=reentrant)

    torch.testing.assert_close(gradients(saving), gradients(call.fused), rtol=0, atol=0)


@parametrize(WITH_LAYERS)
def test_layer_calls_the_function_and_can_be_copied(call: Call) -> None:
    layer, data = call.make_layer(), call.tensors()[: call.data]
    expected = call.fused(*data, *layer.parameters())
    for same in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(same(*data), expected, rtol=0, atol=0)


# ---- what is missing ----


@pytest.mark.skipif(_native.INTERPRETED, reason="the Triton kernels run here, not the extension")
@each_call
def test_without_extension_it_is_plain_pytorch_and_says_so(
    call: Call, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if torch.get_default_device().type != "cpu":
        pytest.skip("the Triton kernels run here, not the extension")
    monkeypatch.setattr(_native, "_C", None)
    monkeypatch.setattr(_native, "load_error", "ImportError: broken")
    _native.log_fallback.cache_clear()
    assert_call_parity(call, call.tensors())
    said = "runs as plain PyTorch: the C++ extension couldn't be loaded (ImportError: broken)"
    assert caplog.text.count(said) == 1
    assert fastseg.info()["cpu"] == "plain PyTorch (ImportError: broken)"
