"""Drop-in layers: torch.nn's constructors and state_dict, fastseg's operators."""

from fastseg.modules._losses import (
    CrossEntropyDiceLoss,
    CrossEntropyLoss,
    FocalLoss,
    UpsampleCrossEntropyDiceLoss,
    UpsampleCrossEntropyLoss,
    UpsampleFocalLoss,
)
from fastseg.modules._pooling import Conv2d, ConvReLUPool2d, ReLUPool2d
from fastseg.modules._predictions import UpsampleArgmax, UpsampleMaskArgmax, UpsampleThreshold

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
]
