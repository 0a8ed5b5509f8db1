"""What the cases of the upsampling operators share: sizes, inputs, roundings, and the points of their sweeps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.harness.devices import Device
from benchmarks.harness.suite import EAGER, FASTSEG, Case, Contestant, Swept
from fastseg import reference

# A sweep's cases are of one image, upsampled fourfold: one of them grows, the other stays.
SWEPT_CLASSES = (2, 5, 10, 21, 50, 150, 300, 1000)
SWEPT_SIDES = (128, 256, 512, 1024, 2048)
CLASSES, SIDE, RATIO = 19, 256, 4


@dataclass(frozen=True)
class UpsamplingCase(Case):
    """Logits of a shape (N, C, h, w) or (N, C, d, h, w) that an operator upsamples to a size (H, W) or (D, H, W)."""

    shape: tuple[int, ...]
    size: tuple[int, ...]
    mode: str = "bilinear"

    @property
    def name(self) -> str:
        """The logits' sizes and the output's, and the mode where it isn't bilinear."""
        mode = "" if self.mode == "bilinear" else f",{self.mode}"
        return f"{'x'.join(map(str, self.shape))}->{'x'.join(map(str, self.size))}{mode}"

    @property
    def labels(self) -> tuple[int, ...]:
        """The labels' sizes."""
        return (self.shape[0], *self.size)

    def contestants(self, training: bool) -> list[Contestant]:
        """Of a sweep fastseg and eager, as its whole would take the others too long to compile."""
        if self.swept is None:
            return super().contestants(training)
        return [Contestant(kind, "nchw") for kind in (FASTSEG, EAGER)]

    @property
    def roundings(self) -> int:
        """How far a float32 upsampled logit may be from the true one, in epsilons of the largest logit.

        Each rounding is half an epsilon. Along an axis of n pixels, the position (at most n) comes of three: the step,
        its product, and the difference of one half; an error of the position counts twice the largest logit, the most
        that neighbours can differ by. Weights, products and sums of two neighbours are four more.
        """
        return 0 if self.mode == "nearest" else sum(3 * before + 2 for before in self.shape[2:])

    def make_logits(
        self, dtype: torch.dtype | None = None, layout: str = "nchw", requires_grad: bool = False
    ) -> Tensor:
        """The logits, of one of these dtypes and layouts."""
        return self.device.make(self.shape, dtype, layout=layout, requires_grad=requires_grad)

    def map_upsampled(self, function: Callable[[Tensor, int], Tensor]) -> Tensor:
        """``function`` of each image's true upsampled logits, [C, H, W] or [C, D, H, W], and its number, stacked."""
        logits = self.make_logits(torch.float64)
        return torch.stack([
            function(reference.upsample(image.unsqueeze(0), self.size, None, self.mode, False)[0], number)
            for number, image in enumerate(logits)
        ])  # fmt: skip


def sweep(make: Callable[..., Case], device: Device) -> list[Case]:
    """The cases of both sweeps of an operator, made by ``make(shape, size, ...)``; the first of each is a quick one."""
    return [
        make(
            (1, classes, side // RATIO, side // RATIO), (side, side), device=device, quick=value == values[0],
            swept=Swept(along, value, classes * math.prod((side, side))),
        )
        for along, values in (("classes", SWEPT_CLASSES), ("output side", SWEPT_SIDES))
        for value in values
        for classes, side in [(value, SIDE) if along == "classes" else (CLASSES, value)]
    ]  # fmt: skip
