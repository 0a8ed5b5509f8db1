"""Peak memory of a call, as the operating system sees it."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable

# Pages that the allocator keeps from before hide part of the growth, or add to it by fragmentation; the lowest of a few
# measurements is what the call itself needs.
MEASUREMENTS = 3


def peak_growth(call: Callable[[], object]) -> int | None:
    """Bytes by which the process's resident set grows at most during ``call``; None on systems other than Linux.

    Counts everything that the call touches: torch's tensors, oneDNN's and fastseg's scratch memory. What an earlier
    call left behind for the next one (a cached buffer, generated code) isn't counted.
    """
    if sys.platform != "linux":
        return None
    return min(_one_peak(call) for _ in range(MEASUREMENTS))


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
