"""Weights that balance a loss over classes of different frequency."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor


def class_frequencies(
    labels: Iterable[Mapping[int, int]], num_classes: int, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """Add up the pixels of each class over a data set; ignored pixels are not counted anywhere.

    Args:
        labels: For each image the number of pixels of each label, as ``Counter(mask.flatten().tolist())`` gives it and
            a `Summary` holds it.
        num_classes: Number of classes C; other labels aren't counted.
        ignore_index: Label of the pixels that don't count.

    Returns:
        Two int64 tensors of shape (C): ``pixels[c]``, the pixels of class c; ``present[c]``, the counted pixels of all
        images in which class c appears.
    """
    classes = [label for label in range(num_classes) if label != ignore_index]
    rows = [[image.get(label, 0) for label in classes] for image in labels]
    counts = torch.zeros(len(rows), num_classes, dtype=torch.int64)
    counts[:, classes] = torch.tensor(rows, dtype=torch.int64).view(-1, len(classes))
    return counts.sum(0), ((counts > 0) * counts.sum(1, keepdim=True)).sum(0)


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
