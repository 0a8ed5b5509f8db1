"""What differs between the devices that are measured: clock, memory counter, inputs, dtype and description."""

from __future__ import annotations

import functools
import shutil
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

import fastseg
from benchmarks.harness.memory import peak_growth
from fastseg.testing import lay_out

# What a GPU reads before each call that is timed. At 4 TB/s that takes a millisecond, more than a host needs to launch
# a forward and a backward pass: what is timed is the device's work, and not the wait for the next launch. It also fills
# the caches with what no call wants. It is read and not written, because a cache full of lines that wait to be written
# back would slow down the call that follows.
LEAD_BYTES = 2**32


class Device(ABC):
    """A device: its clock, its memory counter and the inputs made on it.

    Attributes:
        name: torch's type of the device.
        dtype: What is measured on it.
        drawn: The dtype that random numbers are drawn in before they are rounded to ``dtype``.
        copied_bytes: Size of the tensors whose copy and sum give the ceiling of the bandwidth: far more than any cache
            holds.
        matrix_sides: Rows and columns of the matrices whose product gives the ceiling of the arithmetic; the fastest of
            them counts.
        asynchronous: Whether it works beside the host, which only launches the work.
    """

    name: str
    asynchronous: bool
    dtype: torch.dtype
    drawn: torch.dtype
    copied_bytes: int
    matrix_sides: tuple[int, ...]

    @abstractmethod
    def missing(self) -> str | None:
        """Why fastseg's kernels can't be measured here, or None."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What the report says of it: at least ``type``, ``dtype`` and ``title``."""

    @abstractmethod
    def lead(self) -> None:
        """Gives an asynchronous device something to do while the host launches what is timed next."""

    @abstractmethod
    def mark(self) -> Any:
        """A moment: when the work that was asked for so far is done."""

    @abstractmethod
    def wait(self) -> None:
        """Returns when all work is done; marks can be read then."""

    @abstractmethod
    def seconds(self, start: Any, end: Any) -> float:
        """Seconds between two marks."""

    @abstractmethod
    def peak_growth(self, call: Callable[[], object]) -> int | None:
        """Bytes that the memory in use grows by at most during ``call``; None where that is unknown."""

    def make(
        self,
        shape: Sequence[int],
        dtype: torch.dtype | None = None,
        *,
        seed: int = 0,
        layout: str = "nchw",
        scale: float = 1.0,
        requires_grad: bool = False,
    ) -> Tensor:
        """As `fastseg.testing.make`, drawn on the device and rounded to its dtype: another holds the same numbers."""
        values = torch.randn(shape, generator=self._generator(seed), dtype=self.drawn, device=self.name)
        values = (values * scale).to(self.dtype).to(dtype or self.dtype)
        return lay_out(values, layout).requires_grad_(requires_grad)

    def make_labels(self, shape: Sequence[int], num_classes: int, *, seed: int = 0) -> Tensor:
        """As `fastseg.testing.make_labels`, drawn on the device."""
        return torch.randint(num_classes, shape, generator=self._generator(seed), device=self.name)

    def _generator(self, seed: int) -> torch.Generator:
        return torch.Generator(self.name).manual_seed(seed)


class Processor(Device):
    """The CPU."""

    name = "cpu"
    asynchronous = False
    dtype = torch.float32
    drawn = torch.float64  # the numbers of `fastseg.testing.make`
    copied_bytes = 2**27
    matrix_sides = (1024, 2048)  # enough for a few cores, and for many

    def missing(self) -> str | None:
        active = fastseg.info()["cpu"]
        return None if active == "C++ kernels" else f"fastseg's C++ kernels are not active, but {active}"

    def describe(self) -> dict[str, Any]:
        info = fastseg.info()
        return {
            "type": self.name,
            "dtype": str(self.dtype).removeprefix("torch."),
            "title": f"{info['cpu_isa']} kernels, {info['threads']} threads",
        }

    def lead(self) -> None:
        """Nothing: a CPU does at once what it is asked."""

    def mark(self) -> float:
        return perf_counter()

    def wait(self) -> None:
        """Nothing is left to wait for."""

    def seconds(self, start: float, end: float) -> float:
        return end - start

    def peak_growth(self, call: Callable[[], object]) -> int | None:
        """The growth of the process's resident set, see `memory`."""
        return peak_growth(call)


class GraphicsProcessor(Device):
    """The current CUDA device (ROCm's too)."""

    name = "cuda"
    asynchronous = True
    dtype = torch.bfloat16
    drawn = torch.float32  # float64 would be slow on most GPUs
    copied_bytes = 2**31
    matrix_sides = (8192,)

    @functools.cached_property
    def _read(self) -> Tensor:
        return torch.zeros(LEAD_BYTES // torch.float32.itemsize, device=self.name)

    def missing(self) -> str | None:
        if not torch.cuda.is_available():
            return f"torch {torch.__version__} sees no CUDA device"
        active = fastseg.info()["gpu"]
        return None if active == "Triton kernels" else f"fastseg's Triton kernels are not active, but {active}"

    def describe(self) -> dict[str, Any]:
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        runtime = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
        return {
            "type": self.name,
            "dtype": str(self.dtype).removeprefix("torch."),
            "title": (
                f"{properties.name}, {properties.multi_processor_count} multiprocessors, "
                f"{properties.total_memory / 2**30:.0f} GiB; {runtime}, cuDNN {torch.backends.cudnn.version()}, "
                f"driver {_driver_version()}, Triton {fastseg.info()['triton']}"
            ),
        }

    def lead(self) -> None:
        self._read.sum()

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wait(self) -> None:
        torch.cuda.synchronize()

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return start.elapsed_time(end) / 1000  # milliseconds

    def peak_growth(self, call: Callable[[], object]) -> int | None:
        """The growth of what torch's allocator has given out; work space of cuDNN and of kernels counts."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before


def _driver_version() -> str:
    """The NVIDIA driver's version, which torch doesn't tell."""
    if shutil.which("nvidia-smi") is None:
        return "unknown"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False)
    return answer.stdout.split("\n")[0].strip() if answer.returncode == 0 else "unknown"


CPU = Processor()
CUDA = GraphicsProcessor()
DEVICES = {device.name: device for device in (CPU, CUDA)}
