"""Draws the pictures of stored results again, from their tables: ``python -m benchmarks.reports [--machine NAME]``.

Of NAME.md in ``benchmarks/results``, the chart beside it; of that and NAME-models.md, overview.png.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.reports import charts, overview

RESULTS = Path(__file__).parents[1] / "results"
MACHINE = "cpu-amd-epyc-zen3-2cores"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reports", description=__doc__)
    parser.add_argument("--machine", default=MACHINE, help="the results' name; by default, those that the README shows")
    machine = parser.parse_args().machine
    suite, models = RESULTS / f"{machine}.md", RESULTS / f"{machine}-models.md"
    charts.draw(suite, suite.with_suffix(".png"))
    overview.draw(suite, models, RESULTS / "overview.png")


if __name__ == "__main__":
    main()
