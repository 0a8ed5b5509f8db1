"""``python -m fastseg.kernels``: compile the kernels without a GPU, or tune them on one."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fastseg._native import INTERPRETED


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m fastseg.kernels", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    compiling = commands.add_parser("compile", help="compile ahead of time, without a GPU, and print what kernels need")
    compiling.add_argument("--target", required=True, help="cuda:80, cuda:90, hip:gfx942 or the like")
    compiling.add_argument("--json", type=Path, metavar="FILE", help="write the table as JSON, too")
    tuning = commands.add_parser("tune", help="time plans on this machine's GPU, and write the table of the best")
    tuning.add_argument("--budget", type=float, default=420.0, metavar="SECONDS", help="of the whole run (%(default)s)")
    tuning.add_argument("--out", type=Path, metavar="FOLDER", help="for <gpu>.json, instead of the package's tuned/")
    tuning.add_argument("--kernel", metavar="NAME", help="tune this kernel alone")
    return parser.parse_args()


def main() -> int:
    """Runs a command; the exit status is 2 where it can't run here."""
    arguments = _parse_arguments()
    if INTERPRETED:
        print("error: TRITON_INTERPRET is set, and interpreted kernels can't be compiled: unset it", file=sys.stderr)
        return 2
    try:
        from fastseg.kernels import compile, tune
    except ImportError as error:
        print(f"error: Triton can't be imported ({error}): pip install triton", file=sys.stderr)
        return 2
    if arguments.command == "compile":
        return compile.main(arguments.target, arguments.json)
    return tune.main(arguments.budget, arguments.out, arguments.kernel)


if __name__ == "__main__":
    sys.exit(main())
