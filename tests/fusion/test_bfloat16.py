"""Convolutions of bfloat16 on a CPU with instructions for their products, and on one without."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastseg
from fastseg import _bfloat16
from fastseg.testing import MEMORY_FORMATS, assert_parity, make
from tests.fusion.cases import compiled, operators

SHAPE = (2, 8, 20, 20)
by_instructions = pytest.mark.parametrize("multiplies", [False, True], ids=["emulated", "by-instructions"])
each_layout = pytest.mark.parametrize("layout", MEMORY_FORMATS)


class Layers(nn.Module):
    """Of every kind of convolution: before a ReLU, before none, with a step, by depth, and of one pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU())
        self.step = nn.Sequential(nn.Conv2d(16, 16, 3, 2, bias=False), nn.BatchNorm2d(16), nn.SiLU())
        self.depth = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.head = nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.depth(self.step(self.stem(x))))


def layers() -> Layers:
    torch.manual_seed(0)
    return Layers().eval()


@pytest.fixture
def with_instructions(multiplies: bool, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(_bfloat16, "cpu_multiplies_bfloat16", lambda: multiplies)
    return multiplies


def results(network: nn.Module, call: Callable[..., Tensor], input: Tensor, autocast: bool = False) -> list[Tensor]:
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = call(input)
    gradients = torch.autograd.grad(output.float().square().sum(), list(network.parameters()))
    return [output.detach(), *gradients]


@each_layout
@by_instructions
@pytest.mark.parametrize("autocast", [False, True])
def test_layers_give_what_they_gave(with_instructions: bool, autocast: bool, layout: str) -> None:
    network, input = layers(), make(SHAPE, torch.bfloat16, layout=layout).float()
    network.bfloat16().float().to(memory_format=MEMORY_FORMATS[layout])
    truth = results(network.double(), network, input.double())
    dtype = torch.float32 if autocast else torch.bfloat16
    network.to(dtype)
    fused, input = compiled(network), input.to(dtype)
    found, plain = (results(network, call, input, autocast) for call in (fused, network))
    assert [tensor.dtype for tensor in found] == [tensor.dtype for tensor in plain]
    assert found[0].stride() == plain[0].stride()
    rounded = [[tensor.bfloat16() for tensor in tensors] for tensors in (found, plain)]
    assert_parity(*rounded, truth)
    expected = [] if with_instructions else ["conv2d", "conv2d", "conv_relu_pool2d"]
    assert operators(fastseg.report(fused)) == expected


@by_instructions
def test_a_pool_is_worth_a_kernel_all_the_same(with_instructions: bool) -> None:
    tensors = [make(shape, torch.bfloat16, seed=seed) for seed, shape in enumerate((SHAPE, (6, 8, 3, 3), (6,)))]
    fused = compiled(lambda *args: F.max_pool2d(F.relu(F.conv2d(*args, padding=1)), 2))
    fused(*tensors)
    assert operators(fastseg.report(fused)) == ["conv_relu_pool2d"]


@by_instructions
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_other_dtypes_stay_as_they_are(with_instructions: bool, dtype: torch.dtype) -> None:
    fused = compiled(lambda *args: F.conv2d(*args) * 1)
    fused(make(SHAPE, dtype), make((6, 8, 1, 1), dtype, seed=1))
    assert operators(fastseg.report(fused)) == []


@pytest.mark.parametrize("multiplies", [False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_only_the_result_is_rounded(with_instructions: bool, dtype: torch.dtype) -> None:
    tensors = [make(SHAPE, dtype), make((6, 8, 1, 1), dtype, seed=1), make((6,), dtype, seed=2)]
    fused = compiled(lambda *args: F.conv2d(*args) * 1)
    with torch.autocast("cpu", torch.bfloat16):
        found = fused(*tensors)
    torch.testing.assert_close(found, F.conv2d(*(t.float() for t in tensors)).bfloat16(), rtol=0, atol=0)
