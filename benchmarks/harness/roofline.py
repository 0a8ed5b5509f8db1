"""The roofline: the two ceilings of a device, measured, and the time that no implementation can go below them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from time import perf_counter
from typing import NamedTuple

import torch

from benchmarks.harness.devices import Device

# Each call is repeated for this long: a GPU's clock needs some time to rise.
SECONDS = 0.2
LEAST_CALLS = 2


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
    """What a device reaches: bytes read and written in large tensors, operations of a large matrix product."""

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
    """The highest rates within the device's memory and of products of random square matrices in its dtype.

    The memory's is that of a copy, or of an addition in place, which a CPU doesn't have to fetch its target for.
    """
    elements = device.copied_bytes // device.dtype.itemsize
    source, target = (torch.ones(elements, dtype=device.dtype, device=device.name) for _ in range(2))
    copy = _least_seconds(device, lambda: target.copy_(source))
    addition = _least_seconds(device, lambda: target.add_(source))
    bytes_per_second = device.copied_bytes * max(2 / copy, 3 / addition)
    return Ceilings(bytes_per_second, max(_product_rate(device, side) for side in device.matrix_sides))


def _product_rate(device: Device, side: int) -> float:
    left, right = (device.make((side, side), seed=seed) for seed in range(2))
    product = torch.empty_like(left)
    return 2 * side**3 / _least_seconds(device, lambda: torch.mm(left, right, out=product))


def _least_seconds(device: Device, call: Callable[[], object]) -> float:
    """Seconds of the fastest call: what a disturbed machine shows less often than a quiet one, but doesn't exceed."""
    seconds: list[float] = []
    end = perf_counter() + SECONDS
    while len(seconds) < LEAST_CALLS or perf_counter() < end:
        start = device.mark()
        call()
        stop = device.mark()
        device.wait()
        seconds.append(device.seconds(start, stop))
    return min(seconds)
