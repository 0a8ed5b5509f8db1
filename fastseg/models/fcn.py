"""FCN: a fully convolutional network of fused front-end stages."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from fastseg.models.base import PixelClassifier, SegmentationModel


class FCN(SegmentationModel):
    """A fully convolutional network (Long, Shelhamer and Darrell, 2015) in its smallest form.

    A stage of convolution, ReLU and 2x2 max pooling for each width, a 1x1 convolution as the classifier of each pooled
    pixel, and bilinear upsampling of its logits to the size of the input.

    Args:
        in_channels: Channels of the images.
        num_classes: Classes to tell apart.
        widths: Output channels of each stage; each stage halves the resolution.
        kernel_size: Side of the stages' square kernels, in pixels; the convolutions keep the size.

    Shape:
        Input ``[N, in_channels, H, W]`` with ``H`` and ``W`` at least ``2 ** len(widths)``; output
        ``[N, num_classes, H, W]``.
    """

    def __init__(
        self, in_channels: int = 3, *, num_classes: int, widths: Sequence[int] = (32, 64), kernel_size: int = 3
    ) -> None:
        super().__init__()
        if not widths:
            raise ValueError("widths: expected at least one stage, got none")
        self.num_classes = num_classes
        channels = (in_channels, *widths)
        self.stages = nn.ModuleList(
            self.front_end(before, after, kernel_size, padding="same") for before, after in pairwise(channels)
        )
        self.classifier = PixelClassifier(channels[-1], num_classes)

    def logits(self, input: Tensor) -> Tensor:
        """The classifier's logits of each pooled pixel, ``[N, num_classes, H >> stages, W >> stages]``."""
        features = input
        for stage in self.stages:
            features = stage(features)
        return self.classifier(features)
