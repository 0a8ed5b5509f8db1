"""The stateless operators: what they mean, what they accept, and the checks of their arguments."""

import torch.fx

from fastseg.functional._binary_cross_entropy import binary_cross_entropy, upsample_binary_cross_entropy
from fastseg.functional._class_sums import class_sums, upsample_class_sums
from fastseg.functional._conv2d import conv2d
from fastseg.functional._conv_relu_pool2d import conv_relu_pool2d
from fastseg.functional._cross_entropy import cross_entropy
from fastseg.functional._cross_entropy_dice import cross_entropy_dice, upsample_cross_entropy_dice
from fastseg.functional._focal_loss import focal_loss, upsample_focal_loss
from fastseg.functional._relu_pool2d import relu_pool2d
from fastseg.functional._upsample_argmax import upsample_argmax
from fastseg.functional._upsample_confusion_matrix import upsample_confusion_matrix
from fastseg.functional._upsample_cross_entropy import upsample_cross_entropy
from fastseg.functional._upsample_mask_argmax import upsample_mask_argmax
from fastseg.functional._upsample_threshold import upsample_threshold
from fastseg.ops import flops, registration
from fastseg.ops.on_import import on_import

__all__ = [
    "binary_cross_entropy",
    "class_sums",
    "conv2d",
    "conv_relu_pool2d",
    "cross_entropy",
    "cross_entropy_dice",
    "focal_loss",
    "relu_pool2d",
    "upsample_argmax",
    "upsample_binary_cross_entropy",
    "upsample_class_sums",
    "upsample_confusion_matrix",
    "upsample_cross_entropy",
    "upsample_cross_entropy_dice",
    "upsample_focal_loss",
    "upsample_mask_argmax",
    "upsample_threshold",
]

# torch.fx's symbolic trace keeps their calls whole, as it does those of torch's own functions.
for _name in __all__:
    torch.fx.wrap(_name)

on_import("torch.utils.flop_counter", flops.register)
on_import("torch._inductor.lowering", registration.register_fallbacks)
