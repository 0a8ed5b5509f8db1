"""The benchmark suite: right operators are verified and timed, wrong ones are refused, and the report is written."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor

from fastseg import functional

pytest.importorskip("benchmarks", reason="benchmarks/ is part of a checkout, not of the installed package")
from benchmarks import report, suite
from benchmarks.bench_conv_relu_pool2d import ConvReLUPool2dCase
from benchmarks.bench_cross_entropy import CrossEntropyCase
from benchmarks.bench_models import ModelCase

CASES = [
    ConvReLUPool2dCase((1, 3, 12, 14), 5, input_gradient=True),
    ConvReLUPool2dCase((1, 3, 16, 18), 4, kernel=7, stride=2, padding=3, pool=(3, 2, 1)),
    CrossEntropyCase((2, 5, 4, 6)),
    CrossEntropyCase((6, 4)),
    ModelCase("FCN", (1, 3, 16, 16)),
    ModelCase("UNet", (1, 3, 16, 16)),
]
ONE_ROUND = suite.Effort(seconds=0, least_rounds=1, most_rounds=1)


@pytest.fixture(autouse=True)
def _without_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "KINDS", (suite.FASTSEG, suite.EAGER))  # compilers take seconds, and are not ours


@pytest.mark.parametrize("training", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_contestant_is_verified_and_timed(case: suite.Case, training: bool) -> None:
    outcomes = suite.measure.__wrapped__(case, training, ONE_ROUND)
    assert set(outcomes) == set(case.contestants)
    for outcome in outcomes.values():
        assert isinstance(outcome, suite.Measured), outcome
        ((forward, backward),) = outcome.rounds
        assert forward > 0
        assert (backward > 0) == training
        assert (outcome.peak is None) == (sys.platform != "linux")


def slightly_off(operator: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *args, **kwargs: operator(*args, **kwargs) * 1.001


def wrong_gradient(operator: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def call(*args: Tensor, **kwargs: object) -> Tensor:
        output = operator(*args, **kwargs)
        return output * 1.001 - output.detach() * 0.001

    return call


def without_bias(operator: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda input, weight, bias, **kwargs: operator(input, weight, bias * 0, **kwargs)


@pytest.mark.parametrize(
    ("case", "mistake"),
    [(CASES[0], slightly_off), (CASES[0], wrong_gradient), (CASES[0], without_bias), (CASES[2], slightly_off)],
    ids=lambda value: getattr(value, "name", None) or value.__name__,
)
def test_a_wrong_operator_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, case: suite.Case, mistake: Callable[..., Callable[..., Tensor]]
) -> None:
    name = "cross_entropy" if isinstance(case, CrossEntropyCase) else "conv_relu_pool2d"
    monkeypatch.setattr(functional, name, mistake(getattr(functional, name)))
    for contestant, outcome in suite.measure.__wrapped__(case, True, ONE_ROUND).items():
        assert isinstance(outcome, AssertionError if contestant.kind == suite.FASTSEG else suite.Measured)


def entry(kind: str, timing: str, seconds: list[float]) -> dict:
    info = {
        "operator": "pool",
        "case": "2x2",
        "timing": timing,
        "kind": kind,
        "layout": "nchw",
        "peak_bytes": 3 * 2**20,
    }
    return {"extra_info": info, "stats": {"data": seconds}}


def test_report(tmp_path: Path) -> None:
    failed = {"operator": "pool", "case": "2x2", "timing": "forward", "kind": "compile", "layout": "nchw"}
    run = {
        "machine_info": {
            "machine": "x86_64", "system": "Linux", "python_version": "3.11", "cpu": {"brand_raw": "A CPU", "count": 2},
            "fastseg": {"fastseg": "0.1", "torch": "2.13", "cpu_isa": "avx2", "threads": 1},
        },
        "commit_info": {"id": "0123456789abcdef", "dirty": False},
        "datetime": "2026-11-22T10:00:00+00:00",
        "benchmarks": [
            # Twice as fast in most rounds, though the quotient of the medians is 1.5.
            entry("fastseg", "forward", [0.001, 0.004, 0.010]),
            entry("eager", "forward", [0.002, 0.006, 0.020]),
            entry("fastseg", "backward", [0.2]),
            entry("eager", "backward", [0.1]),
        ],
        "failures": [failed | {"error": "InductorError: no compiler\nmore"}],
    }  # fmt: skip
    path = tmp_path / "results" / "report.md"
    report.write(run, path)
    text = path.read_text()
    assert "A CPU, 2 cores" in text
    assert "2.00x (1.75 - 2.00)" in text
    assert "**0.50x**" in text
    assert "4.00 (2.50 - 7.00) | - | 6.00 (4.00 - 13.0) | - | failed" in text
    assert "* pool 2x2, forward, compile NCHW: `InductorError: no compiler`" in text
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
