"""Where and how results are shown."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from fastseg.training.distributed import launched_rank


def main_console() -> Console:
    """The console: silent in all but the first of torchrun's processes."""
    return Console(quiet=bool(launched_rank()))


def iou_table(class_names: Sequence[str], iou: Sequence[float | None]) -> Table:
    """The IoU of each class; a class that neither truth nor prediction has shows a dash."""
    table = Table("class", "IoU")
    table.columns[1].justify = "right"
    for name, value in zip(class_names, iou, strict=True):
        table.add_row(name, "-" if value is None else f"{value:.4f}")
    return table
