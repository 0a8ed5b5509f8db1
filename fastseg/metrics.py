"""Scores of a segmentation: the confusion matrix and what follows from it, boundaries, and calibration."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from fastseg import functional, reference
from fastseg.functional._checks import widen_labels


class Scores(NamedTuple):
    """Scores of a segmentation, all from one confusion matrix; nan where there is nothing to score."""

    pixel_accuracy: float
    iou: tuple[float, ...]  # one for each class; nan for a class absent from truth and prediction
    mean_iou: float  # over the classes whose iou is not nan
    dice: tuple[float, ...]  # one for each class, as iou
    mean_dice: float  # over the classes whose dice is not nan
    precision: tuple[float, ...]  # one for each class; nan for a class that is never predicted
    recall: tuple[float, ...]  # one for each class; nan for a class without a pixel
    specificity: tuple[float, ...]  # one for each class; nan where every pixel is of the class


def confusion_matrix(prediction: Tensor, target: Tensor, num_classes: int, ignore_index: int | None) -> Tensor:
    """Count the pixels of each pair of true and predicted class: ``matrix[t, p] = |{target = t and prediction = p}|``.

    Matrices of batches, or of processes, add up to that of the whole set. Where ``target`` is ``ignore_index`` the
    prediction doesn't matter, be ``ignore_index`` one of the classes or not.

    Args:
        prediction: Integer, any shape: the predicted class of each pixel.
        target: Integer, the shape of ``prediction``: the true class of each pixel.
        num_classes: Number of classes C.
        ignore_index: Label of the pixels that don't count; None where all do.

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
    prediction, target = widen_labels(prediction, None), widen_labels(target, ignore_index)
    if ignore_index is not None:
        counted = ~reference.is_ignored(target, ignore_index)
        prediction, target = prediction[counted], target[counted]
    rows = _classes("target", target.flatten(), num_classes)
    columns = _classes("prediction", prediction.flatten(), num_classes)
    # Not torchmetrics: under torch.use_deterministic_algorithms it holds pixels x C x C numbers, 1.4 GB for four images
    # of 480x360 with 11 classes, though integer counts are deterministic anyway; and it refuses a single class.
    return torch.bincount(rows * num_classes + columns, minlength=num_classes**2).view(num_classes, num_classes)


def mask_confusion_matrix(masks: Tensor, target: Tensor, ignore_index: int | None = None) -> Tensor:
    """Count the pixels of each class's mask: ``matrix[c, t, p] = |{target_c = t and masks_c = p}|`` for 0 and 1.

    What `confusion_matrix` is for classes of which each pixel has one, this is for binary and for multilabel
    segmentation. Matrices of batches, or of processes, add up to that of the whole set.

    Args:
        masks: 0 and 1 in an integer dtype or bool, ``[N, C, ...]``, as `fastseg.functional.upsample_threshold` gives.
        target: The true masks, of the shape of ``masks``: 0, 1, and where it isn't known ``ignore_index``.
        ignore_index: What isn't counted; None where all is.

    Returns:
        int64, ``[C, 2, 2]``, on the device of ``target``: rows are the truth, columns the prediction.

    Raises:
        TypeError: ``masks`` or ``target`` is floating-point.
        ValueError: The shapes differ, or there is another number than those above.
    """
    if masks.shape != target.shape or masks.ndim < 2:
        raise ValueError(
            f"masks and target must be [N, C, ...] of one shape, but they are {tuple(masks.shape)} and "
            f"{tuple(target.shape)}"
        )
    target = widen_labels(target, ignore_index)
    counted = torch.ones_like(target, dtype=torch.bool)
    if ignore_index is not None:
        counted = ~reference.is_ignored(target, ignore_index)
    predicted, true = (_inside(name, part, counted) for name, part in (("masks", masks), ("target", target)))
    dims = [dim for dim in range(target.ndim) if dim != 1]
    both, found, there, all_ = ((part.sum(dims)) for part in (predicted & true, predicted, true, counted))
    cells = [all_ - found - there + both, found - both, there - both, both]
    return torch.stack(cells, 1).view(-1, 2, 2)


def _inside(name: str, part: Tensor, counted: Tensor) -> Tensor:
    """Where a mask is 1 and counted; checked to hold nothing but 0 and 1 there."""
    if part.is_floating_point():
        raise TypeError(f"{name} must be integer or bool, but it is {part.dtype}")
    inside = (part == 1) & counted
    other = (part != 0) & counted & ~inside
    if other.any():
        raise ValueError(f"{name} holds {part[other][0].item()}, which is neither 0 nor 1")
    return inside


