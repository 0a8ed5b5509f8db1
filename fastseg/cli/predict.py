"""``fastseg predict``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from rich.console import Console
from typer import Argument, Option

from fastseg.cli import options
from fastseg.cli.output import main_console
from fastseg.inference import Blend
from fastseg.training import ConfigError, Viewing, predict_video
from fastseg.training import predict as run_prediction
from fastseg.training.devices import launched_place
from fastseg.training.video import is_video

Palette = Literal["ade20k", "camvid", "cityscapes", "voc"]


def predict(
    images: Annotated[list[Path], Argument(help="Image files, and folders of them; or one video.")],
    checkpoint: options.Checkpoint,
    out: Annotated[Path, Option(help="Folder for STEM.png (class numbers) and STEM_overlay.png; or a video's file.")],
    alpha: Annotated[float, Option(min=0, max=1, help="Share of the classes' colours in the overlays.")] = 0.5,
    backend: options.Backend = "fastseg",
    device: options.Device = "auto",
    max_pixels: options.MaxPixels = None,
    model: options.Function = None,
    tile: Annotated[int | None, Option(help="Side of the tiles in which large images are seen.")] = None,
    overlap: Annotated[float, Option(help="Share of a tile that its neighbour covers, too.")] = 0.25,
    blend: Annotated[Blend, Option(help="How tiles are weighted where they overlap.")] = "gaussian",
    tta: Annotated[str | None, Option(help="Also see images so: flip, and sizes, as in flip,0.75,1.25.")] = None,
    palette: Annotated[Palette | None, Option(help="Colours of a data set.", show_default="the checkpoint's")] = None,
    confidence: Annotated[bool, Option("--confidence", help="Also write STEM_confidence.png.")] = False,
) -> None:
    """Segment images: a mask of class numbers and an overlay for each, in the image's size; or a video.

    In several processes: torchrun --nproc-per-node=2 -m fastseg predict ...
    """
    given: dict[str, Any] = {
        "alpha": alpha, "backend": backend, "device": device, "model": model, "colors": palette,
        "viewing": Viewing(tile, overlap, blend, *_augmentation(tta)), "console": main_console(),
    }  # fmt: skip
    rank, processes = launched_place()
    if any(map(is_video, images)):
        if len(images) > 1 or processes > 1 or confidence:
            raise ConfigError("images: a video is segmented alone, in one process, and without --confidence")
        made = f"{predict_video(checkpoint, images[0], out, **given)} frames"
    else:
        masks = run_prediction(checkpoint, images, out, max_pixels=max_pixels, confidence=confidence, **given)
        made = f"{len(masks)} masks and overlays"
    process = f"process {rank}: " if processes > 1 else ""
    Console().print(f"{process}{made} in {out}", soft_wrap=True, highlight=False)


def _augmentation(text: str | None) -> tuple[bool, tuple[float, ...]]:
    """``"flip,0.75"`` to whether to mirror, and the sizes, 1 first."""
    flip, scales = False, [1.0]
    for part in text.split(",") if text is not None else ():
        if part == "flip":
            flip = True
            continue
        try:
            scales.append(float(part))
        except ValueError as error:
            raise ConfigError(f"tta must be flip and numbers, as in flip,0.75,1.25, but it is {text!r}") from error
    return flip, tuple(dict.fromkeys(scales))
