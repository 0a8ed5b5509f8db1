"""What the Triton kernels of the upsampling operators share: the grid, and interpolation without memory.

Along an axis, the output positions between the input's positions k and k + 1 form interval k; those before position 0
form interval -1. Between two rows and two columns of the input lies a cell: its pixels blend the same four logits, the
taps. A program takes cells side by side, each thread's its own, and of each a group of [GROUP_H, GROUP_W] pixels, for
which a thread loads four logits of a class. An interval whose pixels don't fill whole groups leaves some of it empty.

An axis with one tap ("nearest", or of a size that stays) has intervals 0 to size - 1: the positions that read it.
`fastseg.ops.upsampling` defines the grids.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastseg.kernels.cross_entropy_pixels import LOG2_E, from_bits
from fastseg.kernels.launch import Plan, bits_of, cdiv, choose, index_type, launch, next_power_of_2, scratch
from fastseg.kernels.layouts import fill
from fastseg.kernels.relu_pool2d import reach

if TYPE_CHECKING:
    from fastseg.ops.upsampling import Upsampling

# Steps from where the search for an interval's first position begins to it; its guess may be off by one either way.
SEARCH_STEPS = tl.constexpr(3)


class Grid(NamedTuple):
    """What is constant of a grid in a kernel; pairs are of (height, width)."""

    nearest: bool
    corners: bool  # align_corners
    taps: tuple[int, int]
    spread: tuple[bool, bool]  # whether the axis grows
    group: tuple[int, int]  # pixels


# Run-time arguments of the kernels that are compiled for any value.
GRID_ARGUMENTS = (
    "height", "width", "out_height", "out_width", "row_step", "column_step", "column_groups", "blocks", "pixels",
)  # fmt: skip

# ---- the grid ----


@triton.jit
def axes_of(
    height, width, out_height, out_width, row_step, column_step, row_passes, column_passes, GRID: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Rows and columns, each as (size, size of the output, step, groups that an interval takes).

    The step of "nearest" is a single, as in torch, whatever the logits are.
    """
    STEP: tl.constexpr = tl.float32 if GRID.nearest else ACC
    rows = height, out_height, from_bits(row_step, STEP), row_passes
    return rows, (width, out_width, from_bits(column_step, STEP), column_passes)


@triton.jit
def intervals_of(positions, axis, GRID: tl.constexpr):
    """The intervals that hold output positions, and where exactly in the input those are."""
    size, _, step, _ = axis
    if GRID.nearest or GRID.corners:
        coordinates = positions.to(step.dtype) * step
    else:
        coordinates = tl.fma(positions.to(step.dtype) + 0.5, step + tl.zeros_like(positions).to(step.dtype), -0.5)
    return tl.minimum(tl.floor(coordinates).to(tl.int32), size - 1), coordinates


@triton.jit
def first_positions(intervals, axis, GRID: tl.constexpr):
    """The first output positions that no earlier interval holds; the output's size where there is none."""
    _, out_size, step, _ = axis
    ratio = tl.where(step > 0, 1 / step, out_size)
    guess = intervals * ratio if GRID.nearest or GRID.corners else (intervals + 0.5) * ratio - 0.5
    positions = tl.minimum(tl.maximum(tl.floor(guess).to(tl.int32) - 1, 0), out_size)
    for _ in tl.static_range(SEARCH_STEPS):
        found, _ = intervals_of(positions, axis, GRID)
        positions += ((found < intervals) & (positions < out_size)).to(tl.int32)
    return positions


@triton.jit
def holds(first, intervals, axis, GRID: tl.constexpr):
    """Whether intervals have any output positions, of which they are told the first."""
    found, _ = intervals_of(first, axis, GRID)
    return (found == intervals) & (first < axis[1])


@triton.jit
def find_groups(groups, axis, GRID: tl.constexpr, AXIS: tl.constexpr):
    """The intervals of groups, and the groups' first positions; where the axis doesn't grow, a group is a position."""
    _, _, _, passes = axis
    if GRID.spread[AXIS]:
        intervals = groups // passes - (GRID.taps[AXIS] - 1)
        return intervals, first_positions(intervals, axis, GRID) + groups % passes * GRID.group[AXIS]
    else:
        intervals, _ = intervals_of(groups, axis, GRID)
        return intervals, groups


