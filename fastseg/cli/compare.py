"""``fastseg compare``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from rich.console import Console
from rich.table import Column, Table
from typer import Argument, Option

from fastseg.training import ConfigError
from fastseg.training.history import EpochRecord, read_history
from fastseg.training.plots import save_panels


def compare(
    runs: Annotated[list[Path], Argument(help="Folders of runs.")],
    out: Annotated[Path | None, Option(help="Picture of the curves; none without it.")] = None,
) -> None:
    """Show runs side by side: best validation scores, the epoch of them, speed; and their curves as a picture."""
    histories = {str(run): read_history(run) for run in runs}
    if len(histories) < len(runs):
        raise ConfigError("compare: a run is given twice")
    table = Table(
        Column("run", overflow="fold"), "epochs", "best mean IoU", "at epoch", "validation loss then", "images/s"
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for name, records in histories.items():
        best = max(records, key=lambda record: record.mean_iou)
        speed = sum(record.images_per_second for record in records) / len(records)
        table.add_row(
            name, str(len(records)), f"{best.mean_iou:.4f}", str(best.epoch), f"{best.val_loss:.4f}", f"{speed:.1f}"
        )
    Console().print(table)
    if out is not None:
        epochs = range(1, max(map(len, histories.values())) + 1)
        fields = {"training loss": "train_loss", "validation loss": "val_loss", "mean IoU": "mean_iou"}
        panels = {
            title: (epochs, {name: _padded(records, field, len(epochs)) for name, records in histories.items()})
            for title, field in fields.items()
        }
        save_panels(panels, "epoch", out)


def _padded(records: Sequence[EpochRecord], field: str, length: int) -> list[float]:
    """A measurement of each epoch; nan, which isn't drawn, after the last one."""
    values = [getattr(record, field) for record in records]
    return values + [math.nan] * (length - len(values))
