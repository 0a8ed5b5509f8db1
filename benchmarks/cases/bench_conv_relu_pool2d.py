"""conv_relu_pool2d: first layers on images (no gradient of the input), deep layers, the ResNet stem, a small one."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness.devices import CUDA
from benchmarks.harness.roofline import Work
from benchmarks.harness.suite import BACKWARD, FORWARD, OPENVINO, Case, Job
from fastseg import functional, reference
from fastseg.testing import MEMORY_FORMATS

# Plain PyTorch rounds the convolution to the map's dtype, then the sum with the bias, then takes the maximum; fastseg
# rounds the maximum. Two values that are compared differ by up to 2 x 2 half epsilons from what they are; twice that
# leaves room for a library that rounds once more.
EPSILONS = 4


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
    def weight_shape(self) -> tuple[int, int, int, int]:
        """The weight's sizes."""
        return (self.channels, self.input[1], self.kernel, self.kernel)

    @property
    def terms(self) -> int:
        """A weight's gradient runs over the convolution's pixels, the others over the kernel's taps."""
        size = (self.input[0], *(side // self.stride for side in self.input[2:]))
        return max(torch.Size(size).numel(), max(self.input[1], self.channels) * self.kernel**2)

    @property
    def deployments(self) -> tuple[str, ...]:
        """The layers as one stage of a network."""
        return (OPENVINO,)

    def job(self, fused: bool, layout: str, training: bool, dtype: torch.dtype | None = None) -> Job:
        """One call of the operator."""
        make = functools.partial(self.device.make, dtype=dtype)
        tensors = (
            make(self.input, layout=layout, requires_grad=training and self.input_gradient),
            make(
                self.weight_shape,
                seed=1,
                layout=layout,
                scale=math.prod(self.weight_shape[1:]) ** -0.5,
                requires_grad=training,
            ),
            make((self.channels,), seed=2, scale=0.1, requires_grad=training),
        )
        size, stride, padding = self.pool
        function: Callable[..., Tensor] = functools.partial(
            (functional if fused else reference).conv_relu_pool2d,
            stride=self.stride, padding=self.padding, pool_size=size, pool_stride=stride, pool_padding=padding,
        )  # fmt: skip
        if not training:
            return Job(function, tensors)
        incoming = self.incoming.to(tensors[0].dtype).contiguous(memory_format=MEMORY_FORMATS[layout])
        return Job(function, tensors, tuple(t for t in tensors if t.requires_grad), incoming)

    @functools.cached_property
    def incoming(self) -> Tensor:
        """The gradient of the output: random, and zero for the few windows whose winner rounding decides.

        There, two values differ by less than their rounding errors, or the greatest is nearly zero: which of them takes
        the gradient is left to chance, in plain PyTorch too, so that it can't be verified. In float32 the convolution's
        long sum is what makes the errors; half dtypes are summed in float32 as well, and then rounded.
        """
        images, weight, bias = (t.detach() for t in self.job(False, "nchw", False, torch.float64).arguments)
        convolved = F.conv2d(images, weight, bias, self.stride, self.padding)
        summing = torch.finfo(torch.float32).eps * weight[0].numel() * convolved.abs().max()
        size, stride, padding = self.pool
        padded = F.pad(convolved, [padding] * 4, value=-torch.inf)
        windows = padded.unfold(2, size, stride).unfold(3, size, stride)
        first = windows.amax((-2, -1))
        rounding = EPSILONS * torch.finfo(self.device.dtype).eps * (first.abs() + bias.abs().max())
        margin = summing + rounding
        alone = (windows >= (first - margin)[..., None, None]).sum((-2, -1)) == 1
        return self.device.make(first.shape, seed=3) * ((first < -margin) | ((first > margin) & alone))

    def work(self, timing: str) -> tuple[Work, ...]:
        """Forward: input, weight, bias and pooled output, and in training each window's position in a byte.

        Backward: the pooled gradient, the positions, the input (for the weight's gradient) and the weight (for the
        input's), and the gradients. Each gradient of the convolution takes as many operations as the convolution.
        """
        images, weight = torch.empty(self.input, device="meta"), torch.empty(self.weight_shape, device="meta")
        convolved = F.conv2d(images, weight, None, self.stride, self.padding)
        pooled = F.max_pool2d(convolved, *self.pool).numel()
        operations = 2 * convolved.numel() * weight[0].numel()
        itemsize = self.device.dtype.itemsize
        parameters = itemsize * (weight.numel() + self.channels)
        read = itemsize * images.numel() + parameters
        if timing == FORWARD:
            return (Work(read + itemsize * pooled, operations),)
        position = torch.uint8.itemsize
        forward = Work(read + (itemsize + position) * pooled, operations)
        written = parameters + (itemsize * images.numel() if self.input_gradient else 0)
        needed = itemsize * images.numel() + (itemsize * weight.numel() if self.input_gradient else 0)
        backward = Work((itemsize + position) * pooled + needed + written, operations * (1 + self.input_gradient))
        return (backward,) if timing == BACKWARD else (forward, backward)


CASES = [
    ConvReLUPool2dCase((4, 3, 224, 224), 32),
    ConvReLUPool2dCase((4, 32, 112, 112), 64, input_gradient=True),
    ConvReLUPool2dCase((4, 64, 112, 112), 64, input_gradient=True),
    ConvReLUPool2dCase((4, 128, 56, 56), 128, input_gradient=True),
    ConvReLUPool2dCase((4, 3, 224, 224), 64, kernel=7, stride=2, padding=3, pool=(3, 2, 1)),  # the ResNet stem
    ConvReLUPool2dCase((1, 3, 32, 32), 32, quick=True),
    ConvReLUPool2dCase((32, 3, 512, 512), 64, device=CUDA, max_autotune=("channels_last",)),
    ConvReLUPool2dCase((32, 64, 256, 256), 64, input_gradient=True, device=CUDA, max_autotune=("channels_last",)),
    ConvReLUPool2dCase((16, 128, 128, 128), 128, input_gradient=True, device=CUDA),
    ConvReLUPool2dCase((32, 3, 512, 512), 64, kernel=7, stride=2, padding=3, pool=(3, 2, 1), device=CUDA),
    ConvReLUPool2dCase((1, 3, 32, 32), 32, device=CUDA, quick=True, launch_bound=True),
]


def test_conv_relu_pool2d(record: Callable[[], None]) -> None:
    record()
