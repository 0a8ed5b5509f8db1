"""What the tests of the benchmark suite share: devices to measure on, a short effort, and mistakes to find."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("benchmarks", reason="benchmarks/ is part of a checkout, not of the installed package")
from benchmarks.harness import suite
from benchmarks.harness.devices import CPU, CUDA, Processor


class HalfProcessor(Processor):
    """A CPU that is measured in bfloat16, as a GPU is."""

    dtype = torch.bfloat16


HALF_CPU = HalfProcessor()
DEVICES = [
    pytest.param(CPU, id="cpu"),
    pytest.param(HALF_CPU, id="cpu-bfloat16"),
    pytest.param(
        CUDA,
        id="cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
    ),
]
# What every run's JSON says, whatever it measured.
RUN = {
    "machine_info": {
        "machine": "x86_64", "system": "Linux", "python_version": "3.11", "cpu": {"brand_raw": "A CPU", "count": 2},
        "fastseg": {"fastseg": "0.1", "torch": "2.13"},
    },
    "commit_info": {"id": "0123456789abcdef", "dirty": False},
    "datetime": "2026-11-22T10:00:00+00:00",
    "ceilings": {"bytes_per_second": 1e9, "operations_per_second": 2e9},
    "seconds": 321.0,
}  # fmt: skip
ONE_ROUND = suite.Effort(seconds=0, least_rounds=1, most_rounds=1)


def off_by(factor: float) -> Callable[..., Callable[..., Tensor]]:
    def slightly_off(operator: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *args, **kwargs: operator(*args, **kwargs) * factor

    return slightly_off


def gradient_off_by(factor: float) -> Callable[..., Callable[..., Tensor]]:
    def wrong_gradient(operator: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Tensor, **kwargs: object) -> Tensor:
            output = operator(*args, **kwargs)
            return output * factor - output.detach() * (factor - 1)

        return call

    return wrong_gradient
