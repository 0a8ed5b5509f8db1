"""MONAI's losses of overlapping regions: Dice, Tversky and generalised Dice."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from fastseg.functional import class_sums
from fastseg.losses._focal import sigmoid_sums
from fastseg.losses._monai_terms import (
    ClassWeight,
    Weight,
    check_target,
    counted_pixels,
    ignores_a_channel,
    labels_of,
    one_hot_counted,
    read_reduction,
    warn_of_one_channel,
)
from fastseg.losses._sums import log_plain


class RegionLoss(ClassWeight, ABC):
    """A loss of each image's and class's sums of P T, P and T, with what the three have in common.

    Args:
        include_background: Whether class 0 counts.
        to_onehot_y: Whether the target is labels ``[N, 1, d1, ...]``, where there is more than one class.
        sigmoid: Whether P is the input's sigmoid; its sums come from one fused pass.
        softmax: Whether P is the input's softmax; with ``to_onehot_y`` its sums come from one fused pass.
        other_act: A function that makes P of the input.
        reduction: "mean", "sum" or "none".
        smooth_nr: Added to the numerator.
        smooth_dr: Added to the denominator.
        batch: Whether the sums are over the whole batch.
        weight: A number for each class that counts, or one for all.
        soft_label: Whether P T is replaced by the smaller of P and T.
        ignore_index: A label whose pixels don't count. For a target with a channel for each class, which runs as plain
            PyTorch, the class whose pixels don't, or any other number for pixels without a class.
    """

    squared_pred = False

    def __init__(
        self, include_background: bool, to_onehot_y: bool, sigmoid: bool, softmax: bool, other_act: Callable | None,
        reduction: str, smooth_nr: float, smooth_dr: float, batch: bool, weight: Weight | None, soft_label: bool,
        ignore_index: int | None,
    ) -> None:  # fmt: skip
        super().__init__(weight)
        if other_act is not None and not callable(other_act):
            raise TypeError(f"other_act: expected None or a callable, got {type(other_act).__name__}")
        if sigmoid + softmax + (other_act is not None) > 1:
            raise ValueError("sigmoid, softmax, other_act: expected at most one of them")
        self.include_background = include_background
        self.to_onehot_y = to_onehot_y
        self.sigmoid = sigmoid
        self.softmax = softmax
        self.other_act = other_act
        self.reduction = read_reduction(reduction, ("mean", "sum", "none"))
        self.smooth_nr = float(smooth_nr)
        self.smooth_dr = float(smooth_dr)
        self.batch = batch
        self.soft_label = soft_label
        self.ignore_index = ignore_index

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss.

        Args:
            input: Logits or probabilities ``[N, C, d1, ...]``; float32, float64, bfloat16 or float16.
            target: With ``to_onehot_y`` and C > 1, labels ``[N, 1, d1, ...]`` in [0, C); else of input's shape.

        Returns:
            The loss in the promotion of input's dtype and the one-hot target's, which labels and ``ignore_index`` make
            float32.

        Raises:
            IndexError: On a CPU, a label isn't in [0, C).
            ValueError: Shapes don't fit; the message names the argument.
        """
        check_target(input, target, self.to_onehot_y)
        warn_of_one_channel(self, input.shape[1])
        labels = labels_of(self, input, target)
        dtype = torch.promote_types(input.dtype, target.dtype) if target.is_floating_point() else input.dtype
        if labels is not None or not (self.ignore_index is None or ignores_a_channel(target, self.ignore_index)):
            dtype = torch.promote_types(input.dtype, torch.float32)  # of one-hot targets, and of MONAI's masks
        given = target if labels is None else labels
        if not self.fuses(input, labels):
            sums = self._plain_sums(input, target, labels)
        elif self.sigmoid:
            sums = sigmoid_sums(input, given, ignore_index=self.ignore_index, smaller=self.soft_label)
        else:
            sums = class_sums(input, given, self.ignore_index).movedim(-1, 0)
        return self.combine(sums, input.ndim, dtype)

    def combine(self, sums: Tensor, ndim: int, dtype: torch.dtype) -> Tensor:
        """The loss from sums ``[3, N, C]``, of an input of so many dimensions; in dtype, or what is wider."""
        sums = sums if self.include_background or sums.shape[-1] == 1 else sums[..., 1:]
        losses = self.losses_of(*(sums.sum(1) if self.batch else sums)).to(self.result_dtype(dtype))
        if self.reduction == "none":
            return self.unreduced(losses, ndim)
        return losses.mean() if self.reduction == "mean" else losses.sum()

    @abstractmethod
    def losses_of(self, overlap: Tensor, predicted: Tensor, labelled: Tensor) -> Tensor:
        """The losses from sums ``[N, C]`` of the classes that count, over the whole batch ``[C]``."""

    def result_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The losses' dtype, from what input and target are promoted to."""
        return dtype

    def unreduced(self, losses: Tensor, ndim: int) -> Tensor:
        """The losses of reduction "none", for an input of so many dimensions."""
        return losses.reshape(*losses.shape, *[1] * (ndim - 2))

    def fuses(self, input: Tensor, labels: Tensor | None) -> bool:
        """Whether the sums come from a fused pass; if not, the log says why, where an activation could be fused."""
        name, channels = f"monai.{type(self).__name__}", input.shape[1]
        if not self.sigmoid and (not self.softmax or channels == 1):
            return False
        if self.squared_pred:
            log_plain(name, "squared_pred=True needs sums of squared probabilities")
        elif labels is None and not self.sigmoid:
            log_plain(name, "the target has a channel for each class; give labels with to_onehot_y=True")
        elif labels is None and channels > 1 and self.ignore_index is not None:
            log_plain(name, "ignore_index with a target that has a channel for each class")
        else:
            return True
        return False

    def _plain_sums(self, input: Tensor, target: Tensor, labels: Tensor | None) -> Tensor:
        """The sums ``[3, N, C]`` in plain PyTorch."""
        counted = counted_pixels(target, self.ignore_index)
        if self.sigmoid:
            input = input.sigmoid()
        elif self.softmax and input.shape[1] > 1:
            input = input.softmax(1)
        elif self.other_act is not None:
            input = self.other_act(input)
        if labels is not None:
            target = one_hot_counted(labels, counted, input.shape[1])
        if input.shape != target.shape:
            expected, got = tuple(target.shape), tuple(input.shape)
            raise ValueError(f"other_act: expected a result of target's shape {expected}, got {got}")
        if counted is not None:
            input, target = input * counted, target * counted
        wide = torch.promote_types(torch.promote_types(input.dtype, target.dtype), torch.float32)
        input, target = input.to(wide), target.to(wide)  # half types don't hold the sums over many pixels
        terms = [input * target, input, target]
        if self.squared_pred:
            terms[1:] = [input.square(), target.square()]
        elif self.soft_label:
            terms[0] = torch.minimum(input, target)
        return torch.stack([term.flatten(2).sum(2) for term in terms])


