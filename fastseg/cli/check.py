"""``fastseg check``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from rich.console import Console
from typer import Option

from fastseg.cli import options
from fastseg.data import DataConfig

_DEFAULT = DataConfig(data=Path())


def check(
    data: options.Data,
    layout: options.Layout = _DEFAULT.layout,
    mask_suffix: options.MaskSuffix = _DEFAULT.mask_suffix,
    label_map: options.LabelMapFile = _DEFAULT.label_map,
    binary: options.Binary = _DEFAULT.binary,
    reduce_labels: options.ReduceLabels = _DEFAULT.reduce_labels,
    exif: options.Exif = _DEFAULT.exif,
    max_pixels: options.MaxPixels = _DEFAULT.max_pixels,
    val_fraction: options.ValFraction = _DEFAULT.val_fraction,
    test_fraction: options.TestFraction = _DEFAULT.test_fraction,
    classes: options.Classes = _DEFAULT.classes,
    ignore_index: options.IgnoreIndex = _DEFAULT.ignore_index,
    seed: options.Seed = _DEFAULT.seed,
    picture: Annotated[
        Path | None, Option(help="PNG file to write: an image and its mask in colours.", show_default="none")
    ] = None,
) -> None:
    """Read all files of a data set, say what they hold, and whether a training could use them."""
    settings = locals()
    del settings["picture"]
    config = DataConfig(**settings)
    summary, console = config.survey(), Console()
    summary.show(console)
    if picture is not None:
        summary.picture().save(picture, format="PNG")
        console.print(str(picture), soft_wrap=True, highlight=False)
    _ = summary.channels
    console.print(f"{summary.check_classes(config.classes)} classes")
