"""The peak memory of a training step."""

from __future__ import annotations

import multiprocessing
import re
import resource
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from fastseg.training.config import Backend
from fastseg.training.networks import Architecture, own_network

_LINUX_STATUS = Path("/proc/self/status")
_WARM_UP_SIDE = 32  # pixels: small beside any step worth measuring


def peak_step_memory(
    backend: Backend, architecture: Architecture, shape: tuple[int, int, int, int], device: torch.device
) -> int:
    """How far one training step (loss, backward pass, Adam) raises the peak memory, in bytes.

    On a GPU: what the step adds to the allocated device memory at its peak. On a CPU: what it adds to the peak resident
    memory of a new process that has done one step on a tiny image before, so that libraries are loaded and threads
    started.

    Args:
        backend: As in `TrainConfig`.
        architecture: The network, one of fastseg's own.
        shape: Of the images, ``(N, C, H, W)``.
        device: Where to measure.
    """
    if device.type == "cuda":
        return _measure(backend, architecture, shape, device)
    spawn = multiprocessing.get_context("spawn")  # a forked child would inherit its parent's peak
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(_measure, backend, architecture, shape, device).result()


def _measure(
    backend: Backend, architecture: Architecture, shape: tuple[int, int, int, int], device: torch.device
) -> int:
    model = own_network(architecture, backend).to(device)
    optimizer = torch.optim.Adam(model.parameters())

    def step(images: torch.Tensor, masks: torch.Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        model.loss(images, masks).backward()
        optimizer.step()

    def batch(count: int, channels: int, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        images = torch.rand(count, channels, height, width, device=device)
        return images, torch.zeros(count, height, width, dtype=torch.uint8, device=device)

    images, masks = batch(*shape)
    step(*batch(1, shape[1], _WARM_UP_SIDE, _WARM_UP_SIDE))
    before = _peak(device, restart=True)
    step(images, masks)
    return _peak(device) - before


def _peak(device: torch.device, restart: bool = False) -> int:
    """Peak memory so far, in bytes; with ``restart``, a GPU's peak starts again at what is allocated now."""
    if device.type == "cuda":
        if restart:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device)
    if _LINUX_STATUS.exists():  # there, ru_maxrss starts at the parent's peak, also in a process that was spawned
        (kibibytes,) = re.findall(r"VmHWM:\s+(\d+) kB", _LINUX_STATUS.read_text())
        return int(kibibytes) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS counts bytes
