"""Tuning: which plans are fastest on this machine's GPU.

For each kernel and bucket that the tuned specimens touch, plans near the default are compiled, checked against the
default's results and timed; the winner goes into a table that `fastseg.kernels.launch.read_plans` reads.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.errors import OutOfResources
from triton.testing import do_bench

from fastseg.kernels import launch
from fastseg.kernels.compile import compile_jobs, describe_plan, make_job, target_name
from fastseg.kernels.launch import Plan
from fastseg.kernels.specimen import Call, Specimen, record
from fastseg.kernels.specimens import SPECIMENS

# The kernels that are tuned first, by the beginnings of their names: what a small budget is worth most for.
MOST_VALUABLE = (
    "upsample_cross_entropy_backward", "upsample_cross_entropy_forward", "cross_entropy_backward",
    "cross_entropy_forward", "conv_relu_pool2d_forward_fields", "conv_relu_pool2d",
)  # fmt: skip

# Every bucket gets an equal share of the seconds left, but as many as its first candidates need; with fewer than those
# of its default none is begun.
SECONDS_OF_A_BUCKET = 20.0
SECONDS_OF_A_DEFAULT = 5.0

LEAST_GAIN = 0.02  # a plan must be faster than the default by this share: less is noise
WARPS = (2, 4, 8)
FIRST_CHANGES = 2  # how many numbers of the default the first candidates differ in; later ones in one of the best's

# Milliseconds that a candidate is run and then timed, and those of each round of the last comparison with the default.
WARMUP_MS, TIMED_MS = 5, 30
FINAL_WARMUP_MS, FINAL_TIMED_MS, FINAL_ROUNDS = 10, 100, 3

# Results of two plans may differ by the rounding of what is stored (two units in the last place), by that of sums in
# another order (a share of the largest value), and in few positions, where two sums are all but equal.
STORED_ULPS = 2
SUM_SHARE = 2.0**-14
POSITIONS_SHARE = 1e-3


@dataclasses.dataclass(frozen=True)
class Subject:
    """A kernel and a bucket, the default plan, and the specimens that the plan serves."""

    kernel: str
    bucket: str
    default: Plan
    specimens: list[Specimen]

    def __str__(self) -> str:
        return f"{self.kernel}, {self.bucket}"

    def trial(self, plan: Plan) -> contextlib.AbstractContextManager[None]:
        """Within, a plan serves the kernel's calls in the bucket."""
        return launch.trial(self.kernel, self.bucket, plan)


def find_subjects(specimens: Iterable[Specimen]) -> list[Subject]:
    """What the tuned specimens launch, by kernel and bucket; the `MOST_VALUABLE` first."""
    found: dict[tuple[str, str], Subject] = {}
    for specimen in specimens:
        for item in record(specimen) if specimen.tuned else []:
            subject = found.setdefault((item.name, item.bucket), Subject(item.name, item.bucket, item.plan, []))
            if specimen not in subject.specimens:
                subject.specimens.append(specimen)
    ranks = {name: [name.startswith(first) for first in (*MOST_VALUABLE, "")].index(True) for name, _ in found}
    return sorted(found.values(), key=lambda subject: ranks[subject.kernel])


# ---- candidates ----


