"""Attribution maps lie on what a class is found by, and move with it."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from fastseg.explanation import Method, explain
from fastseg.models import FCN

pytest.importorskip("captum", reason="captum isn't installed")
pytestmark = pytest.mark.filterwarnings("ignore:Setting backward hooks:UserWarning", "ignore:Input Tensor:UserWarning")

SIDE = 48


class Detector(nn.Module):
    """Finds bright pixels: class 1 where a 3x3 mean is above a half, class 2 nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Conv2d(1, 1, 3, padding=1, bias=False)
        self.classify = nn.Conv2d(1, 3, 1)
        nn.init.constant_(self.mean.weight, 1 / 9)
        self.classify.weight.data = torch.tensor([0.0, 1, 0]).view(3, 1, 1, 1)
        self.classify.bias.data = torch.tensor([0.0, -0.5, -9])

    def forward(self, images: Tensor) -> Tensor:
        return self.classify(self.mean(images).relu())


def image_of(row: int, column: int) -> Tensor:
    image = torch.zeros(1, SIDE, SIDE)
    image[:, row : row + 10, column : column + 10] = 1
    return image


def centre(map: Tensor) -> Tensor:
    weights = map.clamp(min=0) / map.clamp(min=0).sum()
    places = torch.arange(SIDE, dtype=torch.float32)
    return torch.stack([(weights.sum(1) * places).sum(), (weights.sum(0) * places).sum()])


@pytest.mark.parametrize("method", get_args(Method))
def test_the_map_moves_with_its_object(method: Method) -> None:
    model = Detector()
    maps = {at: explain(model, image_of(*at), 1, method) for at in ((4, 6), (20, 30))}
    for (row, column), map in maps.items():
        assert map.shape == (SIDE, SIDE)
        inside = map[row - 1 : row + 11, column - 1 : column + 11].sum() / map.sum()
        assert inside > 0.95
        torch.testing.assert_close(centre(map), torch.tensor([row + 4.5, column + 4.5]), rtol=0, atol=0.1)
    assert model.training  # as it was


@pytest.mark.parametrize("method", get_args(Method))
def test_of_a_compiled_network_of_ours(method: Method) -> None:
    model = FCN(in_channels=1, num_classes=3, widths=(4, 8)).eval()
    expected = explain(model, image_of(4, 6), 1, method, region=torch.ones(1, 1, dtype=torch.bool))
    model.compile(backend="eager")
    found = explain(model, image_of(4, 6), 1, method, region=torch.ones(1, 1, dtype=torch.bool))
    torch.testing.assert_close(found, expected)
    assert found.shape == (SIDE, SIDE)


def test_of_a_compiled_network_that_has_run() -> None:
    network = pytest.importorskip("fastseg.training.networks").Network(Detector(), 3).eval()
    image, region = image_of(4, 6), torch.ones(1, 1, dtype=torch.bool)
    expected = explain(network, image, 1, region=region)
    network.compile(backend="eager")
    network.logits(image[None])
    torch.testing.assert_close(explain(network, image, 1, region=region), expected)


def test_integrated_gradients_add_up_to_what_they_explain() -> None:
    model, image = Detector(), image_of(4, 6)
    region = torch.ones(SIDE, SIDE, dtype=torch.bool)
    found = explain(model, image, 1, "integrated_gradients", region=region)
    logits = model(torch.stack([image, torch.zeros_like(image)]))[:, 1].sum((1, 2))
    torch.testing.assert_close(found.sum(), (logits[0] - logits[1]).detach(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "lime"}, "method: expected one of gradcam"),
        ({"target": 3}, r"target: expected a class in \[0, 3\), got 3"),
        ({"target": 2}, "target: class 2 isn't found in the image"),
        ({"model": nn.Conv2d(1, 3, 1), "region": torch.ones(1, 1)}, "layer: the network has no convolution"),
    ],
)
def test_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        explain(**({"model": Detector(), "image": image_of(4, 6), "target": 1} | arguments))
