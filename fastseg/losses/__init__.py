"""Region losses and binary cross-entropy; other libraries' losses: their constructors, values and gradients."""

from fastseg.losses import monai, smp
from fastseg.losses._binary_cross_entropy import BinaryCrossEntropyLoss, UpsampleBinaryCrossEntropyLoss
from fastseg.losses._region import (
    DiceLoss,
    GeneralizedDiceLoss,
    JaccardLoss,
    RegionLoss,
    TverskyLoss,
    UpsampleDiceLoss,
    UpsampleGeneralizedDiceLoss,
    UpsampleJaccardLoss,
    UpsampleTverskyLoss,
)

__all__ = [
    "BinaryCrossEntropyLoss",
    "DiceLoss",
    "GeneralizedDiceLoss",
    "JaccardLoss",
    "RegionLoss",
    "TverskyLoss",
    "UpsampleBinaryCrossEntropyLoss",
    "UpsampleDiceLoss",
    "UpsampleGeneralizedDiceLoss",
    "UpsampleJaccardLoss",
    "UpsampleTverskyLoss",
    "monai",
    "smp",
]
