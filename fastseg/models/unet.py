"""UNet: an encoder of fused front ends that keep their un-pooled output, and a decoder that takes it up again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastseg.models.base import PixelClassifier, SegmentationModel


class UNet(SegmentationModel):
    """A U-Net (Ronneberger, Fischer and Brox, 2015) with size-keeping convolutions.

    Each encoder level is two convolutions fused with their ReLU, the second with its 2x2 max pooling too, keeping the
    un-pooled value as the level's skip. Each decoder level reduces the channels (1x1), upsamples bilinearly to the
    skip's size, concatenates and convolves twice. Any input size will do.

    Args:
        in_channels: Channels of the images.
        num_classes: Classes to tell apart.
        widths: Channels of each level, from full resolution down; the last is the bottom, which is not pooled.
        kernel_size: Side of the square kernels, in pixels; the convolutions keep the size.

    Shape:
        Input ``[N, in_channels, H, W]`` with ``H`` and ``W`` at least ``2 ** (len(widths) - 1)``; output
        ``[N, num_classes, H, W]``.
    """

    def __init__(
        self, in_channels: int = 3, *, num_classes: int, widths: Sequence[int] = (32, 64, 128), kernel_size: int = 3
    ) -> None:
        super().__init__()
        if len(widths) < 2:
            raise ValueError(f"widths: expected at least two levels, got {tuple(widths)}")
        self.num_classes = num_classes
        self.expand = nn.ModuleList()
        self.pool = nn.ModuleList()
        channels = in_channels
        for width in widths[:-1]:
            self.expand.append(self._convolution(channels, width, kernel_size))
            self.pool.append(self.front_end(width, width, kernel_size, padding="same", return_skip=True))
            channels = width
        self.bottom = self._two_convolutions(channels, widths[-1], kernel_size)
        self.reduce = nn.ModuleList()
        self.merge = nn.ModuleList()
        for below, width in zip(reversed(widths[1:]), reversed(widths[:-1]), strict=True):
            self.reduce.append(nn.Conv2d(below, width, 1))
            self.merge.append(self._two_convolutions(2 * width, width, kernel_size))
        self.classifier = PixelClassifier(widths[0], num_classes)

    def _convolution(self, before: int, after: int, kernel_size: int) -> nn.Module:
        """A convolution and ReLU: nothing is pooled."""
        return self.front_end(before, after, kernel_size, padding="same", pool_size=1)

    def _two_convolutions(self, before: int, after: int, kernel_size: int) -> nn.Sequential:
        return nn.Sequential(
            self._convolution(before, after, kernel_size), self._convolution(after, after, kernel_size)
        )

    def logits(self, input: Tensor) -> Tensor:
        """Logits ``[N, num_classes, H, W]``: a U-Net works at full resolution."""
        features = input
        skips = []
        for expand, pool in zip(self.expand, self.pool, strict=True):
            features, skip = pool(expand(features))
            skips.append(skip)
        features = self.bottom(features)
        for reduce, merge in zip(self.reduce, self.merge, strict=True):
            first, second = merge.children()
            # Nothing holds a level's largest tensors for longer than a prediction needs them.
            features = first(_joined(skips.pop(), reduce(features)))
            features = second(features)
        return self.classifier(features)

    def forward(self, input: Tensor) -> Tensor:
        """Logits ``[N, num_classes, H, W]`` of images ``[N, in_channels, H, W]``; there is nothing to upsample."""
        return self.logits(input)


def _joined(skip: Tensor, features: Tensor) -> Tensor:
    """A skip and, upsampled to its size, the features from below."""
    raised = F.interpolate(features, size=skip.shape[-2:], mode="bilinear", align_corners=False)
    return torch.cat((skip, raised), dim=1)
