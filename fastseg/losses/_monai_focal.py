"""MONAI's focal loss, of sigmoids or of a softmax."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastseg import reference
from fastseg.losses._focal import is_hard, sigmoid_sums
from fastseg.losses._monai_terms import (
    ClassWeight,
    Weight,
    check_target,
    counted_pixels,
    labels_of,
    one_hot_counted,
    read_reduction,
    warn_of_one_channel,
)
from fastseg.losses._sums import log_plain
from fastseg.ops.cross_entropy import cross_entropy
from fastseg.ops.losses.options import IGNORE_NONE, LossOptions, accumulation_dtype


class FocalLoss(ClassWeight):
    """`monai.losses.FocalLoss`: ``alpha_t * (1 - q)^gamma * -log(q)`` of each value, q what the target says.

    Of sigmoids, q is that of the logit where the target is 1 and of minus the logit where it is 0, and alpha_t is alpha
    or 1 - alpha. Of a softmax, only the label's own probability q counts, and alpha_t is 1 - alpha for class 0.

    What may surprise: the mean divides by the number of classes, too, but with ``ignore_index`` by the number of pixels
    that count alone. With reduction "sum" the loss is the sum over images and classes of the mean over pixels. The
    softmax is one of the classes that count, so without ``include_background`` not of class 0. Unlike the original,
    which rounds float64 logits to float32, this one computes in float64.

    Args:
        include_background: Whether class 0 counts.
        to_onehot_y: Whether the target is labels ``[N, 1, d1, ...]``, where there is more than one class.
        gamma: How much less well classified values count.
        alpha: How much a target of 1 counts, in [0, 1]; None for all alike. Or a number for each class that counts: how
            much that class's own pixels do, the others 1.
        weight: A number for each class that counts, at least 0, or one for all.
        reduction: "mean", "sum" or "none" for ``[N, C', d1, ...]``, C' the classes that count; in plain PyTorch.
        use_softmax: Whether the probabilities are of a softmax; with ``to_onehot_y`` it is fused.
        ignore_index: As in `DiceLoss`.

    Raises:
        ValueError: Arguments don't fit; the message names them.
    """

    def __init__(
        self,
        include_background: bool = True,
        to_onehot_y: bool = False,
        gamma: float = 2.0,
        alpha: float | Sequence[float] | None = None,
        weight: Weight | None = None,
        reduction: str = "mean",
        use_softmax: bool = False,
        ignore_index: int | None = None,
    ) -> None:
        super().__init__(weight)
        self.include_background = include_background
        self.to_onehot_y = to_onehot_y
        self.gamma = gamma
        factors = None if alpha is None else torch.as_tensor(alpha)
        self.alpha = factors if factors is None or factors.ndim > 0 else factors.item()
        self.reduction = read_reduction(reduction, ("mean", "sum", "none"))
        self.use_softmax = use_softmax
        self.ignore_index = ignore_index

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss.

        Args:
            input: Logits ``[N, C]`` or ``[N, C, d1, ...]``; float32, float64, bfloat16 or float16.
            target: With ``to_onehot_y`` and C > 1, labels ``[N, 1, d1, ...]`` in [0, C); else of input's shape.

        Returns:
            The loss, in at least float32.

        Raises:
            IndexError: On a CPU, a label isn't in [0, C).
            ValueError: Shapes don't fit; the message names the argument.
        """
        check_target(input, target, self.to_onehot_y, min_dims=2)
        warn_of_one_channel(self, input.shape[1])
        labels, counted = labels_of(self, input, target), counted_pixels(target, self.ignore_index)
        if not self.fuses(target, labels):
            return self._plain(input, target, labels, counted)
        if self.use_softmax:
            assert labels is not None
            of_images = self._of_softmax(input, labels)
        else:
            given = target if labels is None else labels
            of_images = self.of_sums(sigmoid_sums(input, given, self.gamma, ignore_index=self.ignore_index))
        return self.reduce(of_images, input, counted)

    def fuses(self, target: Tensor, labels: Tensor | None) -> bool:
        """Whether the loss comes from a fused pass; if not, the log says why."""
        if self.reduction == "none":
            reason = 'reduction="none" gives a result of the logits\' size'
        elif self.gamma < 0:
            reason = "gamma < 0"
        elif labels is None and self.use_softmax:
            reason = "the target has a channel for each class; give labels with to_onehot_y=True"
        elif labels is None and target.shape[1] > 1 and self.ignore_index is not None:
            reason = "ignore_index with a target that has a channel for each class"
        elif labels is None and self.alpha is not None and not is_hard(target, self.ignore_index):
            reason = "alpha with a target between 0 and 1"  # whose two sums it would mix
        else:
            return True
        log_plain("monai.FocalLoss", reason)
        return False

    def of_sums(self, sums: Tensor) -> Tensor:
        """Each image's loss ``[N]``, summed over its values, from the six sums ``[6, N, C]`` of sigmoids."""
        own, others, _ = self._counting_classes(sums[3:], dim=2)
        classes = own.shape[1]
        if self.alpha is not None:
            of_own, of_others = self._alphas(classes, own)
            own, others = own * of_own, others * of_others
        weights = self.weights(classes, own)
        return (own + others if weights is None else (own + others) * weights).sum(1)

    def reduce(self, of_images: Tensor, input: Tensor, counted: Tensor | None = None) -> Tensor:
        """The loss from each image's ``[N]``, summed over the values of so large an input, or those that count."""
        if counted is not None:
            counts, least = counted.flatten(1).sum(1).to(of_images.dtype), torch.finfo(torch.float32).eps
            if self.reduction == "sum":
                return (of_images / counts.clamp_min(least)).sum()
            return of_images.sum() / counts.sum().clamp_min(least)
        pixels = input.shape[2:].numel()
        if self.reduction == "sum":
            return of_images.sum() / pixels
        return of_images.sum() / (pixels * self._counting_classes(input).shape[1] * len(input))

    def _counting_classes(self, values: Tensor, dim: int = 1) -> Tensor:
        """The values of the classes that count."""
        classes = values.shape[dim]
        return values if self.include_background or classes == 1 else values.narrow(dim, 1, classes - 1)

    def _of_softmax(self, input: Tensor, labels: Tensor) -> Tensor:
        """Each image's loss ``[N]`` of labels ``[N, d1, ...]``, summed over its pixels."""
        logits, labels = self._counting_classes(input), labels.long()
        if self.ignore_index is not None:
            labels = labels.masked_fill(labels == self.ignore_index, IGNORE_NONE)
        if logits.shape[1] < input.shape[1]:
            labels = (labels - 1).masked_fill((labels == 0) | (labels == IGNORE_NONE), IGNORE_NONE)
        losses = cross_entropy(logits, labels, None, LossOptions(IGNORE_NONE, "none"))
        factors = self._softmax_factors(logits.shape[1], losses)
        return reference.focus(losses, labels, factors, IGNORE_NONE, "none", self.gamma).unsqueeze(-1).flatten(1).sum(1)

    def _plain(self, input: Tensor, target: Tensor, labels: Tensor | None, counted: Tensor | None) -> Tensor:
        """The loss in plain PyTorch."""
        if labels is not None:
            target = one_hot_counted(labels, counted, input.shape[1])
        logits = self._counting_classes(input.to(accumulation_dtype(input)))
        target = self._counting_classes(target.to(logits.dtype))
        if counted is not None:
            logits, target = logits * counted, target * counted
        shape = (-1, *[1] * (input.ndim - 2))
        factors: Tensor | None
        if self.use_softmax:
            logs = logits.log_softmax(1)
            # 1 - p; bounded, since the derivative of a root of zero is infinite.
            losses = (-torch.expm1(logs)).clamp_min(torch.finfo(logs.dtype).tiny).pow(self.gamma) * -logs * target
            factors = self._softmax_factors(logits.shape[1], losses)
        else:
            losses = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
            losses = losses * (logits * (1 - 2 * target)).sigmoid().pow(self.gamma)
            if self.alpha is not None:
                own, others = (factor.view(shape) for factor in self._alphas(logits.shape[1], losses))
                hard = isinstance(self.alpha, Tensor)
                losses = losses * (torch.where(target == 1, own, others) if hard else others + target * (own - others))
            factors = self.weights(logits.shape[1], losses)
        losses = losses if factors is None else losses * factors.view(shape)
        losses = losses if counted is None else losses * counted
        return losses if self.reduction == "none" else self.reduce(losses.flatten(1).sum(1), input, counted)

    def _softmax_factors(self, classes: int, like: Tensor) -> Tensor | None:
        """How much each class counts, ``[classes]``: alpha and the weight in one."""
        alpha, weights = self.alpha, self.weights(classes, like)
        if alpha is not None and not isinstance(alpha, Tensor):
            if self.include_background:
                alpha = like.new_tensor([1 - alpha] + [alpha] * (classes - 1))
            else:
                warnings.warn("alpha: one number is ignored for a softmax without the background", stacklevel=3)
                alpha = None
        elif alpha is not None:
            alpha, _ = self._alphas(classes, like)
        factors = [each for each in (alpha, weights) if each is not None]
        return torch.stack([each.expand(classes) for each in factors]).prod(0) if factors else None

    def _alphas(self, classes: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """The factors of a class's own pixels and of the others: ``[classes]`` or ``[1]`` each."""
        alpha = torch.as_tensor(self.alpha, dtype=like.dtype, device=like.device)
        if alpha.ndim == 0:
            return alpha.view(1), 1 - alpha.view(1)
        if alpha.shape != (classes,):
            raise ValueError(f"alpha: expected a number or {classes} of them, got shape {tuple(alpha.shape)}")
        return alpha, torch.ones_like(alpha)
