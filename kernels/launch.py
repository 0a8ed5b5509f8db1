"""How kernels are launched: the plan that serves a call, and the one function that launches.

A plan is a kernel's tile sizes, warps and pipeline stages. Each kernel's module holds a default plan for every bucket
of shapes; ``tuned/<gpu>.json``, which ``python -m fastseg.kernels tune`` writes, replaces them on that GPU. Nothing is
tuned while a program runs.
"""

from __future__ import annotations

import contextlib
import functools
import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton.language as tl

BACKEND = "cuda" if torch.version.hip is None else "hip"  # as Triton calls it

TUNED = Path(__file__).parent / "tuned"

MULTIPROCESSORS_OF_META = 132  # as an H200 has

# Programs for each multiprocessor that `fit` asks for before it lets tiles be as large as the plan says.
PROGRAMS_PER_MULTIPROCESSOR = 2


class Plan(NamedTuple):
    """Tile sizes (constexpr arguments of a kernel), warps of a program, and stages of its pipelined loops.

    ``max_registers`` is how many a thread may have on NVIDIA's GPUs. Without it the assembler decides, which spills a
    few where that lets one more program run on a multiprocessor.
    """

    tile: Mapping[str, int]
    num_warps: int = 4
    num_stages: int = 1
    max_registers: int | None = None

    def options(self, backend: str) -> dict[str, Any]:
        """What the compiler is told; fused multiply-adds, which Triton 3.10 would no longer make by itself, too."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}
        if backend == "cuda" and self.max_registers is not None:
            options["maxnreg"] = self.max_registers
        return options


class Launch(NamedTuple):
    """A launch as `recording` keeps it; ``arguments`` holds the kernel's constants too."""

    kernel: Any
    bucket: str
    plan: Plan
    arguments: dict[str, Any]

    @property
    def name(self) -> str:
        """The kernel's name."""
        return self.kernel.fn.__name__


_recorded: list[Launch] | None = None
_trials: dict[tuple[str, str], Plan] = {}


def choose(kernel: Any, bucket: str, defaults: Mapping[str, Plan], device: torch.device) -> Plan:
    """The plan for a kernel and a bucket of shapes: the tuned one of this GPU, else the default."""
    key = kernel.fn.__name__, bucket
    return _trials.get(key) or _tuned_plans(device).get(key) or defaults[bucket]


def _tuned_plans(device: torch.device) -> Mapping[tuple[str, str], Plan]:
    return read_plans(gpu_name(device)) if device.type == "cuda" else {}


@functools.cache
def gpu_name(device: torch.device) -> str:
    """The GPU's name as a file's: "nvidia-h200"."""
    return torch.cuda.get_device_name(device).lower().replace(" ", "-").replace("/", "-")


@functools.cache
def read_plans(gpu: str) -> Mapping[tuple[str, str], Plan]:
    """The tuned plans of a GPU, by kernel and bucket; none where it was never tuned."""
    path = TUNED / f"{gpu}.json"
    if not path.exists():
        return {}
    rows = json.loads(path.read_text())["plans"]
    return {
        (row["kernel"], row["bucket"]): Plan(row["tile"], row["num_warps"], row["num_stages"], row.get("max_registers"))
        for row in rows
    }


@contextlib.contextmanager
def trial(kernel: str, bucket: str, plan: Plan) -> Iterator[None]:
    """Within, ``plan`` serves the calls of a kernel in a bucket: for the tuner and the tests."""
    _trials[kernel, bucket] = plan
    try:
        yield
    finally:
        del _trials[kernel, bucket]


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """Within, launches are kept instead of run: on meta tensors, it tells what a call would launch."""
    global _recorded
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before


def launch(
    kernel: Any, bucket: str, plan: Plan, programs: int, device: torch.device, arguments: dict[str, Any]
) -> None:
    """Run ``programs`` programs (maybe none) of a kernel on a device, which needn't be the current one."""
    if _recorded is not None:
        _recorded.append(Launch(kernel, bucket, plan, {**arguments, **plan.tile}))
        return
    if programs == 0:
        return
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[(programs,)](**arguments, **plan.tile, **plan.options(BACKEND))


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 for devices that run programs one after the other.

    On meta tensors, whose launches are recorded to be compiled, those of a large GPU.
    """
    if device.type == "meta":
        return MULTIPROCESSORS_OF_META
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def fit(plan: Plan, axis: str, least: int, work: int, device: torch.device) -> Plan:
    """The plan with a smaller tile along an axis where ``work`` (in that axis' units) would leave multiprocessors idle.

    Sizes stay powers of two of at least ``least``.
    """
    size = plan.tile[axis]
    while size > least and work < size * PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(device):
        size //= 2
    return plan._replace(tile={**plan.tile, axis: size})


def fold(plan: Plan, axis: str, extent: int, other: str, other_extent: int) -> Plan:
    """The plan with a tile as large, but not twice as long as ``extent`` along an axis: what is cut goes to another."""
    size, other_size = plan.tile[axis], plan.tile[other]
    while size >= 2 * extent and other_size < other_extent:
        size, other_size = size // 2, other_size * 2
    return plan._replace(tile={**plan.tile, axis: size, other: other_size})


class Tiling(NamedTuple):
    """A map cut into tiles: how wide they are, and how many stand below and beside each other."""

    width: int
    down: int
    across: int

    @property
    def count(self) -> int:
        """How many tiles there are."""
        return self.down * self.across

    @property
    def arguments(self) -> dict[str, int]:
        """What `fastseg.kernels.relu_pool2d.locate` needs of it, by the kernels' names."""
        return {"down": self.down, "across": self.across, "TILE_W": self.width}


def cdiv(number: int, divisor: int) -> int:
    """How many of a divisor hold a number; Triton's own function takes 20 us on the host."""
    return -(-number // divisor)


@functools.lru_cache(maxsize=4096)
def tile_map(pixels: int, height: int, width: int) -> Tiling:
    """Cuts a map into tiles of so many pixels, as wide as they can be with the fewest pixels outside the map."""
    widths = [1 << bits for bits in range(pixels.bit_length())]
    tilings = [Tiling(wide, cdiv(height, pixels // wide), cdiv(width, wide)) for wide in widths]
    return min(reversed(tilings), key=lambda tiling: tiling.count)


def bits_of(number: float) -> int:
    """A double as a kernel takes it: `fastseg.kernels.cross_entropy_pixels.from_bits` makes the number of it again."""
    return struct.unpack("q", struct.pack("d", number))[0]


def index_type(largest_offset: int) -> tl.dtype:
    """The type of offsets of which the largest is given: 64 bits cost registers, 32 overflow at 2^31."""
    return tl.int64 if largest_offset >= 2**31 else tl.int32


def next_power_of_2(number: int, least: int = 1, most: int = 2**31) -> int:
    """The smallest power of two that isn't below a number, kept between two others."""
    return min(max(1 << (number - 1).bit_length(), least), most)
