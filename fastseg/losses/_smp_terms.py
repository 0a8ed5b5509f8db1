"""What segmentation_models_pytorch's losses share: modes, class weights, and sums over a batch's pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastseg.ops.losses.options import accumulation_dtype

BINARY, MULTICLASS, MULTILABEL = "binary", "multiclass", "multilabel"


def check_mode(mode: str, class_weights: object) -> None:
    """Refuses an unknown mode, and class weights where there is one class."""
    if mode not in (BINARY, MULTICLASS, MULTILABEL):
        raise ValueError(f'mode: expected "binary", "multiclass" or "multilabel", got {mode!r}')
    if class_weights is not None and mode == BINARY:
        raise ValueError('class_weights: mode "binary" has one class')


def as_weights(class_weights: Sequence[float] | Tensor | None) -> Tensor | None:
    """Class weights as float32, which they are in the original."""
    return None if class_weights is None else torch.as_tensor(class_weights).float()


def weighted_mean(losses: Tensor, weights: Tensor | None) -> Tensor:
    """The mean of the classes' losses, weighed where there are weights."""
    if weights is None:
        return losses.mean()
    weights = weights.to(losses.device)
    return (losses * weights).sum() / weights.sum()


def check_weights(class_weights: Tensor | None, classes: int) -> None:
    """Refuses weights of another number of classes."""
    if class_weights is not None and class_weights.shape != (classes,):
        raise ValueError(f"class_weights: expected {classes} numbers, got shape {tuple(class_weights.shape)}")


def result_dtype(y_pred: Tensor, class_weights: Tensor | None) -> torch.dtype:
    """The loss's dtype; class weights are float32, which half types are promoted to."""
    return y_pred.dtype if class_weights is None else torch.promote_types(y_pred.dtype, class_weights.dtype)


class Sums(NamedTuple):
    """Sums over all pixels of the batch that aren't ignored, ``[C]`` each.

    Attributes:
        intersection: Of the smaller of prediction and target.
        predicted: Of the prediction.
        labelled: Of the target.
    """

    intersection: Tensor
    predicted: Tensor
    labelled: Tensor


def sum_pixels(probabilities: Tensor, target: Tensor, counted: Tensor | None) -> Sums:
    """The sums of probabilities and target ``[N, C, pixels]``, of ``counted`` pixels alone where given."""
    target = target.to(probabilities.dtype)
    if counted is not None:
        probabilities, target = probabilities * counted, target * counted
    # Half types don't hold the sums over many pixels.
    dtype = accumulation_dtype(probabilities)
    terms = (torch.minimum(probabilities, target), probabilities, target)
    return Sums(*(term.sum((0, 2), dtype=dtype) for term in terms))
