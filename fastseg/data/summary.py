"""What is in the files of a data set, counted before anything is trained on them."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from fastseg.data.errors import DataError
from fastseg.data.files import image_tensor
from fastseg.data.labels import REMEDY, PairReader
from fastseg.data.pairs import Pair, list_names
from fastseg.data.pictures import colorize, palette, to_picture
from fastseg.data.transforms import IMAGENET_MEAN, IMAGENET_STD

_RGB = (3, "uint8")  # channels and type of the usual images
_MOST = 10  # files that are printed; the rest is counted


class _Facts(NamedTuple):
    """What one pair holds; the moments, ``[2, C]``, are those of an unusual image's channels."""

    size: tuple[int, int]
    channels: tuple[int, str]
    frames: int
    digest: bytes
    labels: dict[int, int]
    moments: np.ndarray | None


@dataclasses.dataclass
class SplitSummary:
    """What a split holds.

    Args:
        images: Number of images that could be read.
        sizes: Images of each ``(height, width)``.
        channels: Images of each number and type of channels, ``(3, "uint8")`` for the usual ones.
        pixels: Pixels of each label.
        moments: Sum of the images' mean values and mean squares by channel, ``[2, C]``, where they aren't 8-bit RGB.
    """

    images: int = 0
    sizes: Counter[tuple[int, int]] = dataclasses.field(default_factory=Counter)
    channels: Counter[tuple[int, str]] = dataclasses.field(default_factory=Counter)
    pixels: Counter[int] = dataclasses.field(default_factory=Counter)
    moments: np.ndarray | None = None

    def _count(self, facts: _Facts) -> None:
        self.images += 1
        self.sizes[facts.size] += 1
        self.channels[facts.channels] += 1
        self.pixels.update(facts.labels)
        if facts.moments is not None and len(self.channels) == 1:
            self.moments = facts.moments if self.moments is None else self.moments + facts.moments


