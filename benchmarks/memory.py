"""Peak memory of a call, as the operating system sees it."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

# Pages that the allocator keeps from before hide part of the growth, or add to it by fragmentation; the lowest of a few
# measurements is what the call itself needs.
MEASUREMENTS = 3

PARALLEL_GRAIN = 2**15  # elements that torch gives a thread at least (at::internal::GRAIN_SIZE)

if sys.platform == "linux":
    # All threads share the main arena: of the others, malloc_trim doesn't give the free pages at the top back. It has
    # to be said before they are made.
    M_ARENA_MAX = -8  # malloc.h
    ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)


def peak_growth(call: Callable[[], object]) -> int | None:
    """Bytes by which the process's resident set grows at most during ``call``; None on systems other than Linux.

    Counts everything that the call touches: torch's tensors, oneDNN's and fastseg's scratch memory. The latter is kept
    by each thread for its next call, so each measurement has threads of its own (OpenMP's belong to the thread that
    calls them). What else an earlier call left behind (generated code, a process's cache) isn't counted.
    """
    if sys.platform != "linux":
        return None
    return min(_in_new_threads(call) for _ in range(MEASUREMENTS))


def _in_new_threads(call: Callable[[], object]) -> int:
    with ThreadPoolExecutor(max_workers=1) as executor:
        executor.submit(torch.ones, PARALLEL_GRAIN * torch.get_num_threads()).result()  # starts OpenMP's threads
        return executor.submit(_one_peak, call).result()


def _one_peak(call: Callable[[], object]) -> int:
    ctypes.CDLL(None).malloc_trim(0)  # gives free pages back, so that touching them again counts
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # sets the peak (VmHWM) to the present size, see proc(5)
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    with open("/proc/self/status") as file:
        kibibytes = next(line.split()[1] for line in file if line.startswith(f"{field}:"))
    return int(kibibytes) * 1024
