"""MONAI's losses (1.6.1): the same arguments, values and gradients, on fastseg's operators.

With ``softmax=True`` and labels that ``to_onehot_y`` asks to convert, and with ``sigmoid=True`` and any target, they
read the logits in fused passes and hold nothing of their size but gradients. What runs as plain PyTorch although an
activation could be fused says so, and why, once on the logger `fastseg`. Labels may have any dtype. `torch.jit.script`
gets MONAI's own loss in place of one of these.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from fastseg.functional._losses import make_options
from fastseg.losses._focal import sigmoid_sums
from fastseg.losses._monai_focal import FocalLoss
from fastseg.losses._monai_region import DiceLoss, GeneralizedDiceLoss, TverskyLoss
from fastseg.losses._monai_terms import Loss, Weight, check_target, labels_of, read_reduction, warn_of_one_channel
from fastseg.losses._sums import softmax_sums
from fastseg.modules import CrossEntropyLoss
from fastseg.ops.losses.options import IGNORE_NONE

__all__ = ["DiceCELoss", "DiceFocalLoss", "DiceLoss", "FocalLoss", "GeneralizedDiceLoss", "TverskyLoss"]


def _check_factor(name: str, factor: float) -> float:
    if not factor >= 0:
        raise ValueError(f"{name}: expected a number of at least 0, got {factor}")
    return factor


class DiceCELoss(Loss):
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
        self.dice = DiceLoss(
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
        labels = labels_of(self.dice, input, target)
        if labels is None or self.dice.sigmoid or not self.dice.fuses(input, labels):
            ce = self._cross_entropy(input, target if labels is None else labels)
            return self.lambda_dice * self.dice(input, target) + self.lambda_ce * ce
        loss = self.cross_entropy
        options = make_options(IGNORE_NONE, loss.reduction, loss.label_smoothing)
        ce, overlap = softmax_sums(input, labels, options, loss.weight)
        return self.lambda_dice * self.dice.combine(overlap, input.ndim, ce.dtype) + self.lambda_ce * ce

    def _cross_entropy(self, input: Tensor, target: Tensor) -> Tensor:
        """The term of labels ``[N, d1, ...]``, or of probabilities of input's shape."""
        if target.ndim == input.ndim and not target.is_floating_point():
            target = target.to(input.dtype)
        return self.binary_cross_entropy(input, target) if input.shape[1] == 1 else self.cross_entropy(input, target)


class DiceFocalLoss(Loss):
    """`monai.losses.DiceFocalLoss`: ``lambda_dice * Dice + lambda_focal * focal loss``.

    The Dice is `DiceCELoss`'s. The focal loss is `FocalLoss`'s, of sigmoids.

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
        softmax: Whether the Dice is of the input's softmax; with ``to_onehot_y``, its sums come from a fused pass.
            The focal loss's come from one of its own, so that two gradients of the logits are held for a moment.
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
        self.dice = DiceLoss(
            include_background, to_onehot_y, sigmoid, softmax, other_act, squared_pred, jaccard, reduction, smooth_nr,
            smooth_dr, batch, weight,
        )  # fmt: skip
        self.focal = FocalLoss(include_background, to_onehot_y, gamma, alpha, weight, reduction)
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
        labels = labels_of(self, input, target)
        fuses = self.dice.fuses(input, labels)
        if not fuses or not self.dice.sigmoid or not self.focal.fuses(target, labels):
            return self.lambda_dice * self.dice(input, target) + self.lambda_focal * self.focal(input, target)
        warn_of_one_channel(self.dice, input.shape[1])
        sums = sigmoid_sums(input, target if labels is None else labels, self.focal.gamma)
        dice = self.dice.combine(sums[:3], input.ndim, sums.dtype)
        return self.lambda_dice * dice + self.lambda_focal * self.focal.reduce(self.focal.of_sums(sums), input)
