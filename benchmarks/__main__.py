"""Runs the suite and writes its report: ``python -m benchmarks --out FILE.md``; see the package's docstring."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.harness.devices import DEVICES
from benchmarks.reports import report, sweep

SUITE = Path(__file__).parent


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="Markdown file to write; the chart lies beside it")
    parser.add_argument("--quick", action="store_true", help="a few cases in a few rounds, to see that all of it runs")
    parser.add_argument(
        "--sweep", action="store_true", help="how the upsampling operators' cost grows with classes and pixels, instead"
    )
    parser.add_argument(
        "--from", dest="run", type=Path, help="a --benchmark-json of pytest to report, instead of measuring"
    )
    parser.add_argument("--device", choices=list(DEVICES), default="cpu", help="what to measure on")
    arguments = parser.parse_args()
    if arguments.run is not None:
        write(json.loads(arguments.run.read_text()), arguments.out)
        return 0
    if missing := DEVICES[arguments.device].missing():
        parser.error(f"--device {arguments.device}: {missing}")
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run.json")
        command = [
            sys.executable, "-m", "pytest", str(SUITE), "-q", "--benchmark-quiet", f"--benchmark-json={run}",
            f"--device={arguments.device}", *(["--quick"] if arguments.quick else []),
            *(["--sweep"] if arguments.sweep else []),
        ]  # fmt: skip
        # In a process of its own: pytest's hooks and the peers' compilers leave nothing behind here.
        status = subprocess.run(command, check=False).returncode
        results = run.read_text() if run.exists() else ""
        if not results:  # pytest has said why
            return status
        write(json.loads(results), arguments.out)
    return status


def write(run: dict[str, Any], path: Path) -> None:
    """Write the report of a run, of the tables' cases or of the sweeps."""
    (sweep if run["sweep"] else report).write(run, path)


if __name__ == "__main__":
    sys.exit(main())
