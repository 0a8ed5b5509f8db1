"""``fastseg export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
from rich.console import Console
from typer import Option

from fastseg.cli import options
from fastseg.export import ExportError, Format
from fastseg.export import export as write
from fastseg.training import ConfigError, load_checkpoint

_SIDE = 64  # of the example, to the next one that the network takes


def export(
    checkpoint: options.Checkpoint,
    format: Annotated[Format, Option(help="Kind of file.")],
    out: Annotated[Path, Option("--file", help="File to write.")],
    model: options.Function = None,
) -> None:
    """Write a checkpoint as a file for other runtimes: normalised images in, class numbers out, of any size.

    The file is run and compared with the network before it is kept. Class names, colours and normalisation are in its
    metadata, under the key "fastseg", as JSON.
    """
    network, metadata = load_checkpoint(checkpoint, model=model)
    side = max(_SIDE, metadata.network.smallest_side, 2 * network.divisor)
    height, width = metadata.size or (side, side)
    described = {
        "classes": metadata.class_names, "palette": metadata.palette, "mean": metadata.mean, "std": metadata.std,
        "size": metadata.size,
    }  # fmt: skip
    example = torch.randn(1, metadata.network.in_channels, height, width, generator=torch.Generator().manual_seed(0))
    try:
        write(network, out, format, example=example, metadata=described)
    except (ExportError, ImportError, ValueError) as error:
        raise ConfigError(str(error)) from error
    Console().print(f"{out}: images [N, {metadata.network.in_channels}, H, W] to classes [N, H, W]", soft_wrap=True)
