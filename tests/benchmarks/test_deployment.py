"""OpenVINO and ONNX Runtime in the benchmarks: verified and timed as all others, left out where not installed."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastseg.testing import MEMORY_FORMATS

pytest.importorskip("benchmarks", reason="benchmarks/ is part of a checkout, not of the installed package")
from benchmarks.cases.bench_conv_relu_pool2d import ConvReLUPool2dCase
from benchmarks.cases.bench_models import ModelCase
from benchmarks.harness import suite
from benchmarks.harness.devices import CPU, Device
from tests.benchmarks.cases import HALF_CPU, ONE_ROUND, off_by

PEERS = list(suite.DEPLOYMENTS)


@dataclasses.dataclass(frozen=True)
class FirstLayer(ConvReLUPool2dCase):
    """A layer that every peer is asked for."""

    @property
    def deployments(self) -> tuple[str, ...]:
        return tuple(PEERS)


FIRST_LAYER = FirstLayer((1, 3, 12, 14), 5)
CASES = [
    FIRST_LAYER,
    ConvReLUPool2dCase((1, 3, 16, 18), 4, kernel=7, stride=2, padding=3, pool=(3, 2, 1)),
    ModelCase("FCN", (1, 3, 64, 64)),
    ModelCase("UNet", (1, 3, 24, 24)),
]


class Echo:
    """What stands for a peer where it isn't installed: plain PyTorch, and what was asked of it."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.layouts: list[str] = []

    def deploy(
        self, function: Callable[..., Tensor], arguments: tuple[Tensor, ...], layout: str
    ) -> Callable[..., Tensor]:
        assert all(tensor.is_contiguous() and not tensor.requires_grad for tensor in arguments)
        self.layouts.append(layout)
        return function


@pytest.fixture(params=PEERS)
def echo(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Echo:
    echo = Echo(request.param)
    monkeypatch.setattr(suite, "KINDS", (suite.FASTSEG, suite.EAGER, echo.kind))
    monkeypatch.setattr(suite.DEPLOYMENTS[echo.kind], "version", lambda: "2026.4")
    monkeypatch.setattr(suite.DEPLOYMENTS[echo.kind], "deploy", echo.deploy)
    return echo


def test_a_peer_is_verified_and_timed_as_all_others(monkeypatch: pytest.MonkeyPatch, echo: Echo) -> None:
    outcomes = suite.measure.__wrapped__(FIRST_LAYER, False, ONE_ROUND)
    assert [contestant.kind for contestant in outcomes].count(echo.kind) == 2
    assert echo.layouts == ["nchw", "channels_last"]
    for contestant, outcome in outcomes.items():
        assert isinstance(outcome, suite.Measured), outcome
        if contestant.kind == echo.kind:
            assert outcome.peak is None  # it keeps its memory from call to call
    wrong = off_by(1.001)
    monkeypatch.setattr(suite.DEPLOYMENTS[echo.kind], "deploy", lambda function, *rest: wrong(function))
    for contestant, outcome in suite.measure.__wrapped__(FIRST_LAYER, False, ONE_ROUND).items():
        assert isinstance(outcome, AssertionError if contestant.kind == echo.kind else suite.Measured)


@pytest.mark.usefixtures("echo")
@pytest.mark.parametrize("training", [False, True], ids=["beside a peer", "without"])
def test_jobs_are_called_untimed_where_a_peer_ran_before(monkeypatch: pytest.MonkeyPatch, training: bool) -> None:
    settled: list[suite.Job] = []
    monkeypatch.setattr(suite, "settle", lambda job, device: settled.append(job))
    suite.measure.__wrapped__(FIRST_LAYER, training, ONE_ROUND)
    assert len(settled) == (0 if training else 6)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize(
    ("kind", "device"),
    [(suite.OPENVINO, CPU), (suite.OPENVINO, HALF_CPU), (suite.ONNXRUNTIME, CPU)],
    ids=["openvino float32", "openvino bfloat16", "onnxruntime float32"],
)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_peer_computes_what_plain_pytorch_does(case: suite.Case, kind: str, device: Device, layout: str) -> None:
    if suite.DEPLOYMENTS[kind].version() is None:
        pytest.skip("the extra bench isn't installed")
    case = dataclasses.replace(case, device=device)
    job = suite.Contestant(kind, layout).job(case, False)
    suite.Verifier(case, False).verify(job)
    (output,) = job.results()
    assert output.data_ptr() == job.results()[0].data_ptr()  # nothing is copied
    assert output.is_contiguous(memory_format=MEMORY_FORMATS[layout] if output.ndim == 4 else torch.contiguous_format)
    if layout == "nchw":
        assert job.function.input.data_ptr() == job.arguments[0].data_ptr()
