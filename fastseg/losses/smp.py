"""segmentation_models_pytorch's losses (0.6.0): the same arguments, values and gradients, on fastseg's operators.

Logits are read in fused passes that hold nothing of their size but the gradient, in all three modes. What runs as plain
PyTorch, and says so once on the logger `fastseg`: ``from_logits=False``, the focal loss of a target between 0 and 1,
and binary cross-entropy with a loss or a weight for each value.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastseg.functional import binary_cross_entropy
from fastseg.functional._binary_cross_entropy import is_of_classes, mean_over_all, of_each_class
from fastseg.functional._checks import pixels_of
from fastseg.functional._losses import in_dtype
from fastseg.losses._focal import IGNORED_MASK, are_classes, is_hard, masks_of, sigmoid_sums
from fastseg.losses._smp_region import DiceLoss, JaccardLoss, TverskyLoss
from fastseg.losses._smp_terms import (
    BINARY,
    MULTICLASS,
    MULTILABEL,
    as_weights,
    check_mode,
    check_weights,
    result_dtype,
    weighted_mean,
)
from fastseg.losses._sums import as_integers, as_labels, check_labels, check_scores, log_plain
from fastseg.ops.cross_entropy import cross_entropy
from fastseg.ops.losses.options import IGNORE_NONE, LossOptions, accumulation_dtype
from fastseg.reference import is_ignored

__all__ = ["DiceLoss", "FocalLoss", "JaccardLoss", "SoftBCEWithLogitsLoss", "SoftCrossEntropyLoss", "TverskyLoss"]

# A class's sum of focal factors, by which "normalized" divides, is at least this.
LEAST_FACTOR = 1e-6
REDUCTIONS = ("mean", "sum", "batchwise_mean")


class FocalLoss(nn.Module):
    """`segmentation_models_pytorch.losses.FocalLoss`.

    A focal loss of sigmoids in every mode. With q the sigmoid of the logit where the target is 1, and of minus the
    logit where it is 0, a value's loss is ``alpha_t * (1 - q)^gamma * -log(q)``, where alpha_t is alpha for a target of
    1 and 1 - alpha for 0.

    What may surprise: in "multiclass" each class is set against the rest, so that this is no softmax focal loss
    (`fastseg.FocalLoss` is one), and a label that is no class counts as "none of them"; with ``from_logits=False`` the
    sigmoid is then applied to the probabilities' logarithms. A mean over classes follows every reduction, so that only
    "binary" has a loss for each value; and a reduction that isn't known is "none". Unlike the original, the gradient is
    finite for gamma < 1 where q is 1.

    Args:
        mode: "binary", "multiclass" or "multilabel". Labels and masks of zeros and ones are served by a fused pass over
            the logits; masks between 0 and 1 run as plain PyTorch, and so do floating-point ones that aren't on a CPU,
            since only waiting for the device would tell.
        alpha: How much a target of 1 counts, in [0, 1]; None for all alike.
        gamma: How much less well classified values count.
        ignore_index: A label that doesn't count; in "binary" and "multilabel" a target value, where the original fails
            for "multilabel".
        from_logits: Whether the prediction is logits, not probabilities.
        eps: Probabilities are clamped to [eps, 1 - eps].
        reduction: Of a class's values: "mean", "sum", "batchwise_mean" (the sum over the first dimension, which is the
            images, or with ignore_index all values) or "none".
        normalized: Whether a class's losses are divided by its sum of ``(1 - q)^gamma``.
        reduced_threshold: Where given, ``1 - q`` is divided by it, and a value whose q is less counts fully.
        class_weights: ``[C]``, how much each class counts in the mean; not for "binary".

    Raises:
        ValueError: Arguments don't fit; the message names them.
    """

    def __init__(
        self,
        mode: str,
        alpha: float | None = None,
        gamma: float | None = 2.0,
        ignore_index: int | None = None,
        from_logits: bool = True,
        eps: float = 1e-7,
        reduction: str | None = "mean",
        normalized: bool = False,
        reduced_threshold: float | None = None,
        class_weights: list[float] | None = None,
    ) -> None:
        super().__init__()
        check_mode(mode, class_weights)
        if gamma is None:
            raise ValueError("gamma: expected a number, got None, which the original can't compute with either")
        reduces = reduction in ("mean", "sum") or (reduction == "batchwise_mean" and ignore_index is not None)
        if class_weights is not None and not reduces:
            raise ValueError(f"class_weights: reduction {reduction!r} leaves values, which they don't fit; reduce them")
        self.mode = mode
        self.alpha = alpha
        self.gamma = gamma
        self.ignore_index = ignore_index
        self.from_logits = from_logits
        self.eps = eps
        self.reduction = reduction
        self.normalized = normalized
        self.reduced_threshold = reduced_threshold
        self.class_weights = as_weights(class_weights)

    def forward(self, y_pred: Tensor, y_true: Tensor) -> Tensor:
        """The loss.

        Args:
            y_pred: Logits or probabilities ``[N, C, d1, ...]``, in "binary" of any shape; float32, float64, bfloat16 or
                float16.
            y_true: In "multiclass", labels ``[N, d1, ...]``; in "multilabel", a target of y_pred's shape; in "binary",
                of its number of elements.

        Returns:
            One number in y_pred's dtype (float32 for half dtypes under autocast, or with ``class_weights``); in
            "binary" with reduction "none" a loss for each value that isn't ignored, ``[values]``. NaN for the mean of
            no value.

        Raises:
            ValueError: Shapes don't fit; the message names the argument.
        """
        check_scores("y_pred", y_pred, 1 if self.mode == BINARY else 2)
        check_weights(self.class_weights, y_pred.shape[1] if self.mode != BINARY else 1)
        logits, target, ignored = self._arranged(y_pred if self.from_logits else self._logits(y_pred), y_true)
        if self.mode == BINARY and self.reduction not in REDUCTIONS:
            losses, factors, counted = self._terms(logits, target, ignored)
            loss = losses[counted] / (factors.sum().clamp_min(LEAST_FACTOR) if self.normalized else 1)
        else:
            loss = weighted_mean(self._of_classes(logits, target, ignored), self.class_weights)
        return in_dtype(loss, result_dtype(y_pred, self.class_weights))

    def _logits(self, probabilities: Tensor) -> Tensor:
        probabilities = probabilities.to(accumulation_dtype(probabilities)).clamp(self.eps, 1 - self.eps)
        return probabilities.log() if self.mode == MULTICLASS else probabilities.logit()

    def _arranged(self, logits: Tensor, y_true: Tensor) -> tuple[Tensor, Tensor, int | None]:
        """Logits ``[N, C, ...]``, labels or a mask for each class, and which of their values is ignored."""
        ignored = self.ignore_index
        if self.mode == MULTICLASS:
            labels, classes = as_labels("y_true", y_true, logits), logits.shape[1]
            if self.gamma >= 0 and are_classes(labels, classes, ignored):
                return logits, labels, ignored
            return logits, masks_of(labels, classes, ignored), None if ignored is None else IGNORED_MASK
        if self.mode == MULTILABEL:
            if y_true.shape != logits.shape:
                raise ValueError(f"y_true: expected y_pred's shape {tuple(logits.shape)}, got {tuple(y_true.shape)}")
            return logits, y_true, ignored
        if y_true.numel() != logits.numel():
            raise ValueError(f"y_true: expected as many targets as y_pred, {logits.numel()}, got {y_true.numel()}")
        return logits.reshape(1, 1, -1), y_true.reshape(1, 1, -1), ignored

    def _of_classes(self, logits: Tensor, target: Tensor, ignored: int | None) -> Tensor:
        """The classes' losses."""
        pixels = [dim for dim in range(logits.ndim) if dim != 1]
        if self.gamma >= 0 and is_hard(target, ignored):
            own, others, factors = sigmoid_sums(logits, target, self.gamma, self.reduced_threshold, ignored)[3:].sum(1)
            losses = own + others if self.alpha is None else self.alpha * own + (1 - self.alpha) * others
        else:
            reason = "masks between 0 and 1, or floating-point ones elsewhere than on a CPU, or gamma < 0"
            log_plain("smp.FocalLoss", reason)
            losses, factors = (terms.sum(pixels) for terms in self._terms(logits, target, ignored)[:2])
        if self.normalized:
            losses = losses / factors.clamp_min(LEAST_FACTOR)
        if self.reduction == "sum":
            return losses
        if self.reduction == "batchwise_mean":  # of an image, or where some don't count, or in "binary", of all values
            alone = ignored is None and self.mode != BINARY
            return losses / logits.shape[2:].numel() if alone else losses
        if ignored is None:
            return losses / logits[:, 0].numel()
        if target.ndim < logits.ndim:
            return losses / (~is_ignored(target, ignored)).sum()
        return losses / (target != ignored).sum(pixels)

    def _terms(self, logits: Tensor, target: Tensor, ignored: int | None) -> tuple[Tensor, Tensor, Tensor]:
        """Each value's loss and ``(1 - q)^gamma``, and whether it counts; the target may lie between 0 and 1."""
        logits = logits.to(accumulation_dtype(logits))
        counted = torch.ones_like(target, dtype=torch.bool) if ignored is None else target != ignored
        target = target.to(logits.dtype)
        losses = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        # Bounded, since the derivative of a root of zero is infinite.
        factors = (-torch.expm1(-losses)).clamp_min(torch.finfo(losses.dtype).tiny)
        if self.reduced_threshold is None:
            factors = factors.pow(self.gamma)
        else:
            reduced = (-losses).exp() < self.reduced_threshold
            factors = (factors / self.reduced_threshold).pow(self.gamma).masked_fill(reduced, 1)
        losses = factors * losses
        if self.alpha is not None:
            losses = losses * (self.alpha * target + (1 - self.alpha) * (1 - target))
        return losses.masked_fill(~counted, 0), factors.masked_fill(~counted, 0), counted


