"""The benchmark suite's OpenVINO: verified and timed as all others where it is installed, left out where it isn't."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastseg.testing import MEMORY_FORMATS

pytest.importorskip("benchmarks", reason="benchmarks/ is part of a checkout, not of the installed package")
from benchmarks.cases.bench_conv_relu_pool2d import ConvReLUPool2dCase
from benchmarks.cases.bench_models import ModelCase
from benchmarks.harness import openvino_peer, suite
from benchmarks.harness.devices import CPU, Device
from tests.benchmarks.cases import HALF_CPU, ONE_ROUND, off_by

FIRST_LAYER = ConvReLUPool2dCase((1, 3, 12, 14), 5)
CASES = [
    FIRST_LAYER,
    ConvReLUPool2dCase((1, 3, 16, 18), 4, kernel=7, stride=2, padding=3, pool=(3, 2, 1)),
    ModelCase("FCN", (1, 3, 64, 64)),
    ModelCase("UNet", (1, 3, 24, 24)),
]


class Echo:
    """What stands for OpenVINO where it isn't installed: plain PyTorch, and what was asked of it."""

    def __init__(self) -> None:
        self.layouts: list[str] = []

    def deploy(
        self, function: Callable[..., Tensor], arguments: tuple[Tensor, ...], layout: str
    ) -> Callable[..., Tensor]:
        assert all(tensor.is_contiguous() and not tensor.requires_grad for tensor in arguments)
        self.layouts.append(layout)
        return function


@pytest.fixture
def echo(monkeypatch: pytest.MonkeyPatch) -> Echo:
    echo = Echo()
    monkeypatch.setattr(suite, "KINDS", (suite.FASTSEG, suite.EAGER, suite.OPENVINO))
    monkeypatch.setattr(openvino_peer, "version", lambda: "2026.4")
    monkeypatch.setattr(openvino_peer, "deploy", echo.deploy)
    return echo


def test_openvino_is_verified_and_timed_as_all_others(monkeypatch: pytest.MonkeyPatch, echo: Echo) -> None:
    outcomes = suite.measure.__wrapped__(FIRST_LAYER, False, ONE_ROUND)
    assert [contestant.kind for contestant in outcomes].count(suite.OPENVINO) == 2
    assert echo.layouts == ["nchw", "channels_last"]
    for contestant, outcome in outcomes.items():
        assert isinstance(outcome, suite.Measured), outcome
        if contestant.kind == suite.OPENVINO:
            assert outcome.peak is None  # it keeps its memory from call to call
    monkeypatch.setattr(openvino_peer, "deploy", lambda function, *rest: off_by(1.001)(function))
    for contestant, outcome in suite.measure.__wrapped__(FIRST_LAYER, False, ONE_ROUND).items():
        assert isinstance(outcome, AssertionError if contestant.kind == suite.OPENVINO else suite.Measured)


@pytest.mark.usefixtures("echo")
@pytest.mark.parametrize("training", [False, True], ids=["beside openvino", "without"])
def test_jobs_are_called_untimed_where_openvino_ran_before(monkeypatch: pytest.MonkeyPatch, training: bool) -> None:
    settled: list[suite.Job] = []
    monkeypatch.setattr(suite, "settle", lambda job, device: settled.append(job))
    suite.measure.__wrapped__(FIRST_LAYER, training, ONE_ROUND)
    assert len(settled) == (0 if training else 6)


@pytest.mark.skipif(openvino_peer.version() is None, reason="the extra bench isn't installed")
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("device", [CPU, HALF_CPU], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_openvino_computes_what_plain_pytorch_does(case: suite.Case, device: Device, layout: str) -> None:
    case = dataclasses.replace(case, device=device)
    job = suite.Contestant(suite.OPENVINO, layout).job(case, False)
    suite.Verifier(case, False).verify(job)
    (output,) = job.results()
    assert output.data_ptr() == job.results()[0].data_ptr()  # nothing is copied
    assert output.is_contiguous(memory_format=MEMORY_FORMATS[layout] if output.ndim == 4 else torch.contiguous_format)
    if layout == "nchw":
        assert job.function.input.data_ptr() == job.arguments[0].data_ptr()
