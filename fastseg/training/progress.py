"""How a run shows where it is: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import datetime
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TextColumn, TimeRemainingColumn

from fastseg.training.history import EpochRecord

_SECONDS_BETWEEN_LINES = 10.0  # where there is no terminal


class RunProgress:
    """The progress of a run: images done, loss, images per second and time left.

    Args:
        console: Where to show it.
        images: Images of an epoch.
        done: Epochs that an earlier run has done.
        epochs: Epochs of the whole run.
    """

    def __init__(self, console: Console, images: int, done: int, epochs: int) -> None:
        self.console = console
        self.epochs = epochs
        self._bar = Progress(
            TextColumn("epoch {task.fields[epoch]}/" + str(epochs)),
            BarColumn(bar_width=None),  # what the numbers leave
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            TimeRemainingColumn(),
            console=console,
            expand=True,
            disable=not console.is_terminal,
        )
        left = max(0, epochs - done) * images
        self._task_id = self._bar.add_task("train", total=left, epoch=done, state="")
        self._next_line = time.monotonic() + _SECONDS_BETWEEN_LINES

    def __enter__(self) -> RunProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()

    @property
    def _task(self) -> Task:
        return self._bar.tasks[self._task_id]

    def epoch_started(self, epoch: int) -> None:
        """Say which epoch runs, from 1."""
        self._bar.update(self._task_id, epoch=epoch)

    def step_done(self, loss: float, images: int) -> None:
        """Count a step's images and show its loss."""
        speed = self._task.speed
        state = f"loss {loss:.4f}" + (f", {speed:.1f} images/s" if speed else "")
        self._bar.update(self._task_id, advance=images, state=state)
        if self._bar.disable and time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + _SECONDS_BETWEEN_LINES
            self.line(self._status())

    def epoch_done(self, record: EpochRecord) -> None:
        """Write an epoch's measurements, which stay on the screen."""
        self.line(
            f"epoch {record.epoch}/{self.epochs}: train loss {record.train_loss:.4f}, val loss {record.val_loss:.4f}, "
            f"pixel accuracy {record.pixel_accuracy:.4f}, mean IoU {record.mean_iou:.4f}, "
            f"{record.seconds:.1f} s, {record.images_per_second:.1f} images/s"
        )

    def _status(self) -> str:
        task = self._task
        remaining = task.time_remaining
        left = "" if remaining is None else f", {datetime.timedelta(seconds=round(remaining))} left"
        done = f"{task.completed:.0f}/{task.total:.0f} images"
        return f"epoch {task.fields['epoch']}/{self.epochs}: {done}, {task.fields['state']}{left}"

    def line(self, text: str) -> None:
        """Write a line that stays on the screen."""
        self.console.print(text, soft_wrap=True, highlight=False)
