"""What captures a call keeps its gradient: export, tracing, make_fx, transforms, ONNX, ahead-of-time compilation."""

import io
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import fastseg
from fastseg import _native, functional, models
from fastseg.losses import monai, smp
from fastseg.testing import assert_parity, make, make_labels
from tests.ops.operators import CALLS, CAPTURED, CLASSES, Call, kernels_for_small_calls, parametrize
from tests.ranks import run_two_ranks

pytestmark = kernels_for_small_calls

MAP = (2, CLASSES, 24, 20)

each_call = parametrize(GRADIENTS := {name: call for name, call in CAPTURED.items() if call.is_differentiable})


class Captured(nn.Module):
    """A call, one number for all results; its floating-point tensors but input are parameters."""

    def __init__(self, call: Call, plain: bool = False) -> None:
        super().__init__()
        self.call = call.plain if plain else call.fused
        _, *others = call.tensors()
        self.others = nn.ParameterList(
            nn.Parameter(other.detach().clone(), other.is_floating_point()) for other in others
        )

    def forward(self, input: Tensor) -> Tensor:
        results = self.call(input, *self.others)
        results = results if isinstance(results, tuple) else (results,)
        return sum((result * result).sum() for result in results)


def input_of(call: Call, seed: int = 7, **options: Any) -> Tensor:
    return make(call.tensors()[0].shape, seed=seed, **options)


def gradients(module: Callable[[Tensor], Tensor], parameters: Any, input: Tensor) -> list[Tensor | None]:
    """The value, and the gradients of input and of the parameters."""
    leaf = input.detach().clone().requires_grad_()
    wanted = [leaf, *(parameter for parameter in parameters if parameter.requires_grad)]
    value = module(leaf)
    return [value.detach(), *torch.autograd.grad(value, wanted, allow_unused=True)]


# ---- captures: from a module and an example to a module of the same parameters' values, and those parameters ----


def exported(module: nn.Module, example: Tensor, strict: bool = False) -> nn.Module:
    return torch.export.export(module, (example,), strict=strict).module()


def saved_and_loaded(module: nn.Module, example: Tensor) -> nn.Module:
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(module, (example,)), buffer)
    buffer.seek(0)
    return torch.export.load(buffer).module()


def decomposed(module: nn.Module, example: Tensor) -> nn.Module:
    return torch.export.export(module, (example,)).run_decompositions().module()


def in_aten(module: nn.Module, example: Tensor) -> nn.Module:
    program = torch.export.export(module, (example,)).run_decompositions(fastseg.decompositions())
    assert not any("fastseg" in str(node.target) for node in program.graph.nodes)
    return program.module()