@triton.jit
def open_groups(first, intervals, axis, GRID: tl.constexpr, AXIS: tl.constexpr):
    """Positions [GROUP, BLOCK_G] from the ``first`` of each group on, whether its interval has them, and their weights.

    The last interval has no far tap: the near one's weight is 1. Positions that don't exist have weights that keep
    infinity infinite; NaN would spread to those that do.
    """
    size, out_size, _, _ = axis
    positions = first[None, :] + tl.arange(0, GRID.group[AXIS])[:, None]
    found, coordinates = intervals_of(positions, axis, GRID)
    exist = (positions < out_size) & (found == intervals[None, :])
    far = tl.zeros_like(coordinates)
    if GRID.taps[AXIS] == 2:
        far = tl.minimum(tl.maximum(coordinates - found, 0.0), 1.0)
        far = tl.where(found < 0, 1.0, tl.where(found == size - 1, 0.0, far))
        far = tl.where(exist, far, 0.5)
    return tl.minimum(positions, out_size - 1), exist, (1 - far, far)


@triton.jit
def pixels_of(opened_rows, opened_columns):
    """Of groups, for [GROUP_H, GROUP_W, BLOCK_G]: rows, columns, existence, and weights of rows and of columns.

    Last whether a group has any pixels [BLOCK_G].
    """
    out_rows, rows_exist, row_weights = opened_rows
    out_columns, columns_exist, column_weights = opened_columns
    some = (tl.max(rows_exist.to(tl.int32), 0) > 0) & (tl.max(columns_exist.to(tl.int32), 0) > 0)
    of_rows = row_weights[0][:, None, :], row_weights[1][:, None, :]
    of_columns = column_weights[0][None, :, :], column_weights[1][None, :, :]
    exist = rows_exist[:, None, :] & columns_exist[None, :, :]
    return out_rows[:, None, :], out_columns[None, :, :], exist, (of_rows, of_columns), some


