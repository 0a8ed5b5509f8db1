"""instance_norm: with a leaky ReLU, after the convolutions of nnU-Net's and MONAI's networks; on a CPU alone."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.harness.roofline import Work
from benchmarks.harness.suite import BACKWARD, FORWARD, OPENVINO, Case, Job
from fastseg import reference
from fastseg.fusion.patterns.instance_norm import norm_and_activation


@dataclass(frozen=True)
class InstanceNormCase(Case):
    """A map of a shape, and nnU-Net's slope."""

    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        """The map's sizes."""
        return "x".join(map(str, self.shape))

    @property
    def terms(self) -> int:
        """A channel's gradients run over all images."""
        return math.prod(self.shape) // self.shape[1]

    @property
    def deployments(self) -> tuple[str, ...]:
        """A layer of a network."""
        return (OPENVINO,)

    def job(self, fused: bool, layout: str, training: bool, dtype: torch.dtype | None = None) -> Job:
        """One call of the operator."""
        make = functools.partial(self.device.make, dtype=dtype)
        map = make(self.shape, layout=layout, requires_grad=training)
        affine = [make(self.shape[1:2], seed=seed, requires_grad=training) for seed in (1, 2)]
        function: Callable[..., Tensor] = functools.partial(
            norm_and_activation if fused else reference.instance_norm, eps=1e-5, negative_slope=0.01
        )
        tensors = (map, *affine)
        return Job(function, tensors, tensors, make(self.shape, seed=3)) if training else Job(function, tensors)

    def work(self, timing: str) -> tuple[Work, ...]:
        """The map and the result; backward the map, its gradient and the result's."""
        map = self.device.dtype.itemsize * math.prod(self.shape)
        if timing == FORWARD:
            return (Work(2 * map),)
        return (Work(3 * map),) if timing == BACKWARD else (Work(2 * map), Work(3 * map))


CASES = [
    InstanceNormCase((2, 32, 192, 192)),
    InstanceNormCase((2, 128, 48, 48)),
    InstanceNormCase((2, 256, 12, 12), quick=True),
]


def test_instance_norm(record: Callable[[], None]) -> None:
    record()
