"""One size an operator beside eager PyTorch and torch.compile, verified before it is timed; a line a case at once."""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import math
import statistics
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from benchmarks.cases.bench_conv_relu_pool2d import ConvReLUPool2dCase
from benchmarks.cases.bench_cross_entropy import CrossEntropyCase
from benchmarks.cases.bench_relu_pool2d import ReLUPool2dCase
from benchmarks.cases.bench_upsample_argmax import UpsampleArgmaxCase
from benchmarks.cases.bench_upsample_class_sums import UpsampleClassSumsCase
from benchmarks.cases.bench_upsample_confusion_matrix import UpsampleConfusionMatrixCase
from benchmarks.cases.bench_upsample_cross_entropy import UpsampleCrossEntropyCase
from benchmarks.cases.bench_upsample_mask_argmax import UpsampleMaskArgmaxCase
from benchmarks.cases.bench_upsample_threshold import UpsampleThresholdCase
from benchmarks.gpu import results
from benchmarks.gpu.stages import MARK
from benchmarks.harness.compile_time import COMPILE
from benchmarks.harness.devices import DEVICES, Device
from benchmarks.harness.roofline import Ceilings, measure_ceilings
from benchmarks.harness.suite import (
    BACKWARD,
    BOTH,
    EAGER,
    FASTSEG,
    FORWARD,
    Case,
    Contestant,
    Effort,
    Job,
    Verifier,
    time_rounds,
)

KINDS = (FASTSEG, EAGER, COMPILE)
HOST_CALLS = 20  # in a row: fewer launches than a GPU's queue holds, so that none waits for the GPU
HOST_ROWS = 3
EFFORT = Effort(0.25, 7, 40, warm_up_seconds=0.05)

# The goals' cases first.
CASES: list[Case] = [
    UpsampleCrossEntropyCase((16, 150, 128, 128), (512, 512)),
    UpsampleArgmaxCase((16, 150, 128, 128), (512, 512)),
    CrossEntropyCase((8, 150, 512, 512)),
    CrossEntropyCase((16, 19, 512, 1024)),
    ConvReLUPool2dCase((32, 3, 512, 512), 64),
    UpsampleCrossEntropyCase((16, 19, 128, 256), (512, 1024)),
    ConvReLUPool2dCase((32, 64, 256, 256), 64, input_gradient=True),
    ReLUPool2dCase((32, 64, 256, 256)),
    ConvReLUPool2dCase((32, 3, 512, 512), 64, kernel=7, stride=2, padding=3, pool=(3, 2, 1)),
    UpsampleConfusionMatrixCase((16, 150, 128, 128), (512, 512)),
    UpsampleCrossEntropyCase((16, 19, 128, 256), (512, 1024), dice=True),
    ReLUPool2dCase((32, 64, 256, 256), (3, 2, 1)),
    ConvReLUPool2dCase((16, 128, 128, 128), 128, input_gradient=True),
    UpsampleThresholdCase((16, 20, 128, 128), (512, 512)),
    UpsampleMaskArgmaxCase((16, 100, 128, 128), (512, 512), classes=150),
    UpsampleClassSumsCase((16, 20, 128, 128), (512, 512)),
]
REHEARSED: list[Case] = [
    UpsampleCrossEntropyCase((1, 5, 8, 8), (32, 32)),
    UpsampleArgmaxCase((1, 5, 8, 8), (32, 32)),
]


@dataclasses.dataclass
class Row:
    """A contestant's figures of a pass: milliseconds (quartiles beside the median), microseconds of the host's time."""

    operator: str
    case: str
    layout: str
    kind: str
    timing: str
    ms: float
    low_ms: float
    high_ms: float
    floor_ms: float
    host_us: float
    peak_mib: float | None


def operator_of(case: Case) -> str:
    """The operator's name in tables."""
    return type(case).__module__.removeprefix("benchmarks.cases.bench_")


def host_microseconds(job: Job, device: Device) -> tuple[float, float]:
    """The host's time for the forward and for the backward pass, the mean of calls in a row; the least of some rows.

    In a row, since a host that has waited for the GPU is slower for a while.
    """
    means = []
    for _ in range(HOST_ROWS):
        device.wait()
        forward = backward = 0.0
        with torch.set_grad_enabled(bool(job.wanted)):
            for _ in range(HOST_CALLS):
                start = perf_counter()
                output = job.function(*job.arguments)
                middle = perf_counter()
                if job.wanted:
                    torch.autograd.grad(output, job.wanted, job.incoming)
                forward, backward = forward + middle - start, backward + perf_counter() - middle
                del output
        means.append((1e6 * forward / HOST_CALLS, 1e6 * backward / HOST_CALLS))
    return min(first for first, _ in means), min(second for _, second in means)


