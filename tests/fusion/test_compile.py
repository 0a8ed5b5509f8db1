"""torch.compile(model, backend="fastseg"): training, inference, and what else a model goes through."""

import copy
import subprocess
import sys
import textwrap
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastseg
from fastseg.fusion.rewriting import rewrite
from fastseg.testing import assert_parity, make, make_labels
from tests.fusion.back_end_cases import upsampled_loss_of_rows
from tests.fusion.cases import CLASSES, compiled, operators
from tests.fusion.networks import EVALUATED, TRAINED, Net, assert_trains_alike, batch


@pytest.fixture
def net() -> Net:
    net = Net()
    net.level.norm.running_var.uniform_(0.5, 2)
    net.level.norm.running_mean.normal_()
    return net


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dynamic", [None, True])
def test_training_steps(net: Net, training: bool, dynamic: bool | None) -> None:
    """In evaluation the statistics are frozen, as in fine-tuning, and the first level is fused, too."""
    net.train(training)
    made = []

    def run(model: nn.Module) -> Any:
        made.append(compiled(model, fullgraph=True, dynamic=dynamic))
        return made[-1]

    assert_trains_alike(net, run, [batch(seed=seed) for seed in range(3)])
    assert operators(fastseg.report(made[0])) == (TRAINED if training else EVALUATED)


def test_training_steps_with_inductor(net: Net) -> None:
    torch._dynamo.reset()
    assert_trains_alike(net, lambda model: torch.compile(model, backend="fastseg"), [batch(seed=s) for s in range(2)])


def test_weights_are_saved_as_they_lie_by_inductor(net: Net) -> None:
    """And not as copies in channels_last, a second set of weights."""
    torch._dynamo.reset()
    fused = torch.compile(net, backend="fastseg")
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        fused(*batch())
    weights = [weight for weight in net.parameters() if weight.ndim == 4]
    alike = [tensor.data_ptr() for tensor in kept if tensor.shape in {weight.shape for weight in weights}]
    assert alike
    assert set(alike) <= {weight.data_ptr() for weight in weights}


def test_inference_with_inductor(net: Net) -> None:
    torch._dynamo.reset()
    net.eval()
    fused = torch.compile(net, backend="fastseg", options={"inner": "inductor", "max_fusion_size": 32})
    images, _ = batch()
    with torch.no_grad():
        assert torch.equal(fused(images), net(images))
    assert operators(fastseg.report(fused)) == ["conv_relu_pool2d", "conv_relu_pool2d", "upsample_argmax"]


def test_channels_last(net: Net) -> None:
    net.to(memory_format=torch.channels_last)
    images = [(x.contiguous(memory_format=torch.channels_last), y) for x, y in (batch(seed=seed) for seed in range(2))]
    assert_trains_alike(net, lambda model: compiled(model, fullgraph=True), images)


