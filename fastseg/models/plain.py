"""The networks of `fastseg.models` in plain PyTorch: same constructors, same state_dict, no fastseg operator.

They are the baseline in the benchmarks, the oracle in the tests, and the way back for a trained model.
"""

from __future__ import annotations

from fastseg import reference
from fastseg.models import fcn, unet
from fastseg.modules import ConvReLUPool2d


class PlainConvReLUPool2d(ConvReLUPool2d):
    """`fastseg.ConvReLUPool2d` computed by conv2d, ReLU and max_pool2d, one after the other."""

    operator = staticmethod(reference.conv_relu_pool2d)


class FCN(fcn.FCN):
    """`fastseg.models.FCN` in plain PyTorch."""

    front_end = PlainConvReLUPool2d
    upsample_cross_entropy = staticmethod(reference.upsample_cross_entropy)
    upsample_argmax = staticmethod(reference.upsample_argmax)
    upsample_confusion_matrix = staticmethod(reference.upsample_confusion_matrix)


class UNet(unet.UNet):
    """`fastseg.models.UNet` in plain PyTorch."""

    front_end = PlainConvReLUPool2d
    upsample_cross_entropy = staticmethod(reference.upsample_cross_entropy)
    upsample_argmax = staticmethod(reference.upsample_argmax)
    upsample_confusion_matrix = staticmethod(reference.upsample_confusion_matrix)
