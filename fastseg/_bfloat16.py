"""Whether a CPU multiplies bfloat16 by itself."""

from __future__ import annotations

import functools
import platform

import torch


@functools.cache
def cpu_multiplies_bfloat16() -> bool:
    """Whether the CPU has instructions for products of bfloat16, which oneDNN then convolves with.

    Without them oneDNN emulates: its convolutions of bfloat16 take 2 to 3 times as long as those of float32.
    """
    if platform.machine().lower() in ("x86_64", "amd64"):
        return torch.cpu._is_avx512_bf16_supported()  # CPUs with AMX have it, too
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()
