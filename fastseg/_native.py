"""The bridge to the C++ kernels: loads `fastseg._C`, describes tensors to it, and tells what is active."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
from typing import Any, TypeAlias

import torch  # before _C: the extension then shares torch's OpenMP thread pool

from fastseg._version import __version__

try:
    _C: Any = importlib.import_module("fastseg._C")
except ImportError as error:
    _C = None
    load_error: str | None = f"{type(error).__name__}: {error}"
else:
    load_error = None

logger = logging.getLogger("fastseg")

# The numbers are csrc/tensor.h's DType.
DTYPE_CODES = {
    torch.float32: 0,
    torch.float64: 1,
    torch.bfloat16: 2,
    torch.float16: 3,
    torch.uint8: 4,
    torch.int16: 5,
    torch.int32: 6,
    torch.int64: 7,
}

TensorDescription: TypeAlias = tuple[int, int, tuple[int, ...], tuple[int, ...]]


def describe(tensor: torch.Tensor | None) -> TensorDescription | None:
    """What the C++ side gets of a tensor: address, dtype code, sizes and strides (in elements); None for None."""
    if tensor is None:
        return None
    return tensor.data_ptr(), DTYPE_CODES[tensor.dtype], tensor.shape, tensor.stride()


@functools.cache
def log_slow_road(operator: str, reason: str) -> None:
    """Say once per reason, on the logger `fastseg`, that calls run plain PyTorch instead of a fastseg kernel."""
    logger.warning("%s runs as plain PyTorch: %s", operator, reason)


def native(operator: str) -> Any:
    """The extension module, or None (and a log line) where it couldn't be loaded."""
    if _C is None:
        log_slow_road(operator, f"the C++ extension couldn't be loaded ({load_error})")
    return _C


def info() -> dict[str, Any]:
    """What fastseg runs on, for bug reports: versions, the CPU kernels' instruction set, threads and backends.

    Returns:
        A dictionary with the keys ``fastseg`` and ``torch`` (versions), ``cpu`` ("native", or why not),
        ``cpu_isa`` (the instruction set in use) and ``cpu_isas`` (those that this machine runs; the environment
        variable ``FASTSEG_CPU_ISA`` chooses one), ``openmp`` (whether the kernels run on several threads), ``threads``
        (``torch.get_num_threads()``), ``cuda`` (devices that torch sees) and ``triton`` (whether it can be imported).
    """
    return {
        "fastseg": __version__,
        "torch": torch.__version__,
        "cpu": "native" if _C is not None else f"plain PyTorch ({load_error})",
        "cpu_isa": _C.active_isa() if _C is not None else None,
        "cpu_isas": _C.runnable_isas() if _C is not None else [],
        "openmp": _C.openmp if _C is not None else False,
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.device_count(),
        "triton": importlib.util.find_spec("triton") is not None,
    }
