"""What pytest hands on: rounds that were timed before, to pytest-benchmark, and fastseg's log, to the report."""

from __future__ import annotations

import logging


class RecordedClock:
    """A timer for pytest-benchmark that stands still but for `advance`: it replays rounds that were timed before."""

    __name__ = "interleaved rounds"

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        """Let ``seconds`` pass."""
        self.now += seconds


class LogLines(logging.Handler):
    """Keeps what fastseg logs: that a call runs as plain PyTorch, for one."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())
