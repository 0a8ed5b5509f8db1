"""segmentation_models_pytorch's losses of overlapping regions: Dice, Jaccard and Tversky."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastseg.functional._losses import in_dtype
from fastseg.losses._focal import sigmoid_sums
from fastseg.losses._smp_terms import (
    BINARY,
    MULTICLASS,
    Sums,
    as_weights,
    check_mode,
    check_weights,
    result_dtype,
    sum_pixels,
    weighted_mean,
)
from fastseg.losses._sums import as_labels, check_scores, log_plain, one_hot, softmax_sums
from fastseg.ops.losses.options import IGNORE_NONE, LossOptions
from fastseg.reference import is_ignored


class DiceLoss(nn.Module):
    """`segmentation_models_pytorch.losses.DiceLoss`.

    Of class c, with sums over all pixels of the batch that aren't ignored, p the predicted probability and t the
    target: ``Dice[c] = (I + smooth) / max((sum(p) + sum(t)) / 2 + smooth, eps)`` and ``I = sum(min(p, t))``, which is
    sum(p * t) for targets of zeros and ones. The loss is the mean over classes of ``1 - Dice[c]``, or ``-log(max(
    Dice[c], eps))``.

    What may surprise: one Dice of each class over the whole batch, not of each image; a class without a labelled pixel
    adds 0 to the mean, but counts in its divisor; ``smooth`` is added to halved sums, so that 1 counts like 2 in
    `fastseg.functional.cross_entropy_dice`; ``class_weights`` give the loss of half-type logits in float32. Unlike the
    original, a batch without images is served: its loss is 0.

    Args:
        mode: "binary", "multiclass" or "multilabel". Of logits the sums come from one fused pass.
        classes: The classes whose losses count; None for all.
        log_loss: Whether the loss is -log(Dice) instead of 1 - Dice.
        from_logits: Whether the prediction is logits, not probabilities.
        smooth: Added to Dice's numerator and denominator, in pixels.
        ignore_index: A label that doesn't count; in "binary" and "multilabel" a target value.
        eps: The least denominator, and the least Dice under the logarithm.
        class_weights: ``[C]``, how much each class counts in the mean; not for "binary".

    Raises:
        ValueError: Arguments don't fit; the message names them.
    """

    def __init__(
        self,
        mode: str,
        classes: list[int] | None = None,
        log_loss: bool = False,
        from_logits: bool = True,
        smooth: float = 0.0,
        ignore_index: int | None = None,
        eps: float = 1e-7,
        class_weights: list[float] | None = None,
    ) -> None:
        super().__init__()
        check_mode(mode, class_weights)
        if classes is not None and mode == BINARY:
            raise ValueError('classes: mode "binary" has one class')
        self.mode = mode
        self.classes = None if classes is None else torch.as_tensor(classes, dtype=torch.long)
        if self.classes is not None and self.classes.ndim != 1:
            raise ValueError(f"classes: expected a list of class indices, got {classes}")
        self.from_logits = from_logits
        self.smooth = smooth
        self.eps = eps
        self.log_loss = log_loss
        self.ignore_index = ignore_index
        self.class_weights = as_weights(class_weights)

    def forward(self, y_pred: Tensor, y_true: Tensor) -> Tensor:
        """The loss.

        Args:
            y_pred: Logits or probabilities ``[N, C, d1, ...]``; float32, float64, bfloat16 or float16.
            y_true: In "multiclass", labels ``[N, d1, ...]`` (or of as many elements) in [0, C); else a target of
                y_pred's number of elements, ``[N, ...]``.

        Returns:
            One number in y_pred's dtype (float32 for half dtypes under autocast, or with ``class_weights``).

        Raises:
            IndexError: On a CPU, a label is neither in [0, C) nor ignored.
            ValueError: Shapes don't fit; the message names the argument.
        """
        check_scores("y_pred", y_pred, 2)
        check_weights(self.class_weights, y_pred.shape[1])
        if self.mode != MULTICLASS:
            sums = self._sum_maps(y_pred, y_true)
        elif self.from_logits:
            labels = as_labels("y_true", y_true, y_pred)
            ignore_index = IGNORE_NONE if self.ignore_index is None else self.ignore_index
            sums = Sums(*softmax_sums(y_pred, labels, LossOptions(ignore_index, "sum"))[1].sum(1))
        else:
            self._log_plain()
            sums = self._sum_labels(y_pred, as_labels("y_true", y_true, y_pred))
        return in_dtype(self._combine(sums), result_dtype(y_pred, self.class_weights))

    def _log_plain(self) -> None:
        log_plain(f"smp.{type(self).__name__}", "from_logits=False leaves no activation to fuse")

    def _denominator(self, sums: Sums) -> Tensor:
        return (sums.predicted + sums.labelled) / 2

    def _combine(self, sums: Sums) -> Tensor:
        scores = (sums.intersection + self.smooth) / (self._denominator(sums) + self.smooth).clamp_min(self.eps)
        losses = -scores.clamp_min(self.eps).log() if self.log_loss else 1 - scores
        losses = losses * (sums.labelled > 0)
        weights = self.class_weights
        if self.classes is not None:
            losses = losses[self.classes.to(losses.device)]
            weights = None if weights is None else weights[self.classes]
        return weighted_mean(losses, weights)

    def _sum_maps(self, y_pred: Tensor, y_true: Tensor) -> Sums:
        """The sums of a target value for each of y_pred's."""
        images, channels = y_pred.shape[:2]
        if y_true.shape[:1] != (images,) or y_true.numel() != y_pred.numel():
            raise ValueError(
                f"y_true: expected as many targets as y_pred, {tuple(y_pred.shape)}, got {tuple(y_true.shape)}"
            )
        if self.from_logits:
            target = y_true.reshape(y_pred.shape)
            sums = sigmoid_sums(y_pred, target, ignore_index=self.ignore_index, smaller=True).sum(1)
            return Sums(*(sums.sum(1, keepdim=True) if self.mode == BINARY else sums))
        self._log_plain()
        pixels = y_pred[0, 0].numel() if images else 0
        if self.mode == BINARY:
            channels, pixels = 1, channels * pixels
        y_true = y_true.reshape(images, channels, pixels)
        counted = None if self.ignore_index is None else y_true != self.ignore_index
        return sum_pixels(y_pred.reshape(y_true.shape), y_true, counted)

    def _sum_labels(self, probabilities: Tensor, labels: Tensor) -> Sums:
        """The sums of class labels."""
        labels = labels.flatten(1) if labels.ndim > 1 else labels.unsqueeze(1)
        counted = None
        if self.ignore_index is not None:
            ignored = is_ignored(labels, self.ignore_index)
            labels, counted = labels.masked_fill(ignored, 0), ~ignored.unsqueeze(1)
        probabilities = probabilities.unsqueeze(-1).flatten(2)
        target = one_hot("y_true", labels, probabilities.shape[1], probabilities.dtype)
        return sum_pixels(probabilities, target, counted)


