"""Region losses: what follows from a class's overlap with its labels, for binary, multilabel and multiclass heads."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn

from fastseg import functional, reference
from fastseg.functional._class_sums import sums_and_cross_entropy
from fastseg.functional._losses import in_dtype
from fastseg.modules._leaves import leaf_of_traces

TASKS = ("binary", "multilabel", "multiclass")


class RegionLoss(nn.Module, ABC):
    """A loss of the sums of `fastseg.functional.class_sums`; subclasses say which.

    Args:
        task: What the classes are: "multiclass", of which softmax gives a pixel one; "multilabel", each with a sigmoid
            and a mask of its own; or "binary", one of them.
        ignore_index: A label, or for sigmoids a target value, that adds nothing to any sum; None for none.
        smooth: Added to a score's numerator and denominator, in pixels; at least 0.
        batch: One score of each class over the whole batch, instead of one of each image and class.
        include_background: Whether class 0 counts; without it, there must be another one.
        ce_weight: How much the mean cross-entropy of what counts adds, for sigmoids the binary one, with class 0 in
            any case: it comes from the same pass. At least 0.
    """

    def __init__(
        self,
        task: str = "multiclass",
        *,
        ignore_index: int | None = None,
        smooth: float = 1e-5,
        batch: bool = False,
        include_background: bool = True,
        ce_weight: float = 0.0,
    ) -> None:
        super().__init__()
        if task not in TASKS:
            raise ValueError(f'task: expected "binary", "multilabel" or "multiclass", got {task!r}')
        for name, number in (("smooth", smooth), ("ce_weight", ce_weight)):
            if not number >= 0:
                raise ValueError(f"{name}: expected a number of at least 0, got {number}")
        if task == "binary" and not include_background:
            raise ValueError('include_background: task "binary" has one class, nothing else is left')
        self.task = task
        self.ignore_index = ignore_index
        self.smooth = smooth
        self.batch = batch
        self.include_background = include_background
        self.ce_weight = ce_weight

    @leaf_of_traces
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss.

        Args:
            input: Logits ``[N, C, d1, ...]``, for "binary" of one class; float32, float64, bfloat16 or float16.
            target: For "multiclass" labels ``[N, d1, ...]`` in [0, C); for "multilabel" a mask for each class, of
                input's shape and any dtype; for "binary" a mask, with or without the dimension of the class.

        Returns:
            One number in input's dtype (float32 for half dtypes under autocast).

        Raises:
            IndexError: On a CPU, a label is neither in [0, C) nor ``ignore_index``.
            ValueError: Shapes don't fit; the message names the argument.
        """
        if self.task == "multiclass":
            activation = "softmax"
        else:
            activation = "sigmoid"
            if self.task == "binary" and input.shape[1:2] != (1,):
                raise ValueError(f'input: task "binary" has one class, got shape {tuple(input.shape)}')
            if self.task == "binary" and target.ndim == input.ndim - 1:
                target = target.unsqueeze(1)
            if target.ndim != input.ndim:
                raise ValueError(f"target: expected a mask for each class, got shape {tuple(target.shape)}")
        sums, cross_entropy = self._sums(input, target, activation)
        if self.batch:
            sums = sums.sum(0, keepdim=True)
        if not self.include_background:
            if sums.shape[1] == 1:
                raise ValueError("include_background: with one class, which is the background, nothing else is left")
            sums = sums[:, 1:]
        loss = self.loss_of(*sums.unbind(-1))
        return in_dtype(loss if cross_entropy is None else loss + self.ce_weight * cross_entropy, input.dtype)

    @property
    def _grid(self) -> tuple[str, bool] | None:
        """On which logits are upsampled, if they are."""
        return None

    def _sums(self, input: Tensor, target: Tensor, activation: str) -> tuple[Tensor, Tensor | None]:
        """The sums ``[N, C, 3]``, and the mean cross-entropy where it counts."""
        if self.ce_weight:
            return sums_and_cross_entropy(input, target, self.ignore_index, activation, self._grid)
        grid = self._grid
        if grid is None:
            return functional.class_sums(input, target, self.ignore_index, activation), None
        mode, align_corners = grid
        sums = functional.upsample_class_sums(
            input, target, self.ignore_index, activation, mode=mode, align_corners=align_corners
        )
        return sums, None

    @abstractmethod
    def loss_of(self, overlap: Tensor, predicted: Tensor, labelled: Tensor) -> Tensor:
        """The loss from sums ``[N, C]`` of p t, p and t; ``[1, C]`` over the whole batch."""

    def _ratio(self, overlap: Tensor, union: Tensor) -> Tensor:
        return (overlap + self.smooth) / (union + self.smooth).clamp_min(reference.LEAST_DENOMINATOR)

    def extra_repr(self) -> str:
        """The task and what counts, for ``repr(layer)``."""
        added = f", ce_weight={self.ce_weight}" if self.ce_weight else ""
        return f"{self.task!r}, ignore_index={self.ignore_index}, smooth={self.smooth}, batch={self.batch}{added}"


