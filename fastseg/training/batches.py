"""From a data set to batches on the device."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from fastseg.data import Augment, DataError, Normalize

Example: TypeAlias = tuple[Tensor, Tensor]  # image uint8 [3, H, W] and mask [H, W], or batches of them

_CUDA_WORKERS = 4  # processes that load images while a GPU trains; a CPU's cores are busy training


@dataclasses.dataclass(frozen=True)
class Preparation:
    """What happens to a batch between loading and the network: to the device, augmentation, normalisation, layout.

    Args:
        device: Where the network is.
        normalize: Normalisation of the images.
        augment: Augmentation of images and masks; None for none.
        channels_last: Give images in torch's channels_last memory format.
    """

    device: torch.device
    normalize: Normalize
    augment: Augment | None = None
    channels_last: bool = False

    def __call__(self, images: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
        """Images uint8 ``[N, 3, H, W]`` to normalised float32, masks ``[N, H, W]`` to the device."""
        images, masks = images.to(self.device, non_blocking=True), masks.to(self.device, non_blocking=True)
        if self.augment is not None:
            images, masks = self.augment(images.to(torch.float32) / 255, masks)
        images = self.normalize(images)
        return images.contiguous(memory_format=self.memory_format), masks

    @property
    def memory_format(self) -> torch.memory_format:
        """The layout of images and network."""
        return torch.channels_last if self.channels_last else torch.contiguous_format


def make_loader(
    dataset: Dataset[Example],
    batch_size: int,
    sampler: Sampler[Any] | Sequence[int],
    device: torch.device,
    workers: int | None,
) -> DataLoader[Example]:
    """A loader of batches ``(images, masks)`` in the order of ``sampler``; ``workers`` as in `TrainConfig`."""
    processes = (_CUDA_WORKERS if device.type == "cuda" else 0) if workers is None else workers
    return DataLoader(
        dataset,
        batch_size,
        sampler=sampler,
        num_workers=processes,
        collate_fn=_stack,
        pin_memory=device.type == "cuda",
        persistent_workers=processes > 0,
    )


def _stack(items: list[Example]) -> list[Tensor]:
    sizes = {tuple(image.shape[-2:]) for image, _ in items}
    if len(sizes) > 1:
        (height, width), (other_height, other_width) = sorted(sizes)[:2]
        raise DataError(
            f"images of different sizes ({height}x{width} and {other_height}x{other_width}, height x width) "
            "can't form a batch: give one size for all"
        )
    return default_collate(items)
