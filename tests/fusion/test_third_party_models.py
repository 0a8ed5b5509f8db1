"""torch.compile(..., backend="fastseg") on third-party models: the same training and the same predictions."""

import copy
import importlib.util
import math

import pytest
import torch
from torch import Tensor, nn

import fastseg
from fastseg.testing import ERROR_FACTOR, assert_parity
from tests.fusion.cases import compiled, operators
from tests.fusion.networks import trained
from tests.fusion.third_party import MODELS, batch, build

pytestmark = [
    pytest.mark.models,
    # Their own use of what newer versions of other packages will do without.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning"),  # TorchDynamo's own, between graphs
]

PIXELS = 4 * 64 * 64

# At a rate of 0.01, batch normalisation of sixteen values and three steps blow an error up by five orders of magnitude:
# float32's doesn't grow as far as it would, and says nothing of float64's.
RATE = 0.001


@pytest.fixture(params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    package = MODELS[request.param].package
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"needs {package}: pip install '.[models]'")
    return request.param


class Step(nn.Module):
    """A model's loss as a model."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.model = name, build(name)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        return MODELS[self.name].run(self.model, images, labels)[0]


def test_three_training_steps(name: str) -> None:
    train(name, Step(name).train(), MODELS[name].training)


@pytest.mark.parametrize("name", ["smp.Unet-resnet18", "transformers.UperNet"], indirect=True)
def test_training_steps_with_frozen_statistics(name: str) -> None:
    """As in fine-tuning: batch normalisation is folded into the convolution then, and both get their gradients."""
    train(name, Step(name).eval(), MODELS[name].evaluation)


def train(name: str, step: nn.Module, expected: list[str]) -> None:
    batches, made = [batch(name, seed) for seed in range(3)], []

    def run(model: nn.Module) -> nn.Module:
        made.append(compiled(model))
        return made[-1]

    def plain(model: nn.Module) -> nn.Module:
        return model

    runs = ((run, torch.float64), (plain, torch.float64), (plain, torch.float32))
    assert_alike_in_float64(step, *(trained(step, batches, *how, RATE) for how in runs))
    assert operators(fastseg.report(made[0])) == expected


def assert_alike_in_float64(
    model: nn.Module, actual: dict[str, Tensor], plain: dict[str, Tensor], single: dict[str, Tensor]
) -> None:
    """Losses, parameters and buffers differ by no more than roundings do.

    In float32 one of millions of values often falls to the other side of a ReLU or a pool, in plain PyTorch as with
    fastseg, and the gradient jumps; in float64 none does. Plain PyTorch's own error there is float32's, scaled.
    """
    eps, scale = torch.finfo(torch.float64).eps, torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    parameters = {key for key, _ in model.named_parameters()}
    groups = {"losses": {"losses"}, "parameters": parameters, "buffers": set(plain) - parameters - {"losses"}}
    for group, keys in groups.items():
        a, p, s = (
            torch.cat([state[key].flatten().double() for key in plain if key in keys] or [torch.zeros(1)])
            for state in (actual, plain, single)
        )
        for norm in (torch.max, lambda error: error.square().mean().sqrt()):
            bound = ERROR_FACTOR * scale * norm((s - p).abs()) + eps * math.sqrt(PIXELS) * norm(p.abs())
            error = norm((a - p).abs())
            assert error <= bound, f"{group}: error {error:.3g} exceeds {bound:.3g}"


def test_predictions_and_losses(name: str) -> None:
    model, run = build(name).eval(), MODELS[name].run
    fused, (images, labels) = compiled(run), batch(name, 0)
    with fastseg.recording() as report:
        actual = fused(model, images, labels)
    plain = run(model, images, labels)
    truth = run(copy.deepcopy(model).double(), images.double(), labels)
    assert_parity(actual[0], plain[0], truth[0], terms=PIXELS)
    different = (actual[1] != truth[1]).sum()
    assert different <= ERROR_FACTOR * (plain[1] != truth[1]).sum() + 1  # of logits that are equal but for rounding
    assert operators(report) == MODELS[name].evaluation
    assert all(replacement.place.source for replacement in report.replaced), report


def test_state_dicts_go_both_ways(name: str) -> None:
    model = build(name)
    keys = list(model.state_dict())
    model.compile(backend="fastseg")
    state = model.state_dict()
    assert list(state) == keys
    build(name).load_state_dict(state)
    model.load_state_dict({key: torch.zeros_like(value) for key, value in state.items()})
    assert not any(parameter.any() for parameter in model.parameters())
