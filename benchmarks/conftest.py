"""pytest's side of the suite: options, the grid of benchmarks, and how measured rounds reach pytest-benchmark."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

import fastseg
from benchmarks.suite import FORWARD, FULL, QUICK, TIMINGS, Case, Contestant, Measured, measure

FAILURES = pytest.StashKey[list[dict[str, str]]]()


class RecordedClock:
    """A timer for pytest-benchmark that stands still but for `advance`: it replays rounds that were timed before."""

    __name__ = "interleaved rounds"

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        """Let ``seconds`` pass."""
        self.now += seconds


CLOCK = RecordedClock()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="measure a few cases in a few rounds")


def pytest_configure(config: pytest.Config) -> None:
    # The peers' warnings (inductor's, for one) are not ours to turn into errors.
    config.addinivalue_line("filterwarnings", "default")
    config.stash[FAILURES] = []
    if fastseg.info()["cpu"] != "native":
        raise pytest.UsageError(f"fastseg's C++ kernels are not active: {fastseg.info()['cpu']}")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every case of a module, each timing of it, each contestant; the contestants of a case one after the other."""
    quick = metafunc.config.getoption("--quick")
    operator = metafunc.function.__name__.removeprefix("test_")
    metafunc.parametrize(
        ("case", "timing", "contestant"),
        [
            pytest.param(
                case, timing, contestant,
                id=f"{case.name}-{timing}-{contestant.kind}-{contestant.layout}",
                marks=pytest.mark.benchmark(timer=CLOCK, group=f"{operator} {case.name} {timing}"),
            )
            for case in metafunc.module.CASES if case.quick or not quick
            for timing in TIMINGS
            for contestant in case.contestants
        ],
    )  # fmt: skip


@pytest.fixture
def record(
    request: pytest.FixtureRequest, benchmark: BenchmarkFixture, case: Case, timing: str, contestant: Contestant
) -> Callable[[], None]:
    """Hands the measured rounds of one contestant to pytest-benchmark, or raises what made it fail."""

    def run() -> None:
        entry = {
            "operator": request.function.__name__.removeprefix("test_"),
            "case": case.name,
            "timing": timing,
            **contestant._asdict(),
        }
        effort = QUICK if request.config.getoption("--quick") else FULL
        outcome = measure(case, timing != FORWARD, effort)[contestant]
        if not isinstance(outcome, Measured):
            request.config.stash[FAILURES].append(entry | {"error": f"{type(outcome).__name__}: {outcome}"})
            raise outcome
        benchmark.extra_info.update(entry, peak_bytes=outcome.peak)
        seconds = outcome.seconds(timing)
        rounds = iter(seconds)
        benchmark.pedantic(lambda: CLOCK.advance(next(rounds)), rounds=len(seconds))

    return run


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["fastseg"] = fastseg.info()


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]) -> None:
    output_json["failures"] = config.stash[FAILURES]
