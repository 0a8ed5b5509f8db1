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
from fastseg.data.labels import REMEDY, PairReader, known_label_map
from fastseg.data.pairs import Pair, list_names
from fastseg.data.pictures import PALETTES, colorize, palette, to_picture
from fastseg.data.transforms import IMAGENET_MEAN, IMAGENET_STD

_RGB = "3 x uint8"
_MOST = 10  # things of a kind that are printed; the rest is counted


class Facts(NamedTuple):
    """What an image and its mask hold: pixels of each label; moments ``[2, C]``, or ``[2, 0]`` of 8-bit RGB."""

    size: str
    channels: str
    frames: int
    digest: bytes
    labels: dict[int, int]
    moments: np.ndarray


@dataclasses.dataclass(frozen=True)
class Summary:
    """What the files of a data set hold.

    Args:
        title: Folder and layout.
        reader: How the files are read.
        splits: What each pair of a split holds that can be used.
        problems: What is wrong with files that can't be used.
        left_out: Files in the data set's folders that no split has.
    """

    title: str
    reader: PairReader
    splits: dict[str, dict[Pair, Facts]]
    problems: list[str]
    left_out: list[Path]

    @property
    def channels(self) -> str:
        """Number and type of the images' channels, as in ``"3 x uint8"``.

        Raises:
            DataError: Not all images have the same.
        """
        kinds = Counter(facts.channels for facts in self._facts())
        if len(kinds) > 1:
            raise DataError(f"images must have the same channels, but there are {_counted(kinds)}")
        return next(iter(kinds), _RGB)

    @property
    def normalization(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each channel: ImageNet's for 8-bit RGB, else those of the training split."""
        if self.channels == _RGB:
            return IMAGENET_MEAN, IMAGENET_STD
        mean, square = np.mean([facts.moments for facts in self.splits["train"].values()], axis=0)
        deviation = np.sqrt(np.maximum(square - mean**2, 0))
        return tuple(mean.tolist()), tuple(np.where(deviation > 0, deviation, 1).tolist())

    def check_classes(self, classes: int | None) -> int:
        """The number of classes: the reader's, the given one, or what the labels imply.

        Raises:
            DataError: A file can't be used, or the labels don't go with the number of classes, or imply none that
                anybody would mean.
        """
        if self.problems:
            more = len(self.problems) - 1
            raise DataError(self.problems[0] + f" (and {more} more files that can't be used)" * bool(more))
        first = self._first_masks()
        labels = sorted(first.keys() - {self.reader.ignore_index})
        implied = max(labels, default=-1) + 1
        named = len(self.reader.class_names)
        if named and classes not in (None, named):
            raise DataError(f"classes must be {named}, as many as have names, but it is {classes}")
        classes = named or classes
        if classes is not None:
            if implied > classes:
                raise DataError(
                    f"{first[implied - 1]}: label {implied - 1} is outside the classes 0..{classes - 1} "
                    f"and is not the ignored label {self.reader.ignore_index}"
                )
            return classes
        if not labels:
            raise DataError(f"no label other than ignore_index {self.reader.ignore_index} in the masks")
        found = f"the masks hold the labels {list_names(sorted(first))} (the last of them in {first[max(first)]})"
        if implied == 1:
            raise DataError(f"{found}, of which one alone counts; the ignored is {self.reader.ignore_index}: {REMEDY}")
        if 2 * len(labels) < implied:
            raise DataError(
                f"{found}, which makes {implied} classes of which {implied - len(labels)} don't occur: {REMEDY}; "
                f"--classes {implied} takes the labels as they are"
            )
        return implied

    def palette(self, classes: int) -> np.ndarray:
        """A colour for each class, ``[C, 3]``: those of the label map, the layout's own, or :func:`palette`'s."""
        label_map = self.reader.label_map or {}
        colors = [key.split(",") for key, name in label_map.items() if name is not None and "," in key]
        if colors:
            return np.array(colors).astype(np.uint8)
        known = (name for name in PALETTES if label_map == known_label_map(name))
        return palette(next(known, classes))

    def picture(self) -> Image.Image:
        """An image beside its mask in colours.

        Raises:
            DataError: No file can be used.
        """
        pair = next((pair for split in self.splits.values() for pair in split), None)
        if pair is None:
            raise DataError(f"{self.title}: no image and mask that can be used")
        image, labels = self.reader.read(pair)
        shown = to_picture(image_tensor(image.pixels))
        both = Image.new("RGB", (2 * shown.width, shown.height))
        both.paste(shown)
        both.paste(colorize(labels, self.palette(int(labels.max()) + 1), self.reader.ignore_index), (shown.width, 0))
        return both

    def show(self, console: Console) -> None:
        """Print all of it."""
        console.print(self.title, soft_wrap=True, highlight=False, markup=False)
        table = Table("split", "images", "height x width", "channels")
        for name, split in self.splits.items():
            sizes, kinds = (
                Counter(getattr(facts, field) for facts in split.values()) for field in ("size", "channels")
            )
            table.add_row(name, str(len(split)), _counted(sizes), _counted(kinds))
        console.print(table)
        pixels = [sum((Counter(facts.labels) for facts in split.values()), Counter()) for split in self.splits.values()]
        table = Table("label", "class", *self.splits)
        for label in sorted({*range(len(self.reader.class_names))}.union(*pixels)):
            name = self.reader.class_names[label] if label < len(self.reader.class_names) else f"class {label}"
            shares = (f"{count[label] / count.total():.2%}" if count[label] else "-" for count in pixels)
            table.add_row(str(label), "ignored" if label == self.reader.ignore_index else name, *shares)
        console.print(table)
        animated = [pair.image for split in self.splits.values() for pair, facts in split.items() if facts.frames > 1]
        for title, things in (
            ("left out", self.left_out),
            ("the same image in two splits", self._duplicates()),
            ("the first frame alone is read", animated),
            ("can't be used", self.problems),
        ):
            if things:
                console.print(f"{title}: {_few(things)}", soft_wrap=True, highlight=False, markup=False)

    def _facts(self) -> list[Facts]:
        return [facts for split in self.splits.values() for facts in split.values()]

    def _first_masks(self) -> dict[int, Path]:
        """The first mask that has a label, for each that occurs."""
        first: dict[int, Path] = {}
        for split in self.splits.values():
            for pair, facts in split.items():
                first.update((label, pair.mask) for label in facts.labels.keys() - first.keys())
        return first

    def _duplicates(self) -> list[str]:
        """Images whose pixels an image of another split has, too."""
        seen: dict[bytes, tuple[str, Path]] = {}
        found = []
        for name, split in self.splits.items():
            for pair, facts in split.items():
                other, path = seen.setdefault(facts.digest, (name, pair.image))
                if other != name:
                    found.append(f"{path} and {pair.image}")
        return found


def examine(reader: PairReader, splits: dict[str, list[Pair]]) -> tuple[dict[str, dict[Pair, Facts]], list[str]]:
    """Read all pairs: what those hold that can be used, and what is wrong with the others."""

    def facts_of(pair: Pair) -> Facts | DataError:
        try:
            return _facts_of(reader, pair)
        except DataError as error:
            return error

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = {name: dict(zip(pairs, pool.map(facts_of, pairs), strict=True)) for name, pairs in splits.items()}
    usable = {
        name: {pair: facts for pair, facts in split.items() if isinstance(facts, Facts)}
        for name, split in found.items()
    }
    return usable, [str(facts) for split in found.values() for facts in split.values() if isinstance(facts, DataError)]


def _facts_of(reader: PairReader, pair: Pair) -> Facts:
    image, labels = reader.read(pair)
    pixels = np.atleast_3d(image.pixels)
    channels = f"{pixels.shape[2]} x {pixels.dtype}"
    moments = np.empty((2, 0))
    if channels != _RGB:
        values = image_tensor(pixels).double() / (255 if pixels.dtype == np.uint8 else 1)
        moments = np.stack([values.mean((1, 2)).numpy(), values.square().mean((1, 2)).numpy()])
    counts = np.bincount(labels.ravel())
    return Facts(
        size=f"{labels.shape[0]}x{labels.shape[1]}",
        channels=channels,
        frames=image.frames,
        digest=hashlib.blake2b(pixels.data, key=str(pixels.shape).encode()).digest(),
        labels={int(label): int(counts[label]) for label in np.flatnonzero(counts)},
        moments=moments,
    )


def _counted(counter: Counter[str]) -> str:
    """The commonest keys, each with its number."""
    return _few((f"{key} ({count})" for key, count in counter.most_common()), ", ")


def _few(things: Iterable[object], between: str = "; ") -> str:
    every = list(map(str, things))
    return between.join(every[:_MOST]) + f"{between}and {len(every) - _MOST} more" * (len(every) > _MOST)
