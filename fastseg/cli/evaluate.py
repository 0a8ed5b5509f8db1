"""``fastseg evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from typer import Option

from fastseg import training
from fastseg.cli import options
from fastseg.cli.output import class_table, main_console
from fastseg.training.history import known


def evaluate(
    data: options.Data,
    checkpoint: options.Checkpoint,
    split: Annotated[Literal["train", "val", "test"], Option(help="Part of the data set.")] = "val",
    batch_size: options.BatchSize = 8,
    backend: options.Backend = "fastseg",
    device: options.Device = "auto",
    workers: options.Workers = None,
    model: options.Function = None,
    at: Annotated[
        Literal["native", "training"], Option(help="Score at the masks' own size, or at that of the training.")
    ] = "native",
    report: Annotated[Path | None, Option(help="Folder for report.html, a page with all that is known.")] = None,
) -> None:
    """Measure a checkpoint on a split: loss, pixel accuracy, IoU and Dice of each class, and their means."""
    (loss, scores), metadata = training.evaluate(
        checkpoint,
        data,
        split,
        batch_size=batch_size,
        backend=backend,
        device=device,
        workers=workers,
        model=model,
        at=at,
        report=report,
    )
    console = main_console()
    iou, dice = ([known(value) for value in values] for values in (scores.iou, scores.dice))
    console.print(class_table(metadata.class_names, IoU=iou, Dice=dice))
    console.print(
        f"{split}: loss {loss:.4f}, pixel accuracy {scores.pixel_accuracy:.4f}, mean IoU {scores.mean_iou:.4f}, "
        f"mean Dice {scores.mean_dice:.4f}",
        soft_wrap=True,
        highlight=False,
    )
