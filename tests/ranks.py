"""Two processes of one group, for tests of what is computed together."""

import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed
import torch.multiprocessing


def run_two_ranks(function: Callable[[int], None], folder: Path) -> None:
    """Call ``function(rank)`` in two processes of a gloo group, which meet in ``folder``; the first error is raised."""
    # Forked from a process that has imported the package: importing takes longer than what the ranks compute.
    torch.multiprocessing.set_forkserver_preload(["fastseg.functional"])
    arguments = (function, str(folder / "store"))
    torch.multiprocessing.start_processes(_run, arguments, nprocs=2, start_method="forkserver")


def _run(rank: int, function: Callable[[int], None], store: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    function(rank)
    torch.distributed.destroy_process_group()
    # gloo's threads live as long as anything refers to the group, as DistributedDataParallel's cycles and DTensor's
    # caches do. One that lets go of a tensor while Python shuts down aborts the process: this one doesn't shut down.
    os._exit(0)
