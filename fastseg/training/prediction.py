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
from fastseg.training.checkpoint import load_checkpoint
from fastseg.training.config import Backend, DeviceChoice
from fastseg.training.devices import choose_device, launched_place, wait_for_all
from fastseg.training.errors import ConfigError


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
    image and a legend of those that occur, ``STEM_confidence.png`` the probability of each pixel's class, of 255. Under
    torchrun each process takes its share of the images, and waits for the others at the end.

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
        The mask files, in the order of the images; of several processes, those of this one.

    Raises:
        CheckpointError: The file is no checkpoint that can be used.
        ConfigError: There is no such device, or the palette has too few colours.
        DataError: An image is missing, or a file to write is an image or would be written twice. After all others are
            written: the images that can't be read.
    """
    out = Path(out)
    targets = _targets(image_files([Path(path) for path in images]), out)
    segmenter = Segmenter(checkpoint, alpha, backend, device, model, viewing, colors)
    out.mkdir(parents=True, exist_ok=True)
    shown = console if console is not None else Console(quiet=True)
    failures: list[str] = []
    rank, processes = launched_place()
    share = dict(list(targets.items())[rank::processes])
    for source, target in track(share.items(), "predict", console=shown, disable=not shown.is_terminal):
        try:
            pixels = read_pixels(source, exif=segmenter.metadata.config.exif, max_pixels=max_pixels)
            image, mask, sure = segmenter.segment(pixels, source, confidence)
        except DataError as error:
            failures.append(str(error))
            continue
        save_mask(mask, target.mask, segmenter.colors)
        segmenter.paint(image, mask, legend=mask).save(target.overlay)
        if sure is not None:
            Image.fromarray((sure * 255).round().to(torch.uint8).numpy()).save(target.confidence)
    wait_for_all()
    if failures:
        raise DataError(f"{len(failures)} of {len(share)} images can't be used: {'; '.join(failures)}")
    return [target.mask for target in share.values()]


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


class Segmenter:
    """A checkpoint's network, how it looks at images, and how what it finds is painted; see `predict`."""

    def __init__(
        self, checkpoint: str | Path, alpha: float, backend: Backend, device: DeviceChoice, model: str | None,
        viewing: Viewing, colors: str | None,
    ) -> None:  # fmt: skip
        self.network, self.metadata = load_checkpoint(checkpoint, backend=backend, model=model)
        self.alpha, self.viewing, self.device = alpha, viewing, choose_device(device)
        self.network.to(self.device).eval()
        self.colors = np.array(self.metadata.palette, dtype=np.uint8) if colors is None else palette(colors)
        if len(self.colors) < self.metadata.num_classes:
            raise ConfigError(
                f"palette {colors} has {len(self.colors)} colours for {self.metadata.num_classes} classes"
            )
        self.normalize = Normalize(self.metadata.mean, self.metadata.std).to(self.device)
        self.logits: Callable[[Tensor], Tensor] = self.network.logits
        if viewing.flip or viewing.scales != (1.0,):
            self.logits = TestTimeAugmentation(self.logits, flip=viewing.flip, scales=viewing.scales).forward

    def segment(
        self, pixels: np.ndarray, name: object, confidence: bool = False
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The image, ``[C, H, W]``, the class of each pixel, ``[H, W]``, and where asked its confidence.

        Raises:
            DataError: The network can't take such an image, which is called by its name.
        """
        image = image_tensor(pixels)
        channels, height, width = image.shape
        seen = image if self.viewing.tile else image_tensor(pixels, self.metadata.size)
        if channels != len(self.metadata.mean):
            raise DataError(
                f"{name}: the network takes {len(self.metadata.mean)} channels, but the image has {channels}"
            )
        smallest = self.metadata.network.smallest_side
        if not self.viewing.tile and min(seen.shape[-2:]) < smallest:
            raise DataError(
                f"{name}: must be at least {smallest}x{smallest}, but it is {height}x{width} (height x width)"
            )
        with torch.no_grad():
            if self.viewing.tile:
                found = sliding_window(
                    self._upsampled, image, max(self.viewing.tile, smallest), overlap=self.viewing.overlap,
                    blend=self.viewing.blend, preprocess=lambda tiles: self.normalize(tiles.to(self.device)),
                    return_confidence=confidence,
                )  # fmt: skip
            else:
                logits = self.logits(self.normalize(seen.to(self.device)).unsqueeze(0))
                found = self.network.operators.upsample_argmax(
                    logits, (height, width), return_confidence=confidence, **self.network.grid
                )
        mask, sure = found if isinstance(found, tuple) else (found, None)
        return image, mask.view(height, width).cpu(), None if sure is None else sure.view(height, width).cpu()

    def paint(self, image: Tensor, mask: Tensor, *, legend: Tensor) -> Image.Image:
        """The classes' colours over the image, and a legend of the classes among ``legend``."""
        painted = overlay(image, mask, self.colors, self.alpha)
        return with_legend(painted, legend, self.metadata.class_names, self.colors)

    def _upsampled(self, tiles: Tensor) -> Tensor:
        return F.interpolate(self.logits(tiles), tuple(tiles.shape[2:]), **self.network.grid)
