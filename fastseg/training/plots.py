"""Pictures of a run. Figures are made without pyplot, so that nobody's backend or open figures are touched."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, TypeAlias

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from fastseg.training.history import EpochRecord

_PANEL = (5.0, 4.0)  # inches of a panel of curves
_PICTURE = 2.2  # inches of one picture in a grid
_DPI = 120
_LINE_STYLES = ("-", "--")  # where two lines coincide, both are seen

Lines: TypeAlias = Mapping[str, Sequence[float]]


def save_history(history: Sequence[EpochRecord], path: Path) -> None:
    """Draw losses, pixel accuracy and mean IoU over the epochs into a PNG file, which names the run's folder."""
    epochs = [record.epoch for record in history]
    losses = {
        "training": [record.train_loss for record in history],
        "validation": [record.val_loss for record in history],
    }
    scores = {
        "pixel accuracy": [record.pixel_accuracy for record in history],
        "mean IoU": [record.mean_iou for record in history],
    }
    save_panels({"loss": (epochs, losses), "validation score": (epochs, scores)}, "epoch", path, str(path.parent))


def save_panels(
    panels: Mapping[str, tuple[Sequence[int], Lines]], xlabel: str, path: Path | BinaryIO, title: str = ""
) -> None:
    """Draw panels side by side into a PNG file.

    Args:
        panels: For the label of each y axis: the points on the x axis, and the named lines over them.
        xlabel: Label of the x axes, which count something.
        path: File to write, or one that is open.
        title: What stands above them all.
    """
    figure = Figure(figsize=(_PANEL[0] * len(panels), _PANEL[1]), layout="constrained")
    figure.suptitle(title)
    for axes, (ylabel, (points, lines)) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        marker = "o" if len(points) == 1 else None
        for (name, values), style in zip(lines.items(), itertools.cycle(_LINE_STYLES)):
            axes.plot(points, values, style, label=name, marker=marker)
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend()
        axes.grid(alpha=0.3)
    figure.savefig(path, format="png", dpi=_DPI)


def save_grid(columns: Mapping[str, Sequence[Image.Image]], path: Path) -> None:
    """Draw named columns of pictures side by side into a PNG file."""
    rows = len(next(iter(columns.values())))
    figure = Figure(figsize=(_PICTURE * len(columns), _PICTURE * rows), layout="constrained")
    grid = figure.subplots(rows, len(columns), squeeze=False)
    for column, (name, pictures) in enumerate(columns.items()):
        grid[0, column].set_title(name)
        for row, picture in enumerate(pictures):
            grid[row, column].imshow(picture, interpolation="nearest")
            grid[row, column].axis("off")
    figure.savefig(path, format="png", dpi=_DPI)
