"""The device and the processes of a run."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from fastseg.training.config import DeviceChoice
from fastseg.training.errors import ConfigError


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
