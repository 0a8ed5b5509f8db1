"""nnU-Net's plain U-Net in two dimensions, written from its description (Isensee et al., Nature Methods 18, 2021)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

SLOPE = 0.01  # of the leaky ReLUs


class PlainConvUNet(nn.Module):
    """Stages of two 3x3 convolutions, each followed by instance normalisation and a leaky ReLU.

    The first convolution of each stage but the first halves the size. On the way up, a transposed convolution of 2x2
    doubles it again, and the stage's convolutions see that beside what the way down had at this size.

    Args:
        in_channels: Channels of the images.
        classes: Number of classes.
        features: Channels of the stages, from the images' size down.
    """

    def __init__(self, in_channels: int, classes: int, features: tuple[int, ...]) -> None:
        super().__init__()
        inputs = (in_channels, *features[:-1])
        self.down = nn.ModuleList(
            nn.Sequential(*_convolution(before, after, 2 if stage else 1), *_convolution(after, after))
            for stage, (before, after) in enumerate(zip(inputs, features, strict=True))
        )
        steps = list(zip(features[:0:-1], features[-2::-1], strict=True))
        self.doubling = nn.ModuleList(nn.ConvTranspose2d(below, here, 2, 2) for below, here in steps)
        self.up = nn.ModuleList(
            nn.Sequential(*_convolution(2 * here, here), *_convolution(here, here)) for _, here in steps
        )
        self.classifier = nn.Conv2d(features[0], classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        """The logits, ``[N, classes, H, W]``, of images whose sides are multiples of 2^(stages - 1)."""
        maps = [images]
        for stage in self.down:
            maps.append(stage(maps[-1]))
        map = maps.pop()
        for doubling, stage in zip(self.doubling, self.up, strict=True):
            map = stage(torch.cat([doubling(map), maps.pop()], 1))
        return self.classifier(map)


def _convolution(before: int, after: int, stride: int = 1) -> list[nn.Module]:
    normalisation = nn.InstanceNorm2d(after, affine=True)
    return [nn.Conv2d(before, after, 3, stride, 1), normalisation, nn.LeakyReLU(SLOPE, inplace=True)]
