"""fastseg.report and fastseg.recording: what the backend says that it did, and of which model."""

import copy
import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastseg
from tests.fusion.cases import CLASSES, compiled, operators
from tests.fusion.networks import EVALUATED, TRAINED, Net, batch

EAGER: dict[str, Any] = {"backend": "fastseg", "options": {"inner": "eager"}}


@pytest.fixture
def net() -> Net:
    torch._dynamo.reset()
    return Net()


def loss(x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(x, y)


def logits_and_labels() -> tuple[Tensor, Tensor]:
    return torch.randn(2, CLASSES, 4, 4), torch.zeros(2, 4, 4, dtype=torch.int64)


# ---- what it says ----


def test_where_and_why(net: Net, caplog: pytest.LogCaptureFixture) -> None:
    fused, given = compiled(net), batch()
    with caplog.at_level(logging.INFO, "fastseg"):
        fused(*given)
    report = fastseg.report(fused)
    by_module = {replacement.place.module: replacement for replacement in report.replaced}
    assert set(by_module) == {"level.relu", "features.0", "", "auxiliary.1"}
    assert by_module["level.relu"].saved_bytes == 0  # the un-pooled value is the skip
    assert by_module["features.0"].saved_bytes == 2 * 8 * 8 * 12 * 4  # the map before the pool
    assert by_module[""].saved_bytes == 2 * (2 * 5 * 16 * 24) * 4  # the upsampled logits and their softmax
    assert report.saved_bytes == sum(r.saved_bytes or 0 for r in report.replaced)
    source = by_module[""].place.source
    file, _, line = source.rpartition(":")
    with open(file) as lines:
        assert "F.interpolate(low" in lines.readlines()[int(line) - 1]
    text = str(report)
    assert text.splitlines()[:2] == [
        "fastseg: 4 replaced, 66.0 KiB not kept, 0 left",
        "tests.fusion.networks.Net.forward, 1 graph",
    ]
    assert "  replaced conv2d + [batch_norm] + relu + max_pool2d -> conv_relu_pool2d, 6.0 KiB not kept" in text
    assert f"at the outermost forward ({source})" in text
    assert any(text in record.getMessage() for record in caplog.records)


def test_what_was_left() -> None:
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2, dilation=2))
    fused = compiled(layers)
    fused(torch.randn(1, 3, 8, 8))
    (left,) = fastseg.report(fused).left  # once, though two patterns look like it
    assert (left.place.module, left.reason) == ("2", "max_pool2d with dilation")
    expected = f"  left conv2d + [batch_norm] + relu + max_pool2d: max_pool2d with dilation\n    at {left.place}"
    assert str(fastseg.report(fused)).endswith(expected)


def test_a_device_without_kernels_keeps_its_calls() -> None:
    fused = compiled(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2)).to("meta"))
    fused(torch.empty(1, 3, 8, 8, device="meta"))
    report = fastseg.report(fused)
    reason = "the operator would run as plain PyTorch (no kernel for device type 'meta')"
    assert (report.replaced, [left.reason for left in report.left]) == ([], [reason])


def test_nothing_matches() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU())
    fused, x = compiled(model), torch.randn(1, 3, 8, 8)
    assert torch.equal(fused(x), model(x))
    assert str(fastseg.report(fused)).splitlines() == [
        "fastseg: nothing replaced, 0 left: the model runs as it was",
        "torch.nn.modules.container.Sequential, 1 graph",
    ]


class Tagged(Tensor):
    """A tensor that TorchDynamo can't look through, as MONAI's MetaTensor."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        torch._dynamo.graph_break()
        return super().__torch_function__(function, types, args, kwargs)


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # TorchDynamo's own, at values between graphs
def test_a_subclass_of_tensor_leaves_nothing_to_replace(net: Net) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
    fused, x = compiled(model), torch.randn(1, 3, 8, 8)
    fused(x.as_subclass(Tagged))
    report = fastseg.report(fused)
    assert not report.replaced
    assert "of Tagged, whose class overrides __torch_function__: give the model plain tensors" in str(report)
    with fastseg.recording() as plain:
        fused(x)
    assert operators(plain) == ["conv_relu_pool2d"]
    assert "Tagged" not in str(plain)


# ---- whose it is ----


@pytest.mark.parametrize("how", ["in place", "as a whole", "as a function", "a method"])
def test_of_a_model_however_it_was_compiled(net: Net, how: str) -> None:
    def step(x: Tensor, y: Tensor) -> Tensor:
        return net(x, y) * 2

    if how == "in place":
        net.compile(**EAGER)
    kinds = {"in place": net, "as a function": step, "a method": net.forward, "as a whole": net}
    fused = net if how == "in place" else torch.compile(kinds[how], **EAGER)
    assert fastseg.report(fused).summary() == 'no graph yet: compile the model with backend="fastseg", and call it'
    fused(*batch()).backward()
    for of in (fused, net, None):
        assert operators(fastseg.report(of)) == TRAINED
    assert operators(fastseg.report(net.features)) == TRAINED  # the graph that its parameters are in
    assert not fastseg.report(Net()).graphs


def test_of_a_part(net: Net) -> None:
    net.features.compile(**EAGER)
    net.level.compile(**EAGER)
    net(*batch())
    assert fastseg.report(net).graphs == fastseg.report(net.level).graphs  # a bare Sequential isn't compiled


def test_of_a_bare_sequential() -> None:
    """PyTorch (2.13) leaves its own modules' frames alone, whichever backend they are compiled in place for."""
    torch._dynamo.reset()
    layers, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2)), torch.randn(1, 3, 8, 8)
    layers.compile(**EAGER)
    layers(x)
    assert "compiles a bare Sequential by torch.compile(model, ...)" in str(fastseg.report(layers))
    torch.compile(layers, **EAGER)(x)
    assert operators(fastseg.report(layers)) == ["conv_relu_pool2d"]


