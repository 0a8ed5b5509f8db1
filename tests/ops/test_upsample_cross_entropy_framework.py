"""The upsampling operators under torch's machinery: opcheck, compile, export, tracing, fake tensors, autocast."""

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from fastseg import _native, functional, reference
from fastseg.ops.upsample_cross_entropy_with_gradient import serves
from fastseg.testing import assert_parity, make, make_labels, values_and_gradients
from tests.ops.cross_entropy_cases import REDUCTIONS, logits
from tests.ops.upsample_cases import MODES, labels_for, terms_of

forward = torch.ops.fastseg.upsample_cross_entropy.default
backward = torch.ops.fastseg.upsample_cross_entropy_backward.default
argmax = torch.ops.fastseg.upsample_argmax.default
confusion_matrix = torch.ops.fastseg.upsample_confusion_matrix.default

with_gradient = torch.ops.fastseg.upsample_cross_entropy_with_gradient.default
with_gradient_backward = torch.ops.fastseg.upsample_cross_entropy_with_gradient_backward.default

SIZE = (11, 9)


def arguments(shape: tuple[int, ...] = (2, 5, 4, 6), size: tuple[int, int] = SIZE) -> tuple[Tensor, Tensor]:
    input = logits(shape)
    return input, labels_for(input, size)


