"""The roofline: the two ceilings of a device, measured, and the time that no implementation can go below them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from statistics import median
from time import perf_counter
from typing import NamedTuple

import torch

from benchmarks.devices import Device

# Each ceiling is measured for this long, after as long a warm-up: a GPU's clock needs some time to rise.
SECONDS = 0.2
LEAST_CALLS = 5


class Work(NamedTuple):
    """What a pass of an operator can't do without.

    Args:
        bytes: Each input read once, each output written once; what an implementation saves beside that for the
            backward pass is its own choice and isn't counted.
        operations: Additions and multiplications of its matrix products, as a dense convolution does them. (The
            gradient behind a pool is sparse: a kernel that skips its zeros can do with fewer.)
    """

    bytes: int
    operations: int = 0


class Ceilings(NamedTuple):
    """What a device reaches: bytes (read and written) of a large copy, operations of a large matrix product."""

    bytes_per_second: float
    operations_per_second: float

    def seconds(self, passes: Iterable[Work]) -> float:
        """The floor: each pass takes as long as its bytes or its operations, whichever takes longer."""
        return sum(max(times) for times in map(self._times, passes))

    def limits(self, passes: Iterable[Work]) -> list[str]:
        """What bounds each pass."""
        return ["bytes" if memory >= arithmetic else "operations" for memory, arithmetic in map(self._times, passes)]

    def _times(self, work: Work) -> tuple[float, float]:
        return work.bytes / self.bytes_per_second, work.operations / self.operations_per_second


def measure_ceilings(device: Device) -> Ceilings:
    """Medians of a copy within the device's memory and of a product of random square matrices in its dtype."""
    source = device.make((device.copied_bytes // device.dtype.itemsize,))
    target = torch.empty_like(source)
    copy = _median_seconds(device, lambda: target.copy_(source))
    left, right = (device.make((device.matrix_side,) * 2, seed=seed) for seed in range(2))
    product = _median_seconds(device, lambda: left @ right)
    return Ceilings(2 * device.copied_bytes / copy, 2 * device.matrix_side**3 / product)


def _median_seconds(device: Device, call: Callable[[], object]) -> float:
    for _ in range(2):  # the first of them is the warm-up
        seconds: list[float] = []
        end = perf_counter() + SECONDS
        while len(seconds) < LEAST_CALLS or perf_counter() < end:
            start = device.mark()
            call()
            stop = device.mark()
            device.wait()
            seconds.append(device.seconds(start, stop))
    return median(seconds)
