"""The patterns that the pass looks for, the more valuable before the less where they share a call."""

from fastseg.fusion.pattern import Pattern
from fastseg.fusion.patterns.binary_cross_entropy import BINARY_CROSS_ENTROPY, UPSAMPLE_BINARY_CROSS_ENTROPY
from fastseg.fusion.patterns.conv2d import CONV, CONV_NORM
from fastseg.fusion.patterns.conv2d_before_upsampling import CONV_BEFORE_UPSAMPLING
from fastseg.fusion.patterns.conv2d_in_float32 import CONV_IN_FLOAT32, CONV_NORM_IN_FLOAT32
from fastseg.fusion.patterns.conv2d_packed import PACKED_CONV, PACKED_CONV_NORM
from fastseg.fusion.patterns.conv_relu import CONV_RELU
from fastseg.fusion.patterns.conv_relu_pool2d import CONV_POOL_RELU, CONV_RELU_POOL
from fastseg.fusion.patterns.cross_entropy import CROSS_ENTROPY, NLL_LOSS
from fastseg.fusion.patterns.idle_pad import IDLE_PAD
from fastseg.fusion.patterns.instance_norm import NORM, NORM_LEAKY_RELU, NORM_RELU
from fastseg.fusion.patterns.relu_pool2d import POOL_RELU, RELU_POOL
from fastseg.fusion.patterns.upsample_argmax import UPSAMPLE_ARGMAX, UPSAMPLE_MAX
from fastseg.fusion.patterns.upsample_cross_entropy import UPSAMPLE_CROSS_ENTROPY, UPSAMPLE_NLL_LOSS
from fastseg.fusion.patterns.upsample_mask_argmax import UPSAMPLE_MASK_ARGMAX
from fastseg.fusion.patterns.upsample_threshold import UPSAMPLE_THRESHOLD

PATTERNS: tuple[Pattern, ...] = (
    CONV_RELU_POOL,
    CONV_POOL_RELU,
    CONV_RELU,
    RELU_POOL,
    POOL_RELU,
    NORM_LEAKY_RELU,
    NORM_RELU,
    NORM,
    IDLE_PAD,
    UPSAMPLE_CROSS_ENTROPY,
    UPSAMPLE_NLL_LOSS,
    UPSAMPLE_BINARY_CROSS_ENTROPY,
    UPSAMPLE_ARGMAX,
    UPSAMPLE_MAX,
    UPSAMPLE_MASK_ARGMAX,
    UPSAMPLE_THRESHOLD,
    CROSS_ENTROPY,
    NLL_LOSS,
    BINARY_CROSS_ENTROPY,
    CONV_BEFORE_UPSAMPLING,
    PACKED_CONV_NORM,
    PACKED_CONV,
    CONV_NORM_IN_FLOAT32,
    CONV_IN_FLOAT32,
    CONV_NORM,
    CONV,
)

__all__ = ["PATTERNS"]
