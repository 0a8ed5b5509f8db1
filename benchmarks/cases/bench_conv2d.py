"""conv2d: 3x3 convolutions before batch normalisation, of a ResNet's stages and of a decoder."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.harness.devices import CUDA
from benchmarks.harness.roofline import Work
from benchmarks.harness.suite import BACKWARD, FORWARD, OPENVINO, Case, Job
from fastseg import functional, reference


@dataclass(frozen=True)
class Conv2dCase(Case):
    """A 3x3 convolution from ``input`` to ``channels`` that keeps the size, without a bias."""

    input: tuple[int, int, int, int]
    channels: int

    @property
    def name(self) -> str:
        """The input's sizes and the output's channels."""
        return f"{'x'.join(map(str, self.input))}->{self.channels}"

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        """The weight's sizes."""
        return (self.channels, self.input[1], 3, 3)

    @property
    def terms(self) -> int:
        """A weight's gradient runs over the pixels, the others over the kernel's taps."""
        return max(self.input[0] * math.prod(self.input[2:]), 9 * max(self.weight_shape[:2]))

    @property
    def deployments(self) -> tuple[str, ...]:
        """A layer of a network."""
        return (OPENVINO,)

    def job(self, fused: bool, layout: str, training: bool, dtype: torch.dtype | None = None) -> Job:
        """One call of the operator."""
        make = functools.partial(self.device.make, dtype=dtype, layout=layout)
        tensors = (
            make(self.input, requires_grad=training),
            make(self.weight_shape, seed=1, scale=math.prod(self.weight_shape[1:]) ** -0.5, requires_grad=training),
        )
        function: Callable[..., Tensor] = functools.partial((functional if fused else reference).conv2d, padding=1)
        if not training:
            return Job(function, tensors)
        return Job(function, tensors, tensors, make((self.input[0], self.channels, *self.input[2:]), seed=3))

    def work(self, timing: str) -> tuple[Work, ...]:
        """Input, weight and output; backward the output's gradient, input and weight, and their gradients."""
        pixels = self.input[0] * math.prod(self.input[2:])
        input, weight, output = math.prod(self.input), math.prod(self.weight_shape), pixels * self.channels
        operations, itemsize = 2 * pixels * weight, self.device.dtype.itemsize
        forward = Work(itemsize * (input + weight + output), operations)
        if timing == FORWARD:
            return (forward,)
        backward = Work(itemsize * (output + 2 * (input + weight)), 2 * operations)
        return (backward,) if timing == BACKWARD else (forward, backward)


CASES = [
    Conv2dCase((2, 64, 64, 64), 64),
    Conv2dCase((2, 256, 16, 16), 256),
    Conv2dCase((4, 512, 12, 12), 512),  # a deep layer of a ResNet whose strides are dilations
    Conv2dCase((2, 128, 128, 128), 32),  # decoders
    Conv2dCase((2, 16, 256, 256), 16),
    Conv2dCase((1, 16, 32, 32), 16, quick=True),
    Conv2dCase((32, 64, 128, 128), 64, device=CUDA),  # PyTorch's own there: what the layer costs
    Conv2dCase((1, 16, 32, 32), 16, device=CUDA, quick=True, launch_bound=True),
]


def test_conv2d(record: Callable[[], None]) -> None:
    record()
