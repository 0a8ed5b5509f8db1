"""What MONAI's losses share: checks, and the terms of the compound ones, soft Dice and the focal loss of sigmoids."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastseg.losses._sums import check_scores, log_plain
from fastseg.ops.losses.options import accumulation_dtype

Weight = Sequence[float] | float | Tensor


def read_reduction(reduction: str, known: tuple[str, ...]) -> str:
    """The reduction's name; MONAI's enumerations are strings."""
    for name in known:
        if reduction == name:
            return name
    raise ValueError(f"reduction: expected one of {', '.join(known)}, got {reduction!r}")


def check_target(input: Tensor, target: Tensor, to_onehot_y: bool) -> None:
    """Refuses a target that is neither labels to be converted nor of input's shape."""
    check_scores("input", input, 3)
    channels = target.shape[1] if target.ndim > 1 else None
    pixels = target.ndim == input.ndim and target.shape[2:] == input.shape[2:] and target.shape[0] == input.shape[0]
    labels = to_onehot_y and input.shape[1] > 1
    if not pixels or channels != (1 if labels else input.shape[1]):
        wanted = (input.shape[0], 1 if labels else input.shape[1], *input.shape[2:])
        hint = "" if labels or channels != 1 else "; labels need to_onehot_y=True"
        raise ValueError(f"target: expected shape {wanted}, got {tuple(target.shape)}{hint}")
    if target.device != input.device:
        raise ValueError(f"target: expected input's device {input.device}, got {target.device}")


def warn_of_one_channel(loss: Any, channels: int) -> None:
    """Says which of a loss's arguments have no meaning for one channel, as MONAI does."""
    if channels == 1:
        for name, ignored in (("softmax", loss.softmax), ("to_onehot_y", loss.to_onehot_y)):
            if ignored:
                warnings.warn(f"{name}=True: ignored for an input of one channel", stacklevel=3)
        if not loss.include_background:
            warnings.warn("include_background=False: ignored for an input of one channel", stacklevel=3)


class ClassWeight(nn.Module):
    """A term with MONAI's buffer ``class_weight``: a number for each class that counts, or one for all, or None."""

    class_weight: Tensor | None

    def __init__(self, weight: Weight | None) -> None:
        super().__init__()
        self.register_buffer("class_weight", None if weight is None else torch.as_tensor(weight))
        if self.class_weight is not None and (self.class_weight < 0).any():
            raise ValueError(f"weight: expected numbers of at least 0, got {weight}")

    def weights(self, classes: int, like: Tensor) -> Tensor | None:
        """The weights of as many classes, ``[classes]`` or a number, as ``like``."""
        weight = self.class_weight
        if weight is not None and weight.ndim > 0 and weight.shape != (classes,):
            raise ValueError(
                f"weight: expected a number for each of the {classes} classes that count, got shape "
                f"{tuple(weight.shape)}; with include_background=False class 0 has none"
            )
        return None if weight is None else weight.to(like)


