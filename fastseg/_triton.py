"""The bridge to the Triton kernels: imports them at the first call that needs them, and registers them."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch

from fastseg._native import INTERPRETED, log_fallback

# The oldest version that the kernels were compiled and interpreted with.
OLDEST_TRITON = (3, 6)


def version() -> str | None:
    """Triton's version, or None where it can't be imported."""
    try:
        return importlib.import_module("triton").__version__
    except ImportError:
        return None


def unusable() -> str | None:
    """Why the Triton kernels can't be used, or None."""
    found = version()
    if found is None:
        return "no Triton"
    if tuple(int(part) for part in found.split(".")[:2]) < OLDEST_TRITON:
        return f"Triton {found} is older than {'.'.join(map(str, OLDEST_TRITON))}"
    return None


@functools.cache
def _load(module: str) -> Any:
    """The module of `fastseg.kernels`, or why there is none."""
    reason = unusable()
    if reason is not None:
        return reason
    try:
        return importlib.import_module(f"fastseg.kernels.{module}")
    except ImportError as error:
        return f"{type(error).__name__}: {error}"


def kernels(operator: str, module: str | None = None) -> Any:
    """A module of Triton kernels, or None (and a log line) where they can't be used."""
    loaded = _load(module or operator)
    if isinstance(loaded, str):
        log_fallback(operator, f"the Triton kernels can't be used ({loaded})")
        return None
    return loaded


def register(
    library: torch.library.Library, operator: str, triton: Callable[..., Any], cpu: Callable[..., Any]
) -> dict[str, Callable[..., Any]]:
    """Registers an operator's implementations: on GPUs (ROCm's, too, have the key CUDA) and on CPUs; returns them."""
    kernels = {"CUDA": triton, "CPU": triton if INTERPRETED else cpu}
    for device, kernel in kernels.items():
        library.impl(operator, kernel, device)
    return kernels
