"""fastseg.fuse and fastseg.unfuse: the pass over torch.fx's graphs."""

import copy
import io
import logging
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fusion_cases import CASES, operators
from fusion_networks import Net, assert_trains_alike, batch
from torch import Tensor, nn
from torch.fx.proxy import TraceError

import fastseg
from fastseg.functional import conv_relu_pool2d
from fastseg.fusion.patterns import conv_relu
from fastseg.testing import assert_parity, make, values_and_gradients

LOSSES = ["upsample_cross_entropy", "upsample_cross_entropy"]
# What only a graph with sizes and dtypes can tell.
UNTOLD = ("indices", "no batch", "kept dim", "skip used first", "no pool", "alone", "norm and sum", "wide, used")


class Calls(nn.Module):
    """A function of tensors as a model."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, a: Tensor, b: Tensor, c: Tensor) -> Any:
        return self.function(a, b, c)


class CallsOfFive(Calls):
    def forward(self, a: Tensor, b: Tensor, c: Tensor, d: Tensor, e: Tensor) -> Any:
        return self.function(a, b, c, d, e)


class CallsOfSeven(Calls):
    def forward(self, a: Tensor, b: Tensor, c: Tensor, d: Tensor, e: Tensor, f: Tensor, g: Tensor) -> Any:
        return self.function(a, b, c, d, e, f, g)


MODELS = {3: Calls, 5: CallsOfFive, 7: CallsOfSeven}


@pytest.mark.parametrize("name", [name for name in CASES if "probabilities" not in name])
def test_the_same_values_and_gradients(name: str) -> None:
    case = CASES[name]
    tensors = case.tensors(torch.float32, "nchw")
    fused = fastseg.fuse(MODELS[len(tensors)](case.function))
    actual = values_and_gradients(fused, tensors)
    plain = values_and_gradients(case.function, tensors)
    truth = values_and_gradients(case.function, tensors, torch.float64)
    if not any(word in name for word in UNTOLD):
        assert operators(fastseg.report(fused)) == list(case.operators)
    assert_parity(actual, plain, truth, terms=case.terms)


@pytest.fixture
def net() -> Net:
    net = Net()
    net.level.norm.running_var.uniform_(0.5, 2)
    return net


@pytest.mark.parametrize("training", [True, False])
def test_training_steps(net: Net, training: bool) -> None:
    net.train(training)
    made = []

    def run(model: nn.Module) -> nn.Module:
        made.append(fastseg.fuse(model, inplace=True))
        return made[-1]

    assert_trains_alike(net, run, [batch(seed=seed) for seed in range(3)])
    # Both graphs of the forward without labels are in the report, and the one with them.
    pools = ["conv_relu_pool2d", "conv_relu_pool2d", *(["relu_pool2d"] if training else [])]
    assert operators(fastseg.report(made[0])) == [*pools, "upsample_argmax", *LOSSES]


def test_a_copy_or_in_place(net: Net) -> None:
    keys = list(net.state_dict())
    fused = fastseg.fuse(net)
    assert fused is not net
    assert "forward" not in vars(net)
    assert list(fused.state_dict()) == keys
    assert [name for name, _ in fused.named_modules()] == [name for name, _ in net.named_modules()]
    parameters = list(net.parameters())
    assert fastseg.fuse(net, inplace=True) is net
    assert all(p is q for p, q in zip(parameters, net.parameters(), strict=True))
    assert fastseg.unfuse(net) is not net
    assert "forward" in vars(net)
    assert fastseg.unfuse(net, inplace=True) is net
    assert "forward" not in vars(net)
    with pytest.raises(TypeError, match="model: expected what"):
        fastseg.report(net)


def test_modes_arguments_and_parameters_are_those_of_the_call(net: Net) -> None:
    """The modes may change, also of one module, and so may arguments and parameters."""
    fused, (images, labels) = fastseg.fuse(net), batch()
    plain = net
    for change in (lambda m: m.eval(), lambda m: m.train(), lambda m: m.level.norm.eval(), frozen):
        for model in (fused, plain):
            change(model)
        for arguments in ((images, labels), (images,), (images, None)):
            torch.testing.assert_close(fused(*arguments), plain(*arguments))
        torch.testing.assert_close(fused(x=images, target=labels), plain(images, target=labels))
        torch.testing.assert_close(dict(fused.state_dict()), dict(plain.state_dict()))


def frozen(model: Net) -> None:
    with torch.no_grad():
        model.head = nn.Conv2d(8, 5, 1, bias=False)
        model.head.weight.fill_(0.5)


def test_copies_and_pickles(net: Net) -> None:
    fused, given = fastseg.fuse(net.eval()), batch()
    expected = fused(*given)
    file = io.BytesIO()
    torch.save(fused, file)
    file.seek(0)
    for other in (
        copy.deepcopy(fused),
        pickle.loads(pickle.dumps(fused)),
        torch.load(file, weights_only=False),
    ):
        assert vars(other)["forward"].model is other
        assert torch.equal(other(*given), expected)
        nn.init.zeros_(other.head.weight)
        assert not torch.equal(other(*given), expected)
    assert torch.equal(fused(*given), expected)


def test_hooks_are_called(net: Net) -> None:
    """Also those that are registered afterwards: the graph without the module's own call isn't used then."""
    fused, given, seen = fastseg.fuse(net.eval()), batch(), []
    fused(*given)
    handle = fused.features[0].register_forward_hook(lambda module, args, output: seen.append(output))
    fused(*given)
    assert len(seen) == 1
    assert any("hooks" in leftover.reason for leftover in fastseg.report(fused).left)
    handle.remove()
    fused(*given)
    assert len(seen) == 1


def test_fused_parts_and_fusing_twice(net: Net) -> None:
    net.eval()
    net.features = fastseg.fuse(net.features)
    fused, given = fastseg.fuse(fastseg.fuse(net)), batch()
    assert "forward" not in vars(fused.features)
    torch.testing.assert_close(fused(*given), Net.forward(net, *given))
    assert "forward" not in vars(fastseg.unfuse(net).features)


def test_nothing_matches(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU())
    assert fastseg.fuse(model, inplace=True) is model
    assert "forward" not in vars(model)
    assert str(fastseg.report(model)) == "fastseg: nothing replaced, 0 left: the model runs as it was"
    assert "nothing replaced" in caplog.text


def test_the_report(net: Net, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "fastseg"):
        report = fastseg.report(fastseg.fuse(net))
    assert {(r.operator, r.place.module) for r in report.replaced} == {
        ("conv_relu_pool2d", "level.conv"),
        ("relu_pool2d", "level.relu"),  # in training
        ("conv_relu_pool2d", "features.0"),
        ("upsample_argmax", ""),
    }
    argmax = next(r for r in report.replaced if r.operator == "upsample_argmax")
    file, _, line = argmax.place.source.rpartition(":")
    with open(file) as lines:
        assert "F.interpolate(low" in lines.readlines()[int(line) - 1]
    assert not any(r.saved_bytes for r in report.replaced)  # sizes aren't known
    assert str(report) in caplog.text


def test_a_convolution_without_a_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weight tells a part of whether Winograd's algorithm serves it, the call the rest."""
    served = []
    monkeypatch.setattr(conv_relu, "conv_relu_pool2d", lambda *a, **k: served.append(a) or conv_relu_pool2d(*a, **k))
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2)).eval()
    fused = fastseg.fuse(model)
    assert [(r.pattern, r.place.module) for r in fastseg.report(fused).replaced] == [
        ("conv2d + [batch_norm] + relu", "0")
    ]
    for shape, serves in (((2, 8, 16, 16), True), ((1, 8, 9, 9), False), ((8, 16, 16), False)):
        x = make(shape)
        torch.testing.assert_close(fused(x), model(x))
        assert bool(served) == serves
        served.clear()