class SoftCrossEntropyLoss(nn.Module):
    """`segmentation_models_pytorch.losses.SoftCrossEntropyLoss`: cross-entropy with label smoothing.

    What may surprise: the "mean" divides by all pixels, those that are ignored among them; with "none" and an
    ``ignore_index`` the losses keep a dimension of size 1 at ``dim``; a reduction that isn't known is "none". Unlike
    the original, whose default ``smooth_factor`` fails at the call, None is 0.

    Args:
        reduction: "mean", "sum" or "none".
        smooth_factor: Share of the target, in [0, 1], that is spread evenly over all classes; None for 0.
        ignore_index: A label that adds nothing to the loss; None for no such label.
        dim: The dimension of the classes.

    Raises:
        ValueError: Arguments don't fit; the message names them.
    """

    def __init__(
        self,
        reduction: str = "mean",
        smooth_factor: float | None = None,
        ignore_index: int | None = -100,
        dim: int = 1,
    ) -> None:
        super().__init__()
        if smooth_factor is not None and not 0 <= smooth_factor <= 1:
            raise ValueError(f"smooth_factor: expected a number in [0, 1], got {smooth_factor}")
        self.smooth_factor = smooth_factor
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.dim = dim

    def forward(self, y_pred: Tensor, y_true: Tensor) -> Tensor:
        """The loss.

        Args:
            y_pred: Logits, for the default ``dim`` ``[N, C, d1, ...]``; float32, float64, bfloat16 or float16.
            y_true: Labels in [0, C), of y_pred's shape without ``dim``, or with one element there.

        Returns:
            The loss in y_pred's dtype (float32 for half dtypes under autocast). NaN for the "mean" over no pixel.

        Raises:
            IndexError: On a CPU, a label is neither in [0, C) nor ignored.
            ValueError: Shapes don't fit; the message names the argument.
        """
        if not -y_pred.ndim <= self.dim < y_pred.ndim:
            raise ValueError(f"dim: expected a dimension of y_pred, which has {y_pred.ndim}, got {self.dim}")
        logits = y_pred.movedim(self.dim, 1) if y_pred.ndim > 1 else y_pred
        check_scores("y_pred", logits, 1)
        labels = y_true.squeeze(self.dim) if y_true.ndim == y_pred.ndim else y_true
        check_labels("y_true", labels, pixels_of(logits), logits)
        ignore_index = IGNORE_NONE if self.ignore_index is None else self.ignore_index
        reduction = "sum" if self.reduction in ("mean", "sum") else "none"
        options = LossOptions(ignore_index, reduction, self.smooth_factor or 0.0)
        loss = cross_entropy(logits, as_integers(labels), None, options)
        if self.reduction == "mean":
            loss = loss / labels.numel()
        elif reduction == "none" and self.ignore_index is not None:
            loss = loss.unsqueeze(self.dim)
        return in_dtype(loss, y_pred.dtype)


