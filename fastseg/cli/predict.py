"""``fastseg predict``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from rich.console import Console
from typer import Argument, Option

from fastseg.cli import options
from fastseg.training import predict as run_prediction


def predict(
    images: Annotated[list[Path], Argument(help="Image files, and folders of them.")],
    checkpoint: options.Checkpoint,
    out: Annotated[Path, Option(help="Folder for STEM.png (class numbers) and STEM_overlay.png.")],
    alpha: Annotated[float, Option(min=0, max=1, help="Share of the classes' colours in the overlays.")] = 0.5,
    backend: options.Backend = "fastseg",
    device: options.Device = "auto",
    max_pixels: options.MaxPixels = None,
    model: options.Function = None,
) -> None:
    """Segment images: a mask of class numbers and an overlay for each, in the image's size."""
    console = Console()
    masks = run_prediction(
        checkpoint,
        images,
        out,
        alpha=alpha,
        backend=backend,
        device=device,
        model=model,
        max_pixels=max_pixels,
        console=console,
    )
    console.print(f"{len(masks)} masks and overlays in {out}", soft_wrap=True, highlight=False)