class DiceLoss(RegionLoss):
    """`monai.losses.DiceLoss`: ``1 - (2 sum(P T) + smooth_nr) / (sum(P) + sum(T) + smooth_dr)`` of image and class.

    What may surprise: ``weight`` scales the classes' losses, but their mean divides by the number of classes, and where
    one class is left it doesn't count.

    Args:
        include_background: As in `RegionLoss`, whose arguments the others are, too.
        squared_pred: Whether the denominator has squares; in plain PyTorch.
        jaccard: Whether the denominator is that of the Jaccard index, doubled.
    """

    def __init__(
        self,
        include_background: bool = True,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Callable | None = None,
        squared_pred: bool = False,
        jaccard: bool = False,
        reduction: str = "mean",
        smooth_nr: float = 1e-5,
        smooth_dr: float = 1e-5,
        batch: bool = False,
        weight: Weight | None = None,
        soft_label: bool = False,
        ignore_index: int | None = None,
    ) -> None:
        super().__init__(
            include_background, to_onehot_y, sigmoid, softmax, other_act, reduction, smooth_nr, smooth_dr, batch,
            weight, soft_label, ignore_index,
        )  # fmt: skip
        self.squared_pred = squared_pred
        self.jaccard = jaccard

    def losses_of(self, overlap: Tensor, predicted: Tensor, labelled: Tensor) -> Tensor:
        """See `RegionLoss.losses_of`."""
        union = predicted + labelled
        if self.jaccard:
            union = 2 * (union - overlap)
        losses = 1 - (2 * overlap + self.smooth_nr) / (union + self.smooth_dr)
        weights = self.weights(losses.shape[-1], losses) if losses.shape[-1] > 1 else None
        return losses if weights is None else losses * weights


