"""The training and the validation split that a run's settings name."""

from __future__ import annotations

import dataclasses
import itertools

from fastseg.data import (
    CAMVID_CLASSES,
    CAMVID_IGNORE_INDEX,
    DataError,
    MaskDataset,
    Pair,
    camvid_layout,
    class_frequencies,
    class_weights,
    find_pairs,
    infer_num_classes,
)
from fastseg.training.config import TrainConfig

DEFAULT_IGNORE_INDEX = 255


@dataclasses.dataclass(frozen=True)
class Splits:
    """The images that a run trains and validates on.

    Args:
        train: The training split.
        val: The validation split.
        class_names: A name for each class.
        ignore_index: Label of the pixels that don't count.
    """

    train: MaskDataset
    val: MaskDataset
    class_names: tuple[str, ...]
    ignore_index: int


def open_splits(config: TrainConfig) -> Splits:
    """Find the files of both splits, and the classes that their masks have.

    Raises:
        DataError: The data can't be used.
    """
    camvid = camvid_layout(config.data)
    pairs = {split: _pairs(config, split) for split in ("train", "val")}
    if config.test_fraction and not camvid:
        pairs["test"] = _pairs(config, "test")
    ignore_index, classes = config.ignore_index, config.classes
    if ignore_index is None:
        ignore_index = CAMVID_IGNORE_INDEX if camvid else DEFAULT_IGNORE_INDEX
    if classes is None:
        all_pairs = list(itertools.chain.from_iterable(pairs.values()))
        classes = len(CAMVID_CLASSES) if camvid else infer_num_classes(all_pairs, ignore_index)
    known = camvid and classes == len(CAMVID_CLASSES)
    return Splits(
        train=MaskDataset(pairs["train"], config.size, classes, ignore_index),
        val=MaskDataset(pairs["val"], config.size, classes, ignore_index),
        class_names=CAMVID_CLASSES if known else tuple(f"class {label}" for label in range(classes)),
        ignore_index=ignore_index,
    )


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


def _pairs(config: TrainConfig, split: str) -> list[Pair]:
    return find_pairs(
        config.data, split, val_fraction=config.val_fraction, test_fraction=config.test_fraction, seed=config.seed
    )
