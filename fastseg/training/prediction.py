"""Masks for images, by a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from fastseg.data import DataError, Normalize, images_by_stem, overlay, save_mask
from fastseg.data.files import image_tensor, read_pixels
from fastseg.training.checkpoint import Metadata, load_checkpoint
from fastseg.training.config import Backend, DeviceChoice
from fastseg.training.devices import choose_device
from fastseg.training.networks import Network


class Target(NamedTuple):
    """The files to write for one image."""

    mask: Path
    overlay: Path


def predict(
    checkpoint: str | Path,
    images: Sequence[str | Path],
    out: str | Path,
    *,
    alpha: float = 0.5,
    backend: Backend = "fastseg",
    device: DeviceChoice = "auto",
    max_pixels: int | None = None,
    model: str | None = None,
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
        max_pixels: The largest image; None takes 500 million pixels.
        model: As in `load_checkpoint`.
        console: Where progress is shown; None for nowhere.

    Returns:
        The mask files, in the order of the images.

    Raises:
        CheckpointError: The file is no checkpoint that can be used.
        ConfigError: There is no such device.
        DataError: An image is missing, or a file to write is an image or would be written twice. After all others are
            written: the images that can't be read.
    """
    out = Path(out)
    targets = _targets(_image_files([Path(path) for path in images]), out)
    network, metadata = load_checkpoint(checkpoint, backend=backend, model=model)
    place = choose_device(device)
    network.to(place).eval()
    colors = np.array(metadata.palette, dtype=np.uint8)
    out.mkdir(parents=True, exist_ok=True)
    shown = console if console is not None else Console(quiet=True)
    failures: list[str] = []
    for source, target in track(targets.items(), "predict", console=shown, disable=not shown.is_terminal):
        try:
            image, mask = _segment(source, network, metadata, place, max_pixels)
        except DataError as error:
            failures.append(str(error))
            continue
        save_mask(mask, target.mask, colors)
        overlay(image, mask, colors, alpha).save(target.overlay)
    if failures:
        raise DataError(f"{len(failures)} of {len(targets)} images can't be used: {'; '.join(failures)}")
    return [target.mask for target in targets.values()]


def _image_files(paths: list[Path]) -> list[Path]:
    """The files among ``paths`` and in the folders among them."""
    files: list[Path] = []
    for path in paths:
        if not path.exists():
            raise DataError(f"{path}: no such file or folder")
        found = list(images_by_stem(path).values()) if path.is_dir() else [path]
        if not found:
            raise DataError(f"{path}: no images in this folder")
        files += found
    return files


def _targets(files: list[Path], out: Path) -> dict[Path, Target]:
    """What to write for each file; nothing is written twice, and no image is overwritten."""
    targets: dict[Path, Target] = {}
    taken = {file.resolve(): f"the image {file}" for file in files}
    for file in files:
        targets[file] = Target(out / f"{file.stem}.png", out / f"{file.stem}_overlay.png")
        for target in targets[file]:
            if (other := taken.get(target.resolve())) is not None:
                raise DataError(f"{file}: its result {target} would overwrite {other}")
            taken[target.resolve()] = f"the result of {file}"
    return targets


def _segment(
    path: Path, network: Network, metadata: Metadata, device: torch.device, max_pixels: int | None
) -> tuple[Tensor, Tensor]:
    """The image, uint8 ``[3, H, W]``, and the class of each pixel, ``[H, W]``, both in the file's size.

    The network sees the image in the size of its training; its own logits are upsampled once, to the file's.
    """
    pixels = read_pixels(path, exif=metadata.config.exif, max_pixels=max_pixels)
    image, seen = image_tensor(pixels), image_tensor(pixels, metadata.size)
    if len(image) != len(metadata.mean):
        raise DataError(f"{path}: the network takes {len(metadata.mean)} channels, but the image has {len(image)}")
    height, width = image.shape[-2:]
    smallest = metadata.network.smallest_side
    if min(seen.shape[-2:]) < smallest:
        raise DataError(f"{path}: must be at least {smallest}x{smallest}, but it is {height}x{width} (height x width)")
    normalize = Normalize(metadata.mean, metadata.std)
    mask = network.predict(normalize(seen).unsqueeze(0).to(device), (height, width))
    return image, mask.squeeze(0).cpu()
