"""fastseg: drop-in PyTorch layers for image segmentation on fused kernels."""

from fastseg import functional, models, reference
from fastseg._info import info
from fastseg._version import __version__
from fastseg.modules import ConvReLUPool2d, CrossEntropyLoss

__all__ = [
    "ConvReLUPool2d",
    "CrossEntropyLoss",
    "__version__",
    "functional",
    "info",
    "models",
    "reference",
]