class SoftBCEWithLogitsLoss(nn.Module):
    """`segmentation_models_pytorch.losses.SoftBCEWithLogitsLoss`: binary cross-entropy with label smoothing.

    A target t becomes ``(1 - t) * smooth_factor + t * (1 - smooth_factor)``. A reduced loss comes from one fused pass
    where the weights are numbers of classes.

    What may surprise: the "mean" divides by all values, those that are ignored among them, and a reduction that isn't
    known is "none".

    Args:
        weight: How much each value counts; of any shape that broadcasts to the logits'.
        ignore_index: A target value that adds nothing to the loss; None for none.
        reduction: "mean", "sum" or "none".
        smooth_factor: Share of the target that the other value gets; None for 0.
        pos_weight: How much a target of 1 counts; of any shape that broadcasts to the logits'.
    """

    weight: Tensor | None
    pos_weight: Tensor | None

    def __init__(
        self,
        weight: Tensor | None = None,
        ignore_index: int | None = -100,
        reduction: str = "mean",
        smooth_factor: float | None = None,
        pos_weight: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.smooth_factor = smooth_factor
        self.register_buffer("weight", weight)
        self.register_buffer("pos_weight", pos_weight)

    def forward(self, y_pred: Tensor, y_true: Tensor) -> Tensor:
        """The loss.

        Args:
            y_pred: Logits of any shape; float32, float64, bfloat16 or float16.
            y_true: A target of y_pred's shape, in [0, 1], of a boolean, integer or floating-point dtype.

        Returns:
            The loss in y_pred's dtype (float32 for half dtypes under autocast).

        Raises:
            ValueError: Shapes don't fit; the message names the argument.
        """
        if y_true.shape != y_pred.shape:
            raise ValueError(f"y_true: expected y_pred's shape {tuple(y_pred.shape)}, got {tuple(y_true.shape)}")
        target, ignored = y_true, self.ignore_index
        if self.smooth_factor is not None:
            values = y_true.to(accumulation_dtype(y_pred))
            smoothed = (1 - values) * self.smooth_factor + values * (1 - self.smooth_factor)
            target = smoothed if ignored is None else torch.where(y_true == ignored, values, smoothed)
        given = [each for each in (self.weight, self.pos_weight) if each is not None]
        fits = self.reduction in ("mean", "sum") and y_pred.ndim > 1 and 0 not in y_pred.shape[1:]
        if not fits or not all(is_of_classes(each, y_pred) for each in given):
            return self._plain(y_pred, target, y_true)
        weight, pos_weight = (of_each_class(each, y_pred.shape[1]) for each in (self.weight, self.pos_weight))
        if self.reduction == "mean":
            weight = mean_over_all(weight, y_pred)
        return binary_cross_entropy(y_pred, target, weight, pos_weight, ignored, "sum")

    def _plain(self, y_pred: Tensor, target: Tensor, y_true: Tensor) -> Tensor:
        log_plain("smp.SoftBCEWithLogitsLoss", "a loss for each value, or a weight that isn't one of classes")
        losses = F.binary_cross_entropy_with_logits(
            y_pred, target.to(y_pred.dtype), self.weight, pos_weight=self.pos_weight, reduction="none"
        )
        if self.ignore_index is not None:
            losses = losses.masked_fill(y_true == self.ignore_index, 0)
        reduced = {"mean": losses.mean, "sum": losses.sum}.get(self.reduction)
        return losses if reduced is None else reduced()
