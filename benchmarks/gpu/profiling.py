"""The slowest cases of a timing, kernel by kernel."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import torch

from benchmarks.devices import DEVICES
from benchmarks.gpu import timing
from benchmarks.gpu.stages import MARK
from benchmarks.suite import BOTH, FASTSEG, FORWARD, Contestant

CASES = 5
LINES = 10  # kernels of a case


def slowest(rows: list[dict]) -> list[tuple[str, str, str]]:
    """Operator, case and layout of those that are farthest above their floor, in milliseconds."""
    longest = [row for row in rows if row["kind"] == FASTSEG and row["timing"] in (BOTH, FORWARD)]
    longest.sort(key=lambda row: row["floor_ms"] - row["ms"])
    keys = dict.fromkeys((row["operator"], row["case"], row["layout"]) for row in longest)
    return list(keys)[:CASES]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--timing", type=Path, required=True, help="what benchmarks.gpu.timing wrote")
    results = json.loads(parser.parse_args().timing.read_text())
    device = DEVICES[results["device"]["type"]]
    cases = timing.CASES if device.asynchronous else timing.REHEARSED
    by_name = {(timing.operator_of(case), case.name): dataclasses.replace(case, device=device) for case in cases}
    activities = [torch.profiler.ProfilerActivity.CUDA if device.asynchronous else torch.profiler.ProfilerActivity.CPU]
    for operator, name, layout in slowest(results["rows"]):
        case = by_name[operator, name]
        job = Contestant(FASTSEG, layout).job(case, case.timings != (FORWARD,))
        job.results()
        device.wait()
        with torch.profiler.profile(activities=activities) as profile:
            for _ in range(3):
                device.lead()
                job.results()
            device.wait()
        print(f"\n{operator} {name} {layout}")
        events = profile.key_averages()
        key = "device_time_total" if device.asynchronous else "cpu_time_total"
        for event in sorted(events, key=lambda event: -getattr(event, key))[:LINES]:
            print(f"  {getattr(event, key) / 3:9.1f} us  {event.count / 3:4.1f} x  {event.key[:110]}", flush=True)
    print(f"{MARK}the slowest cases, kernel by kernel: see the log")
    return 0


if __name__ == "__main__":
    sys.exit(main())
