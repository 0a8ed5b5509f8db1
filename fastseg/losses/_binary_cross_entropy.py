"""Binary cross-entropy as layers: torch.nn's constructor and state_dict, and a target value that doesn't count."""

from __future__ import annotations

from torch import Tensor, nn

from fastseg import functional
from fastseg.modules._leaves import leaf_of_traces


class BinaryCrossEntropyLoss(nn.Module):
    """Binary cross-entropy of logits; ``weight`` and ``pos_weight`` are buffers, as in `torch.nn.BCEWithLogitsLoss`.

    See `fastseg.functional.binary_cross_entropy` for the formula, the shapes and the arguments.
    """

    weight: Tensor | None
    pos_weight: Tensor | None

    def __init__(
        self,
        weight: Tensor | None = None,
        *,
        pos_weight: Tensor | None = None,
        ignore_index: int | None = None,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("pos_weight", pos_weight)
        self.ignore_index = ignore_index
        self.reduction = reduction

    @leaf_of_traces
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss between logits ``[N, C, d1, ...]`` and a target of their shape."""
        return functional.binary_cross_entropy(
            input, target, self.weight, self.pos_weight, self.ignore_index, self.reduction
        )

    def extra_repr(self) -> str:
        """What counts, and the reduction, for ``repr(layer)``."""
        return f"ignore_index={self.ignore_index}, reduction={self.reduction!r}"


class UpsampleBinaryCrossEntropyLoss(BinaryCrossEntropyLoss):
    """`BinaryCrossEntropyLoss` of logits upsampled to the target's size.

    See `fastseg.functional.upsample_binary_cross_entropy` for the shapes and dtypes.

    Args:
        weight: ``[C]``, how much each class counts.
        pos_weight: ``[C]``, how much a target of 1 counts.
        ignore_index: A target value that doesn't count; None for none.
        reduction: "none", "mean" or "sum".
        mode: "bilinear" or "nearest".
        align_corners: As in `fastseg.functional.upsample_cross_entropy`.
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        *,
        pos_weight: Tensor | None = None,
        ignore_index: int | None = None,
        reduction: str = "mean",
        mode: str = "bilinear",
        align_corners: bool = False,
    ) -> None:
        super().__init__(weight, pos_weight=pos_weight, ignore_index=ignore_index, reduction=reduction)
        self.mode = mode
        self.align_corners = align_corners

    @leaf_of_traces
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss between logits ``[N, C, h, w]`` and a target ``[N, C, H, W]``."""
        return functional.upsample_binary_cross_entropy(
            input, target, self.weight, self.pos_weight, self.ignore_index, self.reduction,
            mode=self.mode, align_corners=self.align_corners,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """The grid, and what `BinaryCrossEntropyLoss.extra_repr` says."""
        return f"mode={self.mode!r}, align_corners={self.align_corners}, {super().extra_repr()}"
