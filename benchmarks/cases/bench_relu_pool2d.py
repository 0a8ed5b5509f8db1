"""relu_pool2d: the pool of a ResNet's stem in training, of a VGG's or U-Net's level, and a small one."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.harness.devices import CUDA
from benchmarks.harness.roofline import Work
from benchmarks.harness.suite import BACKWARD, FORWARD, Case, Job
from fastseg import functional, reference


@dataclass(frozen=True)
class ReLUPool2dCase(Case):
    """ReLU of a map, and a pool of (size, stride, padding)."""

    shape: tuple[int, int, int, int]
    pool: tuple[int, int, int] = (2, 2, 0)

    @property
    def name(self) -> str:
        """The map's sizes, and the pool where it isn't 2x2."""
        size, stride, _ = self.pool
        return "x".join(map(str, self.shape)) + ("" if self.pool == (2, 2, 0) else f",{size}x{size}/{stride}")

    @property
    def terms(self) -> int:
        """A gradient's windows."""
        size, stride, _ = self.pool
        return math.ceil(size / stride) ** 2

    def job(self, fused: bool, layout: str, training: bool, dtype: torch.dtype | None = None) -> Job:
        """One call of the operator."""
        make = functools.partial(self.device.make, dtype=dtype, layout=layout)
        map = make(self.shape, requires_grad=training)
        size, stride, padding = self.pool
        function: Callable[..., Tensor] = functools.partial(
            (functional if fused else reference).relu_pool2d, pool_size=size, pool_stride=stride, pool_padding=padding
        )
        return Job(function, (map,), (map,), make(self.pooled, seed=3)) if training else Job(function, (map,))

    @property
    def pooled(self) -> torch.Size:
        """The output's shape."""
        return torch.nn.functional.max_pool2d(torch.empty(self.shape, device="meta"), *self.pool).shape

    def work(self, timing: str) -> tuple[Work, ...]:
        """The map, the pooled values, and in training each window's position in a byte; backward their gradients."""
        itemsize, pooled = self.device.dtype.itemsize, self.pooled.numel()
        map = itemsize * math.prod(self.shape)
        if timing == FORWARD:
            return (Work(map + itemsize * pooled),)
        with_positions = Work(map + (itemsize + torch.uint8.itemsize) * pooled)
        return (with_positions,) if timing == BACKWARD else (with_positions, with_positions)


CASES = [
    ReLUPool2dCase((2, 64, 128, 128), (3, 2, 1)),  # a ResNet's stem
    ReLUPool2dCase((2, 64, 128, 128)),
    ReLUPool2dCase((1, 16, 32, 32), quick=True),
    ReLUPool2dCase((32, 64, 256, 256), (3, 2, 1), device=CUDA),
    ReLUPool2dCase((32, 64, 256, 256), device=CUDA),
    ReLUPool2dCase((1, 16, 32, 32), device=CUDA, quick=True, launch_bound=True),
]


def test_relu_pool2d(record: Callable[[], None]) -> None:
    record()