def candidates(plan: Plan, changes: int) -> list[Plan]:
    """Plans that differ from a plan in up to ``changes`` of its numbers, those with fewest differences first.

    A side of the tile is halved or doubled, the warps are those of `WARPS`, and the stages, where the plan has several,
    one less or one more.
    """
    stages = (plan.num_stages - 1, plan.num_stages + 1) if plan.num_stages > 1 else ()
    numbers = [[(axis, size // 2), (axis, size * 2)] for axis, size in plan.tile.items()]
    numbers += [
        [("num_warps", warps) for warps in WARPS if warps != plan.num_warps],
        [("num_stages", s) for s in stages],
    ]
    return [
        _changed(plan, dict(chosen))
        for count in range(1, changes + 1)
        for group in itertools.combinations(numbers, count)
        for chosen in itertools.product(*group)
        if all(value > 0 for _, value in chosen)
    ]


def _changed(plan: Plan, numbers: dict[str, int]) -> Plan:
    tile = {axis: numbers.get(axis, size) for axis, size in plan.tile.items()}
    warps, stages = numbers.get("num_warps", plan.num_warps), numbers.get("num_stages", plan.num_stages)
    return plan._replace(tile=tile, num_warps=warps, num_stages=stages)


def search(default: Plan, time_all: Callable[[list[Plan]], Iterator[tuple[Plan, float]]]) -> tuple[Plan, float]:
    """The fastest plan found, and its milliseconds: from the default's neighbours on to those of whatever is faster.

    ``time_all`` yields those of the plans that work, and their milliseconds; it ends early when time is up.
    """
    tried = [default]
    ((best, least),) = time_all([default])
    plans = candidates(default, FIRST_CHANGES)
    while plans:
        tried += plans
        fastest = min(time_all(plans), key=lambda timed: timed[1], default=(best, least))
        if fastest[1] >= least:
            break
        best, least = fastest
        plans = [plan for plan in candidates(best, 1) if plan not in tried]
    return best, least


# ---- checking and timing ----


def mismatch(actual: Tensor, expected: Tensor) -> str | None:
    """How a result differs from the default plan's beyond rounding; None where it doesn't."""
    if not expected.is_floating_point():
        share = (actual != expected).double().mean().item()
        return f"{share:.2%} of the positions differ" if share > POSITIONS_SHARE else None
    finite = expected.abs().nan_to_num(0.0, posinf=0.0)
    largest = finite.max().item() if expected.numel() else 0.0
    relative = STORED_ULPS * torch.finfo(expected.dtype).eps
    close = torch.isclose(actual, expected, rtol=relative, atol=SUM_SHARE * largest, equal_nan=True)
    return None if bool(close.all()) else f"{(~close).double().mean().item():.2%} of the values differ"


@contextlib.contextmanager
def _poisoned_memory() -> Iterator[None]:
    """Within, fresh tensors hold NaN, so that what a kernel doesn't write can't be right by chance."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def compile_plans(subject: Subject, calls: list[Call], target: GPUTarget, plans: list[Plan]) -> list[str | None]:
    """Compiles what calls would launch into Triton's cache, in parallel; why a plan can't be compiled, or None."""
    jobs, counts = [], []
    for plan in plans:
        with subject.trial(plan), launch.recording() as launches:
            for call in calls:
                call()
        of_kernel = [item for item in launches if item.name == subject.kernel]
        jobs += [make_job(item, target, str(subject)) for item in of_kernel]
        counts.append(len(of_kernel))
    errors = (row.error for row in compile_jobs(jobs))
    by_plan = [[error for error in itertools.islice(errors, count) if error] for count in counts]
    return [" ".join(found[0].split()) if found else None for found in by_plan]


class Trials:
    """Runs a subject's specimens with plans, on a device, until a deadline (of `time.monotonic`)."""

    def __init__(self, subject: Subject, device: torch.device, target: GPUTarget, deadline: float) -> None:
        self.subject, self.target, self.deadline = subject, target, deadline
        self.slowest_batch = 0.0  # to be compiled, in seconds
        self.calls: list[Call] = [specimen.prepare(device) for specimen in subject.specimens]
        with subject.trial(subject.default):
            self.expected = [[result.clone() for result in call()] for call in self.calls]

    def time_all(self, plans: list[Plan]) -> Iterator[tuple[Plan, float]]:
        """The plans that work, and their milliseconds; what doesn't is printed with the reason."""
        size = max(1, (os.cpu_count() or 1) // len(self.calls))  # compiled at once, before the clock is looked at
        for first in range(0, len(plans), size):
            batch, start = plans[first : first + size], time.monotonic()
            if start + self.slowest_batch > self.deadline and self.subject.default not in batch:
                return
            problems = compile_plans(self.subject, self.calls, self.target, batch)
            self.slowest_batch = max(self.slowest_batch, time.monotonic() - start)
            for plan, problem in zip(batch, problems, strict=True):
                if time.monotonic() > self.deadline and plan != self.subject.default:
                    return
                problem = problem or self._check(plan)
                if problem is None:
                    milliseconds = self.milliseconds(plan, WARMUP_MS, TIMED_MS)
                    print(f"  {describe_plan(plan)}: {milliseconds:.4f} ms", flush=True)
                    yield plan, milliseconds
                else:
                    print(f"  {describe_plan(plan)}: discarded, {problem}", flush=True)

    def _check(self, plan: Plan) -> str | None:
        """Why a plan can't be launched, or how its results differ; else None."""
        for call, expected in zip(self.calls, self.expected, strict=True):
            try:
                with self.subject.trial(plan), _poisoned_memory():
                    for stale in call():
                        stale.fill_(float("nan") if stale.is_floating_point() else torch.iinfo(stale.dtype).max)
                    results = call()
            except OutOfResources as error:
                return str(error)
            problems = (mismatch(result, truth) for result, truth in zip(results, expected, strict=True))
            problem = next((problem for problem in problems if problem), None)
            if problem:
                return problem
        return None

    def milliseconds(self, plan: Plan, warmup: float, timed: float) -> float:
        """The geometric mean, over the specimens, of the median time of a call."""
        with self.subject.trial(plan):
            medians = [do_bench(call, warmup=warmup, rep=timed, return_mode="median") for call in self.calls]
        return statistics.geometric_mean(medians)


def tune(subject: Subject, device: torch.device, target: GPUTarget, deadline: float) -> dict[str, Any]:
    """The table's row: the fastest plan, or the default where nothing is faster by `LEAST_GAIN`."""
    print(f"{subject}: {len(subject.specimens)} specimens", flush=True)
    comparison = FINAL_ROUNDS * 2 * len(subject.specimens) * (FINAL_WARMUP_MS + FINAL_TIMED_MS) / 1000
    trials = Trials(subject, device, target, deadline - comparison)
    best, found_ms = search(subject.default, trials.time_all)
    rounds = [
        [trials.milliseconds(plan, FINAL_WARMUP_MS, FINAL_TIMED_MS) for plan in (subject.default, best)]
        for _ in range(FINAL_ROUNDS if best != subject.default else 0)  # by turns: the clock of a GPU drifts
    ] or [[found_ms, found_ms]]
    default_ms, best_ms = (statistics.median(times) for times in zip(*rounds, strict=True))
    kept = best_ms > default_ms * (1 - LEAST_GAIN)
    print(f"  -> {describe_plan(best)}: {best_ms:.4f} ms, default {default_ms:.4f} ms{', kept' if kept else ''}")
    plan, milliseconds = (subject.default, default_ms) if kept else (best, best_ms)
    return {
        "kernel": subject.kernel, "bucket": subject.bucket, "tile": dict(plan.tile), "num_warps": plan.num_warps,
        "num_stages": plan.num_stages, "max_registers": plan.max_registers, "ms": round(milliseconds, 5),
        "default_ms": round(default_ms, 5), "date": datetime.date.today().isoformat(), "torch": torch.__version__,
        "triton": triton.__version__,
    }  # fmt: skip


# ---- the table ----


def read_rows(path: Path) -> list[dict[str, Any]]:
    """A table's rows, of faster plans and of kept defaults; none where there is no table."""
    if not path.exists():
        return []
    table = json.loads(path.read_text())
    return [*table["plans"], *table["kept"]]


def merge(rows: list[dict[str, Any]], row: dict[str, Any], subjects: list[Subject]) -> list[dict[str, Any]]:
    """Rows with a new one in its place, without those of kernels and buckets that are no more."""
    by_key = {(old["kernel"], old["bucket"]): old for old in [*rows, row]}
    return [by_key[key] for subject in subjects if (key := (subject.kernel, subject.bucket)) in by_key]


def write(path: Path, gpu: str, target: GPUTarget, rows: list[dict[str, Any]]) -> None:
    """Writes a table, whole or not at all. A default that was kept is no plan: a better default takes effect."""
    faster = [row["ms"] < row["default_ms"] for row in rows]
    table = {
        "gpu": gpu,
        "target": target_name(target),
        "plans": list(itertools.compress(rows, faster)),
        "kept": [row for row, is_faster in zip(rows, faster, strict=True) if not is_faster],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(table, indent=1) + "\n")
    os.replace(unfinished, path)
    launch.read_plans.cache_clear()


def main(budget: float, folder: Path | None = None, kernel: str | None = None) -> int:
    """Tunes buckets, or those of a kernel, and writes the table after each; the exit status.

    Args:
        budget: Seconds after which the run ends; buckets that it has no time for keep their defaults.
        folder: Where the table is written; None: in the package.
        kernel: The kernel's name; None: all kernels.
    """
    end = time.monotonic() + budget
    if not torch.cuda.is_available():
        print("error: tuning needs a CUDA device, and torch finds none on this machine", file=sys.stderr)
        return 2
    subjects = find_subjects(SPECIMENS)
    chosen = [subject for subject in subjects if kernel in (None, subject.kernel)]
    if not chosen:
        names = ", ".join(sorted({subject.kernel for subject in subjects}))
        print(f"error: --kernel: expected one of {names}, but got {kernel!r}", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    target, gpu = triton.runtime.driver.active.get_current_target(), launch.gpu_name(device)
    path = (folder or launch.TUNED) / f"{gpu}.json"
    for index, subject in enumerate(chosen):
        now = time.monotonic()
        if end - now < SECONDS_OF_A_DEFAULT:
            print(f"time is up; not tuned: {'; '.join(map(str, chosen[index:]))}")
            break
        share = max((end - now) / (len(chosen) - index), SECONDS_OF_A_BUCKET)
        row = tune(subject, device, target, min(now + share, end))
        write(path, gpu, target, merge(read_rows(path), row, subjects))
    print(f"written: {path}")
    return 0
