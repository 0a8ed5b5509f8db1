"""Reading images with their masks, and what the values of masks mean: numbers or colours to classes."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from fastseg.data.errors import DataError
from fastseg.data.files import Raster, read_raster
from fastseg.data.pairs import Pair

LabelMap: TypeAlias = dict[str, "str | None"]  # "7" or "128,64,128" to the name of a class; None: doesn't count

ExifChoice: TypeAlias = Literal["refuse", "apply", "ignore"]

LARGEST_LABEL = 65535  # masks are files of at most 16 bits

_UNKNOWN = np.iinfo(np.int32).min  # in a table of classes: the map doesn't have this value

_BINARY_NAMES = ("background", "foreground")
_JPEG_FOREGROUND = 128  # halfway: what compression makes of 0 and 255 stays on its side
_JPEG_SPREAD = 32  # between the channels of gray pixels, after compression

REMEDY = (
    "--label-map FILE says which number or colour is which class, "
    "--binary takes 0 (black) for the background and the rest for one class"
)


def known_label_map(name: str) -> LabelMap:
    """The label map of a layout."""
    path = Path(__file__).with_name("label_maps") / f"{name}.json"
    return dict(json.loads(path.read_text(encoding="utf-8")))


CAMVID_CLASSES = tuple(name for name in known_label_map("camvid").values() if name is not None)
CAMVID_IGNORE_INDEX = 11  # pixels that the annotators left unlabelled


def read_label_map(path: str | Path) -> LabelMap:
    """Read a label map: a JSON object of the masks' values to the names of the classes, in the order of the classes.

    A value is a number (``{"0": "ground", "255": "road"}``) or a colour (``{"0,0,0": "ground", "200,30,60": "road"}``).
    Pixels whose value has ``null`` for a name don't count.

    Args:
        path: The file.

    Returns:
        The object.

    Raises:
        DataError: The file can't be read or is no such object.
    """
    try:
        entries = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: can't be read as a label map: {error}") from error
    if not isinstance(entries, dict) or not all(isinstance(name, str | None) for name in entries.values()):
        raise DataError(f"{path}: a label map is a JSON object of numbers or colours to names")
    try:
        PairReader(label_map=entries, ignore_index=-1)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    return entries


@dataclasses.dataclass(frozen=True)
class PairReader:
    """Reads an image and the class numbers of its mask.

    The arguments are fields of :class:`DataConfig`. The values of a JPEG file, which compression changes, count as the
    nearest in the map. Without map, ``binary`` and ``reduce_labels``, masks hold class numbers.

    Raises:
        DataError: The map isn't one, more than one of the first three is given, or ``ignore_index`` is a class.
    """

    label_map: LabelMap | None = None
    binary: bool = False
    reduce_labels: bool = False
    ignore_index: int = 255
    exif: ExifChoice = "refuse"
    max_pixels: int | None = None

    def __post_init__(self) -> None:
        if (self.label_map is not None) + self.binary + self.reduce_labels > 1:
            raise DataError("only one of label_map, binary and reduce_labels can be given")
        if self.label_map is not None:
            _ = self._table
        if self.ignore_index in range(len(self.class_names)):
            raise DataError(
                f"ignore_index must be none of {len(self.class_names)} classes, but it is {self.ignore_index}"
            )

    def __getstate__(self) -> dict[str, Any]:
        """The fields, for another process, without the table of a map of colours, which has 64 MiB."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes; empty where nothing says them."""
        if self.binary:
            return _BINARY_NAMES
        return tuple(name for name in (self.label_map or {}).values() if name is not None)

    def read(self, pair: Pair) -> tuple[Raster, np.ndarray]:
        """The image, and the class of each pixel, integer ``[H, W]``.

        Raises:
            DataError: A file can't be read, the mask's values aren't class numbers nor in the map, or image and mask
                differ in size or orientation.
        """
        image = read_raster(pair.image, "image", exif=self.exif, max_pixels=self.max_pixels)
        colors = self.label_map is not None and self._table[0].shape[1] > 1
        mask = read_raster(pair.mask, "colors" if colors else "labels", exif=self.exif, max_pixels=self.max_pixels)
        labels = self._labels(pair.mask, mask, colors)
        if self.exif == "refuse" and image.orientation != mask.orientation:
            raise DataError(
                f"{pair.image}: its EXIF orientation is {image.orientation}, but that of its mask {pair.mask} is "
                f"{mask.orientation}: --exif apply turns each as its own says, --exif ignore leaves both as they are"
            )
        if image.pixels.shape[:2] != labels.shape:
            raise DataError(
                f"{pair.image} is {_extent(image.pixels)}, but its mask {pair.mask} is {_extent(labels)} "
                "(width x height)"
            )
        return image, labels

    def _labels(self, path: Path, mask: Raster, colors: bool) -> np.ndarray:
        pixels = mask.pixels
        if pixels.dtype.kind not in "iu":
            raise DataError(f"{path}: a mask holds integers, but this holds {pixels.dtype}")
        if self.binary:
            foreground: np.ndarray = pixels >= (_JPEG_FOREGROUND if mask.lossy else 1)
            return np.any(np.atleast_3d(foreground), -1).astype(np.uint8)
        if pixels.ndim == 2:
            pixels = pixels[..., None]
        if not colors and pixels.shape[2] > 1:
            spread = int(np.ptp(pixels, axis=-1).max(initial=0))  # 0: numbers, saved as colours
            if self.label_map is None or spread > (_JPEG_SPREAD if mask.lossy else 0):
                raise DataError(
                    f"{path}: a mask holds one class number for each pixel (grayscale or palette), "
                    f"but this holds {_some_values(pixels)}; {REMEDY}"
                )
            pixels = pixels[..., :1]
        for wrong in (int(pixels.min(initial=0)), int(pixels.max(initial=0))):
            if not 0 <= wrong <= LARGEST_LABEL:
                raise DataError(f"{path}: labels must be in 0..{LARGEST_LABEL}, but one is {wrong}")
        if self.label_map is not None:
            return self._mapped(path, pixels, mask.lossy)
        if mask.lossy:
            raise DataError(f"{path}: a JPEG file doesn't keep class numbers: save masks as PNG; or {REMEDY}")
        labels = pixels[..., 0]
        if self.reduce_labels:
            if (labels == self.ignore_index + 1).any():
                raise DataError(f"{path}: label {self.ignore_index + 1}, one less, would be the ignored label")
            counted = (labels != 0) & (labels != self.ignore_index)
            labels = np.where(counted, labels.astype(np.int64) - 1, self.ignore_index)
        return labels

    @functools.cached_property
    def _table(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The map's values, ``[K, 1]`` or ``[K, 3]``, the class of each, and the class of every number or colour."""
        assert self.label_map is not None
        values, classes, named = [], list[int](), 0
        for key, name in self.label_map.items():
            parts = key.replace(" ", "").split(",")
            largest = LARGEST_LABEL if len(parts) == 1 else 255
            if len(parts) not in (1, 3) or not all(part.isdecimal() and int(part) <= largest for part in parts):
                raise DataError(f"a label map's keys are numbers (7) or colours (128,64,128), but one is {key!r}")
            values.append([int(part) for part in parts])
            classes.append(self.ignore_index if name is None else named)
            named += name is not None
        if len({len(value) for value in values}) != 1 or not self.class_names:
            raise DataError("a label map needs a name for a class, and keys that are all numbers or all colours")
        table = np.array(values)
        if len(np.unique(_codes(table))) < len(table):
            raise DataError("a label map has each number or colour once")
        by_code = np.full(1 << (16 if table.shape[1] == 1 else 24), _UNKNOWN, np.int32)
        if table.shape[1] == 1 and self.ignore_index >= 0:
            by_code[self.ignore_index :][:1] = self.ignore_index  # whether the map has it or not
        by_code[_codes(table)] = classes
        return table, np.array(classes), by_code

    def _mapped(self, path: Path, pixels: np.ndarray, lossy: bool) -> np.ndarray:
        values, classes, by_code = self._table
        found = _codes(pixels)
        if lossy:
            seen, places = np.unique(found, return_inverse=True)
            parts = seen[:, None] >> np.arange(8 * (values.shape[1] - 1), -1, -8) & 255
            nearest = np.array([np.square(values - part).sum(1).argmin() for part in parts])
            return classes[nearest[places.reshape(found.shape)]]
        labels = by_code[found]
        if (unknown := labels == _UNKNOWN).any():
            raise DataError(f"{path}: the label map doesn't have its values {_some_values(pixels[unknown])}")
        return labels


def _codes(values: np.ndarray) -> np.ndarray:
    """One number for each number or colour of the last dimension."""
    codes = values[..., 0]
    for channel in range(1, values.shape[-1]):
        codes = codes.astype(np.int32) << 8 | values[..., channel]
    return codes


def _some_values(pixels: np.ndarray, most: int = 4) -> str:
    """The first few values or colours."""
    rows = np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0)
    names = [str(row[0]) if len(row) == 1 else f"({','.join(map(str, row))})" for row in rows[:most]]
    return ", ".join(names) + (f" and {len(rows) - most} more" if len(rows) > most else "")


def _extent(pixels: np.ndarray) -> str:
    return f"{pixels.shape[1]}x{pixels.shape[0]}"
