"""The benchmark suite: right operators are verified and timed, wrong ones are refused, and the report is written."""

import dataclasses
import importlib
import pkgutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastseg import functional
from fastseg.testing import make, make_labels

pytest.importorskip("benchmarks", reason="benchmarks/ is part of a checkout, not of the installed package")
pytest.importorskip("matplotlib", reason="matplotlib isn't installed: it comes with the extra [train]")
from benchmarks import __main__, cases
from benchmarks.cases import bench_conv_relu_pool2d
from benchmarks.cases.bench_conv_relu_pool2d import ConvReLUPool2dCase
from benchmarks.cases.bench_cross_entropy import CrossEntropyCase, count_partial_sums
from benchmarks.cases.bench_instance_norm import InstanceNormCase
from benchmarks.cases.bench_models import ModelCase
from benchmarks.harness import compile_time, memory, openvino_peer, suite
from benchmarks.harness.devices import CPU, CUDA, Device, Processor
from benchmarks.reports import report
from tests.benchmarks.cases import DEVICES, HALF_CPU, ONE_ROUND, gradient_off_by, off_by


class AsynchronousProcessor(Processor):
    """A CPU that is timed as a GPU is; counts the work that it gets before calls."""

    asynchronous = True
    leads = 0

    def lead(self) -> None:
        self.leads += 1


FIRST_LAYER = ConvReLUPool2dCase((1, 3, 12, 14), 5, input_gradient=True)
STEM = ConvReLUPool2dCase((1, 3, 16, 18), 4, kernel=7, stride=2, padding=3, pool=(3, 2, 1))
LOGITS = CrossEntropyCase((2, 5, 4, 6))
CASES = [
    FIRST_LAYER,
    STEM,
    LOGITS,
    CrossEntropyCase((6, 4)),
    ModelCase("FCN", (1, 3, 64, 64)),  # large enough that rounding to bfloat16 decides more than a window or two
    ModelCase("UNet", (1, 3, 24, 24)),
]
MODULES = [
    importlib.import_module(f"{cases.__name__}.{module.name}")
    for module in pkgutil.iter_modules(cases.__path__)
    if module.name.startswith("bench_")
]
ALL_CASES = [case for module in MODULES for case in module.CASES]


@pytest.fixture(autouse=True)
def _without_compilers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "KINDS", (suite.FASTSEG, suite.EAGER))  # they take seconds, and are not ours


@pytest.fixture
def all_kinds(monkeypatch: pytest.MonkeyPatch, _without_compilers: None) -> None:
    monkeypatch.setattr(suite, "KINDS", report.KINDS)


# ---- verified and timed ----


