"""conv_relu_pool2d: first layers on images (no gradient of the input), deep layers, the ResNet stem, a small one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.suite import Case, Job
from fastseg import functional, reference
from fastseg.testing import MEMORY_FORMATS, make


@dataclass(frozen=True)
class ConvReLUPool2dCase(Case):
    """A convolution from ``input`` to ``channels``, ReLU, and a pool of (size, stride, padding)."""

    input: tuple[int, int, int, int]
    channels: int
    kernel: int = 3
    stride: int = 1
    padding: int = 1
    pool: tuple[int, int, int] = (2, 2, 0)
    input_gradient: bool = False

    @property
    def name(self) -> str:
        """The input's sizes and the output's channels, and the kernel where it isn't 3x3."""
        kernel = "" if self.kernel == 3 else f",{self.kernel}x{self.kernel}/{self.stride}"
        return f"{'x'.join(map(str, self.input))}->{self.channels}{kernel}"

    @property
    def terms(self) -> int:
        """A weight's gradient runs over the convolution's pixels, the others over the kernel's taps."""
        size = (self.input[0], *(side // self.stride for side in self.input[2:]))
        return max(torch.Size(size).numel(), max(self.input[1], self.channels) * self.kernel**2)

    def job(self, fused: bool, layout: str, training: bool, dtype: torch.dtype = torch.float32) -> Job:
        """One call of the operator."""
        taps = self.input[1] * self.kernel**2
        shape = (self.channels, self.input[1], self.kernel, self.kernel)
        tensors = (
            make(self.input, dtype, layout=layout, requires_grad=training and self.input_gradient),
            make(shape, dtype, seed=1, layout=layout, scale=taps**-0.5, requires_grad=training),
            make((self.channels,), dtype, seed=2, scale=0.1, requires_grad=training),
        )
        size, stride, padding = self.pool
        function: Callable[..., Tensor] = functools.partial(
            (functional if fused else reference).conv_relu_pool2d,
            stride=self.stride, padding=self.padding, pool_size=size, pool_stride=stride, pool_padding=padding,
        )  # fmt: skip
        if not training:
            return Job(function, tensors)
        incoming = self.incoming.to(dtype).contiguous(memory_format=MEMORY_FORMATS[layout])
        return Job(function, tensors, tuple(t for t in tensors if t.requires_grad), incoming)

    @functools.cached_property
    def incoming(self) -> Tensor:
        """The gradient of the output: random, and zero for the few windows whose winner float32 can't tell.

        There, two values differ by less than rounding, or the greatest is nearly zero: which of them takes the gradient
        is left to chance, in plain PyTorch too, so that it can't be verified.
        """
        images, weight, bias = (t.detach() for t in self.job(False, "nchw", False, torch.float64).arguments)
        convolved = F.conv2d(images, weight, bias, self.stride, self.padding)
        margin = torch.finfo(torch.float32).eps * weight[0].numel() * convolved.abs().max()
        size, stride, padding = self.pool
        padded = F.pad(convolved, [padding] * 4, value=-torch.inf)
        first, second = padded.unfold(2, size, stride).unfold(3, size, stride).flatten(-2).topk(2).values.unbind(-1)
        decided = (first < -margin) | ((first > margin) & (first - second > margin))
        return make(first.shape, torch.float32, seed=3) * decided


CASES = [
    ConvReLUPool2dCase((4, 3, 224, 224), 32),
    ConvReLUPool2dCase((4, 32, 112, 112), 64, input_gradient=True),
    ConvReLUPool2dCase((4, 64, 112, 112), 64, input_gradient=True),
    ConvReLUPool2dCase((4, 128, 56, 56), 128, input_gradient=True),
    ConvReLUPool2dCase((4, 3, 224, 224), 64, kernel=7, stride=2, padding=3, pool=(3, 2, 1)),  # the ResNet stem
    ConvReLUPool2dCase((1, 3, 32, 32), 32, quick=True),
]


def test_conv_relu_pool2d(record: Callable[[], None]) -> None:
    record()