@pytest.mark.parametrize("where", ["around", "within"])
def test_autocast(net: Net, where: str) -> None:
    """Around the compiled model, and as a context that the model itself enters."""

    class Within(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, *args: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return self.net(*args)

    net.eval()
    exact = copy.deepcopy(net).double()
    model = Within() if where == "within" else net
    fused, (images, labels) = compiled(model, fullgraph=True), batch()
    results = []
    for call in (fused, model, exact):
        with torch.autocast("cpu", torch.bfloat16, enabled=call is not exact and where == "around"):
            loss = call(images.double() if call is exact else images, labels)
        parameters = exact.parameters() if call is exact else net.parameters()
        results.append([loss.detach(), *torch.autograd.grad(loss, parameters)])
    actual, plain, truth = results
    assert actual[0].dtype == torch.float32
    assert operators(fastseg.report(fused)) == EVALUATED
    # The values are in bfloat16, whatever the dtype that their sums come in.
    assert_parity(*([tensor.to(torch.bfloat16) for tensor in tensors] for tensors in (actual, plain)), truth)


def test_dynamic_shapes_compile_once(net: Net) -> None:
    """A graph for the loss and one for the prediction serve all sizes."""
    torch._dynamo.reset()
    counter = CompileCounter()
    fused = torch.compile(net.eval(), backend=counter, fullgraph=True)
    for step, size in enumerate([(16, 24), (20, 32), (36, 28)]):
        images, labels = batch(size, images=2 + step)
        for tensor, dimensions in ((images, (0, 2, 3)), (labels, (0, 1, 2))):
            for dimension in dimensions:
                torch._dynamo.mark_dynamic(tensor, dimension)
        torch.testing.assert_close(fused(images, labels), net(images, labels))
        assert torch.equal(fused(images), net(images))
    assert counter.operators == [EVALUATED, ["conv_relu_pool2d"] * 2 + ["upsample_argmax"]]


def test_rows_of_dynamic_shapes_compile_once() -> None:
    torch._dynamo.reset()
    fused = torch.compile(upsampled_loss_of_rows, backend=(counter := CompileCounter()), fullgraph=True)
    for images, *size in ((2, 5, 7), (3, 9, 11)):
        x, y = make((images, CLASSES, *size)), make_labels((images, 4 * size[0], 3 * size[1]), CLASSES)
        for tensor, dimensions in ((x, (0, 2, 3)), (y, (0, 1, 2))):
            for dimension in dimensions:
                torch._dynamo.mark_dynamic(tensor, dimension)
        torch.testing.assert_close(fused(x, y, None), upsampled_loss_of_rows(x, y, None))
    assert counter.operators == [["upsample_cross_entropy"]]


class CompileCounter:
    """The backend, and what it put into each graph."""

    def __init__(self) -> None:
        self.operators: list[list[str]] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        replaced, _ = rewrite(graph)
        self.operators.append(sorted(replacement.operator for replacement in replaced))
        return graph.forward


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # TorchDynamo's own, at values between graphs
def test_graph_breaks(net: Net) -> None:
    """Each graph has its own replacements, and one report holds them all."""

    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            level = self.net.pool(self.net.level(x))
            torch._dynamo.graph_break()
            logits = self.net.head(self.net.features(level))
            torch._dynamo.graph_break()
            return self.net.loss(F.interpolate(logits, y.shape[1:], mode="bilinear"), y)

    model = Broken().eval()
    fused, given = compiled(model), batch()
    torch.testing.assert_close(fused(*given), model(*given))
    report = fastseg.report(fused)
    assert len(report.graphs) == 3
    assert operators(report) == ["conv_relu_pool2d"] * 2 + ["upsample_cross_entropy"]


def test_changes_of_mode_are_seen(net: Net) -> None:
    fused, given = compiled(net), batch()
    for training in (True, False, True):
        fused.train(training)
        before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
        loss = fused(*given)
        after = {name: tensor.clone() for name, tensor in net.state_dict().items()}
        net.load_state_dict(before)
        torch.testing.assert_close(loss, net(*given))
        torch.testing.assert_close(after, dict(net.state_dict()))
    assert len(fastseg.report(fused).graphs) == 2


def test_the_state_dict_goes_both_ways(net: Net) -> None:
    fused, given = compiled(net), batch()
    fused(*given)
    other = Net()
    other.load_state_dict({name.removeprefix("_orig_mod."): tensor for name, tensor in fused.state_dict().items()})
    torch.testing.assert_close(fused.eval()(*given), other.eval()(*given))
    fused.load_state_dict({f"_orig_mod.{name}": torch.zeros_like(tensor) for name, tensor in net.state_dict().items()})
    assert not fused(given[0]).any()


@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_activation_checkpoints(net: Net, inner: str) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features, self.head, self.loss = net.features, net.head, net.loss

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            features = checkpoint(self.features, x.repeat(1, 3, 1, 1)[:, :8], use_reentrant=False)
            return self.loss(F.interpolate(self.head(features), y.shape[1:], mode="bilinear"), y)

    torch._dynamo.reset()
    made = []

    def run(model: nn.Module) -> Any:
        made.append(torch.compile(model, backend="fastseg", options={"inner": inner}, fullgraph=True))
        return made[-1]

    assert_trains_alike(Checkpointed(), run, [batch(seed=seed) for seed in range(2)])
    assert operators(fastseg.report(made[0])) == ["conv_relu_pool2d", "upsample_cross_entropy"]


# ---- options and errors ----


def test_unknown_options(net: Net) -> None:
    for options in ({"inner": "fast"}, {"inner": "inductor", "max_autotoon": True}):
        torch._dynamo.reset()
        with pytest.raises(Exception, match=r"options: expected .*(fast|max_autotoon)"):
            torch.compile(net, backend="fastseg", options=options)(*batch())


def test_no_compiler_at_hand(net: Net, caplog: pytest.LogCaptureFixture) -> None:
    """Then plain PyTorch runs the rewritten graph, and the log says so."""
    torch._inductor.cpp_builder.cpp_compiler_search.cache_clear()
    torch._dynamo.reset()
    # Not monkeypatch, which deletes the option of this module in the end.
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}):
        fused, given = torch.compile(net.eval(), backend="fastseg"), batch()
        torch.testing.assert_close(fused(*given), net(*given))
    assert "the graph runs without Inductor, by plain PyTorch: " in caplog.text
    assert len(fastseg.report(fused).replaced) == 4


def test_what_dynamo_cannot_capture_gets_its_own_error() -> None:
    def function(x: Tensor) -> Tensor:
        return F.relu(x) if x.sum() > 0 else x

    with pytest.raises(torch._dynamo.exc.Unsupported, match="Data-dependent"):
        compiled(function, fullgraph=True)(torch.randn(3))


def test_the_backend_needs_no_import() -> None:
    """PyTorch finds it by its entry point."""
    code = """
        import torch
        print("fastseg" in torch._dynamo.list_backends())
        layers = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.ReLU(), torch.nn.MaxPool2d(2))
        compiled = torch.compile(layers, backend="fastseg", options={"inner": "eager"})
        compiled(torch.zeros(1, 1, 8, 8))
        import fastseg
        print(len(fastseg.report(compiled).replaced))
        """
    process = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert process.stdout.split() == ["True", "1"]
