"""Predictions as layers: `torch.nn.Upsample`'s arguments, fastseg's operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastseg import functional
from fastseg.modules._leaves import leaf_of_traces
from fastseg.modules._pooling import IntOrPair


class _UpsamplePrediction(nn.Module):
    """What the layers share: the output's size, and the grid.

    Args:
        size: The output's (height, width), or (depth, height, width), or one number for all.
        scale_factor: The output's size in input's, instead of ``size``. Without either, each call says its size.
        mode: "bilinear", of volumes "trilinear", or "nearest".
        align_corners: As in `fastseg.functional.upsample_cross_entropy`.

    Raises:
        ValueError: Both ``size`` and ``scale_factor`` are given.
    """

    def __init__(
        self,
        size: IntOrPair | None = None,
        scale_factor: float | tuple[float, ...] | None = None,
        mode: str = "bilinear",
        align_corners: bool = False,
    ) -> None:
        super().__init__()
        if size is not None and scale_factor is not None:
            raise ValueError(f"size: expected either it or scale_factor, got {size} and {scale_factor}")
        self.size = size
        self.scale_factor = scale_factor
        self.mode = mode
        self.align_corners = align_corners

    def _grid(self, size: IntOrPair | None) -> dict[str, Any]:
        """The operators' arguments; ``size`` overrides the constructor's."""
        extent = {"size": self.size, "scale_factor": self.scale_factor} if size is None else {"size": size}
        return {**extent, "mode": self.mode, "align_corners": self.align_corners}

    def extra_repr(self) -> str:
        """The size and the grid, for ``repr(layer)``."""
        extent = f"size={self.size!r}" if self.scale_factor is None else f"scale_factor={self.scale_factor!r}"
        return f"{extent}, mode={self.mode!r}, align_corners={self.align_corners!r}"


class UpsampleArgmax(_UpsamplePrediction):
    """The class of the largest upsampled logit of each pixel: `torch.nn.Upsample` and ``argmax(1)`` in one layer.

    See `fastseg.functional.upsample_argmax` for the shapes and dtypes.

    Args:
        size: The output's (height, width), or (depth, height, width), or one number for all.
        scale_factor: The output's size in input's, instead of ``size``. Without either, each call says its size.
        mode: "bilinear", of volumes "trilinear", or "nearest".
        align_corners: As in `fastseg.functional.upsample_cross_entropy`.
        dtype: The labels' dtype; None for uint8 for up to 256 classes, else int64.
        return_confidence: Also return the largest class's softmax value.

    Raises:
        ValueError: Both ``size`` and ``scale_factor`` are given.
    """

    def __init__(
        self,
        size: IntOrPair | None = None,
        scale_factor: float | tuple[float, ...] | None = None,
        mode: str = "bilinear",
        align_corners: bool = False,
        *,
        dtype: torch.dtype | None = None,
        return_confidence: bool = False,
    ) -> None:
        super().__init__(size, scale_factor, mode, align_corners)
        self.dtype = dtype
        self.return_confidence = return_confidence

    @leaf_of_traces
    def forward(self, input: Tensor, size: IntOrPair | None = None) -> Any:
        """Labels of logits ``[N, C, h, w]``, and the confidence where asked; ``size`` overrides the constructor's."""
        return functional.upsample_argmax(
            input, **self._grid(size), dtype=self.dtype, return_confidence=self.return_confidence
        )


class UpsampleThreshold(_UpsamplePrediction):
    """Binary and multilabel masks: `torch.nn.Upsample`, ``sigmoid`` and a threshold in one layer.

    See `fastseg.functional.upsample_threshold` for the shapes and dtypes.

    Args:
        size: The output's (height, width), or one number for both.
        threshold: A probability, above which a pixel is inside.
        return_scores: Also return each mask's mean probability and box.
        grid: ``scale_factor``, ``mode`` and ``align_corners``, as `UpsampleArgmax` has them.

    Raises:
        ValueError: Both ``size`` and ``scale_factor`` are given.
    """

    def __init__(
        self, size: IntOrPair | None = None, threshold: float = 0.5, *, return_scores: bool = False, **grid: Any
    ) -> None:
        super().__init__(size, **grid)
        self.threshold = threshold
        self.return_scores = return_scores

    @leaf_of_traces
    def forward(self, input: Tensor, size: IntOrPair | None = None) -> Any:
        """Masks of logits ``[N, C, h, w]``, and where asked scores and boxes; ``size`` overrides the constructor's."""
        return functional.upsample_threshold(
            input, **self._grid(size), threshold=self.threshold, return_scores=self.return_scores
        )

    def extra_repr(self) -> str:
        """The threshold, the size and the grid, for ``repr(layer)``."""
        return f"threshold={self.threshold!r}, {super().extra_repr()}"


class UpsampleMaskArgmax(_UpsamplePrediction):
    """The semantic inference of networks that classify masks, such as MaskFormer and Mask2Former, in one layer.

    See `fastseg.functional.upsample_mask_argmax` for the shapes and dtypes.

    Args:
        size: The output's (height, width), or one number for both.
        dtype: The labels' dtype; None for uint8 for up to 256 classes, else int64.
        grid: ``scale_factor``, ``mode`` and ``align_corners``, as `UpsampleArgmax` has them.

    Raises:
        ValueError: Both ``size`` and ``scale_factor`` are given.
    """

    def __init__(self, size: IntOrPair | None = None, *, dtype: torch.dtype | None = None, **grid: Any) -> None:
        super().__init__(size, **grid)
        self.dtype = dtype

    @leaf_of_traces
    def forward(self, input: Tensor, class_probabilities: Tensor, size: IntOrPair | None = None) -> Tensor:
        """Labels of masks' logits ``[N, Q, h, w]`` and classes ``[N, Q, C]``; ``size`` overrides the constructor's."""
        return functional.upsample_mask_argmax(input, class_probabilities, **self._grid(size), dtype=self.dtype)
