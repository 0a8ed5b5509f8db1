"""Masks for images, by a checkpoint."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from rich.progress import track
from torch import Tensor

from fastseg.data import DataError, Normalize, images_by_stem, overlay, palette, save_mask, with_legend
from fastseg.data.files import image_tensor, read_pixels
from fastseg.inference import Blend, TestTimeAugmentation, sliding_window
from fastseg.training.checkpoint import Metadata, load_checkpoint
from fastseg.training.config import Backend, DeviceChoice
from fastseg.training.devices import choose_device
from fastseg.training.errors import ConfigError
from fastseg.training.networks import Network


class Target(NamedTuple):
    """The files to write for one image."""

    mask: Path
    overlay: Path
    confidence: Path


@dataclasses.dataclass(frozen=True)
class Viewing:
    """How a network looks at an image.

    Args:
        tile: Side of the tiles in which it sees the image, each in the file's own size; None for the whole image, in
            the size of its training.
        overlap: Share of a tile's side that it shares with its neighbour, in [0, 1).
        blend: How tiles are weighted; see `fastseg.sliding_window`.
        flip: Also see it mirrored, and take the mean of the logits.
        scales: The sizes to see it in, of which the mean is taken too.
    """

    tile: int | None = None
    overlap: float = 0.25
    blend: Blend = "gaussian"
    flip: bool = False
    scales: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        if self.tile is not None and self.tile < 1:
            raise ConfigError(f"tile must be positive, but it is {self.tile}")
        if not 0 <= self.overlap < 1:
            raise ConfigError(f"overlap must be in [0, 1), but it is {self.overlap}")
        if not self.scales or not all(0 < scale < math.inf for scale in self.scales):
            raise ConfigError(f"scales must be positive, but they are {self.scales}")


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
    viewing: Viewing = Viewing(),
    colors: str | None = None,
    confidence: bool = False,
    console: Console | None = None,
) -> list[Path]:
    """Write a mask and an overlay for each image, in the image's own size.

    ``STEM.png`` holds class numbers (see `fastseg.data.save_mask`), ``STEM_overlay.png`` the classes' colours over the
    image and a legend of those that occur, ``STEM_confidence.png`` the probability of each pixel's class, of 255.

    Args:
        checkpoint: A file that training wrote.
        images: Image files, and folders of them.
        out: Folder to write to, made where it doesn't exist.
        alpha: Share of the colours in the overlays, in [0, 1].
        backend: As in `TrainConfig`.
        device: As in `TrainConfig`.
        max_pixels: The largest image; None takes 500 million pixels.
        model: As in `load_checkpoint`.
        viewing: How the network looks at an image.
        colors: One of `fastseg.data.PALETTES`; None for the checkpoint's.
        confidence: Also write the confidence.
        console: Where progress is shown; None for nowhere.

    Returns:
        The mask files, in the order of the images.

    Raises:
        CheckpointError: The file is no checkpoint that can be used.
        ConfigError: There is no such device, or the palette has too few colours.
        DataError: An image is missing, or a file to write is an image or would be written twice. After all others are
            written: the images that can't be read.
    """
    out = Path(out)
    targets = _targets(image_files([Path(path) for path in images]), out)
    network, metadata = load_checkpoint(checkpoint, backend=backend, model=model)
    place = choose_device(device)
    network.to(place).eval()
    painted = np.array(metadata.palette, dtype=np.uint8) if colors is None else palette(colors)
    if len(painted) < metadata.num_classes:
        raise ConfigError(f"palette {colors} has {len(painted)} colours for {metadata.num_classes} classes")
    out.mkdir(parents=True, exist_ok=True)
    shown = console if console is not None else Console(quiet=True)
    failures: list[str] = []
    for source, target in track(targets.items(), "predict", console=shown, disable=not shown.is_terminal):
        try:
            image, mask, sure = _segment(source, network, metadata, place, max_pixels, viewing, confidence)
        except DataError as error:
            failures.append(str(error))
            continue
        save_mask(mask, target.mask, painted)
        with_legend(overlay(image, mask, painted, alpha), mask, metadata.class_names, painted).save(target.overlay)
        if sure is not None:
            Image.fromarray((sure * 255).round().to(torch.uint8).numpy()).save(target.confidence)
    if failures:
        raise DataError(f"{len(failures)} of {len(targets)} images can't be used: {'; '.join(failures)}")
    return [target.mask for target in targets.values()]


def image_files(paths: Sequence[Path]) -> list[Path]:
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
        targets[file] = Target(*(out / f"{file.stem}{ending}.png" for ending in ("", "_overlay", "_confidence")))
        for target in targets[file]:
            if (other := taken.get(target.resolve())) is not None:
                raise DataError(f"{file}: its result {target} would overwrite {other}")
            taken[target.resolve()] = f"the result of {file}"
    return targets


def _segment(
    path: Path, network: Network, metadata: Metadata, device: torch.device, max_pixels: int | None, viewing: Viewing,
    confidence: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """The image, uint8 ``[3, H, W]``, the class of each pixel, ``[H, W]``, and where asked its confidence."""
    pixels = read_pixels(path, exif=metadata.config.exif, max_pixels=max_pixels)
    image = image_tensor(pixels)
    seen = image if viewing.tile else image_tensor(pixels, metadata.size)
    if len(image) != len(metadata.mean):
        raise DataError(f"{path}: the network takes {len(metadata.mean)} channels, but the image has {len(image)}")
    height, width = image.shape[-2:]
    smallest = metadata.network.smallest_side
    if not viewing.tile and min(seen.shape[-2:]) < smallest:
        raise DataError(f"{path}: must be at least {smallest}x{smallest}, but it is {height}x{width} (height x width)")
    normalize = Normalize(metadata.mean, metadata.std).to(device)
    logits_of_images: Callable[[Tensor], Tensor] = network.logits
    if viewing.flip or viewing.scales != (1.0,):
        augmented = TestTimeAugmentation(network.logits, flip=viewing.flip, scales=viewing.scales)
        logits_of_images = augmented.forward

    def upsampled(tiles: Tensor) -> Tensor:
        return F.interpolate(logits_of_images(tiles), tuple(tiles.shape[2:]), **network.grid)

    with torch.no_grad():
        if viewing.tile:
            found = sliding_window(
                upsampled, image, max(viewing.tile, smallest), overlap=viewing.overlap, blend=viewing.blend,
                preprocess=lambda tiles: normalize(tiles.to(device)), return_confidence=confidence,
            )  # fmt: skip
        else:
            logits, size = logits_of_images(normalize(seen.to(device)).unsqueeze(0)), (height, width)
            found = network.operators.upsample_argmax(logits, size, return_confidence=confidence, **network.grid)
    mask, sure = found if isinstance(found, tuple) else (found, None)
    return image, mask.view(height, width).cpu(), None if sure is None else sure.view(height, width).cpu()
