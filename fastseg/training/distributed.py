"""The processes of a run: one, or those that torchrun started."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from fastseg.training.config import DeviceChoice
from fastseg.training.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class World:
    """The processes of a run and this one's place among them.

    Args:
        device: Where this process computes.
        rank: Number of this process; 0 writes and prints.
        size: Number of processes.
    """

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of ``tensor`` over all processes, the same on each; ``tensor`` itself where there is one process."""
        if self.size == 1:
            return tensor
        total = tensor.detach().clone()
        dist.all_reduce(total)
        return total


def launched_rank() -> int | None:
    """The number that torchrun gave this process; None where torchrun didn't start it."""
    return int(os.environ["RANK"]) if dist.is_available() and dist.is_torchelastic_launched() else None


def choose_device(choice: DeviceChoice) -> torch.device:
    """The device that ``choice`` stands for.

    Raises:
        ConfigError: CUDA is asked for and torch sees no device.
    """
    available = torch.cuda.is_available()
    if choice == "cuda" and not available:
        raise ConfigError("device must be cpu or auto here, but it is cuda and torch sees no CUDA device")
    return torch.device("cuda" if choice != "cpu" and available else "cpu")


@contextlib.contextmanager
def join_world(choice: DeviceChoice) -> Iterator[World]:
    """Join the processes that torchrun started (gloo on CPUs, NCCL on GPUs), or stand alone; leave them at the end."""
    device = choose_device(choice)
    if launched_rank() is None:
        yield World(device)
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield World(device, dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