@dataclasses.dataclass
class Summary:
    """What the files of a data set hold.

    Args:
        title: Folder and layout.
        class_names: Names of the classes, as far as they are known.
        ignore_index: Label of the pixels that don't count.
        left_out: Files in the data set's folders that no split has.
        splits: Each split by its name.
        first: The first mask that has a label.
        duplicates: Images whose pixels another split has, too: both files.
        animated: Images with more than one frame, of which the first is read.
        problems: What is wrong with files that can't be used.
        example: A pair that can be used.
    """

    title: str
    class_names: tuple[str, ...]
    ignore_index: int
    left_out: list[Path]
    splits: dict[str, SplitSummary] = dataclasses.field(default_factory=dict)
    first: dict[int, Path] = dataclasses.field(default_factory=dict)
    duplicates: list[tuple[Path, Path]] = dataclasses.field(default_factory=list)
    animated: list[Path] = dataclasses.field(default_factory=list)
    problems: list[str] = dataclasses.field(default_factory=list)
    example: Pair | None = None

    def count(self, reader: PairReader, splits: dict[str, list[Pair]]) -> None:
        """Read the files of all splits and count what they hold."""
        seen: dict[bytes, tuple[str, Path]] = {}
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for name, pairs in splits.items():
                split = self.splits[name] = SplitSummary()
                for pair, facts in zip(pairs, pool.map(lambda pair: _examine(reader, pair), pairs), strict=True):
                    if isinstance(facts, DataError):
                        self.problems.append(str(facts))
                        continue
                    split._count(facts)
                    self.example = self.example or pair
                    for label in facts.labels:
                        self.first.setdefault(label, pair.mask)
                    if facts.frames > 1:
                        self.animated.append(pair.image)
                    other, path = seen.setdefault(facts.digest, (name, pair.image))
                    if other != name:
                        self.duplicates.append((path, pair.image))

    def check_classes(self, classes: int | None) -> int:
        """The number of classes: the given one, or what the labels imply.

        Raises:
            DataError: A file can't be used, or the labels don't go with the number of classes, or imply none that
                anybody would mean.
        """
        if self.problems:
            more = len(self.problems) - 1
            raise DataError(self.problems[0] + f" (and {more} more files that can't be used)" * bool(more))
        labels = sorted(self.first.keys() - {self.ignore_index})
        if not labels and classes is None:
            raise DataError(f"no label other than ignore_index {self.ignore_index} in the masks")
        implied = max(labels, default=-1) + 1
        if classes is not None and implied > classes:
            raise DataError(
                f"{self.first[implied - 1]}: label {implied - 1} is outside the classes 0..{classes - 1} "
                f"and is not the ignored label {self.ignore_index}"
            )
        if classes is not None:
            return classes
        found = f"the masks hold the labels {list_names(labels)} (the last in {self.first[labels[-1]]})"
        if implied == 1:
            ignored = f" beside the ignored {self.ignore_index}" * (self.ignore_index in self.first)
            raise DataError(f"{found}{ignored}, which is a single class: {REMEDY}")
        if 2 * len(labels) < implied:
            raise DataError(
                f"{found}, which makes {implied} classes of which {implied - len(labels)} don't occur: {REMEDY}; "
                f"--classes {implied} takes the labels as they are"
            )
        return implied

    @property
    def channels(self) -> tuple[int, str]:
        """Number and type of the images' channels.

        Raises:
            DataError: Not all images have the same.
        """
        kinds = sum((split.channels for split in self.splits.values()), Counter[tuple[int, str]]())
        if len(kinds) > 1:
            names = " and ".join(f"{count} of {number} x {kind}" for (number, kind), count in kinds.most_common())
            raise DataError(f"images must have the same channels, but there are {names}")
        return next(iter(kinds), _RGB)

    @property
    def normalization(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each channel: ImageNet's for 8-bit RGB, else those of the training split."""
        train = self.splits.get("train")
        if train is None or train.moments is None:
            return IMAGENET_MEAN, IMAGENET_STD
        mean, square = train.moments / train.images
        deviation = np.sqrt(np.maximum(square - mean**2, 0))
        return tuple(mean.tolist()), tuple(np.where(deviation > 0, deviation, 1).tolist())

    def picture(self, reader: PairReader) -> Image.Image:
        """An image beside its mask in colours.

        Raises:
            DataError: No file can be used.
        """
        if self.example is None:
            raise DataError(f"{self.title}: no image and mask that can be used")
        image, labels = reader.read(self.example)
        shown = to_picture(image_tensor(image.pixels))
        both = Image.new("RGB", (2 * shown.width, shown.height))
        both.paste(shown)
        both.paste(colorize(labels, palette(int(labels.max()) + 1), self.ignore_index), (shown.width, 0))
        return both

    def show(self, console: Console) -> None:
        """Print all of it."""
        table = Table("split", "images", "height x width", "channels", title=self.title, title_justify="left")
        for name, split in self.splits.items():
            sizes = (f"{height}x{width}{_times(count)}" for (height, width), count in split.sizes.most_common())
            kinds = (f"{number} x {kind}{_times(count)}" for (number, kind), count in split.channels.most_common())
            table.add_row(name, str(split.images), _few(sizes), _few(kinds))
        console.print(table)
        table = Table("label", "class", *self.splits)
        for label in sorted({*range(len(self.class_names)), *self.first}):
            named = self.class_names[label] if label < len(self.class_names) else f"class {label}"
            shares = (split.pixels[label] / max(1, sum(split.pixels.values())) for split in self.splits.values())
            table.add_row(
                str(label),
                "ignored" if label == self.ignore_index else named,
                *(f"{share:.2%}" if share else "-" for share in shares),
            )
        console.print(table)
        for title, things in (
            ("left out", self.left_out),
            ("the same image in two splits", [f"{one} and {other}" for one, other in self.duplicates]),
            ("the first frame alone is read", self.animated),
            ("can't be used", self.problems),
        ):
            if things:
                text = f"{title}: {_few(map(str, things), '; ')}"
                console.print(text, soft_wrap=True, highlight=False, markup=False)


def _examine(reader: PairReader, pair: Pair) -> _Facts | DataError:
    try:
        image, labels = reader.read(pair)
    except DataError as error:
        return error
    pixels = image.pixels
    channels = (pixels.shape[2] if pixels.ndim > 2 else 1, str(pixels.dtype))
    moments = None
    if channels != _RGB:
        values = image_tensor(pixels).double() / (255 if pixels.dtype == np.uint8 else 1)
        moments = np.stack([values.mean((1, 2)).numpy(), values.square().mean((1, 2)).numpy()])
    counts = np.bincount(labels.ravel())
    return _Facts(
        size=labels.shape,
        channels=channels,
        frames=image.frames,
        digest=hashlib.blake2b(pixels.data, key=str(pixels.shape).encode()).digest(),
        labels={int(label): int(counts[label]) for label in np.flatnonzero(counts)},
        moments=moments,
    )


def _times(count: int) -> str:
    return f" ({count})" if count > 1 else ""


def _few(texts: Iterable[str], between: str = ", ") -> str:
    every = list(texts)
    return between.join(every[:_MOST]) + (f"{between}and {len(every) - _MOST} more" if len(every) > _MOST else "")
