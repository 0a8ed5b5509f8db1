"""One model measured in this process, or all of them, each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch._dynamo.config
import torch._inductor.config
from pytest_benchmark.plugin import pytest_benchmark_generate_machine_info
from pytest_benchmark.utils import get_commit_info

import fastseg
from benchmarks.harness.compile_time import COMPILE
from benchmarks.harness.devices import CPU
from benchmarks.harness.suite import (
    COMPILERS,
    DEPLOYMENTS,
    FASTSEG,
    WARM_UP_CALLS,
    Contestant,
    Effort,
    Measured,
    verify_and_time,
)
from benchmarks.reports import third_party as report
from benchmarks.reports.third_party import STEP, TIMINGS
from benchmarks.third_party.cases import ThirdPartyCase

# Of one function: what breaks TorchDynamo's graph is compiled apart for each module that calls it, for each contestant
# and each mode. Beyond torch's own limit, 8, they would run without a compiler.
ENOUGH_GRAPHS = 64

# A step of these models takes a second, not a millisecond.
FULL = Effort(seconds=6, least_rounds=5, most_rounds=30)
QUICK = Effort(seconds=0, least_rounds=3, most_rounds=3)


# Of memory's process. Where glibc's malloc serves large blocks from its heap, how much of that a call touches depends
# on all that came before it, of the other contestants too: one step took 235 to 252 MiB, of which 170 were in use at
# once. Blocks with pages of their own give them back at once, which costs time: hence two processes.
PAGES_OF_THEIR_OWN = {"MALLOC_MMAP_THRESHOLD_": "65536"}


def measure(case: ThirdPartyCase, effort: Effort, timings: Sequence[str] = TIMINGS) -> dict[str, Any]:
    """What `benchmarks.reports.third_party` writes of a model's step, prediction or both, but for the memory."""
    start = perf_counter()
    result: dict[str, Any] = {"name": case.name, "images": case.images, "classes": case.classes}
    measured: list[dict[str, Any]] = []
    missing: list[dict[str, Any]] = []
    for timing in timings:
        with compiling(case, timing == STEP):
            outcomes = verify_and_time(case, timing == STEP, effort, memory=False)
        for contestant, outcome in outcomes.items():
            entry = {"timing": timing, **contestant._asdict()}
            if isinstance(outcome, Measured):
                seconds = [sum(passes) for passes in outcome.rounds]
                measured.append(entry | {"rounds": seconds, "peak": outcome.peak, "returned": outcome.returned})
            else:
                missing.append(entry | {"reason": f"{type(outcome).__name__}: {outcome}"})
    result |= {"measured": measured, "missing": missing}
    result["replaced"] = {timing: replaced(case, timing == STEP) for timing in timings}
    verified = any(entry["timing"] == STEP and entry["kind"] == FASTSEG for entry in measured)
    result["difference"] = difference(case) if verified else {}
    spent = {kind: COMPILERS.spent[type(case), kind] for kind in (COMPILE, FASTSEG)}
    return result | {"seconds": perf_counter() - start, "compiling": spent}


@contextmanager
def compiling(case: ThirdPartyCase, training: bool) -> Iterator[None]:
    """The settings of torch's compiler that a model is measured with: of predictions the weights are constant."""
    with (
        torch._inductor.config.patch(dict(case.inductor) | {"freezing": not training}),
        torch._dynamo.config.patch(recompile_limit=ENOUGH_GRAPHS),
    ):
        yield


def measure_memory(case: ThirdPartyCase, result: dict[str, Any]) -> None:
    """Add what each contestant's call needs to `measure`'s result, in a process with `PAGES_OF_THEIR_OWN`."""
    for entry in result["measured"]:
        contestant, training = Contestant(entry["kind"], entry["layout"]), entry["timing"] == STEP
        if contestant.kind in DEPLOYMENTS:  # it has its memory before it is called
            continue
        torch.compiler.reset()
        with compiling(case, training):
            job = contestant.job(case, training)
            for _ in range(WARM_UP_CALLS):
                job.results()
            entry["peak"] = case.device.peak_growth(job.results)