def rows_of(case: Case, ceilings: Ceilings, kinds: tuple[str, ...]) -> list[Row]:
    """Verifies the contestants and times them, in turns; what fails is printed and left out."""
    training = case.timings != (FORWARD,)
    torch.compiler.reset()
    verifier, jobs = Verifier(case, training), {}
    for contestant in [Contestant(kind, layout) for kind in kinds for layout in case.layouts]:
        try:
            job = contestant.job(case, training)
            verifier.verify(job)
        except Exception as error:  # a wrong result or a failing compilation is reported, and the others are timed
            print(f"{case.name} {contestant}: {type(error).__name__}: {' '.join(str(error).split())[:600]}", flush=True)
        else:
            jobs[contestant] = job
    del verifier
    gc.collect()
    rows = []
    for contestant, rounds in time_rounds(jobs, EFFORT, case.device, case.led).items():
        peak = case.device.peak_growth(jobs[contestant].results)
        hosts = host_microseconds(jobs[contestant], case.device)
        for timing, seconds, host in (
            (FORWARD, [forward for forward, _ in rounds], hosts[0]),
            (BACKWARD, [backward for _, backward in rounds], hosts[1]),
            (BOTH, [sum(passes) for passes in rounds], sum(hosts)),
        )[: 3 if training else 1]:
            low, median, high = statistics.quantiles([1e3 * s for s in seconds], n=4, method="inclusive")
            rows.append(
                Row(
                    operator_of(case), case.name, contestant.layout, contestant.kind, timing, median, low, high,
                    1e3 * ceilings.seconds(case.work(timing)), host, None if peak is None else peak / 2**20,
                )
            )  # fmt: skip
    return rows


def compile_peers(case: Case) -> None:
    """Runs torch.compile's contestants once: then its cache on disk holds what takes several times their timing."""
    torch.compiler.reset()
    for layout in case.layouts:
        Contestant(COMPILE, layout).job(case, case.timings != (FORWARD,)).results()


def describe(rows: list[Row]) -> list[str]:
    """A line for each layout and pass of a case."""
    lines = []
    for row in rows:
        if row.kind != FASTSEG:
            continue
        others = [other for other in rows if other.timing == row.timing and other.kind != FASTSEG]
        best = min((other.ms for other in others), default=float("nan"))
        same = {other.kind: other.ms for other in others if other.layout == row.layout}
        peers = ", ".join(f"{kind} {ms:.3f}" for kind, ms in same.items())
        lines.append(
            f"{row.operator} {row.case} {row.layout} {row.timing}: {row.ms:.3f} ms ({row.low_ms:.3f} - "
            f"{row.high_ms:.3f}), {best / row.ms:.2f}x the best; {peers}; floor {row.floor_ms:.3f} "
            f"({row.floor_ms / row.ms:.0%}); host {row.host_us:.0f} us; "
            + ("" if row.peak_mib is None else f"peak {row.peak_mib:.0f} MiB")
        )
    return lines


def write(path: Path, device: Device, ceilings: Ceilings, rows: list[Row], seconds: dict[str, float]) -> None:
    """Writes everything so far."""
    content: dict[str, Any] = {
        "device": device.describe(),
        "torch": torch.__version__,
        "ceilings": ceilings._asdict(),
        "rows": [dataclasses.asdict(row) for row in rows],
        "seconds": seconds,
    }
    path.write_text(json.dumps(content, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=list(DEVICES), required=True)
    parser.add_argument("--json", type=Path, help="where the results are written, and beside it the table")
    parser.add_argument("--seconds", type=float, default=math.inf, help="no case is begun after so many")
    parser.add_argument("--kinds", default=",".join(KINDS), help="contestants, with commas between them")
    parser.add_argument("--compile", action="store_true", help="time nothing, but fill torch.compile's cache")
    parser.add_argument("--only", help="cases whose operator and name hold this")
    arguments = parser.parse_args()
    start, device = perf_counter(), DEVICES[arguments.device]
    cases = CASES if device.asynchronous else REHEARSED
    if arguments.only:
        cases = [case for case in cases if arguments.only in f"{operator_of(case)} {case.name}"]
    if arguments.compile:
        for case in cases:
            compile_peers(dataclasses.replace(case, device=device))
            print(f"{operator_of(case)} {case.name}: {perf_counter() - start:.1f} s", flush=True)
        return 0
    if arguments.json is None:
        parser.error("--json is required")
    ceilings = measure_ceilings(device)
    print(
        f"copy {ceilings.bytes_per_second / 1e12:.2f} TB/s, product {ceilings.operations_per_second / 1e12:.0f} TFLOP/s"
    )
    rows: list[Row] = []
    seconds: dict[str, float] = {}
    left = []
    for case in cases:
        case = dataclasses.replace(case, device=device)
        begun = perf_counter()
        if begun - start > arguments.seconds:
            left.append(case.name)
            continue
        found = rows_of(case, ceilings, tuple(arguments.kinds.split(",")))
        rows += found
        seconds[f"{operator_of(case)} {case.name}"] = perf_counter() - begun
        print("\n".join(describe(found)), flush=True)
        write(arguments.json, device, ceilings, rows, seconds)
    results.write(json.loads(arguments.json.read_text()), arguments.json.with_suffix(".md"))
    print(f"{MARK}{len(seconds)} cases timed{', no time for ' + ', '.join(left) if left else ''}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
