"""A data set of image and mask files."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from fastseg.data.errors import DataError
from fastseg.data.files import image_tensor
from fastseg.data.labels import PairReader
from fastseg.data.pairs import Pair

_UINT8_MAX = 255


class MaskDataset(Dataset[tuple[Tensor, Tensor]]):
    """Images and masks from files.

    An item is ``(image, mask)``: the image of shape (C, H, W) as :func:`read_image` gives it, RGB uint8 for most files;
    the mask of shape (H, W) with one class number for each pixel. The mask is uint8, or int64 where labels may exceed
    255: if ``num_classes`` or ``ignore_index`` says so or, without ``num_classes``, if the file has more than 8 bits.

    Args:
        pairs: The files, from :func:`find_pairs`.
        size: ``(height, width)`` that items are resized to: the image bilinearly with antialiasing, the mask to the
            nearest pixel. None keeps each file's size.
        num_classes: If given, labels must lie in [0, num_classes) or equal ``ignore_index``.
        ignore_index: Label of the pixels that don't count.
        reader: What the masks' values mean and how files are read; its ``ignore_index`` must be the same.
        native_masks: Keep the masks in their files' size where images are resized.

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
        *,
        reader: PairReader | None = None,
        native_masks: bool = False,
    ) -> None:
        if size is not None and (len(size) != 2 or min(size) < 1):
            raise ValueError(f"size must be two positive numbers (height, width), but it is {size}")
        if num_classes is not None and num_classes < 1:
            raise ValueError(f"num_classes must be positive, but it is {num_classes}")
        self.reader = reader if reader is not None else PairReader(ignore_index=ignore_index)
        if self.reader.ignore_index != ignore_index:
            raise ValueError(f"ignore_index must be the reader's {self.reader.ignore_index}, but it is {ignore_index}")
        self.pairs = list(pairs)
        self.size = size
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.native_masks = native_masks

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        pair = self.pairs[index]
        image, labels = self.reader.read(pair)
        if self.num_classes is not None:
            outside = ((labels < 0) | (labels >= self.num_classes)) & (labels != self.ignore_index)
            if outside.any():
                raise DataError(
                    f"{pair.mask}: label {labels[outside][0]} is outside the classes 0..{self.num_classes - 1} "
                    f"and is not the ignored label {self.ignore_index}"
                )
        labels = labels.astype(self._label_dtype(labels), copy=False)
        if self.size is not None and not self.native_masks:
            height, width = self.size
            # Pillow has no 64-bit pictures; labels fit in 16 bits
            picture = Image.fromarray(labels if labels.dtype == np.uint8 else labels.astype(np.int32))
            resized = picture.resize((width, height), Image.Resampling.NEAREST)
            labels = np.asarray(resized).astype(labels.dtype)
        return image_tensor(image.pixels, self.size), torch.from_numpy(np.ascontiguousarray(labels))

    def _label_dtype(self, labels: np.ndarray) -> type[np.uint8] | type[np.int64]:
        if self.num_classes is None:
            return np.uint8 if labels.dtype == np.uint8 else np.int64
        # one type for the whole data set, so that items of 8-bit and 16-bit files stack
        return np.uint8 if max(self.num_classes - 1, self.ignore_index) <= _UINT8_MAX else np.int64
