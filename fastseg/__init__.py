"""fastseg: drop-in PyTorch layers for image segmentation on fused kernels."""

from fastseg import functional, losses, metrics, models, reference
from fastseg._info import info
from fastseg._version import __version__
from fastseg.fusion import fuse, report, unfuse
from fastseg.modules import (
    Conv2d,
    ConvReLUPool2d,
    CrossEntropyDiceLoss,
    CrossEntropyLoss,
    FocalLoss,
    ReLUPool2d,
    UpsampleArgmax,
    UpsampleCrossEntropyDiceLoss,
    UpsampleCrossEntropyLoss,
    UpsampleFocalLoss,
)

__all__ = [
    "Conv2d",
    "ConvReLUPool2d",
    "CrossEntropyDiceLoss",
    "CrossEntropyLoss",
    "FocalLoss",
    "ReLUPool2d",
    "UpsampleArgmax",
    "UpsampleCrossEntropyDiceLoss",
    "UpsampleCrossEntropyLoss",
    "UpsampleFocalLoss",
    "__version__",
    "functional",
    "fuse",
    "info",
    "losses",
    "metrics",
    "models",
    "reference",
    "report",
    "unfuse",
]
