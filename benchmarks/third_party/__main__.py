"""``python -m benchmarks.third_party``: see the package's docstring."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from benchmarks.reports import third_party as report
from benchmarks.reports.third_party import TIMINGS
from benchmarks.third_party import measuring
from benchmarks.third_party.cases import CASES


def main() -> int:
    names = {case.name: case for case in CASES}
    parser = argparse.ArgumentParser(prog="python -m benchmarks.third_party", description=__doc__)
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    parser.add_argument("--readme", type=Path, help="Markdown file whose table is replaced, between its two marks")
    parser.add_argument(
        "--only", action="append", choices=list(names), help="measure this model alone, and others named so"
    )
    parser.add_argument("--timing", action="append", choices=TIMINGS, help="measure this alone, and others named so")
    parser.add_argument("--quick", action="store_true", help="a few rounds, to see that all of it runs")
    parser.add_argument("--json", type=Path, help="file for what was measured; what it holds of other models is kept")
    parser.add_argument("--from", dest="run", type=Path, help="such a file to report, instead of measuring")
    parser.add_argument("--one", choices=list(names), help=argparse.SUPPRESS)
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    timings = arguments.timing or TIMINGS
    if arguments.one:
        case, effort = names[arguments.one], measuring.QUICK if arguments.quick else measuring.FULL
        if arguments.memory:
            result = json.loads(arguments.json.read_text())
            measuring.measure_memory(case, result)
        else:
            result = measuring.measure(case, effort, timings)
        arguments.json.write_text(json.dumps(result))
        return 0
    if arguments.out is None:
        parser.error("--out is needed: the Markdown file to write")
    if arguments.readme is not None:
        try:  # before all the work, not after it
            report.insert(arguments.readme.read_text(), "")
        except ValueError as error:
            parser.error(f"{arguments.readme}: {error}")
    if arguments.run is not None:
        results = json.loads(arguments.run.read_text())
    else:
        chosen = [case for name, case in names.items() if name in (arguments.only or names)]
        earlier = json.loads(arguments.json.read_text()) if arguments.json and arguments.json.exists() else None
        results = measuring.run(chosen, CASES, earlier, arguments.quick, timings)
        if arguments.json is not None:
            arguments.json.write_text(json.dumps(results))
    if not results["models"]:
        parser.error(
            "; ".join(["nothing was measured", *(f"{name}: {why}" for name, why in results["absent"].items())])
        )
    report.write(results, arguments.out)
    if arguments.readme is not None:
        arguments.readme.write_text(report.insert(arguments.readme.read_text(), report.in_short(results)))
    return int(bool(results["absent"]) or any(result["missing"] for result in results["models"]))


if __name__ == "__main__":
    sys.exit(main())
