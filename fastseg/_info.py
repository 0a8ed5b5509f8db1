"""What fastseg runs on."""

from __future__ import annotations

from typing import Any

import torch

from fastseg import _native, _triton
from fastseg._version import __version__
from fastseg.ops.convolution.kept import kept_bytes


def info() -> dict[str, Any]:
    """What fastseg runs on, for bug reports: versions, the CPU kernels' instruction set, threads and backends.

    Returns:
        A dictionary with the keys ``fastseg``, ``torch`` and ``triton`` (versions; None where there is no Triton),
        ``cpu`` (what CPU tensors run: "C++ kernels", the interpreted Triton kernels, or plain PyTorch and why),
        ``cpu_isa`` (the instruction set in use) and ``cpu_isas`` (those that this machine runs; the environment
        variable ``FASTSEG_CPU_ISA`` chooses one), ``openmp`` (whether the kernels run on several threads), ``threads``
        (``torch.get_num_threads()``), ``kept_weights`` (bytes of transformed weights that predictions on a CPU keep, as
        long as the weights live), ``gpu`` (what GPU tensors run) and ``gpus`` (those that torch sees).

    Raises:
        ValueError: As `cpu_isa`.
    """
    return {
        "fastseg": __version__,
        "torch": torch.__version__,
        "triton": _triton.version(),
        "cpu": _describe_cpu(),
        "cpu_isa": cpu_isa(),
        "cpu_isas": _native._C.runnable_isas() if _native._C is not None else [],
        "openmp": _native._C.openmp if _native._C is not None else False,
        "threads": torch.get_num_threads(),
        "kept_weights": kept_bytes(),
        "gpu": "Triton kernels" if (reason := missing_kernels("cuda")) is None else f"plain PyTorch ({reason})",
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
    }


def cpu_isa() -> str | None:
    """The instruction set that the CPU kernels use; None where there are none.

    Raises:
        ValueError: The environment variable ``FASTSEG_CPU_ISA`` names one that this machine can't run.
    """
    return _native._C.active_isa() if _native._C is not None else None


def missing_kernels(device: str) -> str | None:
    """Why a type of device has no kernels, so that its tensors run plain PyTorch; None where it has them."""
    if device == "cuda":
        return _triton.unusable()
    if device == "cpu":
        return None if _native.INTERPRETED else _native.load_error
    return f"no kernel for device type {device!r}"


def _describe_cpu() -> str:
    if _native.INTERPRETED:
        return "Triton kernels, interpreted"
    return "C++ kernels" if (reason := missing_kernels("cpu")) is None else f"plain PyTorch ({reason})"
