"""`torch.utils.flop_counter.FlopCounterMode` counts what it counts in plain PyTorch."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastseg

CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "pool": {},
    "stride-and-dilation": {"stride": (2, 1), "padding": (2, 1), "dilation": (1, 2)},
    "groups": {"groups": 4},
    "no-bias": {"bias": False},
    "skip": {"return_skip": True, "padding": 1},
    "overlapping-windows": {"kernel_size": 4, "padding": 2, "pool_size": 3, "pool_stride": 2},
}


def count(network: nn.Module, input: Tensor) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        output = network(input)
        outputs = output if isinstance(output, tuple) else (output,)
        torch.stack([part.square().sum() for part in outputs]).sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("input_needs_gradient", [False, True])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_conv_relu_pool2d(name: str, input_needs_gradient: bool) -> None:
    arguments = {"kernel_size": 3} | CONVOLUTIONS[name]
    input = torch.randn(2, 8, 40, 44, requires_grad=input_needs_gradient)
    counts = [
        count(layer(8, 16, **arguments), input)
        for layer in (fastseg.ConvReLUPool2d, fastseg.models.plain.PlainConvReLUPool2d)
    ]
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("input_needs_gradient", [False, True])
def test_conv2d(input_needs_gradient: bool) -> None:
    input = torch.randn(1, 32, 64, 64, requires_grad=input_needs_gradient)  # enough for Winograd's algorithm
    counts = [count(layer(32, 32, 3, padding=1), input) for layer in (fastseg.Conv2d, nn.Conv2d)]
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("first", [pytest.param("fastseg", marks=pytest.mark.full), "torch.utils.flop_counter"])
def test_formulas_are_there_whichever_is_imported_first(first: str) -> None:
    code = f"""
import importlib, torch
importlib.import_module({first!r})
import fastseg, torch.utils.flop_counter as counter
assert torch.ops.fastseg.conv_relu_pool2d in counter.flop_registry
assert type(counter.__loader__).__module__.startswith(("importlib", "_frozen_importlib")), counter.__loader__
"""
    subprocess.run([sys.executable, "-c", code], check=True)
