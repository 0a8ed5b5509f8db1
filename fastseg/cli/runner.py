"""Runs a command: errors become one line and an exit code."""

from __future__ import annotations

import atexit
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType

import torch.distributed as dist
import typer

from fastseg.cli.app import app
from fastseg.data import DataError
from fastseg.training import CheckpointError, ConfigError, DivergedError
from fastseg.training.devices import launched_rank

# Exit codes: 0, and
FAILED = 1  # the run failed
REFUSED = 2  # what the user gave can't be used
INTERRUPTED = 128 + signal.SIGINT
TERMINATED = 128 + signal.SIGTERM

# Typer's later versions carry their own Click, earlier ones use the package: the public BadParameter leads to either.
_UsageError: type[Exception] = typer.BadParameter.__bases__[0]


def main() -> None:
    """Run the command of ``sys.argv`` and exit with its code."""
    if launched_rank() is None:  # a process that waits for the others must die at once, not when it wakes up
        signal.signal(signal.SIGTERM, _terminate)
    code = run(sys.argv[1:])
    if dist.is_available() and dist.is_initialized():
        # A thread of gloo that lets go of a tensor while Python shuts down aborts the process, and the group lives as
        # long as anything refers to it, as DistributedDataParallel's cycles do: this process doesn't shut Python down.
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def run(arguments: Sequence[str]) -> int:
    """Run a command; what is the user's to mend becomes one line on stderr.

    Args:
        arguments: The command and its options.

    Returns:
        The exit code.
    """
    try:
        code = app(args=list(arguments), prog_name="fastseg", standalone_mode=False)
    except _UsageError as error:
        return _report(error.format_message(), REFUSED)  # type: ignore[attr-defined]
    except (DataError, ConfigError, CheckpointError, OSError) as error:
        return _report(str(error), REFUSED)
    except DivergedError as error:
        return _report(str(error), FAILED)
    except (typer.Abort, KeyboardInterrupt):
        code = INTERRUPTED
    return _report("interrupted", INTERRUPTED) if code == INTERRUPTED else code or 0


def _report(message: str, code: int) -> int:
    lines = message.strip().splitlines()
    if len(lines) > 1 and "Original Traceback" in message:  # of a process that loads images; the error is at its end
        lines = [lines[-1].partition(": ")[2]]
    rank = launched_rank()
    process = "" if rank is None else f"process {rank}: "
    print(f"error: {process}{' '.join(' '.join(lines).split())}", file=sys.stderr)
    return code


def _terminate(_signal: int, _frame: FrameType | None) -> None:
    """Leave as by any exception, so that loading processes and half-written files are cleared away."""
    sys.exit(TERMINATED)
