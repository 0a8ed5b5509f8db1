"""cross_entropy under torch's machinery: opcheck, compile, export, tracing, fake tensors, autocast, checkpoint, DDP."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.parallel import DistributedDataParallel

import fastseg
from fastseg import _native, functional, reference
from fastseg.ops import cross_entropy as operator
from fastseg.testing import assert_parity, make, make_labels, values_and_gradients
from tests.ranks import run_two_ranks

pytestmark = pytest.mark.usefixtures("kernels_for_small_logits")

forward = torch.ops.fastseg.cross_entropy.default
backward = torch.ops.fastseg.cross_entropy_backward.default

# Named options of `fastseg.functional.cross_entropy`.
OPTIONS: dict[str, dict[str, Any]] = {
    "mean": {},
    "smoothed-sum": {"reduction": "sum", "label_smoothing": 0.1, "ignore_index": 2},
    "weighted-none": {"reduction": "none", "weight": torch.tensor([0.5, 2.0, 1.0, 0.25, 3.0])},
}
TARGETS = ("labels", "probabilities")


def arguments(target: str = "labels", shape: tuple[int, ...] = (2, 5, 6, 8), **options: Any) -> tuple[Tensor, Tensor]:
    input = make(shape, scale=3.0, **options)
    if target == "probabilities":
        return input, make(shape, seed=3).softmax(1)
    return input, make_labels((shape[0], *shape[2:]), shape[1])


def permitted(target: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options without an ignore_index, which probabilities can't have."""
    return {name: value for name, value in options.items() if target == "labels" or name != "ignore_index"}


CHECKED = {
    "float32-none": (torch.float32, "none"),
    "float32-sum": (torch.float32, "sum"),
    "bfloat16-mean": (torch.bfloat16, "mean"),
    "float64-mean": (torch.float64, "mean"),
}


@pytest.mark.parametrize(("dtype", "reduction"), CHECKED.values(), ids=CHECKED)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_opcheck(target: str, dtype: torch.dtype, reduction: str) -> None:
    logits, given = arguments(target)
    accumulated = torch.float64 if dtype == torch.float64 else torch.float32
    given = given.to(accumulated) if target == "probabilities" else given
    weight = make((5,), accumulated).abs()
    # Dense in an order of its own, and not dense: the gradient's strides must be those that the fake promises.
    layouts = (logits, logits.transpose(1, 3).contiguous().transpose(1, 3), logits.repeat(1, 1, 1, 2)[..., ::2])
    for input in layouts:
        input = input.to(dtype)
        for options in ((None, -100, reduction, 0.0), (weight, -100, reduction, 0.1)):
            torch.library.opcheck(forward, (input, given, *options))
            loss, statistics, total_weight = forward(input, given, *options)
            grad_output = torch.ones((), dtype=loss.dtype).expand_as(loss)
            torch.library.opcheck(
                backward, (grad_output, input, given, options[0], statistics, total_weight, *options[1:])
            )


def check_compiled(compiled: Callable[..., Tensor], input: Tensor, given: Tensor, options: dict[str, Any]) -> None:
    assert_parity(
        values_and_gradients(compiled, [input, given], **options),
        values_and_gradients(reference.cross_entropy, [input, given], **options),
        values_and_gradients(reference.cross_entropy, [input, given], torch.float64, **options),
        terms=input.shape[1],
    )


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_compile(options: dict[str, Any], target: str, backend: str) -> None:
    torch.compiler.reset()
    compiled = torch.compile(functional.cross_entropy, fullgraph=True, backend=backend)
    check_compiled(compiled, *arguments(target, requires_grad=True), permitted(target, options))


