"""Scores of a segmentation: the confusion matrix and what follows from it."""

from typing import NamedTuple

import torch
from torch import Tensor


class Scores(NamedTuple):
    """Scores of a segmentation, all from one confusion matrix; nan where there is nothing to score."""

    pixel_accuracy: float
    iou: tuple[float, ...]  # one for each class; nan for a class absent from truth and prediction
    mean_iou: float  # over the classes whose iou is not nan


def confusion_matrix(prediction: Tensor, target: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    """Count the pixels of each pair of true and predicted class: ``matrix[t, p] = |{target = t and prediction = p}|``.

    Matrices of batches, or of processes, add up to that of the whole set. Where ``target`` is ``ignore_index`` the
    prediction doesn't matter, be ``ignore_index`` one of the classes or not.

    Args:
        prediction: Integer, any shape: the predicted class of each pixel.
        target: Integer, the shape of ``prediction``: the true class of each pixel.
        num_classes: Number of classes C.
        ignore_index: Label of the pixels that don't count.

    Returns:
        int64, shape (C, C), on the device of ``target``: rows are the truth, columns the prediction.

    Raises:
        TypeError: ``prediction`` or ``target`` is not integer.
        ValueError: The shapes differ, or a counted label is outside [0, C).
    """
    if prediction.shape != target.shape:
        raise ValueError(
            f"prediction and target must have the same shape, "
            f"but they have {tuple(prediction.shape)} and {tuple(target.shape)}"
        )
    counted = target.long() != ignore_index  # a uint8 target would wrap a negative number
    rows = _classes("target", target[counted], num_classes)
    columns = _classes("prediction", prediction[counted], num_classes)
    # Not torchmetrics: under torch.use_deterministic_algorithms it holds pixels x C x C numbers, 1.4 GB for four images
    # of 480x360 with 11 classes, though integer counts are deterministic anyway; and it refuses a single class.
    return torch.bincount(rows * num_classes + columns, minlength=num_classes**2).view(num_classes, num_classes)


def scores(matrix: Tensor) -> Scores:
    """Pixel accuracy, IoU of each class and mean IoU.

    With the matrix M (rows truth, columns prediction):

    * pixel accuracy: ``sum_c M[c, c] / sum M``
    * ``iou[c] = M[c, c] / (sum_p M[c, p] + sum_t M[t, c] - M[c, c])``, nan where class c is in neither truth nor
      prediction
    * mean IoU: the mean of ``iou[c]`` over the classes where it is not nan

    Args:
        matrix: int64, shape (C, C), from :func:`confusion_matrix`.

    Returns:
        The scores, in 0..1; nan for the two totals of a matrix without any pixel.

    Raises:
        ValueError: ``matrix`` is not square.
    """
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"matrix must be square, but its shape is {tuple(matrix.shape)}")
    counts = matrix.to("cpu", torch.float64)
    hits = counts.diagonal()
    iou = hits / (counts.sum(dim=1) + counts.sum(dim=0) - hits)  # 0 / 0 is nan
    return Scores(
        pixel_accuracy=(hits.sum() / counts.sum()).item(), iou=tuple(iou.tolist()), mean_iou=iou.nanmean().item()
    )


def _classes(name: str, labels: Tensor, num_classes: int) -> Tensor:
    """``labels`` as int64, checked to lie in [0, num_classes)."""
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise TypeError(f"{name} must be integer, but it is {labels.dtype}")
    labels = labels.to(torch.int64)
    outside = (labels < 0) | (labels >= num_classes)
    if outside.any():
        raise ValueError(
            f"{name} holds the label {labels[outside][0].item()}, outside the classes 0..{num_classes - 1}"
        )
    return labels