# ---- opcheck ----

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "dense": lambda t: t,
    "permuted": lambda t: t.transpose(1, 3).contiguous().transpose(1, 3),  # dense in an order of its own
    "sliced": lambda t: t.repeat(1, 1, 1, 2)[..., ::2],  # not dense
}
GRIDS = {"bilinear": ("bilinear", False), "align_corners": ("bilinear", True), "nearest": ("nearest", False)}
CHECKED = {
    "float32-none": (torch.float32, "none", "bilinear", False),
    "bfloat16-mean": (torch.bfloat16, "mean", "align_corners", True),
    "float64-sum": (torch.float64, "sum", "nearest", False),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize(("dtype", "reduction", "grid", "with_overlap"), CHECKED.values(), ids=CHECKED)
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_opcheck_of_the_loss(
    dtype: torch.dtype, reduction: str, grid: str, with_overlap: bool, layout: Callable[[Tensor], Tensor]
) -> None:
    base, target = arguments()
    input = layout(base.detach()).to(dtype)
    weight = make((5,), torch.float64 if dtype == torch.float64 else torch.float32).abs()
    options = (-100, reduction, 0.1, *GRIDS[grid])
    for with_statistics in (True, False):
        torch.library.opcheck(forward, (input, target, weight, *options, with_overlap, with_statistics))
    loss, statistics, total_weight, overlap = forward(input, target, weight, *options, with_overlap, True)
    grad_loss = torch.ones((), dtype=loss.dtype).expand_as(loss)
    tensors = (grad_loss, torch.ones_like(overlap), input, target, weight, statistics, total_weight)
    torch.library.opcheck(backward, (*tensors, *options))
    assert backward(*tensors, *options).stride() == torch.empty_like(input).stride()
    if reduction != "none":
        torch.library.opcheck(with_gradient, (input, target, weight, *options))
        _, total_weight, gradient = with_gradient(input, target, weight, *options)
        saved = (grad_loss, input, target, weight, total_weight, gradient)
        torch.library.opcheck(with_gradient_backward, (*saved, *options))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_opcheck_of_the_prediction(layout: Callable[[Tensor], Tensor]) -> None:
    base, target = arguments()
    input = layout(base.detach())
    torch.library.opcheck(argmax, (input, [11, 9], None, "bilinear", True, torch.uint8, True))
    torch.library.opcheck(argmax, (input, [6, 9], [1.5, 1.5], "nearest", False, torch.int64, False))
    torch.library.opcheck(confusion_matrix, (input, target, None, "bilinear", False))
    torch.library.opcheck(confusion_matrix, (input, target.int(), 2, "nearest", False))


# ---- compile, export, tracing ----


def check_compiled(compiled: Callable[..., Tensor], input: Tensor, target: Tensor, options: dict[str, Any]) -> None:
    definition = reference.upsample_cross_entropy
    assert_parity(
        values_and_gradients(compiled, [input, target], **options),
        values_and_gradients(definition, [input, target], **options),
        values_and_gradients(definition, [input, target], torch.float64, **options),
        terms=terms_of(input, tuple(target.shape[1:])),
    )


COMPILED: dict[str, tuple[str, dict[str, Any]]] = {
    "eager": ("eager", {}),
    "aot_eager": ("aot_eager", {"reduction": "none", "align_corners": True}),
    "aot_eager-pixel-weight": ("aot_eager", {"pixel_weight": make((2, *SIZE)).abs(), "ignore_index": 3}),
    "inductor": ("inductor", {"reduction": "sum", "label_smoothing": 0.1, "weight": make((5,)).abs()}),
}


@pytest.mark.parametrize(("backend", "options"), COMPILED.values(), ids=COMPILED)
def test_compiled_loss(backend: str, options: dict[str, Any]) -> None:
    torch.compiler.reset()
    compiled = torch.compile(functional.upsample_cross_entropy, fullgraph=True, backend=backend)
    check_compiled(compiled, *arguments(), options)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compiled_prediction(backend: str) -> None:
    torch.compiler.reset()

    def predict(input: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        labels, confidence = functional.upsample_argmax(input, scale_factor=1.5, return_confidence=True)
        return labels, confidence, functional.upsample_confusion_matrix(input, target, 2)

    actual = torch.compile(predict, fullgraph=True, backend=backend)(*arguments())
    torch.testing.assert_close(actual, predict(*arguments()), rtol=0, atol=0)


SHAPES = (((2, 5, 4, 6), (11, 9)), ((3, 5, 7, 3), (21, 10)), ((7, 5, 9, 12), (40, 33)))


def test_loss_compiled_for_dynamic_sizes_without_recompiling() -> None:
    torch.compiler.reset()
    compiled = torch.compile(functional.upsample_cross_entropy, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for shape, size in SHAPES:
            check_compiled(compiled, *arguments(shape, size), {"label_smoothing": 0.1})


def test_prediction_compiled_for_dynamic_sizes_without_recompiling() -> None:
    torch.compiler.reset()

    def predict(input: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        return (
            functional.upsample_argmax(input, tuple(target.shape[1:])),
            functional.upsample_argmax(input, scale_factor=2.5, mode="nearest"),
            functional.upsample_confusion_matrix(input, target),
        )

    compiled = torch.compile(predict, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True), torch.no_grad():
        for shape, size in SHAPES:
            given = arguments(shape, size)
            torch.testing.assert_close(compiled(*given), predict(*given), rtol=0, atol=0)


def test_compiled_second_derivative_is_refused() -> None:
    torch.compiler.reset()
    input, target = arguments()
    loss = torch.compile(functional.upsample_cross_entropy, fullgraph=True, backend="aot_eager")(input, target)
    (gradient,) = torch.autograd.grad(loss, input, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        gradient.square().sum().backward()


class Segmenter(nn.Module):
    """A network's end: a convolution at a quarter of the resolution, the loss, the prediction and its counts."""

    def __init__(self, loss: Callable[..., Tensor] = functional.upsample_cross_entropy) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.classifier = nn.Conv2d(3, 5, 1)
        self.loss = loss

    def forward(self, images: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        low = self.classifier(images)
        labels = functional.upsample_argmax(low, tuple(target.shape[-2:]))
        return self.loss(low, target, label_smoothing=0.1), labels, functional.upsample_confusion_matrix(low, target)


def gradients(model: nn.Module, images: Tensor, target: Tensor) -> list[Tensor]:
    model.zero_grad()
    model(images, target)[0].backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_compiled_model_gives_the_eager_gradients(layout: str) -> None:
    torch.compiler.reset()
    images, target = make((2, 3, 8, 8), layout=layout), make_labels((2, 32, 32), 5)
    eager = gradients(Segmenter(), images, target)
    torch.testing.assert_close(gradients(torch.compile(Segmenter(), fullgraph=True), images, target), eager)
    torch.testing.assert_close(eager, gradients(Segmenter(reference.upsample_cross_entropy), images, target))


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
def test_export(strict: bool) -> None:
    model = Segmenter().eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    example = (make((2, 3, 8, 8)), make_labels((2, 24, 20), 5))
    shapes = {"images": {0: batch}, "target": {0: batch}}
    program = torch.export.export(model, example, dynamic_shapes=shapes, strict=strict)
    images, target = make((7, 3, 8, 8), seed=3), make_labels((7, 24, 20), 5, seed=3)
    torch.testing.assert_close(program.module()(images, target), model(images, target), rtol=0, atol=0)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_make_fx_records_the_operators(reduction: str) -> None:
    input, target = arguments()

    def step(input: Tensor) -> tuple[Tensor, ...]:
        loss = functional.upsample_cross_entropy(input, target, reduction=reduction)
        (gradient,) = torch.autograd.grad(loss.sum(), input)
        counts = functional.upsample_confusion_matrix(input, target)
        return gradient, counts, functional.upsample_argmax(input, SIZE)

    graph = make_fx(step)(input)
    in_forward = serves(input, reduction)
    passes = {with_gradient, with_gradient_backward} if in_forward else {forward, backward}
    assert {*passes, argmax, confusion_matrix} <= {node.target for node in graph.graph.nodes}
    other = logits(tuple(input.shape), seed=9)
    torch.testing.assert_close(graph(other), step(other), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["fake", "meta"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_tensors_without_memory(reduction: str, kind: str) -> None:
    with FakeTensorMode() if kind == "fake" else torch.device("meta"):
        input = torch.empty(2, 5, 6, 8, dtype=torch.bfloat16, requires_grad=True)
        target = torch.empty(2, 24, 31, dtype=torch.uint8)
        loss = functional.upsample_cross_entropy(input, target, reduction=reduction)
        (gradient,) = torch.autograd.grad(loss.sum(), input)
        labels, confidence = functional.upsample_argmax(input, scale_factor=1.5, return_confidence=True)
        matrix = functional.upsample_confusion_matrix(input, target)
    assert (loss.shape, loss.dtype) == (target.shape if reduction == "none" else (), torch.bfloat16)
    assert (gradient.shape, gradient.dtype, gradient.stride()) == (input.shape, input.dtype, input.stride())
    assert (labels.shape, labels.dtype) == ((2, 9, 12), torch.uint8)
    assert (confidence.shape, confidence.dtype) == ((2, 9, 12), torch.bfloat16)
    assert (matrix.shape, matrix.dtype) == ((5, 5), torch.int64)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint(reentrant: bool) -> None:
    input, target = arguments()
    (expected,) = torch.autograd.grad(functional.upsample_cross_entropy(input, target), input)
    loss = torch.utils.checkpoint.checkpoint(functional.upsample_cross_entropy, input, target, use_reentrant=reentrant)
    loss.backward()
    torch.testing.assert_close(input.grad, expected, rtol=0, atol=0)


# ---- autocast ----


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_autocast_gives_the_loss_in_float32(dtype: torch.dtype, reduction: str, mode: dict[str, Any]) -> None:
    input, target = arguments()
    input = input.detach().to(dtype).requires_grad_()
    device = torch.get_default_device().type

    def under_autocast(function: Callable[..., Tensor], enabled: bool = True) -> Callable[..., Tensor]:
        def call(*tensors: Tensor) -> Tensor:
            with torch.autocast(device, torch.bfloat16, enabled=enabled):
                return function(*tensors, reduction=reduction, **mode)

        return call

    actual = values_and_gradients(under_autocast(functional.upsample_cross_entropy), [input, target])
    plain = values_and_gradients(under_autocast(reference.upsample_cross_entropy), [input, target])
    truth = values_and_gradients(
        reference.upsample_cross_entropy, [input, target], torch.float64, reduction=reduction, **mode
    )
    assert actual[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_parity(actual, plain, truth, terms=terms_of(input, SIZE, mode.get("mode", "bilinear")))
    assert under_autocast(functional.upsample_cross_entropy, enabled=False)(input, target).dtype == dtype


def test_autocast_keeps_the_confidences_dtype() -> None:
    input = make((2, 5, 4, 6), torch.bfloat16)
    expected = functional.upsample_argmax(input, SIZE, return_confidence=True)
    with torch.autocast(torch.get_default_device().type, torch.float16):
        actual = functional.upsample_argmax(input, SIZE, return_confidence=True)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


# ---- what is missing ----


@pytest.mark.skipif(_native.INTERPRETED, reason="the Triton kernels run here, not the extension")
def test_without_extension_takes_plain_pytorch_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if torch.get_default_device().type != "cpu":
        pytest.skip("the Triton kernels run here, not the extension")
    monkeypatch.setattr(_native, "_C", None)
    monkeypatch.setattr(_native, "load_error", "ImportError: broken")
    _native.log_fallback.cache_clear()
    input, target = arguments()
    for mode in MODES.values():
        check_compiled(functional.upsample_cross_entropy, input, target, mode)
        labels = functional.upsample_argmax(input, SIZE, **mode)
        assert torch.equal(labels, reference.upsample_argmax(input, SIZE, **mode))
        counts = functional.upsample_confusion_matrix(input, target, **mode)
        assert torch.equal(counts, reference.upsample_confusion_matrix(input, target, **mode))
    for operator in ("upsample_cross_entropy", "upsample_argmax", "upsample_confusion_matrix"):
        line = f"{operator} runs as plain PyTorch: the C++ extension couldn't be loaded (ImportError: broken)"
        assert caplog.text.count(line) == 1


def test_import_needs_no_gpu_and_no_triton() -> None:
    code = "import fastseg, sys, torch; assert 'triton' not in sys.modules; torch.ops.fastseg.upsample_argmax.default"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
