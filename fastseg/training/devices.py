"""The device and the processes of a run."""

from __future__ import annotations

import datetime
import itertools
import os
import pickle
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.elastic.utils.store import barrier

from fastseg.training.config import DeviceChoice
from fastseg.training.errors import ConfigError

_T = TypeVar("_T")

_LONGEST_WAIT = datetime.timedelta(days=7)
_meetings = itertools.count()


def launched_rank() -> int | None:
    """The number that torchrun gave this process; None where torchrun didn't start it."""
    return int(os.environ["RANK"]) if dist.is_available() and dist.is_torchelastic_launched() else None


def launched_place() -> tuple[int, int]:
    """The number of this process among those that torchrun started, and how many these are; 0 of 1 without it."""
    rank = launched_rank()
    return (0, 1) if rank is None else (rank, int(os.environ["WORLD_SIZE"]))


def wait_for_all() -> None:
    """Return when all processes that torchrun started are here: it ends them all as soon as one ends with an error."""
    if (meeting := _meeting()) is not None:
        store, key, processes = meeting
        barrier(store, processes, key, barrier_timeout=_LONGEST_WAIT.total_seconds())


def from_first(make: Callable[[], _T]) -> _T:
    """What ``make`` gives in the first of the processes that torchrun started, the only one that calls it."""
    if (meeting := _meeting()) is None:
        return make()
    store, key, _ = meeting
    if not launched_rank():
        made = make()
        store.set(key, pickle.dumps(made))  # type: ignore[arg-type]  # bytes do, too
        return made
    store.wait([key], _LONGEST_WAIT)
    received: _T = pickle.loads(store.get(key))
    return received


def _meeting() -> tuple[dist.Store, str, int] | None:
    """Where the processes that torchrun started meet, a key there for this time, and how many they are."""
    rank, processes = launched_place()
    if processes == 1:
        return None
    store, _, _ = next(dist.rendezvous("env://", rank, processes))
    return store, f"fastseg/{next(_meetings)}", processes


def choose_device(choice: DeviceChoice) -> torch.device:
    """The device that ``choice`` stands for; under torchrun each process has a GPU of its own.

    Raises:
        ConfigError: CUDA is asked for and torch sees no device.
    """
    available = torch.cuda.is_available()
    if choice == "cuda" and not available:
        raise ConfigError("device must be cpu or auto here, but it is cuda and torch sees no CUDA device")
    if choice == "cpu" or not available:
        return torch.device("cpu")
    return torch.device("cuda") if launched_rank() is None else torch.device("cuda", int(os.environ["LOCAL_RANK"]))
