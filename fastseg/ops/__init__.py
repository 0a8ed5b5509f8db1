"""The operators: schema, fake, implementations and gradient, one module each. Importing this registers them all."""

from fastseg.ops import (
    conv2d,
    conv2d_packed,
    conv_relu_pool2d,
    cross_entropy,
    instance_norm,
    relu_pool2d,
    upsample_argmax,
    upsample_confusion_matrix,
    upsample_cross_entropy,
    upsample_mask_argmax,
    upsample_sigmoid_sums,
    upsample_threshold,
)

__all__ = [
    "conv2d",
    "conv2d_packed",
    "conv_relu_pool2d",
    "cross_entropy",
    "instance_norm",
    "relu_pool2d",
    "upsample_argmax",
    "upsample_confusion_matrix",
    "upsample_cross_entropy",
    "upsample_mask_argmax",
    "upsample_sigmoid_sums",
    "upsample_threshold",
]