class JaccardLoss(DiceLoss):
    """`segmentation_models_pytorch.losses.JaccardLoss`: `DiceLoss` with another score.

    ``Jaccard[c] = (I + smooth) / max(sum(p) + sum(t) - I + smooth, eps)``, and `DiceLoss`'s arguments.
    """

    def _denominator(self, sums: Sums) -> Tensor:
        return sums.predicted + sums.labelled - sums.intersection


class TverskyLoss(DiceLoss):
    """`segmentation_models_pytorch.losses.TverskyLoss`: `DiceLoss` with prices for its two kinds of errors.

    ``Tversky[c] = (I + smooth) / max(I + alpha (sum(p) - I) + beta (sum(t) - I) + smooth, eps)``, and the mean over
    classes is raised to the power of gamma.

    Args:
        mode: As in `DiceLoss`.
        classes: As there.
        log_loss: As there.
        from_logits: As there.
        smooth: As there.
        ignore_index: As there.
        eps: As there.
        alpha: What a false positive costs.
        beta: What a false negative costs.
        gamma: The power of the mean.
        class_weights: As there.

    Raises:
        ValueError: Arguments don't fit; the message names them.
    """

    def __init__(
        self,
        mode: str,
        classes: list[int] | None = None,
        log_loss: bool = False,
        from_logits: bool = True,
        smooth: float = 0.0,
        ignore_index: int | None = None,
        eps: float = 1e-7,
        alpha: float = 0.5,
        beta: float = 0.5,
        gamma: float = 1.0,
        class_weights: list[float] | None = None,
    ) -> None:
        super().__init__(mode, classes, log_loss, from_logits, smooth, ignore_index, eps, class_weights)
        self.alpha = alpha
        self.beta = beta
        self.gamma = gamma

    def _denominator(self, sums: Sums) -> Tensor:
        overlap = sums.intersection
        return overlap + self.alpha * (sums.predicted - overlap) + self.beta * (sums.labelled - overlap)

    def _combine(self, sums: Sums) -> Tensor:
        return super()._combine(sums) ** self.gamma
