"""What a run measures, epoch by epoch."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import NamedTuple

from fastseg.metrics import Scores
from fastseg.training import _records
from fastseg.training.errors import ConfigError


class Evaluation(NamedTuple):
    """What a network reaches on a split.

    Args:
        loss: The loss over all labelled pixels.
        scores: What `fastseg.metrics.scores` makes of the confusion matrix.
    """

    loss: float
    scores: Scores


@dataclasses.dataclass(frozen=True)
class EpochRecord:
    """The measurements of one epoch.

    Args:
        epoch: Number of the epoch, from 1.
        train_loss: Mean of the steps' losses, each counted by its images.
        val_loss: Loss over all labelled pixels of the validation split.
        pixel_accuracy: Share of the labelled validation pixels that are right.
        mean_iou: Mean of ``iou`` over the classes that have one.
        iou: Intersection over union of each class; None for a class that neither truth nor prediction has.
        seconds: Wall-clock seconds of the epoch's training, validation left out.
        images_per_second: Training images per second, of all processes together.
    """

    epoch: int
    train_loss: float
    val_loss: float
    pixel_accuracy: float
    mean_iou: float
    iou: tuple[float | None, ...]
    seconds: float
    images_per_second: float


@dataclasses.dataclass(frozen=True)
class History:
    """A run that has ended.

    Args:
        out: The run's folder, with ``best.safetensors``, ``last.ckpt``, ``history.jsonl`` and ``curves.png``.
        class_names: A name for each class.
        epochs: The measurements of every epoch.
    """

    out: Path
    class_names: tuple[str, ...]
    epochs: tuple[EpochRecord, ...]

    @property
    def best(self) -> EpochRecord:
        """The epoch of ``best.safetensors``: the first with the highest mean IoU."""
        return max(self.epochs, key=lambda record: record.mean_iou)


def to_lines(records: tuple[EpochRecord, ...]) -> str:
    """The records as JSON Lines."""
    return "".join(json.dumps(dataclasses.asdict(record), allow_nan=False) + "\n" for record in records)


def known(value: float) -> float | None:
    """``value``, or None for nan, which JSON doesn't have."""
    return None if math.isnan(value) else value


def read_history(run: Path) -> tuple[EpochRecord, ...]:
    """The records of a run's folder.

    Raises:
        ConfigError: It holds none.
    """
    file = run / "history.jsonl"
    try:
        records = tuple(_records.from_json(EpochRecord, json.loads(line)) for line in file.read_text().splitlines())
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{run}: no run that can be read: {error}") from error
    if not records:
        raise ConfigError(f"{run}: no run that can be read: {file.name} is empty")
    return records