class DiceTerm(ClassWeight):
    """The Dice term, from sums ``[3, N, C]`` of each image and class: of P * T, of P and of T.

    ``1 - (2 PT + smooth_nr) / (P + T + smooth_dr)``, and with jaccard ``P + T - PT`` doubled in the denominator.
    """

    def __init__(
        self, include_background: bool, to_onehot_y: bool, sigmoid: bool, softmax: bool, other_act: Callable | None,
        squared_pred: bool, jaccard: bool, reduction: str, smooth_nr: float, smooth_dr: float, batch: bool,
        weight: Weight | None,
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
        self.squared_pred = squared_pred
        self.jaccard = jaccard
        self.reduction = reduction
        self.smooth_nr = float(smooth_nr)
        self.smooth_dr = float(smooth_dr)
        self.batch = batch

    def first_class(self, channels: int) -> int:
        """The first class that counts."""
        return 0 if self.include_background or channels == 1 else 1

    def fuses(self, input: Tensor, labels: Tensor | None, name: str) -> bool:
        """Whether the sums may come from one pass over the logits; if not, the log says why."""
        if not self.sigmoid and (not self.softmax or input.shape[1] == 1):
            return False
        if self.squared_pred:
            log_plain(name, "squared_pred=True needs sums of squared probabilities")
        elif labels is None and not self.sigmoid:
            log_plain(name, "the target has a channel for each class; give labels with to_onehot_y=True")
        elif self.reduction == "none":
            log_plain(name, 'reduction="none" gives a result of the logits\' size')
        else:
            return True
        return False

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The term of logits and a target of their shape, in plain PyTorch."""
        first = self.first_class(input.shape[1])
        if self.sigmoid:
            input = input.sigmoid()
        elif self.softmax and input.shape[1] > 1:
            input = input.softmax(1)
        elif self.other_act is not None:
            input = self.other_act(input)
        if input.shape != target.shape:
            expected, got = tuple(target.shape), tuple(input.shape)
            raise ValueError(f"other_act: expected a result of target's shape {expected}, got {got}")
        input, target = input[:, first:], target[:, first:]
        dtype = torch.promote_types(input.dtype, target.dtype) if target.is_floating_point() else input.dtype
        terms = [input * target, input, target]
        if self.squared_pred:
            terms[1:] = [input.square(), target.square()]
        # Half types don't hold the sums over many pixels.
        wide = torch.promote_types(dtype, torch.float32)
        sums = torch.stack([term.flatten(2).sum(2, dtype=wide) for term in terms])
        return self.combine(sums, input.ndim).to(dtype)

    def combine(self, sums: Tensor, ndim: int) -> Tensor:
        """The term from the sums of the classes that count; of so many dimensions for reduction "none"."""
        intersection, predicted, labelled = sums.sum(1) if self.batch else sums
        union = predicted + labelled
        if self.jaccard:
            union = 2 * (union - intersection)
        losses = 1 - (2 * intersection + self.smooth_nr) / (union + self.smooth_dr)
        classes = losses.shape[-1]
        if classes > 1:
            weights = self.weights(classes, losses)
            losses = losses if weights is None else losses * weights
        if self.reduction == "none":
            return losses.reshape(*losses.shape, *[1] * (ndim - 2))
        return losses.mean() if self.reduction == "mean" else losses.sum()


class FocalTerm(ClassWeight):
    """The focal term of sigmoids."""

    def __init__(
        self, gamma: float, weight: Weight | None, alpha: float | Sequence[float] | None, reduction: str
    ) -> None:
        super().__init__(weight)
        self.gamma = gamma
        factors = None if alpha is None else torch.as_tensor(alpha)
        self.alpha = factors if factors is None or factors.ndim > 0 else factors.item()
        self.reduction = reduction

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The term of the logits of the classes that count and a target of their shape, in plain PyTorch."""
        input = input.to(accumulation_dtype(input))
        target = target.to(input.dtype)
        losses = F.binary_cross_entropy_with_logits(input, target, reduction="none")
        losses = losses * (input * (1 - 2 * target)).sigmoid().pow(self.gamma)
        classes = (-1, *[1] * (input.ndim - 2))
        if self.alpha is not None:
            own, others = (factor.view(classes) for factor in self._alphas(input.shape[1], losses))
            if isinstance(self.alpha, Tensor):
                losses = losses * torch.where(target == 1, own, others)
            else:
                losses = losses * (target * own + (1 - target) * others)
        weights = self.weights(input.shape[1], losses)
        losses = losses if weights is None else losses * weights.view(classes)
        if self.reduction == "none":
            return losses
        return losses.mean() if self.reduction == "mean" else losses.flatten(2).mean(2).sum()

    def sums_serve(self, target: Tensor) -> bool:
        """Whether the term follows from sums, of labels or of a target with a channel for each class.

        A factor of shares between 0 and 1 mixes the two sums' terms.
        """
        return self.gamma >= 0 and (self.alpha is None or not target.is_floating_point())

    def of_sums(self, sums: Tensor, images: int, pixels: int) -> Tensor:
        """The term from what `fastseg.losses._focal.focal_sums` gives of so many images of so many pixels."""
        own, others, _ = sums
        if self.alpha is not None:
            of_own, of_others = self._alphas(len(own), own)
            own, others = own * of_own, others * of_others
        weights = self.weights(len(own), own)
        losses = own + others if weights is None else (own + others) * weights
        return losses.sum() / pixels / (images * len(losses) if self.reduction == "mean" else 1)

    def _alphas(self, classes: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """The factors of a class's own pixels and of the others: ``[classes]`` or ``[1]`` each."""
        alpha = torch.as_tensor(self.alpha, dtype=like.dtype, device=like.device)
        if alpha.ndim == 0:
            return alpha.view(1), 1 - alpha.view(1)
        if alpha.shape != (classes,):
            raise ValueError(f"alpha: expected a number or {classes} of them, got shape {tuple(alpha.shape)}")
        return alpha, torch.ones_like(alpha)
