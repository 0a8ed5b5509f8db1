"""The bridge to the C++ kernels: loads `fastseg._C` and describes tensors to it."""

from __future__ import annotations

import functools
import importlib
import logging
import os
import warnings
from pathlib import Path
from typing import Any, TypeAlias

import torch  # before _C: the extension then shares torch's OpenMP thread pool

try:
    _C: Any = importlib.import_module("fastseg._C")
except ImportError as error:
    _C = None
    load_error: str | None = f"{type(error).__name__}: {error}"
else:
    load_error = None

_ROOT = Path(__file__).parents[1]
if _C is None and (_ROOT / "csrc" / "CMakeLists.txt").exists():
    # Python looks into the folder that it is started in first: a checkout there hides the installed package.
    warnings.warn(
        f"this fastseg is the checkout at {_ROOT}, which isn't built: it computes in plain PyTorch. Build it "
        f"(pip install -e {_ROOT}), or start Python in another folder to use an installed fastseg",
        RuntimeWarning,
        stacklevel=2,
    )

logger = logging.getLogger("fastseg")

# Where the environment variable TRITON_INTERPRET is 1, Triton interprets kernels instead of compiling them, and CPU
# tensors run through them instead of the C++ kernels: slowly, to test the kernels where there is no GPU.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

DTYPE_CODES = {getattr(torch, name): code for code, name in enumerate(getattr(_C, "DTYPES", ()))}

TensorDescription: TypeAlias = tuple[int, int, tuple[int, ...], tuple[int, ...]]


def describe(tensor: torch.Tensor | None) -> TensorDescription | None:
    """What the C++ side gets of a tensor: address, dtype code, sizes and strides (in elements); None for None."""
    if tensor is None:
        return None
    return tensor.data_ptr(), DTYPE_CODES[tensor.dtype], tensor.shape, tensor.stride()


@functools.cache
def log_fallback(operator: str, reason: str) -> None:
    """Say once per reason, on the logger `fastseg`, that calls run plain PyTorch instead of a fastseg kernel."""
    logger.warning("%s runs as plain PyTorch: %s", operator, reason)


def log_missing_kernel(operator: str, input: torch.Tensor) -> None:
    """Say that an operator has no kernel for input's device; where CPUs and GPUs come here, it has been said why."""
    if input.device.type not in ("cpu", "cuda"):
        log_fallback(operator, f"no kernel for device type {input.device.type!r}")


def native(operator: str) -> Any:
    """The extension module, or None (and a log line) where it couldn't be loaded."""
    if _C is None:
        log_fallback(operator, f"the C++ extension couldn't be loaded ({load_error})")
    return _C
