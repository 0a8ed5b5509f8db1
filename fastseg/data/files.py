"""Reading images and masks: files in, checked tensors out."""

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from fastseg.data.errors import DataError
from fastseg.data.pairs import Pair

# What Pillow raises on damaged files (found by damaging files of ten formats): OSError for most, SyntaxError for broken
# PNG chunks, ValueError for broken headers, struct.error for broken EXIF data, and its own error for sizes that only a
# damaged or hostile header claims.
_UNREADABLE = (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError)

_INDEX_MODES = ("1", "L", "P", "I", "I;16", "I;16L", "I;16B", "I;16N")  # Pillow's modes with one integer for each pixel
_DEEP_MODES = (
    "I",
    "I;16",
    "I;16L",
    "I;16B",
    "I;16N",
    "F",
)  # more than 8 bits: Pillow clips instead of scaling them to RGB

_UINT8_MAX = 255


def read_image(path: str | Path, size: tuple[int, int] | None = None) -> Tensor:
    """Read an image as RGB, turned as its EXIF orientation says.

    Grayscale, palette and RGBA images are converted; an alpha channel is dropped.

    Args:
        path: Any file that Pillow reads with 8 bits a channel.
        size: ``(height, width)`` to resize to, bilinear with antialiasing; None keeps the file's.

    Returns:
        uint8, shape (3, H, W).

    Raises:
        DataError: The file can't be read or has more than 8 bits a channel.
    """
    return _image_tensor(_load_image(Path(path)), size)


class MaskDataset(Dataset[tuple[Tensor, Tensor]]):
    """Images and index masks from files.

    An item is ``(image, mask)``: the image uint8 of shape (3, H, W), RGB; the mask of shape (H, W) with one class
    number for each pixel. The mask is uint8, or int64 where labels may exceed 255: if ``num_classes`` or
    ``ignore_index`` says so or, without ``num_classes``, if the file has more than 8 bits.

    Args:
        pairs: The files, from :func:`find_pairs`.
        size: ``(height, width)`` that items are resized to: the image bilinearly with antialiasing, the mask to the
            nearest pixel. None keeps each file's size.
        num_classes: If given, labels must lie in [0, num_classes) or equal ``ignore_index``.
        ignore_index: Label of the pixels that don't count.

    Raises:
        ValueError: ``size`` or ``num_classes`` is not positive.
        DataError: When an item is read: a file can't be read, the sizes of image and mask differ, the mask is not an
            index mask, or a label is outside the classes. The message names the file and the value.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        size: tuple[int, int] | None = None,
        num_classes: int | None = None,
        ignore_index: int = 255,
    ) -> None:
        if size is not None and (len(size) != 2 or min(size) < 1):
            raise ValueError(f"size must be two positive numbers (height, width), but it is {size}")
        if num_classes is not None and num_classes < 1:
            raise ValueError(f"num_classes must be positive, but it is {num_classes}")
        self.pairs = list(pairs)
        self.size = size
        self.num_classes = num_classes
        self.ignore_index = ignore_index

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        pair = self.pairs[index]
        image, mask = _load_image(pair.image), _load_mask(pair.mask)
        if image.size != mask.size:
            raise DataError(
                f"{pair.image} is {_extent(image)}, but its mask {pair.mask} is {_extent(mask)} (width x height)"
            )
        if self.num_classes is not None:
            _check_labels(pair.mask, mask, self.num_classes, self.ignore_index)
        if self.size is not None:
            height, width = self.size
            mask = mask.resize((width, height), Image.Resampling.NEAREST)
        return _image_tensor(image, self.size), torch.from_numpy(np.array(mask, dtype=self._label_dtype(mask)))

    def _label_dtype(self, mask: Image.Image) -> type[np.uint8] | type[np.int64]:
        if self.num_classes is None:
            return np.int64 if mask.mode in _DEEP_MODES else np.uint8
        # one type for the whole data set, so that items of 8-bit and 16-bit files stack
        return np.uint8 if max(self.num_classes - 1, self.ignore_index) <= _UINT8_MAX else np.int64


def infer_num_classes(pairs: Sequence[Pair], ignore_index: int) -> int:
    """The number of classes that the masks imply: the largest label other than ``ignore_index``, plus one.

    Args:
        pairs: The files, from :func:`find_pairs`; every mask is read.
        ignore_index: Label of the pixels that don't count.

    Returns:
        The number of classes, at least 1.

    Raises:
        DataError: A mask can't be read or is not an index mask, or no mask has a label other than ``ignore_index``.
    """
    largest = -1
    for pair in pairs:
        labels = np.asarray(_load_mask(pair.mask), dtype=np.int64)
        largest = max(largest, int(labels.max(where=labels != ignore_index, initial=-1)))
    if largest < 0:
        raise DataError(f"no label other than ignore_index {ignore_index} in {len(pairs)} masks")
    return largest + 1


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as file:
            file.load()  # decodes the pixels: a truncated file fails here, not later
            return ImageOps.exif_transpose(file)
    except _UNREADABLE as error:
        raise DataError(f"{path}: can't be read as an image: {error}") from error


def _load_image(path: Path) -> Image.Image:
    image = _open(path)
    if image.mode in _DEEP_MODES:
        raise DataError(f"{path}: an image with 8 bits a channel is expected, but its mode is {image.mode}")
    if "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns where such a palette goes to RGB at once
    return image.convert("RGB")


def _load_mask(path: Path) -> Image.Image:
    mask = _open(path)
    if mask.mode not in _INDEX_MODES:
        raise DataError(
            f"{path}: an index mask is expected (one class number for each pixel: grayscale or palette), "
            f"but its mode is {mask.mode}"
        )
    return mask


def _image_tensor(image: Image.Image, size: tuple[int, int] | None) -> Tensor:
    if size is not None:
        height, width = size
        image = image.resize((width, height), Image.Resampling.BILINEAR)  # Pillow's filters antialias
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def _check_labels(path: Path, mask: Image.Image, num_classes: int, ignore_index: int) -> None:
    labels = np.asarray(mask, dtype=np.int64)
    outside = ((labels < 0) | (labels >= num_classes)) & (labels != ignore_index)
    if outside.any():
        raise DataError(
            f"{path}: label {labels[outside][0]} is outside the classes 0..{num_classes - 1} "
            f"and is not the ignored label {ignore_index}"
        )


def _extent(image: Image.Image) -> str:
    return f"{image.width}x{image.height}"