def without_grad(capture: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    def captured(module: nn.Module, example: Tensor) -> nn.Module:
        with torch.no_grad():
            return capture(module, example)

    return captured


def traced(module: nn.Module, example: Tensor) -> nn.Module:
    return torch.jit.trace(module, (example,), check_trace=False)


def before_dispatch(module: nn.Module, example: Tensor) -> nn.Module:
    return make_fx(module, pre_dispatch=True)(example)


CAPTURES: dict[str, Callable[..., nn.Module]] = {
    "export": exported,
    "export-strict": lambda module, example: exported(module, example, strict=True),
    "export-no-grad": without_grad(exported),
    "export-saved": saved_and_loaded,
    "export-decomposed": decomposed,
    "export-aten": in_aten,
    "trace": traced,
    "trace-no-grad": without_grad(traced),
    "make_fx-pre-dispatch": before_dispatch,
    "make_fx-pre-dispatch-no-grad": without_grad(before_dispatch),
    "compile": lambda module, example: torch.compile(module, backend="aot_eager", fullgraph=True),
}


@each_call
@pytest.mark.parametrize("capture", CAPTURES)
@pytest.mark.strength(1)
@pytest.mark.filterwarnings("ignore")
def test_gradients_of_what_was_captured(capture: str, call: Call) -> None:
    torch.compiler.reset()
    module, input = Captured(call), input_of(call)
    expected = gradients(module, module.parameters(), input)
    captured = CAPTURES[capture](module, input)
    parameters = list(captured.parameters()) or list(module.parameters())
    actual = gradients(captured, parameters, input)
    assert all(gradient is not None for gradient in actual)
    if capture == "export-aten":  # torch's operators, which add up in another order
        plain, truth = Captured(call, plain=True), Captured(call, plain=True).double()
        assert_parity(
            actual,
            gradients(plain, plain.parameters(), input),
            gradients(truth, truth.parameters(), input.double()),
            terms=call.terms(call.tensors()),
        )
    else:
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("capture", ["export", "trace-no-grad", "make_fx-pre-dispatch"])
@pytest.mark.parametrize("with_overlap", [False, True], ids=["focal", "dice-focal"])
@pytest.mark.filterwarnings("ignore")
def test_gradients_of_focal_losses_that_were_captured(with_overlap: bool, capture: str) -> None:
    labels, input = make_labels((2, 24, 20), CLASSES, seed=3), make(MAP)
    loss = monai.DiceFocalLoss(to_onehot_y=True, softmax=True) if with_overlap else smp.FocalLoss("multiclass")

    class Loss(nn.Module):
        def forward(self, input: Tensor) -> Tensor:
            return loss(input, labels.unsqueeze(1) if with_overlap else labels)

    expected = gradients(Loss(), [], input)
    torch.testing.assert_close(gradients(CAPTURES[capture](Loss(), input), [], input), expected)


# ---- transforms ----

TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor, Tensor], Tensor]] = {
    "jvp": lambda f, x, t: torch.func.jvp(f, (x,), (t,))[1],
    "grad": lambda f, x, t: torch.func.grad(f)(x),
    "jvp-of-grad": lambda f, x, t: torch.func.jvp(torch.func.grad(f), (x,), (t,))[1],
    "vmap-of-grad": lambda f, x, t: torch.func.vmap(torch.func.grad(f))(torch.stack((x, t))),
    "vmap": lambda f, x, t: torch.func.vmap(f)(torch.stack((x, t))),
    "dual": lambda f, x, t: tangent(f, x, t),
    "dual-without-grad": lambda f, x, t: torch.no_grad()(tangent)(f, x, t),
    "dual-with-grad": lambda f, x, t: tangent(f, x.clone().requires_grad_(), t).detach(),
}


def tangent(function: Callable[[Tensor], Tensor], input: Tensor, direction: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(input, direction))).tangent


@each_call
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # vmap runs the operators in a loop
def test_transforms_give_what_plain_pytorch_gives(transform: str, call: Call) -> None:
    module, plain = Captured(call), Captured(call, plain=True)
    input, direction = input_of(call), input_of(call, seed=9)
    actual, expected = (TRANSFORMS[transform](m, input, direction) for m in (module, plain))
    torch.testing.assert_close(actual, expected, rtol=2e-3, atol=1e-4)


def test_what_takes_plain_pytorch_says_so(caplog: pytest.LogCaptureFixture) -> None:
    _native.log_fallback.cache_clear()
    module, input = Captured(CALLS["relu_pool2d"]), input_of(CALLS["relu_pool2d"])
    torch.func.grad(module)(input)
    torch.func.jvp(module, (input,), (input,))
    for reason in ("a transform of torch.func", "forward-mode differentiation"):
        assert f"relu_pool2d runs as plain PyTorch: {reason}" in caplog.text


# ---- networks ----

NETWORKS = {"FCN": models.FCN, "UNet": models.UNet}


