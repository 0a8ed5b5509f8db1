"""Scores of a checkpoint on a data set."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from fastseg.data import DataError, Normalize
from fastseg.training.checkpoint import Metadata, load_checkpoint
from fastseg.training.config import Backend, DeviceChoice
from fastseg.training.datamodule import SegmentationData
from fastseg.training.history import Evaluation
from fastseg.training.run import task_of
from fastseg.training.trainer import new_trainer, quiet_lightning


def evaluate(
    checkpoint: str | Path,
    data: str | Path,
    split: str = "val",
    *,
    batch_size: int = 8,
    backend: Backend = "fastseg",
    device: DeviceChoice = "auto",
    workers: int | None = None,
    model: str | None = None,
    at: Literal["native", "training"] = "native",
) -> tuple[Evaluation, Metadata]:
    """Measure a checkpoint on a split of a data set, with the normalisation, loss and split of its training.

    Args:
        checkpoint: A file that training wrote.
        data: Folder of the data set.
        split: ``"train"``, ``"val"`` or ``"test"``.
        batch_size: Images of a batch; decides speed and memory alone.
        backend: As in `TrainConfig`.
        device: As in `TrainConfig`.
        workers: As in `TrainConfig`.
        model: As in `load_checkpoint`.
        at: The size that is scored: ``"native"``, the masks' own, as `predict` writes them; ``"training"``, that which
            the network was trained at. The network sees its own size in either case.

    Returns:
        Loss and scores over the split, and the checkpoint's metadata.

    Raises:
        CheckpointError: The file is no checkpoint that can be used.
        ConfigError: There is no such device.
        DataError: The data can't be used, or has labels outside the checkpoint's classes.
    """
    network, metadata = load_checkpoint(checkpoint, backend=backend, model=model)
    source = dataclasses.replace(metadata.config, data=Path(data), ignore_index=metadata.ignore_index)
    dataset = source.dataset(split, metadata.size, metadata.num_classes, native_masks=at == "native")
    if (channels := len(dataset[0][0])) != len(metadata.mean):
        raise DataError(f"{data}: the network takes {len(metadata.mean)} channels, but the images have {channels}")
    batches = SegmentationData(
        None, dataset, batch_size=batch_size, workers=workers, normalize=Normalize(metadata.mean, metadata.std)
    )
    task = task_of(metadata, network)
    with quiet_lightning():
        new_trainer(device).validate(task, batches, verbose=False)
    return task.evaluation, metadata