def replaced(case: ThirdPartyCase, training: bool) -> Counter[str]:
    """How many places each operator serves, in NCHW."""
    with compiling(case, training), fastseg.recording() as found:
        Contestant(FASTSEG, "nchw").job(case, training).results()
    return Counter(replacement.operator for replacement in found.replaced)


def difference(case: ThirdPartyCase) -> dict[str, float]:
    """The largest difference between the backend's and eager PyTorch's loss and gradients, over the largest of eager's.

    In float64: in float32 some of millions of values fall to the other side of a ReLU or a pool in whatever is not
    eager PyTorch to the last bit, and the gradient jumps (see `ModelCase.plain`). Without Inductor, whose roundings are
    its own.
    """
    job = case.job(False, "nchw", True, torch.float64)
    fused = torch.compile(job.function, dynamic=False, backend="fastseg", options={"inner": "eager"})
    results = (case.judged(of.results()) for of in (job._replace(function=fused), job))
    return {
        name: ((f - e).abs().max() / e.abs().max()).item()
        for name, f, e in zip(("loss", "gradients"), *results, strict=True)
    }


def run(
    chosen: list[ThirdPartyCase], cases: list[ThirdPartyCase], earlier: dict[str, Any] | None, quick: bool,
    timings: Sequence[str] = TIMINGS,
) -> dict[str, Any]:  # fmt: skip
    """Results of the ``chosen`` of ``cases`` (``quick``: in a few rounds), and of the rest those of an earlier run.

    Of the chosen ones, too, where not all ``timings`` are measured.
    """
    order = [case.name for case in cases]
    known = earlier or {"models": [], "absent": {}}
    results = {result["name"]: result for result in known["models"] if result["name"] in order}
    absent = {name: why for name, why in known["absent"].items() if name in order}
    for case in chosen:
        before = results.pop(case.name, None)
        absent.pop(case.name, None)
        if missing := case.missing():
            absent[case.name] = missing
            print(f"{case.name}: {missing}")
            continue
        outcome = in_new_process(case.name, quick, timings)
        if isinstance(outcome, str):
            absent[case.name] = outcome
        else:
            results[case.name] = outcome if before is None else _merged(before, outcome, timings)
    info = pytest_benchmark_generate_machine_info() | {"fastseg": fastseg.info()}
    packages = sorted({case.package for case in cases if not case.missing()} - {"torch"})
    peers = {package: version(package.replace("_", "-")) for package in packages}
    return {
        "models": sorted(results.values(), key=lambda result: order.index(result["name"])),
        "absent": absent,
        "machine_info": info,
        "commit_info": get_commit_info(),
        "device": CPU.describe(),
        "datetime": datetime.now(timezone.utc).isoformat(),
        "peers": peers | {report.NAMES[kind]: peer.version() for kind, peer in DEPLOYMENTS.items()},
    }


def _merged(before: dict[str, Any], result: dict[str, Any], timings: Sequence[str]) -> dict[str, Any]:
    """A model's result, and of an earlier one the timings that it hasn't."""
    kept = {key: [entry for entry in before[key] if entry["timing"] not in timings] for key in ("measured", "missing")}
    return result | {
        **{key: entries + result[key] for key, entries in kept.items()},
        "replaced": before["replaced"] | result["replaced"],
        "difference": result["difference"] or before["difference"],
    }


def in_new_process(name: str, quick: bool, timings: Sequence[str]) -> dict[str, Any] | str:
    """The results of one model, or why there are none."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "result.json")
        command = [sys.executable, "-m", "benchmarks.third_party", "--one", name, "--json", str(path)]
        command += [f"--timing={timing}" for timing in timings]
        start = perf_counter()
        status = subprocess.run([*command, *(["--quick"] if quick else [])], check=False).returncode
        if status == 0:
            status = subprocess.run([*command, "--memory"], check=False, env=os.environ | PAGES_OF_THEIR_OWN).returncode
        print(f"{name}: {perf_counter() - start:.0f} s, exit status {status}", flush=True)
        return json.loads(path.read_text()) if status == 0 else f"its process ended with exit status {status}"
