"""What a user says of a data set, and the data sets that come of it."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path

from rich.console import Console

from fastseg.data.dataset import MaskDataset
from fastseg.data.errors import DataError
from fastseg.data.labels import ExifChoice, LabelMap, PairReader, known_label_map
from fastseg.data.pairs import LAYOUTS, Pair, find_layout, find_pairs
from fastseg.data.summary import Summary, examine


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where a data set is and how it is read; the command line has an option for each field.

    Args:
        data: Folder of the data set (see `find_pairs`).
        layout: Name of its layout; ``"auto"`` finds it out.
        mask_suffix: What the stem of a mask has after that of its image; None takes the layout's.
        label_map: What the masks' values mean (see `read_label_map`); None takes the layout's, or class numbers.
        binary: In masks, 0 (black) is the class 0 and every other value the class 1.
        reduce_labels: In masks, 0 doesn't count and the other labels are one too high.
        exif: What an EXIF orientation does to an image whose mask has another: ``"refuse"``, ``"apply"`` (each file is
            turned by its own) or ``"ignore"`` (none is).
        max_pixels: The largest file; None takes 500 million pixels.
        val_fraction: Share of the images that validate, where the layout has no splits of its own.
        test_fraction: Share of the images that are kept for a test, likewise.
        classes: Number of classes; None takes that of the label map, or what the masks imply.
        ignore_index: Label of the pixels that don't count; None takes 11 for CamVid's layout, else 255.
        seed: Seed of the split.
    """

    data: Path
    layout: str = "auto"
    mask_suffix: str | None = None
    label_map: LabelMap | None = None
    binary: bool = False
    reduce_labels: bool = False
    exif: ExifChoice = "refuse"
    max_pixels: int | None = None
    val_fraction: float = 0.2
    test_fraction: float = 0.0
    classes: int | None = None
    ignore_index: int | None = None
    seed: int = 0

    def pairs(self, split: str) -> list[Pair]:
        """The files of a split."""
        return find_pairs(
            self.data,
            split,
            layout=self.layout,
            mask_suffix=self.mask_suffix,
            val_fraction=self.val_fraction,
            test_fraction=self.test_fraction,
            seed=self.seed,
        )

    def reader(self) -> PairReader:
        """How the files are read."""
        layout, label_map = LAYOUTS[find_layout(self.data, self.layout)], self.label_map
        if layout.label_map and label_map is None and not (self.binary or self.reduce_labels):
            known = known_label_map(layout.label_map)
            if self.classes in (None, sum(name is not None for name in known.values())):
                label_map = known
        default = 255 if self.label_map or self.binary else layout.ignore_index
        ignore_index = default if self.ignore_index is None else self.ignore_index
        return PairReader(label_map, self.binary, self.reduce_labels, ignore_index, self.exif, self.max_pixels)

    def survey(self) -> Summary:
        """Read all files of the data set: what they hold, and what is wrong with those that can't be used.

        Raises:
            DataError: The files of the training or the validation split can't be found.
        """
        splits = {split: self.pairs(split) for split in ("train", "val")}
        name = find_layout(self.data, self.layout)
        layout, reader = LAYOUTS[name], self.reader()
        if self.test_fraction if layout.drawn else layout.has(self.data, "test"):
            with contextlib.suppress(DataError):  # of some data sets the test's masks aren't public
                splits["test"] = self.pairs("test")
        used = {path for pairs in splits.values() for pair in pairs for path in pair}
        left_out = sorted(layout.files(self.data) - used)
        return Summary(f"{self.data}, layout {name}", reader, *examine(reader, splits), left_out)

    def dataset(
        self, split: str, size: tuple[int, int] | None, num_classes: int, *, native_masks: bool = False
    ) -> MaskDataset:
        """A split as images and masks (see `MaskDataset`)."""
        reader = self.reader()
        return MaskDataset(
            self.pairs(split), size, num_classes, reader.ignore_index, reader=reader, native_masks=native_masks
        )


@dataclasses.dataclass(frozen=True)
class Splits:
    """The images that a run trains and validates on.

    Args:
        train: The training split.
        val: The validation split.
        class_names: A name for each class.
        ignore_index: Label of the pixels that don't count.
        summary: What is in the files; its ``channels`` and ``normalization`` say what a network needs to know.
    """

    train: MaskDataset
    val: MaskDataset
    class_names: tuple[str, ...]
    ignore_index: int
    summary: Summary


def open_splits(
    config: DataConfig, size: tuple[int, int] | None, console: Console | None = None, summary: Summary | None = None
) -> Splits:
    """Print what a data set's files hold, and open the splits to train and to validate on.

    Args:
        config: Where the data set is and how it is read.
        size: ``(height, width)`` that images and masks are resized to; None keeps the files'.
        console: Where the summary is printed; None for nowhere.
        summary: What ``config.survey()`` found; None to read all files now.

    Raises:
        DataError: The data can't be used.
    """
    if summary is None:
        summary = config.survey()
    if console is not None:
        summary.show(console)
    _ = summary.channels
    classes = summary.check_classes(config.classes)
    return Splits(
        train=config.dataset("train", size, classes),
        val=config.dataset("val", size, classes),
        class_names=summary.reader.class_names or tuple(f"class {label}" for label in range(classes)),
        ignore_index=summary.reader.ignore_index,
        summary=summary,
    )
