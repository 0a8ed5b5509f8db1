"""Scores of a checkpoint on a data set."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fastseg.data import DataError, MaskDataset, Normalize, overlay
from fastseg.data.pictures import to_picture
from fastseg.metrics import confusion_matrix, scores
from fastseg.training.checkpoint import Metadata, load_checkpoint
from fastseg.training.config import Backend, DeviceChoice
from fastseg.training.datamodule import SegmentationData
from fastseg.training.devices import launched_rank
from fastseg.training.evaluation_report import Example, error_map, write_report
from fastseg.training.history import Evaluation
from fastseg.training.networks import Network
from fastseg.training.run import task_of
from fastseg.training.trainer import new_trainer, quiet_lightning

WORST = 10  # images in a report


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
    report: str | Path | None = None,
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
        report: Folder for ``report.html``, one page that opens without a network: the scores, the confusion matrix, the
            curves of the training and the worst images with truth, prediction and errors.

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
    if report is not None and not launched_rank():
        _write_report(Path(report), f"{checkpoint} on {split} of {data}", network, metadata, dataset)
    return task.evaluation, metadata


def _write_report(folder: Path, title: str, network: Network, metadata: Metadata, dataset: MaskDataset) -> None:
    """One more pass over the images, one by one: each has its own score."""
    normalize, colors = Normalize(metadata.mean, metadata.std), np.array(metadata.palette, dtype=np.uint8)
    place = next(network.parameters()).device
    total = torch.zeros(metadata.num_classes, metadata.num_classes, dtype=torch.int64)
    ranked: list[tuple[float, int, Tensor]] = []  # the worst first: score, number of the image, prediction
    for index in range(len(dataset)):
        image, mask = dataset[index]
        prediction = network.predict(normalize(image)[None].to(place), (mask.shape[0], mask.shape[1]))[0].cpu()
        matrix = confusion_matrix(prediction, mask, metadata.num_classes, metadata.ignore_index)
        total += matrix
        score = scores(matrix).mean_iou
        if not math.isnan(score):
            ranked = sorted([*ranked, (score, index, prediction)], key=lambda entry: entry[0])[:WORST]
    worst = []
    for score, index, prediction in ranked:
        image, mask = dataset[index]
        picture = to_picture(image).resize((mask.shape[1], mask.shape[0]))
        truth = mask.numpy().astype(np.int64)
        pictures = {
            "truth": overlay(picture, truth, colors), "prediction": overlay(picture, prediction, colors),
            "errors": error_map(prediction.numpy(), truth, metadata.ignore_index),
        }  # fmt: skip
        worst.append(Example(dataset.pairs[index].image.name, score, pictures))
    curves = {
        "validation loss": [record.val_loss for record in metadata.history],
        "mean IoU": [record.mean_iou for record in metadata.history],
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_report(folder / "report.html", title, metadata.class_names, colors, total, curves, worst)
