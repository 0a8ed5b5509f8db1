"""How kernels are launched: the plan that serves a call, the one function that launches, and how launches are replayed.

A plan is a kernel's tile sizes, warps and pipeline stages. Each kernel's module holds a default plan for every bucket
of shapes; ``tuned/<gpu>.json``, which ``python -m fastseg.kernels tune`` writes, replaces them on that GPU. Nothing is
tuned while a program runs.

A launcher is a function of tensors and options that decides what to launch, and launches it. Deciding, and Triton's own
way to a compiled kernel, take the host longer than many kernels take the GPU; so a `replayed` launcher does it once for
each shape, stride, dtype and option, and later calls launch what the first one did.
"""

from __future__ import annotations

import contextlib
import functools
import json
import struct
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

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


class _State(threading.local):
    """What is kept of a thread's launches: autograd has threads of its own."""

    recorded: list[Launch] | None = None  # within `recording`
    first_call: _FirstCall | None = None  # within the first call of a `replayed` launcher


_state = _State()
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
    before, _state.recorded = _state.recorded, []
    try:
        yield _state.recorded
    finally:
        _state.recorded = before


def launch(kernel: Any, bucket: str, plan: Plan, programs: int, arguments: dict[str, Any]) -> None:
    """Run ``programs`` programs (maybe none) of a kernel on its tensors' device, which needn't be the current one.

    Of the arguments, the kernel gets those that it has parameters for.
    """
    known = {**arguments, **plan.tile}
    arguments = {name: known[name] for name in kernel.arg_names}
    if _state.recorded is not None:
        _state.recorded.append(Launch(kernel, bucket, plan, arguments))
        return
    if programs == 0:
        return
    device = next(value.device for value in arguments.values() if isinstance(value, Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        compiled = kernel[(programs,)](**arguments, **plan.options(BACKEND))
    if _state.first_call is not None:
        _state.first_call.launches.append((compiled, programs, list(arguments.values())))


def scratch(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Fresh memory for a launcher's kernels."""
    tensor = torch.empty(tuple(shape), dtype=dtype, device=device)
    if _state.first_call is not None:
        _state.first_call.scratch.append(tensor)
    return tensor


# ---- replayed launchers ----

MOST_REPLAYS = 1024  # of a launcher: then it forgets them all
ALIGNMENT = 16  # bytes: Triton compiles for pointers that are multiples of it, and for those that aren't


class _FirstCall(NamedTuple):
    """What a launcher did when it was called in earnest."""

    launches: list[tuple[Any, int, list[Any]]]  # compiled kernels, programs, and all arguments in order
    scratch: list[Tensor]


class _ReplayedLaunch(NamedTuple):
    """A launch with holes for addresses."""

    run: Callable[..., None]
    programs: int
    function: Any
    metadata: Any
    arguments: list[Any]
    holes: list[tuple[int, int]]  # an argument's place, and the tensor's that belongs there


class _Replay(NamedTuple):
    """What a call does for some shapes, strides, dtypes and options; tensors are the call's, then the scratch."""

    scratch: list[tuple[torch.Size, torch.dtype]]
    launches: list[_ReplayedLaunch]
    returned: int | None  # which of the scratch


def replayed(launcher: Callable[..., Tensor | None]) -> Callable[..., Tensor | None]:
    """Makes later calls of a launcher on a GPU repeat what the first one of their kind has launched.

    Args:
        launcher: ``launcher(tensors, *options)``: a tuple of tensors or None, the first of which is none of the latter,
            and whatever else decides. It passes them, and what `scratch` gives, on to `launch` as they are, returns
            nothing or one of the latter, and does nothing else with a tensor. What it decides must follow from shapes,
            strides, dtypes, device and options.

    Returns:
        The launcher. On other devices, for the tuner and for `recording` it is what it was.
    """
    replays: dict[Hashable, _Replay] = {}

    @functools.wraps(launcher)
    def call(tensors: tuple[Tensor | None, ...], *options: Any) -> Tensor | None:
        first = tensors[0]
        if not _compiles(first) or _trials or _state.recorded is not None:
            return launcher(tensors, *options)
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        key = (
            options, first.device, *[address % ALIGNMENT == 0 for address in addresses],  # type: ignore[union-attr]
            *map(addresses.index, addresses),  # which tensors are the same: they are told apart by nothing else
            *[None if tensor is None else (tensor.shape, tensor.stride(), tensor.dtype) for tensor in tensors],
        )  # fmt: skip
        replay = replays.get(key)
        if replay is not None:
            return _run(replay, addresses, first.device)  # type: ignore[union-attr]
        before, _state.first_call = _state.first_call, _FirstCall([], [])
        try:
            returned = launcher(tensors, *options)
            if len(replays) >= MOST_REPLAYS:
                replays.clear()
            replays[key] = _replay_of(_state.first_call, tensors, returned)
        finally:
            _state.first_call = before
        return returned

    return call


def _compiles(tensor: Tensor | None) -> bool:
    """Whether kernels are compiled for a tensor's device, and not interpreted or only recorded."""
    return tensor is not None and tensor.is_cuda


def _replay_of(call: _FirstCall, tensors: tuple[Tensor | None, ...], returned: Tensor | None) -> _Replay:
    places = {id(tensor): place for place, tensor in enumerate([*tensors, *call.scratch]) if tensor is not None}
    launches = []
    for compiled, programs, arguments in call.launches:
        holes = [(at, places[id(value)]) for at, value in enumerate(arguments) if isinstance(value, Tensor)]
        kept = [None if isinstance(value, Tensor) else value for value in arguments]
        launches.append(
            _ReplayedLaunch(compiled.run, programs, compiled.function, compiled.packed_metadata, kept, holes)
        )
    scratch = [(tensor.shape, tensor.dtype) for tensor in call.scratch]
    return _Replay(scratch, launches, None if returned is None else places[id(returned)] - len(tensors))


def _run(replay: _Replay, addresses: list[int], device: torch.device) -> Tensor | None:
    """Launches as Triton itself does in the end, with addresses for tensors, but without its profiler's hooks."""
    if torch.cuda.current_device() != device.index:
        with torch.cuda.device(device):
            return _run(replay, addresses, device)
    memory = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in replay.scratch]
    addresses += [tensor.data_ptr() for tensor in memory]
    stream = triton.runtime.driver.active.get_current_stream(device.index)
    for run, programs, function, metadata, arguments, holes in replay.launches:
        arguments = arguments.copy()
        for at, place in holes:
            arguments[at] = addresses[place]
        run(programs, 1, 1, stream, function, metadata, None, None, None, *arguments)
    return None if replay.returned is None else memory[replay.returned]


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
