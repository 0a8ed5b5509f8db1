"""Masks for images, by a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from torch import Tensor

from fastseg.data import DataError, Normalize, images_by_stem, overlay, palette, read_image, save_mask
from fastseg.models import SegmentationModel
from fastseg.training.checkpoint import Metadata, load_checkpoint
from fastseg.training.config import Backend, DeviceChoice
from fastseg.training.distributed import choose_device
from fastseg.training.networks import smallest_side


def predict(
    checkpoint: str | Path,
    images: Sequence[str | Path],
    out: str | Path,
    *,
    alpha: float = 0.5,
    backend: Backend = "fastseg",
    device: DeviceChoice = "auto",
    console: Console | None = None,
) -> list[Path]:
    """Write a mask and an overlay for each image, in the image's own size.

    ``STEM.png`` holds class numbers (see `fastseg.data.save_mask`), ``STEM_overlay.png`` the classes' colours over the
    image.

    Args:
        checkpoint: A file that training wrote.
        images: Image files, and folders of them.
        out: Folder to write to, made where it doesn't exist.
        alpha: Share of the colours in the overlays, in [0, 1].
        backend: As in `TrainConfig`.
        device: As in `TrainConfig`.
        console: Where progress is shown; None for nowhere.

    Returns:
        The mask files, in the order of the images.

    Raises:
        CheckpointError: The file is no checkpoint that can be used.
        ConfigError: There is no such device.
        DataError: An image is missing or can't be read, or two have the same stem.
    """
    files = _image_files([Path(path) for path in images])
    model, metadata = load_checkpoint(checkpoint, backend=backend)
    place = choose_device(device)
    model.to(place).eval()
    colors = palette(metadata.num_classes)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    shown = console if console is not None else Console(quiet=True)
    masks = []
    for path in track(files, "predict", console=shown, disable=not shown.is_terminal):
        image, mask = _segment(path, model, metadata, place)
        masks.append(out / f"{path.stem}.png")
        save_mask(mask, masks[-1], colors)
        overlay(image, mask, colors, alpha).save(out / f"{path.stem}_overlay.png")
    return masks


def _image_files(paths: list[Path]) -> list[Path]:
    """The files among ``paths`` and in the folders among them."""
    files: dict[str, Path] = {}
    for path in paths:
        if not path.exists():
            raise DataError(f"{path}: no such file or folder")
        found = images_by_stem(path) if path.is_dir() else {path.stem: path}
        if not found:
            raise DataError(f"{path}: no images in this folder")
        for stem, file in found.items():
            if stem in files:
                raise DataError(f"{files[stem]} and {file} have the same stem: their masks would be one file")
            files[stem] = file
    return list(files.values())


def _segment(path: Path, model: SegmentationModel, metadata: Metadata, device: torch.device) -> tuple[Tensor, Tensor]:
    """The image, uint8 ``[3, H, W]``, and its classes, int64 ``[H, W]``, both in the file's size.

    The network sees the image in the size of its training; its logits are upsampled bilinearly to the file's.
    """
    image = read_image(path)
    seen = image if metadata.size is None else read_image(path, metadata.size)
    height, width = image.shape[-2:]
    smallest = smallest_side(metadata.model, metadata.arguments)
    if min(seen.shape[-2:]) < smallest:
        raise DataError(f"{path}: must be at least {smallest}x{smallest}, but it is {height}x{width} (height x width)")
    normalize = Normalize(metadata.mean, metadata.std)
    with torch.no_grad():
        logits = model(normalize(seen).unsqueeze(0).to(device))
        upsampled = F.interpolate(logits, size=(height, width), mode="bilinear", align_corners=False)
    return image, upsampled.argmax(1).squeeze(0).cpu()
