"""Scores of a checkpoint on a data set."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from fastseg.data import Normalize
from fastseg.training.batches import Preparation, make_loader
from fastseg.training.checkpoint import Metadata, load_checkpoint
from fastseg.training.config import Backend, DeviceChoice
from fastseg.training.distributed import join_world
from fastseg.training.engine import Evaluation, evaluate_batches, with_loss


def evaluate(
    checkpoint: str | Path,
    data: str | Path,
    split: str = "val",
    *,
    batch_size: int = 8,
    backend: Backend = "fastseg",
    device: DeviceChoice = "auto",
    workers: int | None = None,
) -> tuple[Evaluation, Metadata]:
    """Measure a checkpoint on a split of a data set, with the size, normalisation, loss and split of its training.

    Args:
        checkpoint: A file that training wrote.
        data: Folder of the data set.
        split: ``"train"``, ``"val"`` or ``"test"``.
        batch_size: Images of a batch; decides speed and memory alone.
        backend: As in `TrainConfig`.
        device: As in `TrainConfig`.
        workers: As in `TrainConfig`.

    Returns:
        Loss and scores over the split, and the checkpoint's metadata.

    Raises:
        CheckpointError: The file is no checkpoint that can be used.
        ConfigError: There is no such device.
        DataError: The data can't be used, or has labels outside the checkpoint's classes.
    """
    model, metadata = load_checkpoint(checkpoint, backend=backend)
    source = dataclasses.replace(metadata.config, data=Path(data), ignore_index=metadata.ignore_index)
    dataset = source.dataset(split, metadata.size, metadata.num_classes)
    with join_world(device) as world:
        prepare = Preparation(world.device, Normalize(metadata.mean, metadata.std).to(world.device))
        network = with_loss(model, metadata).to(world.device)
        part = range(world.rank, len(dataset), world.size)
        batches = make_loader(dataset, batch_size, part, world.device, workers)
        return evaluate_batches(network, batches, prepare, world), metadata
