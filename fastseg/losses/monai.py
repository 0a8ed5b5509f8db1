"""MONAI's losses (1.6.1): the same arguments, values and gradients, on fastseg's operators.

With ``softmax=True`` and labels that ``to_onehot_y`` asks to convert, they read the logits in fused passes and hold
nothing of their size but the gradient. So does the Dice with ``sigmoid=True``, and the focal loss beside it but for
``alpha`` with a floating-point target. Everything else runs as plain PyTorch. Labels may have any dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastseg.functional import class_sums
from fastseg.functional._losses import make_options
from fastseg.losses._focal import all_sums, focal_sums
from fastseg.losses._monai_region import DiceLoss, GeneralizedDiceLoss, TverskyLoss
from fastseg.losses._monai_terms import DiceTerm, FocalTerm, Weight, check_target, read_reduction, warn_of_one_channel
from fastseg.losses._sums import as_integers, one_hot, softmax_sums
from fastseg.modules import CrossEntropyLoss
from fastseg.ops.focal_sums import Focal
from fastseg.ops.losses.options import IGNORE_NONE

__all__ = ["DiceCELoss", "DiceFocalLoss", "DiceLoss", "GeneralizedDiceLoss", "TverskyLoss"]


def _check_factor(name: str, factor: float) -> float:
    if not factor >= 0:
        raise ValueError(f"{name}: expected a number of at least 0, got {factor}")
    return factor


class DiceCELoss(nn.Module):
    """`monai.losses.DiceCELoss`: ``lambda_dice * Dice + lambda_ce * cross-entropy``.

    Of image n and class c, with sums over pixels, P the activated input and T the one-hot target: ``Dice[n, c] = 1 -
    (2 sum(P T) + smooth_nr) / (sum(P) + sum(T) + smooth_dr)``.

    What may surprise: the cross-entropy is of the input's softmax whatever activation the Dice has, and counts class 0
    even without ``include_background``; for one channel it is `torch.nn.BCEWithLogitsLoss`, ``weight`` its
    ``pos_weight``. ``weight`` scales the classes' Dice losses, but their mean divides by the number of classes, and
    where one class is left it doesn't count. Without smoothing, a class that is nowhere is NaN. No label is ignored.
    Half-type logits and labels give a loss in float32.

    Args:
        include_background: Whether class 0 counts in the Dice.
        to_onehot_y: Whether the target is labels ``[N, 1, d1, ...]``.
        sigmoid: Whether the Dice is of the input's sigmoid.
        softmax: Whether it is of the input's softmax; with ``to_onehot_y``, both losses come from one fused pass.
        other_act: Another activation for the Dice.
        squared_pred: Whether its denominator sums squares.
        jaccard: Whether it is the soft Jaccard index, ``1 - (2 sum(P T) + smooth_nr) / (2 sum(P + T - P T) +
            smooth_dr)``.
        reduction: "mean" or "sum", over images and classes, and for the cross-entropy over pixels.
        smooth_nr: Added to the numerator.
        smooth_dr: Added to the denominator.
        batch: One Dice of each class over the whole batch, instead of one of each image and class.
        weight: ``[C]``, how much each class counts in both losses.
        lambda_dice: How much the Dice counts; at least 0.
        lambda_ce: How much the cross-entropy counts; at least 0.
        label_smoothing: Share of the target that is spread evenly over all classes, in the cross-entropy alone.

    Raises:
        ValueError: Arguments don't fit; the message names them.
        TypeError: ``other_act`` can't be called.
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
        weight: Tensor | None = None,
        lambda_dice: float = 1.0,
        lambda_ce: float = 1.0,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        reduction = read_reduction(reduction, ("mean", "sum"))
        self.dice = DiceTerm(
            include_background, to_onehot_y, sigmoid, softmax, other_act, squared_pred, jaccard, reduction, smooth_nr,
            smooth_dr, batch, weight if weight is None or include_background else weight[1:],
        )  # fmt: skip
        self.cross_entropy = CrossEntropyLoss(weight, reduction=reduction, label_smoothing=label_smoothing)
        self.binary_cross_entropy = nn.BCEWithLogitsLoss(pos_weight=weight, reduction=reduction)
        self.lambda_dice = _check_factor("lambda_dice", lambda_dice)
        self.lambda_ce = _check_factor("lambda_ce", lambda_ce)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss.

        Args:
            input: Logits ``[N, C, d1, ...]``; float32, float64, bfloat16 or float16.
            target: With ``to_onehot_y`` and C > 1, labels ``[N, 1, d1, ...]`` in [0, C); else of input's shape.

        Returns:
            One number in the promotion of input's dtype and the one-hot target's, which labels make float32.

        Raises:
            IndexError: On a CPU, a label isn't in [0, C).
            ValueError: Shapes don't fit; the message names the argument.
        """
        check_target(input, target, self.dice.to_onehot_y)
        channels = input.shape[1]
        warn_of_one_channel(self.dice, channels)
        labels = as_integers(target[:, 0]) if self.dice.to_onehot_y and channels > 1 else None
        fuses = self.dice.fuses(input, labels, "monai.DiceCELoss")
        if fuses and self.dice.sigmoid:
            sums = class_sums(input, target if labels is None else labels, activation="sigmoid").movedim(-1, 0)
            dice = self.dice.combine(sums[..., self.dice.first_class(channels) :], input.ndim)
            ce = self._cross_entropy(input, target if labels is None else labels)
            if labels is None:
                soft = target.is_floating_point()
                dice = dice.to(torch.promote_types(input.dtype, target.dtype) if soft else input.dtype)
        elif fuses:
            assert labels is not None
            loss = self.cross_entropy
            options = make_options(IGNORE_NONE, loss.reduction, loss.label_smoothing)
            ce, overlap = softmax_sums(input, labels, options, loss.weight)
            dice = self.dice.combine(overlap[..., self.dice.first_class(channels) :], input.ndim)
        else:
            ce = self._cross_entropy(input, target if labels is None else labels)
            target = target if labels is None else one_hot("target", labels, channels, torch.float32)
            dice = self.dice(input, target)
        return self.lambda_dice * dice + self.lambda_ce * ce

    def _cross_entropy(self, input: Tensor, target: Tensor) -> Tensor:
        """The term of labels ``[N, d1, ...]``, or of probabilities of input's shape."""
        if target.ndim == input.ndim and not target.is_floating_point():
            target = target.to(input.dtype)
        return self.binary_cross_entropy(input, target) if input.shape[1] == 1 else self.cross_entropy(input, target)


