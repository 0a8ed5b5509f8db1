"""Segmentation networks built from fastseg's layers; `fastseg.models.plain` holds their plain-PyTorch twins."""

from fastseg.models import plain
from fastseg.models.base import SegmentationModel
from fastseg.models.fcn import FCN
from fastseg.models.unet import UNet

__all__ = ["FCN", "SegmentationModel", "UNet", "plain"]