@pytest.mark.parametrize("target", TARGETS)
def test_compile_dynamic_sizes_without_recompiling(target: str) -> None:
    torch.compiler.reset()
    compiled = torch.compile(functional.cross_entropy, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for shape in ((2, 5, 6, 8), (3, 5, 14, 9), (7, 5, 21, 33)):
            check_compiled(compiled, *arguments(target, shape, requires_grad=True), {"label_smoothing": 0.1})


def test_compile_another_ignore_index_once_dynamic() -> None:
    torch.compiler.reset()
    compiled = torch.compile(functional.cross_entropy, fullgraph=True, backend="aot_eager", dynamic=True)
    input, given = arguments(requires_grad=True)
    for index in (3, 2, 4):
        check_compiled(compiled, input, given, {"ignore_index": index})


def test_compiled_second_derivative_is_refused() -> None:
    torch.compiler.reset()
    input, given = arguments(requires_grad=True)
    loss = torch.compile(functional.cross_entropy, fullgraph=True, backend="aot_eager")(input, given)
    (gradient,) = torch.autograd.grad(loss, input, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        gradient.square().sum().backward()


class Classifier(nn.Module):
    """A convolution and the loss, whose logits are neither a leaf nor, with channels_last, contiguous."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.classifier = nn.Conv2d(3, 5, 1)
        self.loss = loss

    def forward(self, images: Tensor, target: Tensor) -> Tensor:
        return self.loss(self.classifier(images), target)


def gradients(model: nn.Module, images: Tensor, target: Tensor) -> list[Tensor]:
    model.zero_grad()
    model(images, target).backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_compiled_model_gives_the_eager_gradients(layout: str) -> None:
    torch.compiler.reset()
    model = Classifier(fastseg.CrossEntropyLoss(ignore_index=1, label_smoothing=0.1))
    images, target = make((2, 3, 8, 8), layout=layout), make_labels((2, 8, 8), 5)
    eager = gradients(model, images, target)
    torch.testing.assert_close(gradients(torch.compile(model, fullgraph=True), images, target), eager)
    plain = gradients(Classifier(nn.CrossEntropyLoss(ignore_index=1, label_smoothing=0.1)), images, target)
    torch.testing.assert_close(eager, plain)


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
def test_export(strict: bool) -> None:
    model = Classifier(fastseg.CrossEntropyLoss()).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    example = (make((2, 3, 8, 8)), make_labels((2, 8, 8), 5))
    shapes = {"images": {0: batch}, "target": {0: batch}}
    program = torch.export.export(model, example, dynamic_shapes=shapes, strict=strict)
    images, target = make((7, 3, 8, 8), seed=3), make_labels((7, 8, 8), 5, seed=3)
    torch.testing.assert_close(program.module()(images, target), model(images, target), rtol=0, atol=0)


def test_make_fx_records_the_operators() -> None:
    input, given = arguments(requires_grad=True)

    def gradient(input: Tensor) -> Tensor:
        return torch.autograd.grad(functional.cross_entropy(input, given), input)[0]

    graph = make_fx(gradient)(input)
    recorded = {node.target for node in graph.graph.nodes}
    assert {forward, backward} <= recorded
    other = make(input.shape, seed=9, requires_grad=True)
    torch.testing.assert_close(graph(other), gradient(other), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["fake", "meta"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_tensors_without_memory(reduction: str, kind: str) -> None:
    with FakeTensorMode() if kind == "fake" else torch.device("meta"):
        input = torch.empty(2, 5, 6, 8, dtype=torch.bfloat16, requires_grad=True)
        target = torch.empty(2, 6, 8, dtype=torch.uint8)
        loss = functional.cross_entropy(input, target, reduction=reduction)
        (gradient,) = torch.autograd.grad(loss.sum(), input)
    assert (loss.shape, loss.dtype) == (target.shape if reduction == "none" else (), torch.bfloat16)
    assert (gradient.shape, gradient.dtype, gradient.stride()) == (input.shape, input.dtype, input.stride())


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint(reentrant: bool) -> None:
    input, given = arguments(requires_grad=True)
    (expected,) = torch.autograd.grad(functional.cross_entropy(input, given), input)
    torch.utils.checkpoint.checkpoint(functional.cross_entropy, input, given, use_reentrant=reentrant).backward()
    torch.testing.assert_close(input.grad, expected, rtol=0, atol=0)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_autocast_gives_the_loss_in_float32(dtype: torch.dtype, reduction: str, target: str) -> None:
    input, given = arguments(target)
    input = input.to(dtype).requires_grad_()
    given = given.to(dtype) if target == "probabilities" else given

    def under_autocast(function: Callable[..., Tensor], enabled: bool = True) -> Callable[..., Tensor]:
        def call(*tensors: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                return function(*tensors, reduction=reduction)

        return call

    actual = values_and_gradients(under_autocast(functional.cross_entropy), [input, given])
    plain = values_and_gradients(under_autocast(F.cross_entropy), [input, given])
    truth = values_and_gradients(F.cross_entropy, [input, given], torch.float64, reduction=reduction)
    terms = (5 + 8) ** 2 if dtype == torch.float64 else 5  # float64 is its own truth
    assert_parity(actual, plain, truth, terms=terms)
    off = under_autocast(functional.cross_entropy, enabled=False)(input, given)
    assert off.dtype == dtype


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "no-autocast"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_logits_are_not_copied_to_float32(dtype: torch.dtype, autocast: bool) -> None:
    input, given = arguments(shape=(1, 64, 32, 32), requires_grad=True)
    input = input.detach().to(dtype).requires_grad_()
    with torch.profiler.profile(profile_memory=True) as profile, torch.autocast("cpu", enabled=autocast):
        functional.cross_entropy(input, given).backward()
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in profile.events())
    statistics = 2 * given.numel() * 4
    assert allocated < input.nbytes + statistics + 4096  # the gradient, the statistics, and numbers


def test_compile_under_autocast() -> None:
    torch.compiler.reset()
    images, target = make((2, 3, 8, 8)), make_labels((2, 8, 8), 5)
    model = Classifier(fastseg.CrossEntropyLoss())
    with torch.autocast("cpu", torch.bfloat16):
        loss = torch.compile(model, fullgraph=True, backend="aot_eager")(images, target)
        expected = model(images, target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=0, atol=0)


def test_deepcopy_keeps_the_layer() -> None:
    layer = fastseg.CrossEntropyLoss(torch.rand(5), reduction="none")
    torch.testing.assert_close(copy.deepcopy(layer)(*arguments()), layer(*arguments()), rtol=0, atol=0)


@pytest.mark.skipif(_native.INTERPRETED, reason="the Triton kernels run here, not the extension")
@pytest.mark.parametrize("target", TARGETS)
def test_without_extension_takes_plain_pytorch_and_says_so(
    target: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(_native, "_C", None)
    monkeypatch.setattr(_native, "load_error", "ImportError: broken")
    _native.log_fallback.cache_clear()
    for options in OPTIONS.values():
        check_compiled(functional.cross_entropy, *arguments(target, requires_grad=True), permitted(target, options))
    assert caplog.text.count("couldn't be loaded (ImportError: broken)") == 1


# ---- two processes ----


def train_one_step(rank: int) -> None:
    """One rank: its gradients after DistributedDataParallel's average must be plain PyTorch's."""
    operator.PLAIN_MAX_LOGITS = 0  # a process of its own, without the fixture
    images, target = make((2, 3, 8, 8), seed=rank), make_labels((2, 8, 8), 5, seed=rank)
    target[:, : 1 + 5 * rank] = 255  # the ranks differ in their numbers of valid pixels
    mine, plain = (
        gradients(DistributedDataParallel(Classifier(loss)), images, target)
        for loss in (fastseg.CrossEntropyLoss(ignore_index=255), nn.CrossEntropyLoss(ignore_index=255))
    )
    torch.testing.assert_close(mine, plain)
    first = [gradient.clone() for gradient in mine]
    for gradient in first:
        torch.distributed.broadcast(gradient, 0)
    torch.testing.assert_close(mine, first, rtol=0, atol=0)


def test_two_ranks_with_different_numbers_of_valid_pixels(tmp_path: Path) -> None:
    run_two_ranks(train_one_step, tmp_path)
