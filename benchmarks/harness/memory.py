"""Peak memory of a call, as the operating system sees it."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

# Pages that the allocator keeps from before hide part of the growth, or add to it by fragmentation; the lowest of a few
# measurements is what the call itself needs.
MEASUREMENTS = 3

PARALLEL_GRAIN = 2**15  # elements that torch gives a thread at least (at::internal::GRAIN_SIZE)

if sys.platform == "linux":
    LIBC = ctypes.CDLL(None)
    LIBC.open_memstream.restype = ctypes.c_void_p
    # All threads share the main arena: of the others, malloc_trim doesn't give the free pages at the top back, and a
    # call that gets those again would seem to need nothing. It has to be said before they are made.
    M_ARENA_MAX = -8  # malloc.h
    LIBC.mallopt(M_ARENA_MAX, 1)


def unknown() -> str | None:
    """Why the growth can't be known in this process, or None."""
    if sys.platform != "linux":
        return "the peak of the resident set is known on Linux alone"
    if _count_arenas() > 1:
        return "threads had started before it could be said that all are to share one arena"
    return None


def peak_growth(call: Callable[[], object]) -> int | None:
    """Bytes by which the process's resident set grows at most during ``call``; None where that is `unknown`.

    Counts everything that the call touches: torch's tensors, oneDNN's and fastseg's scratch memory. The latter is kept
    by each thread for its next call, so each measurement has threads of its own (OpenMP's belong to the thread that
    calls them). What else an earlier call left behind (generated code, a process's cache) isn't counted.
    """
    if unknown():
        return None
    collecting = gc.isenabled()
    gc.disable()  # what it frees during a call would hide as much that the call takes
    try:
        return min(_in_new_threads(call) for _ in range(MEASUREMENTS))
    finally:
        if collecting:
            gc.enable()


def _count_arenas() -> int:
    """The areas that malloc serves threads from."""
    text, size = ctypes.c_char_p(), ctypes.c_size_t()
    stream = ctypes.c_void_p(LIBC.open_memstream(ctypes.byref(text), ctypes.byref(size)))
    LIBC.malloc_info(0, stream)  # XML, see malloc_info(3)
    LIBC.fclose(stream)
    assert text.value is not None
    count = text.value.count(b"<heap nr")
    LIBC.free(text)
    return count


def _in_new_threads(call: Callable[[], object]) -> int:
    with ThreadPoolExecutor(max_workers=1) as executor:
        executor.submit(torch.ones, PARALLEL_GRAIN * torch.get_num_threads()).result()  # starts OpenMP's threads
        return executor.submit(_one_peak, call).result()


def _one_peak(call: Callable[[], object]) -> int:
    LIBC.malloc_trim(0)  # gives free pages back, so that touching them again counts
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # sets the peak (VmHWM) to the present size, see proc(5)
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    with open("/proc/self/status") as file:
        kibibytes = next(line.split()[1] for line in file if line.startswith(f"{field}:"))
    return int(kibibytes) * 1024