class Forward(nn.Module):
    """A model that torch.fx can't trace rightly."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor, *rest: Tensor) -> Tensor:
        if self.kind == "control flow" and x.sum() > 0:
            return x
        if self.kind == "random tensor":
            return x + torch.rand(3)
        if self.kind == "new module":
            return nn.ReLU()(x)
        with torch.set_grad_enabled(self.kind != "no grad"):
            return F.relu(x)


@pytest.mark.parametrize("kind", ["control flow", "random tensor", "no grad", "new module", "variadic"])
def test_what_fx_cannot_trace(kind: str) -> None:
    class Model(Forward):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    with pytest.raises(TraceError):
        fastseg.fuse(Forward(kind) if kind == "variadic" else Model(kind))


def test_sizes_that_only_the_call_knows() -> None:
    """Calls with tensors that an operator doesn't serve run as they did, errors included."""

    class Model(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            up = F.interpolate(x, scale_factor=2.5)
            return F.cross_entropy(up, y), up.argmax(1)

    fused, plain = fastseg.fuse(Model()), Model()
    for shape, target in (((2, 3, 4), (2, 10)), ((2, 3, 4, 5, 3), (2, 10, 12, 7)), ((2, 3, 5, 7), (2, 12, 17))):
        x, y = torch.randn(shape), torch.zeros(target, dtype=torch.int64)
        torch.testing.assert_close(fused(x, y), plain(x, y))
    probabilities = torch.rand(2, 3, 10, 10)
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(fused(x, probabilities), plain(x, probabilities))
    for wrong in (torch.zeros(2, 9, 10, dtype=torch.int64), torch.zeros(2, 10, 10, dtype=torch.int32)):
        messages = []
        for model in (fused, plain):
            with pytest.raises(RuntimeError) as error:
                model(x, wrong)
            messages.append(str(error.value))
        assert messages[0] == messages[1]
