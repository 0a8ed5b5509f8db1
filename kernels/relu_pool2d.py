"""conv_relu_pool2d's Triton kernels behind a library's convolution: bias, ReLU, max pooling and positions in one pass.

They are relu_pool2d's own, too, whose map anything may have made. Forward reads the map once. Backward writes the
gradient of it from the pooled one, reading that and the positions alone. A tile is [BLOCK_P pixels, BLOCK_O channels];
whichever of the two lies side by side in memory is read by neighbouring threads.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastseg.kernels.launch import (
    BACKEND,
    Plan,
    Tiling,
    cdiv,
    choose,
    fit,
    fold,
    index_type,
    launch,
    next_power_of_2,
    replayed,
    scratch,
    tile_map,
)

CUT = tl.constexpr(255)  # the position of a window whose maximum ReLU cut


@triton.jit
def locate(
    program, down, across, channel_blocks, height, width,
    CHANNELS: tl.constexpr, BLOCK_P: tl.constexpr, TILE_W: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """A program's image; rows, columns and existence of its pixels [BLOCK_P]; its channels and theirs [BLOCK_O].

    Channels run fastest over the programs, then the tiles of a map of height x width, then the images.
    """
    tile = program // channel_blocks
    image = (tile // (down * across)).to(tl.int64)
    local = tl.arange(0, BLOCK_P)
    rows = tile // across % down * (BLOCK_P // TILE_W) + local // TILE_W
    columns = tile % across * TILE_W + local % TILE_W
    channels = program % channel_blocks * BLOCK_O + tl.arange(0, BLOCK_O)
    return image, rows, columns, (rows < height) & (columns < width), channels, channels < CHANNELS


@triton.jit
def offsets_of(rows, columns, channels, strides, INDEX: tl.constexpr):
    """Offsets [BLOCK_P, BLOCK_O] within an image; strides are those of a tensor's four axes."""
    pixels = rows.to(INDEX) * strides[2] + columns.to(INDEX) * strides[3]
    return pixels[:, None] + (channels.to(INDEX) * strides[1])[None, :]


@triton.jit
def keep_larger(value, position, largest, chosen):
    """The largest value so far and its position, as max_pool2d chooses: the first of equal ones, but the last NaN."""
    larger = (value > largest) | (value != value)
    return tl.where(larger, value, largest), tl.where(larger, position, chosen)


@triton.jit
def store_pooled(
    largest, chosen, bias, output, positions, image, rows, columns, exist, channels, channels_exist, strides,
    INDEX: tl.constexpr,
):  # fmt: skip
    """Stores ReLU of the windows' maxima with their bias, and positions, CUT where it, once rounded, leaves nothing."""
    if bias is not None:
        largest += tl.load(bias + channels, channels_exist, other=0).to(tl.float32)[None, :]
    pooled = tl.where(largest <= 0, 0.0, largest).to(output.dtype.element_ty)  # keeps NaN
    mask = exist[:, None] & channels_exist[None, :]
    offsets = image * strides[0] + offsets_of(rows, columns, channels, strides, INDEX)
    tl.store(output + offsets, pooled, mask)
    if positions is not None:
        tl.store(positions + offsets, tl.where(pooled.to(largest.dtype) <= 0, CUT, chosen).to(tl.uint8), mask)


