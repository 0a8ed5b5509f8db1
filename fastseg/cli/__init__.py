"""The command line: ``fastseg`` or ``python -m fastseg``."""

import sys


def main() -> None:
    """Run the command of ``sys.argv`` and exit with its code."""
    try:
        from fastseg.cli import runner
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "fastseg":
            raise
        print(f"error: the command line needs {error.name}: install fastseg-kernels[train]", file=sys.stderr)
        sys.exit(2)
    runner.main()
