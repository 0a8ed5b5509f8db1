"""The stages of a run: what each executes, for how long at most, and how it is run and logged."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from time import perf_counter
from types import MappingProxyType
from typing import NamedTuple

REPOSITORY = Path(__file__).parents[2]
MARK = "== "  # begins the line of a stage's output that the summary repeats; its last one counts

# A stage's process gets this long to end by itself, and leave its results, before it is killed.
GRACE_SECONDS = 3.0

HANGING_SECONDS = 40  # of a test

# Inductor would start a pool of as many processes as there are cores for each worker, and there is a worker for each.
NO_POOLS = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}

BUDGET_SECONDS = 480.0  # of a whole run, where nothing else is said
SHARE_OF_TIMING = 0.35


class Stage(NamedTuple):
    """A stage: its command, and how many seconds it may take.

    Args:
        name: What the summary calls it.
        seconds: Its limit.
        command: What is run, in the repository's root.
        environment: Variables beside this process's own.
        decisive: Whether its failure ends the run.
        beside_next: Whether the next stages begin before it has ended; the first that isn't beside waits for it.
    """

    name: str
    seconds: float
    command: list[str]
    environment: Mapping[str, str] = MappingProxyType({})
    decisive: bool = False
    beside_next: bool = False


class Outcome(NamedTuple):
    """How a stage ended: "passed", "failed", or "out of time"; how long it took, and its last marked line."""

    name: str
    status: str
    seconds: float
    headline: str


def _module(name: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", name, *arguments]


def _pytest(workers: int, *arguments: str) -> list[str]:
    # pytest-benchmark warns under pytest-xdist, and warnings are errors; a failed test needn't stop the others.
    distribution = ["-n", str(workers), "--dist=worksteal"] if workers > 1 else []
    hanging = ["-o", f"faulthandler_timeout={HANGING_SECONDS}"]  # then it says where
    return _module("pytest", "-q", "-p", "no:cacheprovider", "-p", "no:benchmark", *hanging, *distribution, *arguments)


PARITY = [
    f"tests/{name}.py"
    for name in (
        "ops/test_cross_entropy", "kernels/test_labels", "ops/test_upsample_cross_entropy", "ops/test_upsample_argmax",
        "ops/test_upsample_confusion_matrix", "ops/test_upsample_threshold", "ops/test_upsample_mask_argmax",
        "ops/test_class_sums", "ops/test_relu_pool2d", "ops/test_conformance", "ops/test_memory",
    )
]  # fmt: skip
CONVOLUTIONS = ["tests/ops/test_conv_relu_pool2d_fields.py", "tests/ops/test_conv_relu_pool2d.py"]
BEHAVIOUR = ["tests/kernels/test_cuda.py", "tests/kernels/test_cuda_memory.py"]
SMOKE = "tests/ops/test_smoke.py"
# What the tests of more elements than 32 bits count have in their names: each takes the GPU alone.
LARGE = "2_to_the_31"
MOST_CASES = "--most=5"  # of a test: each compiles kernels of its own, which takes a core one to two seconds
A_FEW_CASES = ("--strength=1", "--most=3")  # of a rehearsal


def gpu_stages(out: Path, seconds_for_timing: float) -> list[Stage]:
    """The stages on a machine with a GPU."""
    cores = os.cpu_count() or 1
    on_gpu = ["--device=cuda", "--shuffled"]
    install = ["pip", "install", "--no-index", "--no-build-isolation", "--no-deps", "-q", "-e", "."]
    behaviour = ["-m", "gpu", *BEHAVIOUR, "-k"]
    timing = str(out / "timing.json")
    return [
        Stage("versions", 30, _module("benchmarks.gpu.versions")),
        Stage(
            "build", 90, _module(*install), {"CMAKE_ARGS": "-DFASTSEG_PORTABLE_ONLY=ON"}, decisive=True,
            beside_next=True,
        ),
        Stage("compile", 60, _module("benchmarks.gpu.compiling", "--json", str(out / "compile.json"))),
        Stage("smoke", 60, _pytest(cores, "-x", "--device=cuda", "--tf32=off", SMOKE), decisive=True),
        Stage("peers", 120, _module("benchmarks.gpu.timing", "--device=cuda", "--compile"), beside_next=True),
        Stage("parity", 100, _pytest(cores, "--tf32=off", *on_gpu, MOST_CASES, *PARITY, *CONVOLUTIONS)),
        Stage("parity, TF32", 40, _pytest(cores, "--tf32=on", *on_gpu, *CONVOLUTIONS, "-k", "float32")),
        Stage("behaviour", 110, _pytest(cores, *behaviour, f"not {LARGE} and not parity_suite"), NO_POOLS),
        Stage("behaviour, large", 60, _pytest(1, *behaviour, LARGE)),
        Stage(
            "timing", 180,
            _module("benchmarks.gpu.timing", "--device=cuda", "--json", timing, f"--seconds={seconds_for_timing:.0f}"),
        ),
        Stage("profile", 60, _module("benchmarks.gpu.profiling", "--timing", timing)),
    ]  # fmt: skip


def rehearsal_stages(out: Path) -> list[Stage]:
    """The same on a machine without a GPU: less of each, interpreted or on the CPU."""
    interpreted = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    timing = str(out / "timing.json")
    return [
        Stage("versions", 60, _module("benchmarks.gpu.versions")),
        Stage("compile", 120, _module("benchmarks.gpu.compiling", "--few", "--json", str(out / "compile.json"))),
        Stage("smoke", 120, _pytest(1, "-x", *A_FEW_CASES, SMOKE), interpreted, decisive=True),
        Stage("parity", 120, _pytest(1, *A_FEW_CASES, *PARITY[1:2]), interpreted),
        Stage("behaviour", 60, _pytest(1, "-m", "gpu", *BEHAVIOUR)),
        Stage("peers", 120, _module("benchmarks.gpu.timing", "--device=cpu", "--compile")),
        Stage(
            "timing", 120,
            _module("benchmarks.gpu.timing", "--device=cpu", "--json", timing, "--seconds=60", "--kinds=fastseg,eager"),
        ),
        Stage("profile", 60, _module("benchmarks.gpu.profiling", "--timing", timing)),
    ]  # fmt: skip


def only(stages: list[Stage], names: list[str]) -> list[Stage]:
    """The stages of some names; one whose next stage is left out runs alone, for a later one may need it."""
    kept = []
    for stage, following in zip(stages, [*stages[1:], None], strict=True):
        if stage.name.split(",")[0] in names:
            beside = stage.beside_next and following is not None and following.name.split(",")[0] in names
            kept.append(stage._replace(beside_next=beside))
    return kept


class Process:
    """A running stage, whose output goes to this process's and to a log."""

    def __init__(self, stage: Stage, log: Path, limit: float) -> None:
        self.stage, self.limit, self.headline = stage, limit, ""
        self.start, self.end = perf_counter(), None
        environment = {**os.environ, **stage.environment, "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            stage.command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors="replace", start_new_session=True,
        )  # fmt: skip
        self.reader = threading.Thread(target=self._copy, args=(log,), daemon=True)
        self.reader.start()

    def _copy(self, log: Path) -> None:
        with log.open("a") as file:
            for line in self.process.stdout:
                file.write(line)
                file.flush()
                print(f"[{self.stage.name}] {line}", end="", flush=True)
                if line.startswith(MARK):
                    self.headline = line.removeprefix(MARK).strip()
                elif "pytest" in self.stage.command and (" passed" in line or " failed" in line):
                    self.headline = line.strip("= \n")

    def wait(self) -> Outcome:
        """Waits for its end, or ends it."""
        status = "passed"
        try:
            code = self.process.wait(max(self.limit - (perf_counter() - self.start), 0.1))
            status = "passed" if code == 0 else f"failed ({code})"
        except subprocess.TimeoutExpired:
            status = "out of time"
            self._signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):  # it is killed below
                self.process.wait(GRACE_SECONDS)
        seconds = perf_counter() - self.start
        self._signal(signal.SIGKILL)  # what the stage itself has started and left
        self.process.wait()
        self.reader.join(GRACE_SECONDS)
        self.process.stdout.close()
        return Outcome(self.stage.name, status, seconds, self.headline)

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):  # nothing of it runs any more
            os.killpg(self.process.pid, number)


def run(stages: list[Stage], out: Path, budget: float) -> list[Outcome]:
    """Runs stages one after the other until the budget's seconds are over; how each ended."""
    end, log = perf_counter() + budget, out / "log.txt"
    outcomes: list[Outcome] = []
    beside: list[Process] = []
    for stage in stages:
        left = end - perf_counter() - GRACE_SECONDS
        if left <= 0:
            outcomes.append(Outcome(stage.name, "no time left", 0.0, ""))
            continue
        process = Process(stage, log, min(stage.seconds, left))
        beside.append(process)
        if stage.beside_next:
            continue
        ended = [one.wait() for one in beside]
        failed = [one.stage for one, outcome in zip(beside, ended, strict=True) if outcome.status != "passed"]
        outcomes += ended
        beside = []
        (out / "summary.md").write_text(table(outcomes))
        if any(stage.decisive for stage in failed):
            break
    return outcomes


def table(outcomes: list[Outcome]) -> str:
    """The summary."""
    lines = ["| stage | | seconds | |", "| --- | --- | ---: | --- |"]
    lines += [f"| {o.name} | {o.status} | {o.seconds:.1f} | {o.headline} |" for o in outcomes]
    return "\n".join(lines) + "\n"