@pytest.mark.parametrize("training", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_contestant_is_verified_and_timed(case: suite.Case, device: Device, training: bool) -> None:
    case = dataclasses.replace(case, device=device)
    outcomes = suite.measure.__wrapped__(case, training, ONE_ROUND)
    assert set(outcomes) == set(case.contestants(training))
    for outcome in outcomes.values():
        assert isinstance(outcome, suite.Measured), outcome
        ((forward, backward),) = outcome.rounds
        assert forward > 0
        assert (backward > 0) == training
        assert (outcome.peak is None) == (device is not CUDA and memory.unknown() is not None)


def without_bias(operator: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda input, weight, bias, **kwargs: operator(input, weight, bias * 0, **kwargs)


@pytest.mark.parametrize(
    ("case", "device", "mistake"),
    [
        pytest.param(FIRST_LAYER, CPU, off_by(1.001), id="conv-value"),
        pytest.param(FIRST_LAYER, CPU, gradient_off_by(1.001), id="conv-gradient"),
        pytest.param(FIRST_LAYER, CPU, without_bias, id="conv-bias"),
        pytest.param(LOGITS, CPU, off_by(1.001), id="loss-value"),
        # bfloat16 has an epsilon of 0.8%.
        pytest.param(FIRST_LAYER, HALF_CPU, off_by(1.05), id="conv-value-bfloat16"),
        pytest.param(FIRST_LAYER, HALF_CPU, gradient_off_by(1.05), id="conv-gradient-bfloat16"),
        pytest.param(FIRST_LAYER, HALF_CPU, without_bias, id="conv-bias-bfloat16"),
        pytest.param(LOGITS, HALF_CPU, gradient_off_by(1.05), id="loss-gradient-bfloat16"),
    ],
)
def test_a_wrong_operator_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, case: suite.Case, device: Device, mistake: Callable[..., Callable[..., Tensor]]
) -> None:
    name = "cross_entropy" if isinstance(case, CrossEntropyCase) else "conv_relu_pool2d"
    monkeypatch.setattr(functional, name, mistake(getattr(functional, name)))
    case = dataclasses.replace(case, device=device)
    for contestant, outcome in suite.measure.__wrapped__(case, True, ONE_ROUND).items():
        assert isinstance(outcome, AssertionError if contestant.kind == suite.FASTSEG else suite.Measured)


def test_what_stops_a_case_is_reported_for_everyone(monkeypatch: pytest.MonkeyPatch) -> None:
    def run_out_of_memory(case: suite.Case, training: bool) -> list[Tensor]:
        raise torch.OutOfMemoryError("no memory for the truth")

    monkeypatch.setattr(CrossEntropyCase, "plain", run_out_of_memory)
    outcomes = suite.measure.__wrapped__(LOGITS, False, ONE_ROUND)
    assert set(outcomes) == set(LOGITS.contestants(False))
    assert all(isinstance(outcome, torch.OutOfMemoryError) for outcome in outcomes.values())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "case",
    [
        ConvReLUPool2dCase((2, 3, 48, 48), 8, device=HALF_CPU),
        ConvReLUPool2dCase((1, 32, 32, 32), 8, device=HALF_CPU),
        ConvReLUPool2dCase((1, 3, 96, 96), 8, kernel=7, stride=2, padding=3, pool=(3, 2, 1), device=HALF_CPU),
    ],
    ids=lambda case: case.name,
)
def test_rounding_decides_no_window_that_has_a_gradient(
    monkeypatch: pytest.MonkeyPatch, case: ConvReLUPool2dCase, seed: int
) -> None:
    generator = HALF_CPU._generator
    monkeypatch.setattr(HALF_CPU, "_generator", lambda other: generator(100 * seed + other))
    case = dataclasses.replace(case)  # without what is cached
    images, weight, bias = case.job(False, "nchw", False, torch.float64).arguments
    exact = F.conv2d(images, weight, None, case.stride, case.padding)
    once = (exact + bias[:, None, None]).bfloat16()
    twice = exact.bfloat16() + bias.bfloat16()[:, None, None]  # as cuDNN's convolution and a bias after it
    windows = case.incoming != 0
    assert windows.float().mean() > 0.9
    truth, *rounded = (
        F.max_pool2d(F.relu(convolved), *case.pool, return_indices=True)
        for convolved in (exact + bias[:, None, None], once, twice)
    )
    for values, positions in rounded:
        assert torch.equal(values[windows] > 0, truth[0][windows] > 0)
        passed = windows & (truth[0] > 0)
        assert torch.equal(positions[passed], truth[1][passed])


@pytest.mark.parametrize(
    ("labels", "count"),
    [((65536,), 1), ((2, 64, 64), 2), ((8, 512, 512), 16), ((16, 512, 1024), 64)],
    ids=["rows", "small", "ade20k", "cityscapes"],
)
def test_partial_sums_of_a_loss(labels: tuple[int, ...], count: int) -> None:
    assert count_partial_sums(labels) == count


@pytest.mark.parametrize(
    ("launch_bound", "leads"), [(False, 2), (True, 0)], ids=["device's time", "launches counted in"]
)
def test_other_work_goes_before_the_calls_of_an_asynchronous_device(launch_bound: bool, leads: int) -> None:
    device = AsynchronousProcessor()
    case = dataclasses.replace(LOGITS, device=device, launch_bound=launch_bound)
    seconds = case.job(True, "nchw", True).seconds(device, 2, case.led)
    assert device.leads == leads
    assert min(seconds) > 0
    assert not dataclasses.replace(case, device=CPU).led


# ---- inputs and contestants ----


