"""The options of the pixel losses, and the dtype of their arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastseg._native import _C

REDUCTIONS = ("none", "mean", "sum")
# The ignore_index where no label is to be ignored. The C++ kernels then leave it out of their error message.
IGNORE_NONE: int = getattr(_C, "IGNORE_NONE", torch.iinfo(torch.int64).min)

# What an operator takes of `LossOptions`, in its order: all of it, or what needs no upsampling.
SCHEMA = "SymInt ignore_index, str reduction, float label_smoothing"
UPSAMPLE_SCHEMA = f"{SCHEMA}, str mode, bool align_corners"


class LossOptions(NamedTuple):
    """How a pixel loss is computed and reduced; `fastseg.functional` makes and checks it.

    The operators' schemas take its fields, since exported programs hold plain numbers and strings. The implementations
    make the object of them again, and pass it to the C++ bindings and the Triton launchers, which read it by name.

    Attributes:
        ignore_index: The label that doesn't count.
        reduction: "none", "mean" or "sum".
        label_smoothing: Share of the target that is spread evenly over all classes.
        mode: How logits are upsampled to the labels' size: "nearest", which copies where the sizes are equal,
            "bilinear" or of volumes "trilinear".
        align_corners: As in `torch.nn.functional.interpolate`.
    """

    ignore_index: int
    reduction: str
    label_smoothing: float = 0.0
    mode: str = "nearest"
    align_corners: bool = False


def accumulation_dtype(input: Tensor) -> torch.dtype:
    """The dtype of the arithmetic."""
    return torch.float64 if input.dtype == torch.float64 else torch.float32


def no_statistics(loss: Tensor, pixels: Sequence[int]) -> Tensor:
    """An operator's statistics where they weren't asked for: those of no image."""
    return loss.new_empty((2, 0, *pixels))