@triton.jit
def locate_groups(
    program, height, width, out_height, out_width, row_step, column_step, row_passes, column_passes, column_groups,
    blocks, strides, GRID: tl.constexpr, INDEX: tl.constexpr, ACC: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """A program's image, what `pixels_of` says of its groups, and for rows and columns what `tap_offsets` does."""
    rows, columns = axes_of(
        height, width, out_height, out_width, row_step, column_step, row_passes, column_passes, GRID, ACC
    )
    groups = program % blocks * BLOCK_G + tl.arange(0, BLOCK_G)
    row_intervals, first_rows = find_groups(groups // column_groups, rows, GRID, 0)
    column_intervals, first_columns = find_groups(groups % column_groups, columns, GRID, 1)
    opened_rows = open_groups(first_rows, row_intervals, rows, GRID, 0)
    opened_columns = open_groups(first_columns, column_intervals, columns, GRID, 1)
    row_taps = tap_offsets(row_intervals, height, strides[2], GRID, INDEX)
    column_taps = tap_offsets(column_intervals, width, strides[3], GRID, INDEX)
    return (program // blocks).to(tl.int64), pixels_of(opened_rows, opened_columns), (row_taps, column_taps)


# ---- interpolation ----


@triton.jit
def tap_offsets(intervals, size, stride, GRID: tl.constexpr, INDEX: tl.constexpr):
    """Offsets of the taps beside intervals, near and far, and whether there is a far one.

    Before the first position, torch reads the second one with weight 0. With aligned corners it reads the last one
    twice, the second time with weight 0, which makes NaN of infinity.
    """
    near = tl.where(intervals < 0, tl.minimum(size - 1, 1), intervals)
    far = tl.minimum(intervals + 1, size - 1)
    return near.to(INDEX) * stride, far.to(INDEX) * stride, (intervals < size - 1) | GRID.corners


@triton.jit
def flat(values):
    """Values [..., BLOCK_G] in one line, as memory is accessed here, so that each thread has a group of all of them.

    With more axes the compiler would give threads what it takes for neighbours in memory, and then exchange values.
    """
    return tl.reshape(values, [values.numel])


@triton.jit
def load(pointers, mask, other):
    """What pointers [..., BLOCK_G] point to, where the mask, which may have fewer axes, allows it."""
    mask = mask & tl.full(pointers.shape, True, tl.int1)
    return tl.reshape(tl.load(flat(pointers), flat(mask), other=other), pointers.shape)


@triton.jit
def store(pointers, values, mask):
    """Stores values [..., BLOCK_G], of as many axes as pointers and mask have."""
    tl.store(flat(pointers), flat(values), flat(mask))


@triton.jit
def load_taps(pointers, offsets, mask, GRID: tl.constexpr, ACC: tl.constexpr):
    """The taps at (near, near), (near, far), (far, near) and (far, far) rows and columns, where axes have two."""
    near_row, far_row, has_far_row = offsets[0]
    near_column, far_column, has_far_column = offsets[1]
    near_near = load(pointers + (near_row + near_column), mask, other=0).to(ACC)
    near_far, far_near, far_far = near_near, near_near, near_near
    if GRID.taps[1] == 2:
        near_far = load(pointers + (near_row + far_column), mask & has_far_column, other=0).to(ACC)
    if GRID.taps[0] == 2:
        far_near = load(pointers + (far_row + near_column), mask & has_far_row, other=0).to(ACC)
    if GRID.taps[0] == 2 and GRID.taps[1] == 2:
        both = has_far_row & has_far_column
        far_far = load(pointers + (far_row + far_column), mask & both, other=0).to(ACC)
    return near_near, near_far, far_near, far_far


@triton.jit
def blend(near, far, weights, GRID: tl.constexpr, AXIS: tl.constexpr):
    """Interpolation along an axis; to the last bit the same in every kernel."""
    near_weight, far_weight = weights
    if GRID.taps[AXIS] == 2:
        return tl.fma(near, near_weight, far * far_weight)
    elif GRID.nearest:
        return near
    else:
        return near + near * 0.0  # torch adds it once more, with weight 0, which makes NaN of infinity


@triton.jit
def interpolate(taps, weights, GRID: tl.constexpr):
    """Logits of groups [..., GROUP_H, GROUP_W, BLOCK_G] from taps [..., 1, 1, BLOCK_G]; "nearest" leaves axes of 1."""
    near_near, near_far, far_near, far_far = taps
    row_weights, column_weights = weights
    left = blend(near_near, far_near, row_weights, GRID, 0)
    right = left
    if GRID.taps[1] == 2:
        right = blend(near_far, far_far, row_weights, GRID, 0)
    return blend(left, right, column_weights, GRID, 1)


@triton.jit
def load_logits(pointers, offsets, weights, mask, GRID: tl.constexpr, ACC: tl.constexpr):
    """Interpolated logits, from their taps in memory."""
    return interpolate(load_taps(pointers, offsets, mask, GRID, ACC), weights, GRID)


@triton.jit
def probabilities(logits, statistics, at, pixels, counts):
    """exp(z - m - s) of pixels ``at``; of those that don't count 0."""
    largest = load(statistics + at, counts, other=float("inf"))
    log_sum = load(statistics + pixels + at, counts, other=0)
    if log_sum.dtype == tl.float64:
        return tl.exp((logits - largest) - log_sum)
    return tl.exp2(tl.fma(logits - largest, LOG2_E, log_sum * -LOG2_E))


# ---- launchers ----

GROUP_PIXELS = 8  # of a group, at most: a thread has some numbers of its own for each pixel
GROUP_WIDTH = 4  # at most

# Relative error of a coordinate in single arithmetic, with room to spare.
COORDINATE_ERROR = 2.0**-21


def positions_in_interval(size: int, out_size: int, step: float, mode: str, align_corners: bool) -> int:
    """The most output positions that an interval can hold."""
    if step * out_size <= 1:
        return out_size
    ratio = 1 / step
    whole = ratio == round(ratio)
    # Then no coordinate is rounded across a whole number: all are multiples of a power of two, or halves between them.
    exact = math.log2(ratio).is_integer() if whole else False
    halves = whole and round(ratio) % 2 == 0 and mode != "nearest" and not align_corners
    if exact or halves:
        return min(round(ratio), out_size)
    return min(math.floor(ratio * (1 + size * COORDINATE_ERROR)) + 1, out_size)


def grid_of(
    input: Tensor, output: Tensor, upsampling: Upsampling, pixels: int = GROUP_PIXELS
) -> tuple[Grid, dict[str, Any]]:
    """The grid from logits in planes to an output's height and width, with groups of up to so many pixels.

    Also the arguments by which kernels are told the rest of it, and of the logits.
    """
    mode, align_corners, steps = upsampling
    size, out_size = input.shape[2:], output.shape[-2:]
    taps = tuple(1 if mode == "nearest" or before == after else 2 for before, after in zip(size, out_size, strict=True))
    most = [
        positions_in_interval(before, after, step, mode, align_corners)
        for before, after, step in zip(size, out_size, steps, strict=True)
    ]
    group_w = next_power_of_2(most[1], 1, GROUP_WIDTH)
    group = next_power_of_2(most[0], 1, pixels // group_w), group_w
    spread = tuple(after > before for before, after in zip(size, out_size, strict=True))
    grid = Grid(mode == "nearest", align_corners, taps, spread, group)
    arguments = {
        "height": size[0], "width": size[1], "out_height": out_size[0], "out_width": out_size[1],
        "row_step": bits_of(steps[0]), "column_step": bits_of(steps[1]),
        "row_passes": cdiv(most[0], group[0]), "column_passes": cdiv(most[1], group[1]), "GRID": grid,
        "input": input, "input_strides": input.stride(), "CLASSES": input.shape[1],
        "INDEX": index_of(output, input), "ACC": tl.float64 if input.dtype == torch.float64 else tl.float32,
    }  # fmt: skip
    return grid, arguments


def index_of(output: Tensor, *tensors: Tensor) -> tl.dtype:
    """The type of offsets within an image: of all tensors, and of what is dense and has a number for each pixel."""
    return index_type(max(reach(output, *tensors), math.prod(output.shape[-2:])))


def in_planes(input: Tensor) -> Tensor:
    """The logits, copied to NCHW where classes lie side by side.

    Threads with neighbouring cells read the same class. There each would read a line of memory for one number, which
    takes longer than to copy the map, small as it is beside what it is upsampled to.
    """
    if input.stride(1) != 1 or input.shape[1] == 1:
        return input
    planes = scratch(input.shape, input.dtype, input.device)
    fill(input, planes)
    return planes


def plans_of(tiles: dict[int, dict[str, int]], base: Plan, suffixes: Sequence[str] = ("",)) -> dict[str, Plan]:
    """Plans for groups of so many pixels, the base but for some of its tile; with doubles, an eighth of the classes."""
    plans = {}
    for pixels, tile in tiles.items():
        for suffix in suffixes:
            plans[f"{pixels}-pixels{suffix}"] = plan = base._replace(tile={**base.tile, **tile})
            fewer = {axis: max(size // 8, 1) for axis, size in plan.tile.items() if axis == "BLOCK_C"}
            plans[f"{pixels}-pixels{suffix}-double"] = plan._replace(tile={**plan.tile, **fewer})
    return plans


def bucket_of(grid: Grid, input: Tensor, suffix: str = "") -> str:
    """The bucket of a call's plan."""
    return f"{math.prod(grid.group)}-pixels{suffix}{'-double' if input.dtype == torch.float64 else ''}"


def clip_classes(plan: Plan, classes: int) -> Plan:
    """The plan with no more classes at a time than there are."""
    return plan._replace(tile={**plan.tile, "BLOCK_C": min(plan.tile["BLOCK_C"], next_power_of_2(classes))})


def cut_groups(
    kernel: Any, defaults: Mapping[str, Plan], grid: Grid, arguments: dict[str, Any]
) -> tuple[str, Plan, dict[str, int]]:
    """Bucket and plan of a call, and the arguments by which its programs share the groups."""
    input = arguments["input"]
    down, across = arguments["out_height"], arguments["out_width"]
    if grid.spread[0]:
        down = (arguments["height"] + grid.taps[0] - 1) * arguments["row_passes"]
    if grid.spread[1]:
        across = (arguments["width"] + grid.taps[1] - 1) * arguments["column_passes"]
    bucket = bucket_of(grid, input)
    plan = choose(kernel, bucket, defaults, input.device)
    if "BLOCK_C" in plan.tile:
        plan = clip_classes(plan, input.shape[1])
    return bucket, plan, {"column_groups": across, "blocks": cdiv(down * across, plan.tile["BLOCK_G"])}


def launch_groups(kernel: Any, defaults: Mapping[str, Plan], grid: Grid, arguments: dict[str, Any]) -> None:
    """Launches a kernel that has a program for each block of an image's groups."""
    bucket, plan, cut = cut_groups(kernel, defaults, grid, arguments)
    launch(kernel, bucket, plan, len(arguments["input"]) * cut["blocks"], arguments | cut)
