"""Where and how results are shown."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from fastseg.training.devices import launched_rank


def main_console() -> Console:
    """The console: silent in all but the first of torchrun's processes."""
    return Console(quiet=bool(launched_rank()))


def class_table(class_names: Sequence[str], **scores: Sequence[float | None]) -> Table:
    """Named scores of each class; a class that neither truth nor prediction has shows a dash."""
    table = Table("class", *scores)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, *values in zip(class_names, *scores.values(), strict=True):
        table.add_row(name, *("-" if value is None else f"{value:.4f}" for value in values))
    return table