class DiceLoss(RegionLoss):
    """Soft Dice loss: one minus the mean of ``(2 sum(p t) + smooth) / (sum(p) + sum(t) + smooth)``.

    The arguments are those of `RegionLoss`. For "multiclass" it is the Dice term of
    `fastseg.functional.cross_entropy_dice`.

    Source: Milletari et al. 2016, "V-Net".
    """

    def loss_of(self, overlap: Tensor, predicted: Tensor, labelled: Tensor) -> Tensor:
        """See `RegionLoss.loss_of`."""
        return 1 - self._ratio(2 * overlap, predicted + labelled).mean()


class JaccardLoss(RegionLoss):
    """Soft Jaccard loss: one minus the mean of ``(sum(p t) + smooth) / (sum(p) + sum(t) - sum(p t) + smooth)``.

    The arguments are those of `RegionLoss`.
    """

    def loss_of(self, overlap: Tensor, predicted: Tensor, labelled: Tensor) -> Tensor:
        """See `RegionLoss.loss_of`."""
        return 1 - self._ratio(overlap, predicted + labelled - overlap).mean()


class TverskyLoss(RegionLoss):
    """Tversky loss, Dice with prices for its two kinds of errors.

    One minus the mean of ``(TP + smooth) / (TP + alpha FP + beta FN + smooth)``, with ``TP = sum(p t)``,
    ``FP = sum(p) - TP`` and ``FN = sum(t) - TP``: for 1/2 and 1/2 Dice, whose ``smooth`` counts twice.

    Source: Salehi et al. 2017, "Tversky loss function for image segmentation using 3D fully convolutional deep
    networks".

    Args:
        task: As in `RegionLoss`.
        alpha: What a false positive costs; at least 0.
        beta: What a false negative costs; at least 0.
        ignore_index: As in `RegionLoss`.
        smooth: As there.
        batch: As there.
        include_background: As there.
        ce_weight: As there.
    """

    def __init__(
        self,
        task: str = "multiclass",
        alpha: float = 0.3,
        beta: float = 0.7,
        *,
        ignore_index: int | None = None,
        smooth: float = 1e-5,
        batch: bool = False,
        include_background: bool = True,
        ce_weight: float = 0.0,
    ) -> None:
        super().__init__(
            task, ignore_index=ignore_index, smooth=smooth, batch=batch, include_background=include_background,
            ce_weight=ce_weight,
        )  # fmt: skip
        for name, price in (("alpha", alpha), ("beta", beta)):
            if not price >= 0:
                raise ValueError(f"{name}: expected a number of at least 0, got {price}")
        self.alpha = alpha
        self.beta = beta

    def loss_of(self, overlap: Tensor, predicted: Tensor, labelled: Tensor) -> Tensor:
        """See `RegionLoss.loss_of`."""
        errors = self.alpha * (predicted - overlap) + self.beta * (labelled - overlap)
        return 1 - self._ratio(overlap, overlap + errors).mean()

    def extra_repr(self) -> str:
        """As `RegionLoss.extra_repr`, and the prices."""
        return f"{super().extra_repr()}, alpha={self.alpha}, beta={self.beta}"


class GeneralizedDiceLoss(RegionLoss):
    """Generalised Dice loss: one Dice of all classes, in which small ones count as much as large ones.

    One minus the mean over images of ``(2 sum_c w[c] sum(p t) + smooth) / (sum_c w[c] (sum(p) + sum(t)) + smooth)``,
    with ``w[c] = 1 / max(sum(t), 1)^2``. The arguments are those of `RegionLoss`.

    Source: Sudre et al. 2017, "Generalised Dice overlap as a deep learning loss function for highly unbalanced
    segmentations".
    """

    def loss_of(self, overlap: Tensor, predicted: Tensor, labelled: Tensor) -> Tensor:
        """See `RegionLoss.loss_of`."""
        weights = labelled.clamp_min(1).square().reciprocal()
        union = (weights * (predicted + labelled)).sum(1)
        return 1 - self._ratio(2 * (weights * overlap).sum(1), union).mean()


class _Upsampled(RegionLoss):
    """A region loss of logits ``[N, C, h, w]`` upsampled to the target's size ``[..., H, W]``, without these."""

    def __init__(self, *args: Any, mode: str = "bilinear", align_corners: bool = False, **options: Any) -> None:
        super().__init__(*args, **options)
        self.mode = mode
        self.align_corners = align_corners

    @property
    def _grid(self) -> tuple[str, bool]:
        return self.mode, self.align_corners

    def extra_repr(self) -> str:
        """The grid, and what the loss has, for ``repr(layer)``."""
        return f"{super().extra_repr()}, mode={self.mode!r}, align_corners={self.align_corners}"


class UpsampleDiceLoss(_Upsampled, DiceLoss):
    """`DiceLoss` of logits upsampled to the target's size; ``mode`` and ``align_corners`` choose the grid."""


class UpsampleJaccardLoss(_Upsampled, JaccardLoss):
    """`JaccardLoss` of logits upsampled to the target's size; ``mode`` and ``align_corners`` choose the grid."""


class UpsampleTverskyLoss(_Upsampled, TverskyLoss):
    """`TverskyLoss` of logits upsampled to the target's size; ``mode`` and ``align_corners`` choose the grid."""


class UpsampleGeneralizedDiceLoss(_Upsampled, GeneralizedDiceLoss):
    """`GeneralizedDiceLoss` of logits upsampled to the target's size, on the grid of ``mode`` and ``align_corners``."""
