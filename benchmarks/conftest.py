"""pytest's side of the suite: options, the grid of benchmarks, and how measured rounds reach pytest-benchmark."""

from __future__ import annotations

import logging
from collections.abc import Callable
from time import perf_counter
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

import fastseg
from benchmarks.harness import deployment, memory, openvino_peer
from benchmarks.harness.compile_time import OutOfTimeError
from benchmarks.harness.devices import DEVICES, Device
from benchmarks.harness.recording import LogLines, RecordedClock
from benchmarks.harness.roofline import Ceilings, measure_ceilings
from benchmarks.harness.suite import (
    COMPILERS,
    FORWARD,
    FULL,
    QUICK,
    Case,
    Contestant,
    Measured,
    measure,
)

# What goes into the JSON file beside pytest-benchmark's own.
RESULTS: pytest.StashKey[dict[str, Any]] = pytest.StashKey()
CLOCK = RecordedClock()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", choices=list(DEVICES), default="cpu", help="what to measure on")
    parser.addoption("--quick", action="store_true", help="measure a few cases in a few rounds")
    parser.addoption("--sweep", action="store_true", help="measure the sweeps instead of the tables' cases")


def pytest_configure(config: pytest.Config) -> None:
    # The peers' warnings (inductor's, for one) are not ours to turn into errors.
    config.addinivalue_line("filterwarnings", "default")
    device = config.getoption("--device")
    if missing := DEVICES[device].missing():
        raise pytest.UsageError(f"--device {device}: {missing}")
    log = LogLines()
    logging.getLogger("fastseg").addHandler(log)
    config.stash[RESULTS] = {"device": DEVICES[device].describe(), "missing": [], "log": log.lines}
    config.stash[RESULTS]["sweep"] = config.getoption("--sweep")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every case of a module, each timing of it, each contestant; the contestants of a case one after the other."""
    quick, sweep, device = (metafunc.config.getoption(option) for option in ("--quick", "--sweep", "--device"))
    operator = metafunc.function.__name__.removeprefix("test_")
    metafunc.parametrize(
        ("case", "timing", "contestant"),
        [
            pytest.param(
                case, timing, contestant,
                id=f"{case.name}-{timing}-{contestant.kind}-{contestant.layout}",
                marks=pytest.mark.benchmark(timer=CLOCK, group=f"{operator} {case.name} {timing}"),
            )
            for case in metafunc.module.CASES
            if case.device.name == device and (case.quick or not quick) and (case.swept is not None) == sweep
            for timing in case.timings
            for contestant in case.contestants(timing != FORWARD)
        ],
    )  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Training comes first: where there is no time to compile everything, it is what counts."""
    items.sort(key=lambda item: hasattr(item, "callspec") and item.callspec.params.get("timing") == FORWARD)


@pytest.fixture(scope="module")
def device(request: pytest.FixtureRequest) -> Device:
    """What is measured on; its ceilings are measured before each operator, and the highest of the run count."""
    device, results = DEVICES[request.config.getoption("--device")], request.config.stash[RESULTS]
    before = Ceilings(**results.get("ceilings", {"bytes_per_second": 0, "operations_per_second": 0}))
    results["ceilings"] = Ceilings(*map(max, before, measure_ceilings(device)))._asdict()
    return device


@pytest.fixture
def record(
    request: pytest.FixtureRequest, benchmark: BenchmarkFixture, device: Device, case: Case, timing: str,
    contestant: Contestant,
) -> Callable[[], None]:  # fmt: skip
    """Hands the measured rounds of one contestant to pytest-benchmark, or raises what made it fail."""

    def run() -> None:
        entry = {
            "operator": request.function.__name__.removeprefix("test_"),
            "case": case.name,
            "timing": timing,
            **contestant._asdict(),
            "swept": case.swept,
        }
        effort = (QUICK if request.config.getoption("--quick") else FULL)[device.name]
        outcome = measure(case, timing != FORWARD, effort)[contestant]
        if not isinstance(outcome, Measured):
            skipped = isinstance(outcome, OutOfTimeError)
            reason = str(outcome) if skipped else f"{type(outcome).__name__}: {outcome}"
            request.config.stash[RESULTS]["missing"].append(entry | {"skipped": skipped, "reason": reason})
            if skipped:
                pytest.skip(reason)
            raise outcome
        # A launch isn't bounded by the roofline.
        work = () if case.launch_bound else case.work(timing)
        benchmark.extra_info.update(entry, peak_bytes=outcome.peak, returned_bytes=outcome.returned, work=work)
        seconds = outcome.seconds(timing)
        rounds = iter(seconds)
        benchmark.pedantic(lambda: CLOCK.advance(next(rounds)), rounds=len(seconds))

    return run


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["fastseg"] = fastseg.info()


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]) -> None:
    output_json |= config.stash[RESULTS]
    peers, absent = {}, {}
    if config.getoption("--device") == "cpu":
        absent["peak memory"] = memory.unknown()
        if not config.getoption("--sweep"):
            peers["OpenVINO"] = openvino_peer.version()
            absent["OpenVINO"] = None if peers["OpenVINO"] else f"not installed ({deployment.INSTALL})"
    output_json |= {"peers": peers, "absent": absent}
    output_json |= {"seconds": perf_counter() - COMPILERS.start, "compiling": COMPILERS.seconds()}
