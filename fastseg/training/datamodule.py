"""Images and masks for training and validation as a LightningDataModule."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, default_collate

from fastseg.data import Augment, DataError, Normalize
from fastseg.training._lightning import LightningDataModule

Example: TypeAlias = tuple[Tensor, Tensor]  # image [C, H, W] and mask [H, W], or batches of them

_CUDA_WORKERS = 4  # processes that load images while a GPU trains; a CPU's cores are busy training


class SegmentationData(LightningDataModule):
    """Images and masks, loaded, augmented and normalised for `SegmentationTask`.

    The training images come in an order that follows from the seed and the epoch, shared among the processes; each
    validation image comes once, to one of the processes. Augmentation and normalisation run on the network's device.

    Args:
        train: Items ``(image, mask)``: uint8 or floating point in 0..1, ``[C, H, W]``, and integer ``[H, W]``, as
            `fastseg.data.MaskDataset` gives them; None to validate alone.
        val: As ``train``.
        batch_size: Images of a batch, in each process; Lightning's tuner sets it.
        workers: Processes that load images; None takes 4 with CUDA and 0 on a CPU, whose cores are busy training.
        augment: Augmentation of the training batches; None for none.
        normalize: Normalisation of the images; None for that of ImageNet.
        seed: Seed of the order of the training images.
        channels_last: Give images in torch's channels_last memory format.
    """

    def __init__(
        self,
        train: Dataset[Example] | None,
        val: Dataset[Example],
        *,
        batch_size: int = 8,
        workers: int | None = None,
        augment: Augment | None = None,
        normalize: Normalize | None = None,
        seed: int = 0,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        self.train, self.val = train, val
        self.batch_size = batch_size
        self.workers = workers
        self.augment = augment
        self.normalize = Normalize() if normalize is None else normalize
        self.seed = seed
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format

    def train_dataloader(self) -> DataLoader[Example]:
        """Batches of this process's share of the training images."""
        assert self.train is not None
        world, rank = self._place()
        return self._loader(self.train, DistributedSampler(self.train, world, rank, shuffle=True, seed=self.seed))

    def val_dataloader(self) -> DataLoader[Example]:
        """Batches of this process's validation images, none of which another one has."""
        world, rank = self._place()
        return self._loader(self.val, _Unrepeated(self.val, world, rank))

    def on_after_batch_transfer(self, batch: Example, dataloader_idx: int) -> Example:
        """Augment in training, and normalise."""
        images, masks = batch
        if self.augment is not None and self.trainer is not None and self.trainer.training:
            images, masks = self.augment(images.float() / 255 if images.dtype == torch.uint8 else images, masks)
        return self.normalize.to(images.device)(images).contiguous(memory_format=self.memory_format), masks

    def _place(self) -> tuple[int, int]:
        return (1, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)

    def _loader(self, dataset: Dataset[Example], sampler: DistributedSampler[Any]) -> Any:
        cuda = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        processes = (_CUDA_WORKERS if cuda else 0) if self.workers is None else self.workers
        return DataLoader(
            dataset, self.batch_size, sampler=sampler, num_workers=processes, collate_fn=_stack, pin_memory=cuda,
            persistent_workers=processes > 0,
            generator=torch.Generator().manual_seed(self.seed),  # else it draws from that of the augmentation
        )  # fmt: skip


class _Unrepeated(DistributedSampler[Any]):
    """A process's share, without the repetitions that make all shares equally long; Lightning knows the class."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.rank, len(self.dataset), self.num_replicas))  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(range(self.rank, len(self.dataset), self.num_replicas))  # type: ignore[arg-type]


def _stack(items: list[Example]) -> list[Any]:
    sizes = {tuple(image.shape[-2:]) for image, _ in items}
    if len(sizes) > 1:
        (height, width), (other_height, other_width) = sorted(sizes)[:2]
        raise DataError(
            f"images of different sizes ({height}x{width} and {other_height}x{other_width}, height x width) "
            "can't form a batch: give one size for all"
        )
    if len({mask.shape for _, mask in items}) > 1:  # in their files' size, while the images are resized
        return [torch.stack([image for image, _ in items]), [mask for _, mask in items]]
    return default_collate(items)
