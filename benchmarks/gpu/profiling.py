"""The slowest cases of a timing, kernel by kernel."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.gpu import timing
from benchmarks.gpu.stages import MARK, REPOSITORY
from benchmarks.harness.devices import DEVICES, Device
from benchmarks.harness.suite import BOTH, FASTSEG, FORWARD, Contestant, Job

CASES = 5
LINES = 10  # kernels of a case
CALLS = 3

KERNELS = "^(conv|cross|upsample|relu|copy)"  # how the names of Triton's begin
COUNTERS = (
    "gpu__time_duration.sum", "dram__bytes_read.sum", "dram__bytes_write.sum", "launch__registers_per_thread",
    "sm__warps_active.avg.pct_of_peak_sustained_active", "sm__inst_issued.avg.pct_of_peak_sustained_active",
)  # fmt: skip


def slowest(rows: list[dict]) -> list[tuple[str, str, str]]:
    """Operator, case and layout of those that are farthest above their floor, in milliseconds."""
    longest = [row for row in rows if row["kind"] == FASTSEG and row["timing"] in (BOTH, FORWARD)]
    longest.sort(key=lambda row: row["floor_ms"] - row["ms"])
    keys = dict.fromkeys((row["operator"], row["case"], row["layout"]) for row in longest)
    return list(keys)[:CASES]


def job_of(key: tuple[str, str, str], device: Device) -> Job:
    """The call of fastseg that an operator, a case and a layout name."""
    cases = timing.CASES if device.asynchronous else timing.REHEARSED
    case = next(case for case in cases if (timing.operator_of(case), case.name) == key[:2])
    case = dataclasses.replace(case, device=device)
    return Contestant(FASTSEG, key[2]).job(case, case.timings != (FORWARD,))


def profile(job: Job, device: Device) -> None:
    """Prints a call's kernels, and how long each takes."""
    activities = [torch.profiler.ProfilerActivity.CUDA if device.asynchronous else torch.profiler.ProfilerActivity.CPU]
    job.results()
    device.wait()
    with torch.profiler.profile(activities=activities) as profiled:
        for _ in range(CALLS):
            job.results()
        device.wait()
    key = "device_time_total" if device.asynchronous else "cpu_time_total"
    for event in sorted(profiled.key_averages(), key=lambda event: -getattr(event, key))[:LINES]:
        microseconds, count = getattr(event, key) / CALLS, event.count / CALLS
        print(f"  {microseconds:9.1f} us  {count:4.1f} x  {event.key[:110]}", flush=True)


def count(key: tuple[str, str, str]) -> None:
    """Prints the hardware's counters of a call's Triton kernels, by Nsight Compute on a process of its own."""
    command = [
        "ncu", "--clock-control", "none", "--metrics", ",".join(COUNTERS), "--kernel-name", f"regex:{KERNELS}",
        sys.executable, "-m", __spec__.name, "--once", *key,
    ]  # fmt: skip
    subprocess.run(command, cwd=REPOSITORY, check=False)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--timing", type=Path, help="what benchmarks.gpu.timing wrote")
    parser.add_argument(
        "--once", nargs=3, metavar=("OPERATOR", "CASE", "LAYOUT"), help="run this on a GPU, and no more"
    )
    arguments = parser.parse_args()
    if arguments.once is not None:
        job_of(tuple(arguments.once), DEVICES["cuda"]).results()
        return 0
    results = json.loads(arguments.timing.read_text())
    device, keys = DEVICES[results["device"]["type"]], slowest(results["rows"])
    for key in keys:
        floors = [row["floor_ms"] for row in results["rows"] if (row["operator"], row["case"], row["layout"]) == key]
        print(f"\n{' '.join(key)}: floor {1e3 * max(floors):.1f} us", flush=True)
        profile(job_of(key, device), device)
    if device.asynchronous and shutil.which("ncu") is not None:
        for key in keys:
            count(key)
    print(f"{MARK}the slowest cases, kernel by kernel: see the log")
    return 0


if __name__ == "__main__":
    sys.exit(main())
