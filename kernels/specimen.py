"""What a specimen is: a call of an operator's launchers that stands for many.

A specimen makes its tensors on a device and gives a function that calls the launcher on them. On CUDA tensors the
call runs. On meta tensors, which hold no data, `record` tells what it would launch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastseg.kernels.launch import Launch, recording

Call = Callable[[], tuple[Tensor, ...]]


class Specimen(NamedTuple):
    """A call that stands for many; ``prepare`` gives a function that launches, and returns what the kernels filled."""

    name: str
    prepare: Callable[[torch.device], Call]
    tuned: bool  # whether plans are tuned on it: it fills a GPU


def record(specimen: Specimen) -> list[Launch]:
    """What a specimen would launch where nothing is tuned."""
    with recording():  # what it launches to prepare belongs to other specimens
        call = specimen.prepare(torch.device("meta"))
    with recording() as launches:
        call()
    return launches


def describe(*parts: object) -> str:
    """The parts of a specimen's name that aren't empty."""
    return " ".join(str(part).removeprefix("torch.") for part in parts if part)


def make_tensor(sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device, channels_last: bool) -> Tensor:
    """A tensor of random numbers."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return fill(torch.empty(sizes, dtype=dtype, device=device, memory_format=layout))


def fill(tensor: Tensor) -> Tensor:
    """Fills a tensor; not a meta tensor, for which torch would import its compiler: seconds."""
    return tensor if tensor.is_meta else tensor.normal_()
