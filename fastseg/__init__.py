"""fastseg: drop-in PyTorch layers for image segmentation on fused kernels."""

from fastseg import functional, losses, metrics, models, reference
from fastseg._info import info
from fastseg._version import __version__
from fastseg.fusion import recording, report
from fastseg.inference import sliding_window
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
    UpsampleMaskArgmax,
    UpsampleThreshold,
)
from fastseg.ops.registration import decompositions

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
    "UpsampleMaskArgmax",
    "UpsampleThreshold",
    "__version__",
    "decompositions",
    "functional",
    "info",
    "losses",
    "metrics",
    "models",
    "recording",
    "reference",
    "report",
    "sliding_window",
]
