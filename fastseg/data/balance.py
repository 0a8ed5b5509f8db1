"""Weights that balance a loss over classes of different frequency."""

from collections.abc import Sized
from typing import Protocol

import torch
from torch import Tensor

from fastseg.data.errors import DataError


class LabelledImages(Sized, Protocol):
    """Anything with a length whose items are ``(image, mask)``, as MaskDataset and ShapesDataset."""

    def __getitem__(self, index: int, /) -> tuple[Tensor, Tensor]: ...


def class_frequencies(dataset: LabelledImages, num_classes: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Count the pixels of each class over a data set; ignored pixels are not counted anywhere.

    Args:
        dataset: Items ``(image, mask)`` with integer masks of any shape.
        num_classes: Number of classes C.
        ignore_index: Label of the pixels that don't count.

    Returns:
        Two int64 tensors of shape (C): ``pixels[c]``, the pixels of class c; ``present[c]``, the counted pixels of all
        images in which class c appears.

    Raises:
        DataError: A label is outside [0, C) and not ``ignore_index``.
    """
    pixels = torch.zeros(num_classes, dtype=torch.int64)
    present = torch.zeros(num_classes, dtype=torch.int64)
    for index in range(len(dataset)):
        labels = dataset[index][1].to(torch.int64).flatten()
        counts = torch.bincount(labels[labels != ignore_index], minlength=num_classes)
        if len(counts) > num_classes:
            raise DataError(f"item {index}: label {len(counts) - 1} is outside the classes 0..{num_classes - 1}")
        pixels += counts
        present += torch.where(counts > 0, counts.sum(), 0)
    return pixels, present


def class_weights(pixels: Tensor, present: Tensor, method: str) -> Tensor:
    """Weights for a loss, from the counts of :func:`class_frequencies`.

    * ``"inverse"``: ``weight[c] = sum(pixels) / (C * pixels[c])``.
    * ``"median"``: ``freq[c] = pixels[c] / present[c]``, ``weight[c] = median(freq) / freq[c]``, the median over the
      classes that appear. Median frequency balancing: Eigen and Fergus, ICCV 2015; Badrinarayanan et al., SegNet, 2017.

    A class without a pixel gets the weight 0.

    Args:
        pixels: int64, shape (C): pixels of each class.
        present: int64, shape (C): pixels of the images in which each class appears.
        method: ``"inverse"`` or ``"median"``.

    Returns:
        float32, shape (C).

    Raises:
        ValueError: ``method`` is unknown, or no class has a pixel.
    """
    seen = pixels > 0
    if not seen.any():
        raise ValueError("pixels must count at least one pixel, but all counts are zero")
    weights = torch.zeros(len(pixels), dtype=torch.float64)
    if method == "inverse":
        weights[seen] = pixels.sum() / (len(pixels) * pixels[seen].double())
    elif method == "median":
        frequencies = pixels[seen].double() / present[seen]
        # quantile: the mean of the middle two for an even number, where torch.median takes the lower one
        weights[seen] = torch.quantile(frequencies, 0.5) / frequencies
    else:
        raise ValueError(f"method must be 'inverse' or 'median', but it is {method!r}")
    return weights.to(torch.float32)