def scores(matrix: Tensor) -> Scores:
    """Pixel accuracy, IoU and Dice of each class, mean IoU and mean Dice.

    With the matrix M (rows truth, columns prediction):

    * pixel accuracy: ``sum_c M[c, c] / sum M``
    * ``iou[c] = M[c, c] / (sum_p M[c, p] + sum_t M[t, c] - M[c, c])``, nan where class c is in neither truth nor
      prediction
    * ``dice[c] = 2 * M[c, c] / (sum_p M[c, p] + sum_t M[t, c])``, nan where ``iou[c]`` is
    * mean IoU, mean Dice: the mean over the classes where it is not nan
    * ``precision[c] = M[c, c] / sum_t M[t, c]``, ``recall[c] = M[c, c] / sum_p M[c, p]``, whose F1 is Dice, and
      ``specificity[c]``: the share of the pixels of other classes that aren't taken for c

    The matrices of `mask_confusion_matrix`, one for each class, give the scores of their second row and column; the
    pixel accuracy is the share of all decisions that are right.

    Args:
        matrix: int64, shape (C, C), from `confusion_matrix` or `fastseg.functional.upsample_confusion_matrix`; or
            (C, 2, 2), from `mask_confusion_matrix`.

    Returns:
        The scores, in 0..1; nan for the three totals of a matrix without any pixel.

    Raises:
        ValueError: ``matrix`` is not square, or has a negative count.
    """
    of_masks = matrix.ndim == 3 and matrix.shape[1:] == (2, 2)
    if not of_masks and (matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]):
        raise ValueError(f"matrix must be square, but its shape is {tuple(matrix.shape)}")
    counts = matrix.to("cpu", torch.float64)
    if (counts < 0).any():
        raise ValueError(
            "matrix has negative counts: fastseg.functional.upsample_confusion_matrix gives them on a GPU where target "
            "holds labels outside the classes that are not ignore_index"
        )
    hits, true, predicted = counts.diagonal(dim1=-2, dim2=-1), counts.sum(dim=-1), counts.sum(dim=-2)
    right, total = hits.sum(), counts.sum((-2, -1))
    if of_masks:
        hits, true, predicted = hits[:, 1], true[:, 1], predicted[:, 1]
    sizes = true + predicted
    iou, dice = hits / (sizes - hits), 2 * hits / sizes  # 0 / 0 is nan
    return Scores(
        pixel_accuracy=(right / counts.sum()).item(),
        iou=tuple(iou.tolist()), mean_iou=iou.nanmean().item(),
        dice=tuple(dice.tolist()), mean_dice=dice.nanmean().item(),
        precision=tuple((hits / predicted).tolist()), recall=tuple((hits / true).tolist()),
        specificity=tuple(((total - sizes + hits) / (total - true)).tolist()),
    )  # fmt: skip


class _Counts:
    """Counts that batches add up to, and processes; each adds its own batches."""

    def __init__(self, shape: tuple[int, ...], device: torch.device | str | None) -> None:
        self.counts = torch.zeros(shape, dtype=torch.int64, device=device)

    def _add(self, counts: Tensor) -> None:
        if counts.device != self.counts.device:
            raise ValueError(
                f"target: expected the matrix's device {self.counts.device}, got {counts.device}; "
                f"{type(self).__name__} takes a device"
            )
        self.counts += counts

    def total(self) -> Tensor:
        """The counts of all batches of all ranks: int64, rows are the truth, columns the prediction."""
        total = self.counts.clone()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(total)
        return total

    def scores(self) -> Scores:
        """The scores over all batches of all ranks; see `scores` for the formulas and the errors."""
        return scores(self.total())

    def reset(self) -> None:
        """Forget all batches."""
        self.counts.zero_()


