"""Losses as layers: torch.nn's constructors and state_dict, fastseg's operators."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastseg import functional
from fastseg.modules._leaves import leaf_of_traces


def _named(layer: nn.Module, *names: str) -> str:
    """Arguments of a layer, for its repr."""
    return ", ".join(f"{name}={getattr(layer, name)!r}" for name in names)


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """`torch.nn.CrossEntropyLoss` on `fastseg.functional.cross_entropy`: same constructor, same state_dict.

    See `fastseg.functional.cross_entropy` for the shapes and dtypes; labels need not be int64.
    """

    @leaf_of_traces
    def forward(self, input: Tensor, target: Tensor, pixel_weight: Tensor | None = None) -> Tensor:
        """The loss between logits ``[N, C, d1, ...]`` and labels ``[N, d1, ...]`` or class probabilities."""
        return functional.cross_entropy(
            input, target, self.weight, self.ignore_index, self.reduction, self.label_smoothing,
            pixel_weight=pixel_weight,
        )  # fmt: skip


class UpsampleCrossEntropyLoss(nn.CrossEntropyLoss):
    """`torch.nn.CrossEntropyLoss` of logits upsampled to the labels' size; its state_dict loads.

    See `fastseg.functional.upsample_cross_entropy` for the shapes and dtypes.

    Args:
        weight: ``[C]``, how much each class counts.
        ignore_index: A label that doesn't count.
        reduction: "none", "mean" or "sum".
        label_smoothing: Share of the target that is spread evenly over all classes.
        mode: "bilinear", of volumes "trilinear", or "nearest".
        align_corners: As in `fastseg.functional.upsample_cross_entropy`.
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        *,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        mode: str = "bilinear",
        align_corners: bool = False,
    ) -> None:
        super().__init__(weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing)
        self.mode = mode
        self.align_corners = align_corners

    @leaf_of_traces
    def forward(self, input: Tensor, target: Tensor, pixel_weight: Tensor | None = None) -> Tensor:
        """The loss between logits ``[N, C, h, w]`` and labels ``[N, H, W]``."""
        return functional.upsample_cross_entropy(
            input, target, self.weight, self.ignore_index, self.reduction, self.label_smoothing,
            mode=self.mode, align_corners=self.align_corners, pixel_weight=pixel_weight,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """The grid, for ``repr(layer)``."""
        return _named(self, "mode", "align_corners")


class CrossEntropyDiceLoss(nn.Module):
    """The sum of cross-entropy and soft Dice loss; ``weight`` is a buffer, as in `torch.nn.CrossEntropyLoss`.

    See `fastseg.functional.cross_entropy_dice` for the formula, the shapes and the arguments.
    """

    weight: Tensor | None

    def __init__(
        self,
        weight: Tensor | None = None,
        *,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        ce_weight: float = 1.0,
        dice_weight: float = 1.0,
        smooth: float = 1e-5,
        batch_dice: bool = False,
        include_background: bool = True,
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.ce_weight = ce_weight
        self.dice_weight = dice_weight
        self.smooth = smooth
        self.batch_dice = batch_dice
        self.include_background = include_background

    @leaf_of_traces
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss between logits ``[N, C, d1, ...]`` and labels ``[N, d1, ...]``."""
        return functional.cross_entropy_dice(input, target, **self._options())

    def _options(self) -> dict[str, Any]:
        names = (
            "weight", "ignore_index", "label_smoothing", "ce_weight", "dice_weight", "smooth", "batch_dice",
            "include_background",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names}

    def extra_repr(self) -> str:
        """The combination, for ``repr(layer)``."""
        return _named(self, "ce_weight", "dice_weight", "smooth", "batch_dice", "include_background")


class UpsampleCrossEntropyDiceLoss(CrossEntropyDiceLoss):
    """`CrossEntropyDiceLoss` of logits upsampled to the labels' size.

    See `fastseg.functional.upsample_cross_entropy_dice` for the shapes and dtypes.

    Args:
        weight: ``[C]``, how much each class counts in the cross-entropy.
        mode: "bilinear", of volumes "trilinear", or "nearest".
        align_corners: As in `fastseg.functional.upsample_cross_entropy`.
        options: The other arguments of `CrossEntropyDiceLoss`.
    """

    def __init__(
        self, weight: Tensor | None = None, *, mode: str = "bilinear", align_corners: bool = False, **options: Any
    ) -> None:
        super().__init__(weight, **options)
        self.mode = mode
        self.align_corners = align_corners

    @leaf_of_traces
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss between logits ``[N, C, h, w]`` and labels ``[N, H, W]``, or those of volumes."""
        return functional.upsample_cross_entropy_dice(
            input, target, **self._options(), mode=self.mode, align_corners=self.align_corners
        )

    def extra_repr(self) -> str:
        """The grid and the combination, for ``repr(layer)``."""
        return f"{_named(self, 'mode', 'align_corners')}, {super().extra_repr()}"


class FocalLoss(nn.Module):
    """The focal loss of softmax probabilities; ``weight`` is a buffer, as in `torch.nn.CrossEntropyLoss`.

    See `fastseg.functional.focal_loss` for the formula, the shapes and the arguments.
    """

    weight: Tensor | None

    def __init__(
        self,
        weight: Tensor | None = None,
        *,
        ignore_index: int = -100,
        reduction: str = "mean",
        gamma: float = 2.0,
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.gamma = gamma

    @leaf_of_traces
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss between logits ``[N, C, d1, ...]`` and labels ``[N, d1, ...]``."""
        return functional.focal_loss(input, target, self.weight, self.ignore_index, self.reduction, gamma=self.gamma)

    def extra_repr(self) -> str:
        """The exponent, for ``repr(layer)``."""
        return _named(self, "gamma")


class UpsampleFocalLoss(FocalLoss):
    """`FocalLoss` of logits upsampled to the labels' size.

    See `fastseg.functional.upsample_focal_loss` for the shapes and dtypes.

    Args:
        weight: ``[C]``, the paper's alpha of each class.
        mode: "bilinear" or "nearest".
        align_corners: As in `fastseg.functional.upsample_cross_entropy`.
        options: The other arguments of `FocalLoss`.
    """

    def __init__(
        self, weight: Tensor | None = None, *, mode: str = "bilinear", align_corners: bool = False, **options: Any
    ) -> None:
        super().__init__(weight, **options)
        self.mode = mode
        self.align_corners = align_corners

    @leaf_of_traces
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss between logits ``[N, C, h, w]`` and labels ``[N, H, W]``."""
        return functional.upsample_focal_loss(
            input, target, self.weight, self.ignore_index, self.reduction,
            gamma=self.gamma, mode=self.mode, align_corners=self.align_corners,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """The grid and the exponent, for ``repr(layer)``."""
        return f"{_named(self, 'mode', 'align_corners')}, {super().extra_repr()}"
