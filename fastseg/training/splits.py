"""The weights of the classes that a run's settings name."""

from __future__ import annotations

from fastseg.data import DataError, Splits, class_frequencies, class_weights
from fastseg.training.config import TrainConfig


def count_weights(config: TrainConfig, splits: Splits) -> tuple[float, ...] | None:
    """The weight of each class in the loss, by its frequency in the training split; None for equal weights.

    Raises:
        DataError: The data can't be used.
    """
    if config.class_weights == "none":
        return None
    pixels, present = class_frequencies(splits.train, len(splits.class_names), splits.ignore_index)
    if not pixels.any():
        raise DataError(f"no pixel of the training split counts: ignore_index is {splits.ignore_index}")
    return tuple(class_weights(pixels, present, config.class_weights).tolist())
