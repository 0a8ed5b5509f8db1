"""torch.fx's symbolic trace, and what is built on it, keep layers and operators whole."""

from __future__ import annotations

import copy
import importlib.util
import pickle

import pytest
import torch
from torch import Tensor, fx, nn

import fastseg
from fastseg import functional
from fastseg._torchvision import prepare_torchvision

LAYERS = {
    "Conv2d": fastseg.Conv2d(3, 4, 3, padding=1),
    "ConvReLUPool2d": fastseg.ConvReLUPool2d(3, 4, 3, padding=1),
    "ConvReLUPool2d-reflect": fastseg.ConvReLUPool2d(3, 4, 3, padding=1, padding_mode="reflect"),
    "ReLUPool2d": fastseg.ReLUPool2d(2),
    "UpsampleArgmax": fastseg.UpsampleArgmax(scale_factor=2),
    "UpsampleThreshold": fastseg.UpsampleThreshold(scale_factor=2),
}
LOSSES = {
    "CrossEntropyLoss": fastseg.CrossEntropyLoss(),
    "UpsampleCrossEntropyLoss": fastseg.UpsampleCrossEntropyLoss(),
    "CrossEntropyDiceLoss": fastseg.CrossEntropyDiceLoss(),
    "UpsampleCrossEntropyDiceLoss": fastseg.UpsampleCrossEntropyDiceLoss(),
    "FocalLoss": fastseg.FocalLoss(),
    "UpsampleFocalLoss": fastseg.UpsampleFocalLoss(),
}


def calls(graph: fx.Graph) -> list[object]:
    return [node.target for node in graph.nodes if node.op.startswith("call")]


@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_leaves(name: str) -> None:
    model, input = nn.Sequential(LAYERS[name]), torch.randn(2, 3, 16, 16)
    traced = fx.symbolic_trace(model)
    assert [node.op for node in traced.graph.nodes] == ["placeholder", "call_module", "output"]
    assert traced.get_submodule("0") is LAYERS[name]
    assert torch.equal(traced(input), model(input))
    assert torch.equal(pickle.loads(pickle.dumps(traced))(input), model(input))


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_leaves(name: str) -> None:
    class Training(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loss = copy.deepcopy(LOSSES[name])

        def forward(self, input: Tensor, target: Tensor) -> Tensor:
            return self.loss(input, target=target)

    model = Training()
    traced = fx.symbolic_trace(model)
    assert calls(traced.graph) == ["loss"]
    size = 8 if "Upsample" in name else 16
    arguments = torch.randn(2, 3, size, size), torch.randint(0, 3, (2, 16, 16))
    assert torch.equal(traced(*arguments), model(*arguments))


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_traced_itself_calls_its_operator(name: str) -> None:
    fixed = {"size": None} if "Upsample" in name else None  # an optional argument of its forward
    traced, input = fx.symbolic_trace(LAYERS[name], fixed), torch.randn(2, 3, 16, 16)
    operator = {
        "Conv2d": "conv2d", "ReLUPool2d": "relu_pool2d", "UpsampleArgmax": "upsample_argmax",
        "UpsampleThreshold": "upsample_threshold",
    }.get(name, "conv_relu_pool2d")  # fmt: skip
    assert calls(traced.graph)[-1] is getattr(functional, operator)
    assert torch.equal(traced(input), LAYERS[name](input))


def test_functions_are_leaves() -> None:
    def network(input: Tensor) -> Tensor:
        return functional.upsample_argmax(functional.relu_pool2d(input, 2), scale_factor=2)

    traced, input = fx.symbolic_trace(network), torch.randn(2, 3, 64, 64)
    assert calls(traced.graph) == [functional.relu_pool2d, functional.upsample_argmax]
    assert torch.equal(traced(input), network(input))


def test_traced_stages_train() -> None:
    model = fastseg.models.FCN(num_classes=4)
    stages, input = nn.Sequential(*model.stages, model.classifier), torch.randn(2, 3, 32, 32)
    traced = fx.symbolic_trace(stages)
    gradients = []
    for network in (stages, traced):
        stages.zero_grad()
        network(input).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in stages.parameters()])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*gradients, strict=True))


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="torchvision isn't installed")
def test_torchvisions_feature_extractor_names_layers() -> None:
    prepare_torchvision()
    from torchvision.models.feature_extraction import create_feature_extractor

    model = nn.Sequential(fastseg.ConvReLUPool2d(3, 4, 3, padding=1), fastseg.ReLUPool2d(2), nn.Conv2d(4, 2, 1))
    extractor, input = create_feature_extractor(model, ["0", "1"]), torch.randn(2, 3, 16, 16)
    features = extractor(input)
    assert torch.equal(features["0"], model[0](input))
    assert torch.equal(features["1"], model[:2](input))