class ConfusionMatrix(_Counts):
    """The confusion matrix of a whole set, from its batches and from the processes that share it.

    Each process adds its own batches. Where torch.distributed is initialised, `total` and `scores` sum over its ranks,
    and every rank has to call them; int64 counts add up exactly, in any order.

    Args:
        num_classes: Number of classes C.
        ignore_index: Label of the pixels that don't count; None where all do.
        device: Where the counts are kept: that of the predictions and targets, and one that the process group's
            backend can sum on (CPUs with gloo, GPUs with NCCL). None for torch's default device.
    """

    def __init__(
        self, num_classes: int, ignore_index: int | None = None, *, device: torch.device | str | None = None
    ) -> None:
        super().__init__((num_classes, num_classes), device)
        self.num_classes = num_classes
        self.ignore_index = ignore_index

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Add a batch's predicted and true labels; see `confusion_matrix` for their shapes, dtypes and errors."""
        self._add(confusion_matrix(prediction, target, self.num_classes, self.ignore_index))

    def update_from_logits(
        self, input: Tensor, target: Tensor, *, mode: str = "bilinear", align_corners: bool = False
    ) -> None:
        """Add a batch's logits ``[N, C, h, w]``, upsampled to the size of its true labels ``[N, H, W]``.

        Or of volumes, with ``mode="trilinear"`` or "nearest", ``[N, C, d, h, w]`` and ``[N, D, H, W]``.
        Neither the upsampled logits nor the prediction are ever in memory; see
        `fastseg.functional.upsample_confusion_matrix`, also for the errors. A GPU does not wait for the result.
        """
        if input.ndim not in (4, 5) or input.shape[1] != self.num_classes:
            raise ValueError(f"input: expected [N, {self.num_classes}, h, w], got shape {tuple(input.shape)}")
        self._add(
            functional.upsample_confusion_matrix(
                input, target, self.ignore_index, mode=mode, align_corners=align_corners
            )
        )


class MaskConfusionMatrix(_Counts):
    """The confusion matrices of a whole set's masks, as `ConfusionMatrix` for binary and multilabel segmentation.

    Args:
        num_classes: Number of classes C; 1 for binary segmentation.
        threshold: The probability above which logits are inside.
        ignore_index: What isn't counted of the true masks; None where all is.
        device: As of `ConfusionMatrix`.
    """

    def __init__(
        self, num_classes: int, threshold: float = 0.5, ignore_index: int | None = None, *,
        device: torch.device | str | None = None,
    ) -> None:  # fmt: skip
        super().__init__((num_classes, 2, 2), device)
        self.threshold = threshold
        self.ignore_index = ignore_index

    def update(self, masks: Tensor, target: Tensor) -> None:
        """Add a batch's predicted and true masks; see `mask_confusion_matrix` for their shapes, dtypes and errors."""
        counts = mask_confusion_matrix(masks, target, self.ignore_index)
        if counts.shape != self.counts.shape:
            raise ValueError(f"masks: expected {len(self.counts)} classes, got {len(counts)}")
        self._add(counts)

    def update_from_logits(
        self, input: Tensor, target: Tensor, *, mode: str = "bilinear", align_corners: bool = False
    ) -> None:
        """Add a batch's logits ``[N, C, h, w]``, upsampled to the size of its true masks ``[N, C, H, W]``.

        The upsampled logits are never in memory; see `fastseg.functional.upsample_threshold`.
        """
        masks = functional.upsample_threshold(
            input, tuple(target.shape[2:]), self.threshold, mode=mode, align_corners=align_corners
        )
        self.update(masks, target)  # type: ignore[arg-type]  # no tuple