@pytest.mark.parametrize("reset", [False, True])
def test_of_models_compiled_alike(net: Net, reset: bool) -> None:
    """TorchDynamo runs the first one's graphs for the second, and doesn't ask the backend."""
    models, given = (net, copy.deepcopy(net)), batch()
    for model in models:
        model.compile(**EAGER)
        assert not fastseg.report(model).graphs
        model(*given)
        assert operators(fastseg.report(model)) == TRAINED
        if reset:
            torch.compiler.reset()
            assert not fastseg.report(model).graphs


def test_of_models_with_other_layers(net: Net) -> None:
    wider = Net()
    wider.skip = nn.Conv2d(8, CLASSES, 1, bias=False)
    for model in (net.eval(), wider.eval()):
        torch.compile(model, **EAGER)(*batch())
    assert [operators(fastseg.report(model)) for model in (net, wider)] == [EVALUATED, EVALUATED]
    assert not set(fastseg.report(net).graphs) & set(fastseg.report(wider).graphs)
    assert len(fastseg.report().graphs) == 2


def test_of_parameters_that_are_gone(net: Net) -> None:
    """Their ids may be those of others by now."""
    torch.compile(net, **EAGER)(*batch())
    (graph,) = fastseg.report(net).graphs
    copies = [nn.Parameter(parameter.detach()) for parameter in net.parameters()]
    graph.parameters.update({id(new): old for new, old in zip(copies, [*graph.parameters.values()], strict=True)})
    assert not fastseg.report(nn.ParameterList(copies)).graphs


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # TorchDynamo's own, at values between graphs
def test_of_graphs_without_parameters() -> None:
    """What a graph break leaves to the loss belongs to the model that ran before, wherever its code is."""

    def loss(logits: Tensor, y: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return F.cross_entropy(F.interpolate(logits, y.shape[1:]), y)

    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Conv2d(3, CLASSES, 1)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return loss(self.head(x), y)

    torch._dynamo.reset()
    models, x = (Broken(), Broken()), torch.randn(1, 3, 8, 8)
    for model in models:
        model.compile(**EAGER)
        model(x, torch.zeros(1, 16, 16, dtype=torch.int64))
        report = fastseg.report(model)
        assert (len(report.graphs), operators(report)) == (2, ["upsample_cross_entropy"])
    assert not fastseg.report(Broken()).graphs
    names = [
        graph.name.removeprefix("tests.fusion.test_report.test_of_graphs_without_parameters.")
        for graph in report.graphs
    ]
    assert names == ["Broken.forward", "loss"]


@pytest.mark.parametrize("layer", [nn.CrossEntropyLoss(), nn.Sequential(nn.LogSoftmax(1))], ids=str)
def test_of_pytorchs_own_modules_without_parameters(layer: nn.Module) -> None:
    fused = compiled(layer)
    fused(*logits_and_labels()[: 1 + isinstance(layer, nn.CrossEntropyLoss)])
    assert len(fastseg.report(fused).graphs) == 1
    assert not fastseg.report(nn.ReLU()).graphs


def test_of_functions() -> None:
    first, given = compiled(loss), logits_and_labels()
    second, other = torch.compile(loss, **EAGER), torch.compile(lambda x, y: F.cross_entropy(x, y) * 2, **EAGER)
    first(*given)
    other(*given)
    for fused in (first, second, other, loss):
        report = fastseg.report(fused)
        assert (len(report.graphs), operators(report)) == (1, ["cross_entropy"])
    names = [graph.name for graph in fastseg.report().graphs]
    assert names == ["tests.fusion.test_report.loss", "tests.fusion.test_report.test_of_functions.<lambda>"]


def test_of_other_things() -> None:
    with pytest.raises(TypeError, match="of: expected a module or a function, compiled or not, got <class 'int'>"):
        fastseg.report(3)
    for other in (Net(), torch.compile(Net()), torch.compile(F.relu)):
        assert not fastseg.report(other).graphs


# ---- recordings ----


def test_recordings_hold_what_runs(net: Net) -> None:
    """Also what was compiled before, by whichever function or model."""
    fused, given = compiled(net.eval()), batch()
    other = torch.compile(loss, **EAGER)
    fused(*given)
    with fastseg.recording() as outer:
        assert not outer.graphs
        with fastseg.recording() as inner:
            fused(*given)
            fused(*given)
        other(*logits_and_labels())
        assert len(outer.graphs) == 2
    fused.train()(*given)
    assert operators(inner) == EVALUATED
    assert operators(outer) == sorted([*EVALUATED, "cross_entropy"])
    with fastseg.recording() as nothing:
        net(*given)
    assert str(nothing) == 'fastseg: no graph of backend="fastseg" ran here'


def test_recordings_end_with_errors(net: Net) -> None:
    with pytest.raises(ZeroDivisionError), fastseg.recording() as report:
        raise ZeroDivisionError
    compiled(net)(*batch())
    assert not report.graphs