class DiceFocalLoss(nn.Module):
    """`monai.losses.DiceFocalLoss`: ``lambda_dice * Dice + lambda_focal * focal loss``.

    The Dice is `DiceCELoss`'s. The focal loss of a value, with q the sigmoid of the logit where the target is 1 and of
    minus the logit where it is 0: ``alpha_t * (1 - q)^gamma * -log(q)``, where alpha_t is alpha for a target of 1 and
    1 - alpha for 0.

    What may surprise: the focal loss is one of sigmoids, each class against the rest, with ``softmax=True`` too
    (`fastseg.FocalLoss` is one of the softmax). ``weight`` has a number for each class that counts, so none for class 0
    without ``include_background``, whereas `DiceCELoss` always takes C; the means divide by the number of classes, and
    where one class is left the Dice isn't weighed. With reduction "sum" the focal loss is the sum over images and
    classes of the mean over pixels. Unlike the original, which rounds float64 logits to float32 for the focal loss,
    this one computes in float64.

    Args:
        include_background: Whether class 0 counts.
        to_onehot_y: As in `DiceCELoss`.
        sigmoid: As there.
        softmax: Whether the Dice is of the input's softmax; with ``to_onehot_y``, its sums come from a fused pass, and
            the focal loss reads the logits in blocks.
        other_act: As there.
        squared_pred: As there.
        jaccard: As there.
        reduction: "mean", "sum" or "none", whose focal losses of all values are added to Dice's of their image and
            class.
        smooth_nr: As there.
        smooth_dr: As there.
        batch: As there.
        gamma: How much less well classified values count.
        weight: A number, or one for each class that counts, at least 0, in both losses.
        lambda_dice: How much the Dice counts; at least 0.
        lambda_focal: How much the focal loss counts; at least 0.
        alpha: How much a target of 1 counts, in [0, 1]; None for all alike. A number for each class that counts is
            taken, too: how much that class's own pixels count, the others 1.

    Raises:
        ValueError: Arguments don't fit; the message names them.
        TypeError: ``other_act`` can't be called.
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
        gamma: float = 2.0,
        weight: Weight | None = None,
        lambda_dice: float = 1.0,
        lambda_focal: float = 1.0,
        alpha: float | None = None,
    ) -> None:
        super().__init__()
        reduction = read_reduction(reduction, ("mean", "sum", "none"))
        self.dice = DiceTerm(
            include_background, to_onehot_y, sigmoid, softmax, other_act, squared_pred, jaccard, reduction, smooth_nr,
            smooth_dr, batch, weight,
        )  # fmt: skip
        self.focal = FocalTerm(gamma, weight, alpha, reduction)
        self.lambda_dice = _check_factor("lambda_dice", lambda_dice)
        self.lambda_focal = _check_factor("lambda_focal", lambda_focal)
        self.to_onehot_y = to_onehot_y

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss; input and target as in `DiceCELoss.forward`.

        Returns:
            The loss, in at least float32: one number, or for reduction "none" ``[N, C', d1, ...]``, C' the classes that
            count.

        Raises:
            IndexError: On a CPU, a label isn't in [0, C).
            ValueError: Shapes don't fit; the message names the argument.
        """
        check_target(input, target, self.to_onehot_y)
        channels = input.shape[1]
        warn_of_one_channel(self.dice, channels)
        first = self.dice.first_class(channels)
        labels = as_integers(target[:, 0]) if self.to_onehot_y and channels > 1 else None
        given = target if labels is None else labels
        fuses = self.dice.fuses(input, labels, "monai.DiceFocalLoss")
        if fuses and self.dice.sigmoid and self.focal.sums_serve(given):
            sums = all_sums(input, given, self.focal.gamma)[..., first:]
            dice = self.dice.combine(sums[:3], input.ndim)
            focal = self.focal.of_sums(sums[3:].sum(1), images=len(input), pixels=math.prod(input.shape[2:]))
        elif fuses and not self.dice.sigmoid:
            assert labels is not None
            options = Focal(self.focal.gamma, threshold=None, first_class=first, ignore_index=IGNORE_NONE)
            sums, overlap = focal_sums(input, labels, options, with_overlap=True)
            dice = self.dice.combine(overlap[..., first:], input.ndim)
            focal = self.focal.of_sums(sums, images=len(labels), pixels=math.prod(input.shape[2:]))
        else:
            target = target if labels is None else one_hot("target", labels, channels, torch.float32)
            dice = self.dice(input, target)
            focal = self.focal(input[:, first:], target[:, first:])
        return self.lambda_dice * dice + self.lambda_focal * focal