@pytest.mark.parametrize("device", DEVICES)
def test_inputs_are_the_same_numbers_in_every_dtype(device: Device) -> None:
    rounded = device.make((2, 3, 4, 5), seed=3, layout="channels_last", scale=0.5)
    assert rounded.dtype == device.dtype
    assert rounded.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(rounded.double(), device.make((2, 3, 4, 5), torch.float64, seed=3, scale=0.5))
    assert device.make((2,), requires_grad=True).requires_grad


def test_inputs_on_the_cpu_are_those_of_the_tests() -> None:
    assert torch.equal(CPU.make((3, 4), seed=5), make((3, 4), seed=5))
    assert torch.equal(CPU.make_labels((3, 4), 7, seed=5), make_labels((3, 4), 7, seed=5))


@pytest.mark.usefixtures("all_kinds")
@pytest.mark.parametrize(
    ("case", "kinds"),
    [
        (FIRST_LAYER, {"fastseg": 2, "eager": 2, "compile": 2}),
        (bench_conv_relu_pool2d.CASES[6], {"fastseg": 2, "eager": 2, "compile": 2, "max-autotune": 1}),
        (CrossEntropyCase((65536, 10), device=CUDA), {"fastseg": 1, "eager": 1, "compile": 1}),
    ],
    ids=["cpu", "cuda goal", "rows"],
)
@pytest.mark.parametrize("version", [None, "2026.4"], ids=["no openvino", "openvino"])
def test_contestants(
    monkeypatch: pytest.MonkeyPatch, case: suite.Case, kinds: dict[str, int], version: str | None
) -> None:
    monkeypatch.setattr(openvino_peer, "version", lambda: version)

    def count(training: bool) -> dict[str, int]:
        contestants = [contestant.kind for contestant in case.contestants(training)]
        return {kind: contestants.count(kind) for kind in contestants}

    assert count(training=True) == kinds
    # Of convolutions and models on a CPU alone.
    assert count(training=False) == (kinds | {"openvino": 2} if version and case is FIRST_LAYER else kinds)


def test_every_device_has_cases_of_its_own() -> None:
    names = [(case.device.name, type(case), case.name) for case in ALL_CASES]
    assert len(set(names)) == len(names)
    for device, without in ((CPU, set()), (CUDA, {InstanceNormCase})):  # the operator has no kernel of a GPU's
        own = [case for case in ALL_CASES if case.device is device]
        assert {type(case) for case in own} == {type(case) for case in ALL_CASES} - without
        assert any(case.quick for case in own)


@pytest.mark.usefixtures("all_kinds")
def test_compilers_are_left_out_when_their_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "COMPILERS", compile_time.Compilers())
    monkeypatch.setitem(compile_time.COMPILE_TIME, "cpu", compile_time.CompileTime({suite.COMPILE: 5}, until=1e9))
    suite.COMPILERS.spent[CrossEntropyCase, suite.COMPILE] = 6.0
    for contestant, outcome in suite.measure.__wrapped__(LOGITS, False, ONE_ROUND).items():
        left_out = contestant.kind == suite.COMPILE
        assert isinstance(outcome, compile_time.OutOfTimeError if left_out else suite.Measured)
    with suite.COMPILERS.turn(ConvReLUPool2dCase, "cpu", suite.COMPILE):  # another operator has time of its own
        pass
    assert suite.COMPILERS.spent[ConvReLUPool2dCase, suite.COMPILE] > 0
    monkeypatch.setitem(compile_time.COMPILE_TIME, "cpu", compile_time.CompileTime({}, until=0))
    with (
        pytest.raises(compile_time.OutOfTimeError, match="0 s after the start"),
        suite.COMPILERS.turn(CrossEntropyCase, "cpu", "max-autotune"),
    ):
        pass
    with suite.COMPILERS.turn(CrossEntropyCase, "cpu", suite.EAGER):
        pass


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens where there is no CUDA device")
def test_a_missing_device_is_a_plain_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "report.md"
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--device", "cuda", "--out", str(path)])
    with pytest.raises(SystemExit, match="2"):
        __main__.main()
    assert f"--device cuda: torch {torch.__version__} sees no CUDA device" in capsys.readouterr().err
    assert not path.exists()
