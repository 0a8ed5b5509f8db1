"""Two processes of one group, for tests of what is computed together."""

import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed
import torch.multiprocessing


def run_two_ranks(function: Callable[[int], None], folder: Path) -> None:
    """Call ``function(rank)`` in two processes of a gloo group, which meet in ``folder``; the first error is raised."""
    torch.multiprocessing.spawn(_run, (function, str(folder / "store")), nprocs=2)


def _run(rank: int, function: Callable[[int], None], store: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    function(rank)
    torch.distributed.destroy_process_group()
    # gloo's threads live as long as anything refers to the group, as DistributedDataParallel's cycles and DTensor's
    # caches do. One that lets go of a tensor while Python shuts down aborts the process: this one doesn't shut down.
    os._exit(0)