class TverskyLoss(RegionLoss):
    """`monai.losses.TverskyLoss`, of image and class ``1 - (TP + smooth_nr) / (TP + alpha FP + beta FN + smooth_dr)``.

    ``TP = sum(P T)``, ``FP = sum(P) - TP`` and ``FN = sum(T) - TP``.

    Args:
        include_background: As in `RegionLoss`, whose arguments the others are, too.
        alpha: What a false positive costs.
        beta: What a false negative costs.
    """

    def __init__(
        self,
        include_background: bool = True,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Callable | None = None,
        alpha: float = 0.5,
        beta: float = 0.5,
        reduction: str = "mean",
        smooth_nr: float = 1e-5,
        smooth_dr: float = 1e-5,
        batch: bool = False,
        soft_label: bool = False,
        ignore_index: int | None = None,
    ) -> None:
        super().__init__(
            include_background, to_onehot_y, sigmoid, softmax, other_act, reduction, smooth_nr, smooth_dr, batch, None,
            soft_label, ignore_index,
        )  # fmt: skip
        self.alpha = alpha
        self.beta = beta

    def losses_of(self, overlap: Tensor, predicted: Tensor, labelled: Tensor) -> Tensor:
        """See `RegionLoss.losses_of`."""
        errors = self.alpha * (predicted - overlap) + self.beta * (labelled - overlap)
        return 1 - (overlap + self.smooth_nr) / (overlap + errors + self.smooth_dr)

    def unreduced(self, losses: Tensor, ndim: int) -> Tensor:
        """The losses as they are, ``[N, C]``, over the whole batch ``[C]``."""
        return losses


class GeneralizedDiceLoss(RegionLoss):
    """`monai.losses.GeneralizedDiceLoss`: one Dice of all classes, each weighed by its size.

    Of each image ``1 - (2 sum_c w[c] sum(P T) + smooth_nr) / (sum_c w[c] (sum(P) + sum(T)) + smooth_dr)``, with
    ``w[c] = 1 / sum(T)^2``; a class without pixels has the largest weight of the others.

    Args:
        include_background: As in `RegionLoss`, whose arguments the others are, too.
        w_type: "square", "simple" for ``1 / sum(T)``, or "uniform" for 1.
    """

    def __init__(
        self,
        include_background: bool = True,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Callable | None = None,
        w_type: str = "square",
        reduction: str = "mean",
        smooth_nr: float = 1e-5,
        smooth_dr: float = 1e-5,
        batch: bool = False,
        soft_label: bool = False,
    ) -> None:
        super().__init__(
            include_background, to_onehot_y, sigmoid, softmax, other_act, reduction, smooth_nr, smooth_dr, batch, None,
            soft_label, None,
        )  # fmt: skip
        if w_type not in ("square", "simple", "uniform"):
            raise ValueError(f'w_type: expected "square", "simple" or "uniform", got {w_type!r}')
        self.w_type = w_type

    def losses_of(self, overlap: Tensor, predicted: Tensor, labelled: Tensor) -> Tensor:
        """See `RegionLoss.losses_of`."""
        sizes = labelled.square() if self.w_type == "square" else labelled
        weights = torch.ones_like(sizes) if self.w_type == "uniform" else sizes.reciprocal()
        finite = weights.masked_fill(weights.isinf(), 0)
        weights = torch.where(weights.isinf(), finite.amax(-1, keepdim=True), weights)
        score = 2 * (overlap * weights).sum(-1, keepdim=True) + self.smooth_nr
        return 1 - score / (((predicted + labelled) * weights).sum(-1, keepdim=True) + self.smooth_dr)

    def result_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """At least float32, as the weights are."""
        return torch.promote_types(dtype, torch.float32)