class Training(nn.Module):
    """A network and its loss."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        return self.network.loss(images, labels)


@pytest.mark.parametrize("network", NETWORKS)
def test_network_that_was_exported_saved_and_loaded_trains(network: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    eager = Training(NETWORKS[network](num_classes=CLASSES))
    images, labels = make((2, 3, 64, 48)), make_labels((2, 64, 48), CLASSES)
    program = torch.export.export(eager, (images, labels))
    assert any("fastseg.conv_relu_pool2d" in str(node.target) for node in program.graph.nodes)
    torch.export.save(program, tmp_path / "network.pt2")
    loaded = torch.export.load(tmp_path / "network.pt2").module()
    optimisers = [torch.optim.SGD(module.parameters(), lr=0.1) for module in (eager, loaded)]
    for _ in range(3):
        for module, optimiser in zip((eager, loaded), optimisers, strict=True):
            optimiser.zero_grad()
            module(images, labels).backward()
        expected = dict(eager.named_parameters())
        for name, parameter in loaded.named_parameters():
            torch.testing.assert_close(parameter.grad, expected[name].grad)
        for optimiser in optimisers:
            optimiser.step()


# ---- ONNX ----


class Prediction(nn.Module):
    """Labels, confidence and counts of logits."""

    labels = make_labels((2, 96, 80), CLASSES, seed=3)

    def forward(self, logits: Tensor) -> tuple[Tensor, ...]:
        labels, confidence = functional.upsample_argmax(logits, (96, 80), return_confidence=True)
        return labels, confidence, functional.upsample_confusion_matrix(logits, self.labels, ignore_index=1)


class Together(nn.Module):
    """The calls one after the other, each with an input of its own: an export costs more than what is in it."""

    def __init__(self, calls: Iterable[Call]) -> None:
        super().__init__()
        self.calls = nn.ModuleList(map(Captured, calls))

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(call(input) for call, input in zip(self.calls, inputs, strict=True))


SHAPES = {name: tuple(input_of(call).shape) for name, call in GRADIENTS.items()}
ONNX: dict[str, tuple[Callable[[], nn.Module], list[tuple[int, ...]]]] = {
    **{name: (lambda call=call: Captured(call), [SHAPES[name]]) for name, call in GRADIENTS.items()},
    "together": (lambda: Together(GRADIENTS.values()), list(SHAPES.values())),
    "prediction": (Prediction, [MAP]),
    "FCN": (lambda: models.FCN(num_classes=CLASSES), [(1, 3, 64, 48)]),
    "UNet": (lambda: models.UNet(num_classes=CLASSES), [(1, 3, 64, 48)]),
}


@pytest.mark.parametrize(
    "module",
    [pytest.param(name, marks=pytest.mark.full if name in GRADIENTS or name == "UNet" else []) for name in ONNX],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # torch's exporter and onnxscript
def test_onnx(module: str) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    network, inputs = ONNX[module][0]().eval(), [make(shape, seed=7) for shape in ONNX[module][1]]
    buffer = io.BytesIO()
    torch.onnx.export(network, tuple(inputs), dynamo=True, verbose=False).save(buffer)
    session = onnxruntime.InferenceSession(buffer.getvalue(), providers=["CPUExecutionProvider"])
    given = {put.name: input.numpy() for put, input in zip(session.get_inputs(), inputs, strict=True)}
    results, expected = session.run(None, given), network(*inputs)
    for actual, wanted in zip(results, expected if isinstance(expected, tuple) else (expected,), strict=True):
        torch.testing.assert_close(torch.from_numpy(actual), wanted.detach(), rtol=1e-4, atol=1e-4)


# ---- ahead of time, and on several devices ----


@pytest.mark.filterwarnings("ignore")  # Inductor's own
def test_packages_of_aotinductor_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")  # where Inductor refuses what it finds to have a decomposition
    module = Prediction().eval()
    program = torch.export.export(module, (make(MAP),))
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "prediction.pt2"))
    logits = make(MAP, seed=7)
    torch.testing.assert_close(list(torch._inductor.aoti_load_package(package)(logits)), list(module(logits)))


def check_shards(rank: int) -> None:
    """Values and gradients of every call with tensors on a mesh of two processes."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = torch.distributed.init_device_mesh("cpu", (2,))

    def run(call: Call, place: Callable[[Tensor, bool], Tensor]) -> list[Tensor]:
        # Labels have images, as input has; weights and biases don't.
        tensors = [place(t.detach(), at < call.data) for at, t in enumerate(call.tensors(size=(80, 72)))]
        options = {key: place(o, False) if isinstance(o, Tensor) else o for key, o in call.options.items()}
        leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in tensors]
        options.pop("return_indices", None)
        result = replace(call, options=options).outputs(*leaves)[0]
        return [result, *torch.autograd.grad(result.sum(), [leaf for leaf in leaves if leaf.requires_grad])]

    for name, call in GRADIENTS.items():
        whole = run(call, lambda tensor, _: tensor)
        for placement in (Shard(0), Replicate()):
            shards = run(
                call,
                lambda tensor, has_images, placement=placement: distribute_tensor(
                    tensor, mesh, [placement if has_images else Replicate()]
                ),
            )
            for actual, expected in zip(shards, whole, strict=True):
                torch.testing.assert_close(
                    actual.full_tensor(), expected, rtol=1e-3, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}"
                )


def test_shards_of_a_batch_give_what_the_batch_gives(tmp_path: Path) -> None:
    run_two_ranks(check_shards, tmp_path)