@triton.jit
def load_unpooled(
    grad_output, positions, image, rows, columns, exist, channels, channels_exist,
    pooled_h, pooled_w, grad_strides, position_strides,
    POOL: tl.constexpr, POOL_STRIDE: tl.constexpr, POOL_PADDING: tl.constexpr, ACC: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """The gradient [BLOCK_P, BLOCK_O] of pixels of the convolution's output.

    The sum over the windows that hold a pixel of the gradients of those whose maximum it is.
    """
    total = tl.zeros((rows.shape[0], channels.shape[0]), ACC)
    ACROSS: tl.constexpr = (POOL[1] - 1) // POOL_STRIDE[1] + 1  # windows in a row that hold a pixel, at most
    DOWN: tl.constexpr = (POOL[0] - 1) // POOL_STRIDE[0] + 1
    for window in range(DOWN * ACROSS):
        window_y = (rows + POOL_PADDING[0]) // POOL_STRIDE[0] - window // ACROSS
        window_x = (columns + POOL_PADDING[1]) // POOL_STRIDE[1] - window % ACROSS
        local_y = rows + POOL_PADDING[0] - window_y * POOL_STRIDE[0]
        local_x = columns + POOL_PADDING[1] - window_x * POOL_STRIDE[1]
        holds = exist & (window_y >= 0) & (window_y < pooled_h) & (local_y < POOL[0])
        holds = holds & (window_x >= 0) & (window_x < pooled_w) & (local_x < POOL[1])
        mask = holds[:, None] & channels_exist[None, :]
        at = image * position_strides[0] + offsets_of(window_y, window_x, channels, position_strides, INDEX)
        position = tl.load(positions + at, mask, other=255).to(tl.int32)
        at = image * grad_strides[0] + offsets_of(window_y, window_x, channels, grad_strides, INDEX)
        gradient = tl.load(grad_output + at, mask, other=0).to(ACC)
        total += tl.where(position == (local_y * POOL[1] + local_x)[:, None], gradient, 0.0)
    return total


@triton.jit
def load_shifted(pixels, channels, source, skip, owned, ACC: tl.constexpr, INDEX: tl.constexpr):
    """The map with its bias, -inf beyond its edges; its ReLU goes to the skip, where that is ``owned``.

    Pixels are (image, rows, columns, existence), channels (numbers, existence, bias), ``source`` (map, height, width,
    strides), and ``skip`` (map or None, strides).
    """
    image, rows, columns, exist = pixels
    numbers, numbers_exist, shift = channels
    convolved, height, width, strides = source
    exist = exist & (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    mask = exist[:, None] & numbers_exist[None, :]
    at = image * strides[0] + offsets_of(rows, columns, numbers, strides, INDEX)
    value = tl.load(convolved + at, mask, other=float("-inf")).to(ACC) + shift[None, :]
    value = value.to(convolved.dtype.element_ty).to(ACC)  # as the map would be: so the same values are equal
    if skip[0] is not None:
        at = image * skip[1][0] + offsets_of(rows, columns, numbers, skip[1], INDEX)
        tl.store(skip[0] + at, tl.where(value <= 0, 0.0, value), mask & owned)
    return value


@triton.jit
def relu_pool2d_forward(
    convolved, bias, output, positions, skip,
    convolved_h, convolved_w, pooled_h, pooled_w, cells_h, cells_w, down, across, channel_blocks,
    convolved_strides, output_strides, skip_strides,
    CHANNELS: tl.constexpr, POOL: tl.constexpr, POOL_STRIDE: tl.constexpr, POOL_PADDING: tl.constexpr,
    CELL: tl.constexpr, PAIRS: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_P: tl.constexpr, TILE_W: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """Pools ReLU of the convolution's output and its bias; stores the un-pooled map, too, where ``skip`` is given.

    Cells lie as the windows do, and more of them where needed to hold every pixel of the map. Each is as large as a
    window, or as the windows' stride where a skip wants also what lies between them; what lies within the stride it
    stores. Where windows don't overlap, so that no other program reads that, ``skip`` may be ``convolved`` itself.

    With PAIRS, cells are two columns wide and lie side by side in memory, which is read in whole vectors.
    """
    ACC: tl.constexpr = tl.float64 if convolved.dtype.element_ty == tl.float64 else tl.float32
    image, cell_y, cell_x, inside, channels, channels_exist = locate(
        tl.program_id(0), down, across, channel_blocks, cells_h, cells_w, CHANNELS, BLOCK_P, TILE_W, BLOCK_O
    )
    shift = tl.zeros((BLOCK_O,), ACC)
    if bias is not None:
        shift += tl.load(bias + channels, channels_exist, other=0).to(ACC)
    largest = tl.full((BLOCK_P, BLOCK_O), float("-inf"), ACC)
    chosen = tl.zeros((BLOCK_P, BLOCK_O), tl.int32)
    of_channels = channels, channels_exist, shift
    source = convolved, convolved_h, convolved_w, convolved_strides
    if PAIRS:
        _, rows, columns, exist, _, _ = locate(
            tl.program_id(0), down, across, channel_blocks, cells_h, 2 * cells_w, CHANNELS, 2 * BLOCK_P, 2 * TILE_W,
            BLOCK_O,
        )  # fmt: skip
        CELL_H: tl.constexpr = CELL[0]
        for local_y in tl.static_range(CELL_H):
            pixels = image, rows * POOL_STRIDE[0] - POOL_PADDING[0] + local_y, columns - POOL_PADDING[1], exist
            values = load_shifted(
                pixels, of_channels, source, (skip, skip_strides), local_y < POOL_STRIDE[0], ACC, INDEX
            )
            if local_y < POOL[0]:
                near, far = tl.split(tl.reshape(values, (BLOCK_P, 2)))
                largest, chosen = keep_larger(near[:, None], local_y * POOL[1], largest, chosen)
                if POOL[1] == 2:
                    largest, chosen = keep_larger(far[:, None], local_y * POOL[1] + 1, largest, chosen)
    else:
        for place in range(CELL[0] * CELL[1]):
            local_y, local_x = place // CELL[1], place % CELL[1]
            row = cell_y * POOL_STRIDE[0] - POOL_PADDING[0] + local_y
            pixels = image, row, cell_x * POOL_STRIDE[1] - POOL_PADDING[1] + local_x, inside
            owned = (local_y < POOL_STRIDE[0]) & (local_x < POOL_STRIDE[1])
            value = load_shifted(pixels, of_channels, source, (skip, skip_strides), owned, ACC, INDEX)
            if skip is not None:
                value = tl.where((local_y < POOL[0]) & (local_x < POOL[1]), value, float("-inf"))
            largest, chosen = keep_larger(value, local_y * POOL[1] + local_x, largest, chosen)
    is_window = inside & (cell_y < pooled_h) & (cell_x < pooled_w)
    store_pooled(
        largest, chosen, None, output, positions, image, cell_y, cell_x, is_window, channels, channels_exist,
        output_strides, INDEX,
    )  # fmt: skip


@triton.jit
def relu_pool2d_backward(
    grad_output, positions, skip, grad_skip, grad_convolved, bias_partials,
    convolved_h, convolved_w, pooled_h, pooled_w, down, across, channel_blocks,
    grad_strides, position_strides, skip_strides, grad_skip_strides, grad_convolved_strides,
    CHANNELS: tl.constexpr, POOL: tl.constexpr, POOL_STRIDE: tl.constexpr, POOL_PADDING: tl.constexpr,
    INDEX: tl.constexpr, BLOCK_P: tl.constexpr, TILE_W: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """The gradient of the convolution's output; and each program's share of the bias' gradient, [programs, CHANNELS].

    It comes from the pooled output (``grad_output`` may be None), from the skip, or from both.
    """
    ACC: tl.constexpr = tl.float64 if grad_convolved.dtype.element_ty == tl.float64 else tl.float32
    program = tl.program_id(0)
    image, rows, columns, exist, channels, channels_exist = locate(
        program, down, across, channel_blocks, convolved_h, convolved_w, CHANNELS, BLOCK_P, TILE_W, BLOCK_O
    )
    mask = exist[:, None] & channels_exist[None, :]
    gradient = tl.zeros((BLOCK_P, BLOCK_O), ACC)
    if grad_output is not None:
        gradient += load_unpooled(
            grad_output, positions, image, rows, columns, exist, channels, channels_exist, pooled_h, pooled_w,
            grad_strides, position_strides, POOL, POOL_STRIDE, POOL_PADDING, ACC, INDEX,
        )  # fmt: skip
    if grad_skip is not None:
        at = image * skip_strides[0] + offsets_of(rows, columns, channels, skip_strides, INDEX)
        passed = tl.load(skip + at, mask, other=0).to(ACC) <= 0
        at = image * grad_skip_strides[0] + offsets_of(rows, columns, channels, grad_skip_strides, INDEX)
        gradient += tl.where(passed, 0.0, tl.load(grad_skip + at, mask, other=0).to(ACC))
    at = image * grad_convolved_strides[0] + offsets_of(rows, columns, channels, grad_convolved_strides, INDEX)
    tl.store(grad_convolved + at, gradient, mask)
    if bias_partials is not None:
        row = (program // channel_blocks).to(tl.int64) * CHANNELS
        tl.store(bias_partials + row + channels, tl.sum(gradient, 0), channels_exist)


# ---- launchers ----


MOST_PIXELS = 128  # of a tile of channels: each pixel has numbers of its own, too, in registers


def _plans(pixels: int, channels: int) -> dict[str, Plan]:
    """Tiles of so many elements (of half as many doubles) where pixels, and where channels are neighbours in memory."""
    plans = {}
    for suffix, halves in (("", 1), ("-double", 2)):
        plans[f"pixels-inner{suffix}"] = Plan({"BLOCK_P": pixels // halves, "BLOCK_O": 1})
        for c in (16, 32, 64, 128):
            tile = {"BLOCK_P": min(channels // c, MOST_PIXELS) // halves, "BLOCK_O": c}
            plans[f"channels-inner-{c}{suffix}"] = Plan(tile)
    return plans


# Small tiles spend much on finding their pixels. Forward has a whole window for each element: its tiles are smaller. In
# pairs, threads have as many cells as two vectors of 16 bytes hold: with other numbers Triton would pass values between
# them. Strided columns lie in a line of memory for each cell of a thread: with 16 cells 3x3 windows took 0.60 ms
# (32 x 64 x 256^2, NCHW), with 4, which touch half as many lines, they weren't measured yet. Of a copy's bandwidth, 2x2
# windows get 80% forward and 69% backward in NCHW, 81% and 83% in channels_last (H200, bfloat16, 2026-11-27).
FORWARD_PLANS = _plans(pixels=2048, channels=2048)
for size in (2, 4, 8):
    FORWARD_PLANS[f"pairs-{size}"] = Plan({"BLOCK_P": 1024 // size, "BLOCK_O": 1})
    FORWARD_PLANS[f"strided-{size}"] = Plan({"BLOCK_P": 512 if size < 8 else 256, "BLOCK_O": 1})
BACKWARD_PLANS = _plans(pixels=4096, channels=8192)
LEAST_PIXELS = 16  # smallest BLOCK_P
THREADS_OF_A_WARP = 64 if BACKEND == "hip" else 32


def _bucket(tensor: Tensor) -> str:
    channels, suffix = tensor.shape[1], "-double" if tensor.dtype == torch.float64 else ""
    if tensor.stride(1) != 1 or channels == 1:
        return f"pixels-inner{suffix}"
    return f"channels-inner-{next_power_of_2(channels, 16, 128)}{suffix}"


def reach(*tensors: Tensor | None) -> int:
    """The largest offset within an image of any of the tensors, [N, C, H, W] each."""
    reaches = (
        sum((size - 1) * stride for size, stride in zip(tensor.shape[1:], tensor.stride()[1:], strict=True))
        for tensor in tensors
        if tensor is not None and tensor.numel() > 0
    )
    return max(reaches, default=0)


def strides_of(tensor: Tensor | None) -> tuple[int, ...]:
    """A tensor's strides; zeros where there is none."""
    return (0, 0, 0, 0) if tensor is None else tensor.stride()


def _cut(
    kernel: Any, bucket: str, defaults: dict[str, Plan], map: Tensor, height: int, width: int
) -> tuple[Plan, Tiling, int]:
    """The plan for a map, the tiling of ``height`` x ``width`` pixels of it, and its blocks of channels."""
    images, channels, *_ = map.shape
    pixels = height * width
    plan = fold(choose(kernel, bucket, defaults, map.device), "BLOCK_P", pixels, "BLOCK_O", channels)
    # No fewer elements than threads: several threads would have the same one, and where the skip overwrites the map one
    # of them would read what another has stored.
    least = max(LEAST_PIXELS, THREADS_OF_A_WARP * plan.num_warps // plan.tile["BLOCK_O"])
    plan = fit(plan, "BLOCK_P", least, images * pixels * channels // plan.tile["BLOCK_O"], map.device)
    return plan, tile_map(plan.tile["BLOCK_P"], height, width), cdiv(channels, plan.tile["BLOCK_O"])


class ForwardTensors(NamedTuple):
    """A convolution's output, its bias, and what forward fills; see `fastseg.ops.conv_relu_pool2d`."""

    convolved: Tensor
    bias: Tensor | None
    output: Tensor
    positions: Tensor | None
    skip: Tensor | None


class BackwardTensors(NamedTuple):
    """What backward fills, and what it reads."""

    grad_convolved: Tensor
    grad_output: Tensor | None
    positions: Tensor | None
    skip: Tensor | None
    grad_skip: Tensor | None


@replayed
def forward(tensors: ForwardTensors, geometry: Any) -> None:
    """Fills output, positions and skip from a convolution's output."""
    convolved, _, output, _, skip = tensors
    if output.numel() == 0:
        return
    images, channels, convolved_h, convolved_w = convolved.shape
    size, stride, padding = geometry.pool
    cell, (cells_h, cells_w) = size, output.shape[2:]
    if skip is not None:
        cell = tuple(max(pair) for pair in zip(size, stride, strict=True))
        cells_h = max(cells_h, cdiv(convolved_h + padding[0], stride[0]))
        cells_w = max(cells_w, cdiv(convolved_w + padding[1], stride[1]))
    bucket = _bucket(convolved)
    if bucket.startswith("pixels") and stride[1] > 1:
        in_pairs = cell[1] == stride[1] == 2 and convolved.stride(3) == 1
        bucket = f"{'pairs' if in_pairs else 'strided'}-{convolved.itemsize}"
    plan, tiling, channel_blocks = _cut(relu_pool2d_forward, bucket, FORWARD_PLANS, convolved, cells_h, cells_w)
    arguments = {
        **tensors._asdict(), "convolved_h": convolved_h, "convolved_w": convolved_w, "pooled_h": output.shape[2],
        "pooled_w": output.shape[3], "cells_h": cells_h, "cells_w": cells_w, **tiling.arguments,
        "channel_blocks": channel_blocks,
        "convolved_strides": convolved.stride(), "output_strides": output.stride(),
        "skip_strides": strides_of(skip), "CHANNELS": channels, "POOL": size, "POOL_STRIDE": stride,
        "POOL_PADDING": padding, "CELL": cell,
        "PAIRS": bucket.startswith("pairs") and plan.tile["BLOCK_O"] == 1,
        "INDEX": index_type(reach(convolved, output, skip)),
    }  # fmt: skip
    programs = images * tiling.count * channel_blocks
    launch(relu_pool2d_forward, bucket, plan, programs, arguments)


def backward(tensors: BackwardTensors, with_bias: bool, geometry: Any) -> Tensor | None:
    """Fills grad_convolved; returns the bias' gradient (in the dtype of the arithmetic) where it is wanted."""
    partials = _backward(tensors, (with_bias, geometry))
    return None if partials is None else partials.sum(0)


@replayed
def _backward(tensors: BackwardTensors, options: tuple[bool, Any]) -> Tensor | None:
    grad_convolved, grad_output, positions, skip, grad_skip = tensors
    with_bias, geometry = options
    images, channels, convolved_h, convolved_w = grad_convolved.shape
    accumulated = torch.float64 if grad_convolved.dtype == torch.float64 else torch.float32
    device = grad_convolved.device
    bucket = _bucket(grad_convolved)
    plan, tiling, channel_blocks = _cut(
        relu_pool2d_backward, bucket, BACKWARD_PLANS, grad_convolved, convolved_h, convolved_w
    )
    partials = scratch((images * tiling.count, channels), accumulated, device) if with_bias else None
    pooled = (1, 1) if grad_output is None else grad_output.shape[2:]
    size, stride, padding = geometry.pool
    arguments = {
        **tensors._asdict(), "positions": positions if grad_output is not None else None, "bias_partials": partials,
        "convolved_h": convolved_h, "convolved_w": convolved_w, "pooled_h": pooled[0], "pooled_w": pooled[1],
        **tiling.arguments, "channel_blocks": channel_blocks,
        "grad_strides": strides_of(grad_output),
        "position_strides": strides_of(positions), "skip_strides": strides_of(skip),
        "grad_skip_strides": strides_of(grad_skip), "grad_convolved_strides": grad_convolved.stride(),
        "CHANNELS": channels, "POOL": size, "POOL_STRIDE": stride, "POOL_PADDING": padding,
        "INDEX": index_type(reach(grad_convolved, grad_output, positions, skip, grad_skip)),
    }  # fmt: skip
    programs = images * tiling.count * channel_blocks if grad_convolved.numel() else 0
    launch(relu_pool2d_backward, bucket, plan, programs, arguments)
    return partials
