"""The patterns that the pass looks for, the more valuable before the less where they share an anchor."""

from fastseg.fusion.pattern import Pattern
from fastseg.fusion.patterns.conv_relu import CONV_RELU
from fastseg.fusion.patterns.conv_relu_pool2d import CONV_POOL_RELU, CONV_RELU_POOL
from fastseg.fusion.patterns.cross_entropy import CROSS_ENTROPY
from fastseg.fusion.patterns.relu_pool2d import POOL_RELU, RELU_POOL
from fastseg.fusion.patterns.upsample_argmax import UPSAMPLE_ARGMAX
from fastseg.fusion.patterns.upsample_cross_entropy import UPSAMPLE_CROSS_ENTROPY

PATTERNS: tuple[Pattern, ...] = (
    CONV_RELU_POOL,
    CONV_POOL_RELU,
    CONV_RELU,
    RELU_POOL,
    POOL_RELU,
    UPSAMPLE_CROSS_ENTROPY,
    UPSAMPLE_ARGMAX,
    CROSS_ENTROPY,
)

__all__ = ["PATTERNS"]
