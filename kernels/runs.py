"""Pixels of several tensors as runs of evenly spaced ones, so that kernels needn't know how many axes there are."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor


class Runs(NamedTuple):
    """All tensors' pixels, as runs of evenly spaced ones: tensors that lie alike have few and long runs."""

    length: int
    sizes: tuple[int, ...]  # of the axes over the runs
    strides: list[tuple[int, ...]]  # over the runs, of each tensor
    steps: list[int]  # from one pixel of a run to the next, of each tensor

    @property
    def count(self) -> int:
        """How many runs there are."""
        return math.prod(self.sizes)


def runs_of(sizes: tuple[int, ...], strides: list[tuple[int, ...]]) -> Runs:
    """Merges neighbouring axes wherever every tensor's strides allow it."""
    axes: list[tuple[int, tuple[int, ...]]] = []
    for size, steps in zip(sizes, zip(*strides, strict=True), strict=True):
        if size == 1:
            continue
        if axes and all(outer == size * inner for outer, inner in zip(axes[-1][1], steps, strict=True)):
            axes[-1] = axes[-1][0] * size, steps
        else:
            axes.append((size, steps))
    one = (1, (0,) * len(strides))
    outer, (length, steps) = axes[:-1] or [one], axes[-1] if axes else one
    sizes_of_outer, strides_of_outer = zip(*outer, strict=True)
    return Runs(length, sizes_of_outer, list(zip(*strides_of_outer, strict=True)), list(steps))


def pixel_strides(tensor: Tensor, has_classes: bool) -> tuple[int, ...]:
    """The strides of the axes of a tensor [N, C, d1, ...], or [N, d1, ...], that count pixels."""
    strides = tensor.stride()
    return (strides[0], *strides[2:]) if has_classes else strides
