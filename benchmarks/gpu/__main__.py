"""``python -m benchmarks.gpu``: see the package's docstring."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.gpu import stages


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--budget", type=float, default=stages.BUDGET_SECONDS, help="seconds that the run may take")
    parser.add_argument("--rehearse", action="store_true", help="run all stages without a GPU")
    parser.add_argument(
        "--stages", help="names of the stages to run, with commas between them; all others are left out"
    )
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    out = arguments.out.resolve()
    seconds = stages.SHARE_OF_TIMING * arguments.budget
    chosen = stages.rehearsal_stages(out) if arguments.rehearse else stages.gpu_stages(out, seconds)
    if arguments.stages is not None:
        wanted = arguments.stages.split(",")
        if unknown := {*wanted} - {stage.name.split(",")[0] for stage in chosen}:
            parser.error(f"--stages: no stage is called {', '.join(sorted(unknown))}")
        chosen = stages.only(chosen, wanted)
    outcomes = stages.run(chosen, out, arguments.budget)
    print(stages.table(outcomes))
    return 0 if all(outcome.status == "passed" for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