def boundary_f1(
    prediction: Tensor, target: Tensor, num_classes: int, tolerance: int, ignore_index: int | None = None
) -> Tensor:
    """How well the outlines of each class fit: the F1 score of boundary pixels (Csurka et al., 2013).

    A class's boundary pixels are those with a horizontal or vertical neighbour of another class. Precision is the share
    of the predicted ones with a true one within ``tolerance`` rows and columns, recall the share of the true ones with
    a predicted one. Usual is a tolerance of 0.75 % of the image's diagonal.

    Args:
        prediction: Integer ``[N, H, W]``: the predicted class of each pixel.
        target: Integer ``[N, H, W]``: the true class of each pixel.
        num_classes: Number of classes C.
        tolerance: Distance in pixels.
        ignore_index: Label of the pixels that neither have nor are a boundary; None where all do.

    Returns:
        float64 ``[N, C]``, of each image and class, to be averaged with `torch.nanmean`: nan where neither truth nor
        prediction has a boundary.

    Raises:
        TypeError: ``prediction`` or ``target`` is not integer.
        ValueError: The shapes differ or aren't ``[N, H, W]``, or a counted label is outside [0, C).
    """
    if prediction.shape != target.shape or target.ndim != 3:
        raise ValueError(
            f"prediction and target must be [N, H, W], but they are {tuple(prediction.shape)} and {tuple(target.shape)}"
        )
    prediction, target = widen_labels(prediction, None), widen_labels(target, ignore_index)
    nowhere = torch.zeros_like(target, dtype=torch.bool)
    ignored = nowhere if ignore_index is None else reference.is_ignored(target, ignore_index)
    maps = [
        _classes(name, labels.masked_fill(ignored, 0), num_classes).masked_fill(ignored, -1)
        for name, labels in (("prediction", prediction), ("target", target))
    ]
    found, true = map(_boundary, maps)
    result = torch.full((len(target), num_classes), torch.nan, dtype=torch.float64)
    for label in range(num_classes):  # one after the other: a map of each would be C times the labels' memory
        lines = [edges & (labels == label) for edges, labels in zip((found, true), maps, strict=True)]
        near = [
            F.max_pool2d(line.float(), 2 * tolerance + 1, stride=1, padding=tolerance).bool() if tolerance else line
            for line in lines
        ]
        sizes = [line.sum((1, 2)).double() for line in lines]
        hits = [(line & other).sum((1, 2)).double() for line, other in zip(lines, near[::-1], strict=True)]
        precision, recall = (hit / size.clamp(min=1) for hit, size in zip(hits, sizes, strict=True))
        f1 = 2 * precision * recall / (precision + recall).clamp(min=torch.finfo(torch.float64).tiny)
        result[:, label] = f1.masked_fill(sizes[0] + sizes[1] == 0, torch.nan).cpu()
    return result


def _boundary(labels: Tensor) -> Tensor:
    """Which pixels have a neighbour of another class; -1 is none."""
    edges = torch.zeros_like(labels, dtype=torch.bool)
    for dim in (1, 2):
        first, second = labels.narrow(dim, 0, labels.shape[dim] - 1), labels.narrow(dim, 1, labels.shape[dim] - 1)
        differ = (first != second) & (first >= 0) & (second >= 0)
        edges.narrow(dim, 0, labels.shape[dim] - 1).logical_or_(differ)
        edges.narrow(dim, 1, labels.shape[dim] - 1).logical_or_(differ)
    return edges


def calibration(
    confidence: Tensor, prediction: Tensor, target: Tensor, ignore_index: int | None = None, bins: int = 15
) -> Tensor:
    """Sums of pixels by their confidence, which of batches, or of processes, add up; see `calibration_error`.

    Args:
        confidence: Floating-point, any shape: the probability of each pixel's predicted class, in [0, 1].
        prediction: Integer, of that shape: the predicted class; as `fastseg.functional.upsample_argmax` gives both.
        target: Integer, of that shape: the true class.
        ignore_index: Label of the pixels that don't count; None where all do.
        bins: Into which [0, 1] is divided evenly.

    Returns:
        float64 ``[bins, 3]``: number of pixels, number of right ones, sum of the confidence.

    Raises:
        ValueError: The shapes differ, or a confidence is outside [0, 1].
    """
    if not confidence.shape == prediction.shape == target.shape:
        shapes = [tuple(tensor.shape) for tensor in (confidence, prediction, target)]
        raise ValueError(f"confidence, prediction and target must have one shape, but they have {shapes}")
    target = widen_labels(target, ignore_index)
    counted = torch.ones_like(target, dtype=torch.bool)
    if ignore_index is not None:
        counted = ~reference.is_ignored(target, ignore_index)
    confidence, right = confidence[counted].double(), (widen_labels(prediction, None) == target)[counted].double()
    if not ((confidence >= 0) & (confidence <= 1)).all():
        raise ValueError("confidence must be in [0, 1]")
    bin = (confidence * bins).ceil().sub(1).clamp(min=0).long()  # a bin holds its upper end
    return torch.stack(
        [torch.bincount(bin, weights, bins) for weights in (torch.ones_like(right), right, confidence)], dim=1
    )


def calibration_error(sums: Tensor) -> float:
    """The expected calibration error of sums from `calibration`: ``sum_b n_b / n * |accuracy_b - confidence_b|``.

    0 where pixels of each confidence are right as often as it says (Guo et al., "On Calibration of Modern Neural
    Networks", 2017); nan without any pixel.
    """
    count, right, confidence = sums.unbind(1)
    return ((right - confidence).abs().sum() / count.sum()).item()


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
