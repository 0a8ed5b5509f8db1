"""conv_relu_pool2d's Triton kernel for first layers: few input channels, windows of four positions.

Reading is what first layers cost: the patches of a window's four positions overlap, and channels are too few to be read
as vectors. So a window's whole field (all that it sees, 4x4 pixels for a 3x3 kernel and a 2x2 pool) is read once and
multiplied by weights that are spread over the field once for each position, side by side: four times the columns, and
no more reading. Products with the zeros between them are the price. What that saves wasn't measured on a GPU yet.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastseg.kernels.conv_relu_pool2d import (
    ForwardTensors,
    Options,
    bucket_of,
    forward_arguments,
    load_patches,
    taps,
    window_pixels,
    within,
)
from fastseg.kernels.conv_relu_pool2d import options_of as options_of
from fastseg.kernels.launch import Plan, cdiv, choose, launch, multiprocessors, next_power_of_2, replayed, tile_map
from fastseg.kernels.relu_pool2d import keep_larger, locate, store_pooled

POSITIONS = tl.constexpr(4)


@triton.jit
def _load_fields(
    input, image, window_y, window_x, inside, height, width, strides,
    CHANNELS: tl.constexpr, FIELD: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr,
    POOL_STRIDE: tl.constexpr, POOL_PADDING: tl.constexpr, INDEX: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """What windows see [BLOCK_P, BLOCK_K]."""
    rows = (window_y * POOL_STRIDE[0] - POOL_PADDING[0]) * STRIDE[0] - PADDING[0]
    columns = (window_x * POOL_STRIDE[1] - POOL_PADDING[1]) * STRIDE[1] - PADDING[1]
    return load_patches(
        input + image * strides[0], rows, columns, inside, 0, height, width, strides, CHANNELS, FIELD, (1, 1), INDEX,
        BLOCK_K,
    )  # fmt: skip


@triton.jit
def _disturbance(fields):
    """Zero; NaN where the fields hold something that isn't finite."""
    return tl.sum(tl.ravel(fields.to(tl.float32) * 0.0), 0)


# ---- forward ----


@triton.jit
def _load_spread_weights(
    weight, channel_block, strides,
    CHANNELS: tl.constexpr, OUT_CHANNELS: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr,
    DILATION: tl.constexpr, POOL: tl.constexpr, FIELD: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Weights [BLOCK_K, 4 * BLOCK_O]: for each position those of the channels, where it has its taps in the field."""
    field_y, field_x, channel, exist = taps(0, CHANNELS, FIELD, BLOCK_K)
    column = tl.arange(0, POSITIONS * BLOCK_O)
    position, out_channel = column // BLOCK_O, channel_block * BLOCK_O + column % BLOCK_O
    y = field_y[:, None] - (position // POOL[1] * STRIDE[0])[None, :]
    x = field_x[:, None] - (position % POOL[1] * STRIDE[1])[None, :]
    mask = exist[:, None] & (out_channel < OUT_CHANNELS)[None, :]
    mask = mask & (y >= 0) & (y % DILATION[0] == 0) & (y // DILATION[0] < KERNEL[0])
    mask = mask & (x >= 0) & (x % DILATION[1] == 0) & (x // DILATION[1] < KERNEL[1])
    offsets = y // DILATION[0] * strides[2] + x // DILATION[1] * strides[3] + (channel * strides[1])[:, None]
    return tl.load(weight + offsets + (out_channel * strides[0])[None, :], mask, other=0)


@triton.jit
def _pool_tap_by_tap(
    image, weight, window_y, window_x, inside, channels, channels_exist, height, width, convolved_h, convolved_w,
    input_strides, weight_strides,
    CHANNELS: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, DILATION: tl.constexpr,
    POOL: tl.constexpr, POOL_STRIDE: tl.constexpr, POOL_PADDING: tl.constexpr, CLIPPED: tl.constexpr,
    INDEX: tl.constexpr,
):  # fmt: skip
    """Windows' largest values, without the bias, and their positions [BLOCK_P, BLOCK_O]; slowly.

    Each position multiplies what it sees and nothing else.
    """
    largest = tl.full((window_y.shape[0], channels.shape[0]), float("-inf"), tl.float32)
    chosen = tl.zeros((window_y.shape[0], channels.shape[0]), tl.int32)
    for position in range(POSITIONS):
        rows, columns, exist = window_pixels(
            window_y, window_x, position, inside, convolved_h, convolved_w, STRIDE, PADDING, POOL, POOL_STRIDE,
            POOL_PADDING, CLIPPED,
        )  # fmt: skip
        value = tl.zeros((window_y.shape[0], channels.shape[0]), tl.float32)
        for product in range(KERNEL[0] * KERNEL[1] * CHANNELS):
            tap, channel = product // CHANNELS, product % CHANNELS
            y, x = rows + tap // KERNEL[1] * DILATION[0], columns + tap % KERNEL[1] * DILATION[1]
            plane = image + tl.cast(channel, INDEX) * input_strides[1]
            at = y.to(INDEX) * input_strides[2] + x.to(INDEX) * input_strides[3]
            pixels = tl.load(plane + at, exist & within(y, height) & within(x, width), other=0)
            at = channels * weight_strides[0] + channel * weight_strides[1]
            at += tap // KERNEL[1] * weight_strides[2] + tap % KERNEL[1] * weight_strides[3]
            weights = tl.load(weight + at, channels_exist, other=0)
            value += pixels.to(tl.float32)[:, None] * weights.to(tl.float32)[None, :]
        if CLIPPED:
            value = tl.where(exist[:, None], value, float("-inf"))
        largest, chosen = keep_larger(value, position, largest, chosen)
    return largest, chosen


@triton.jit
def conv_relu_pool2d_forward_fields(
    input, weight, bias, output, positions,
    height, width, convolved_h, convolved_w, pooled_h, pooled_w, down, across, channel_blocks, tiles, shares,
    input_strides, weight_strides, output_strides,
    CHANNELS: tl.constexpr, OUT_CHANNELS: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr,
    PADDING: tl.constexpr, DILATION: tl.constexpr, POOL: tl.constexpr, POOL_STRIDE: tl.constexpr,
    POOL_PADDING: tl.constexpr, CLIPPED: tl.constexpr, FIELD: tl.constexpr, PRECISION: tl.constexpr,
    INDEX: tl.constexpr, BLOCK_P: tl.constexpr, TILE_W: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Pooled values, and positions where they are wanted. A program keeps its weights for every ``shares``-th tile.

    A pixel that isn't finite, times the zeros of a position that doesn't see it, is NaN there, too: tiles with such
    pixels are done once more at the end, without those products.
    """
    channel_block = tl.program_id(0) % channel_blocks
    weights = _load_spread_weights(
        weight, channel_block, weight_strides, CHANNELS, OUT_CHANNELS, KERNEL, STRIDE, DILATION, POOL, FIELD, BLOCK_O,
        BLOCK_K,
    )  # fmt: skip
    disturbed = 0.0
    for tile in range(tl.program_id(0) // channel_blocks, tiles, shares):
        image, window_y, window_x, inside, channels, channels_exist = locate(
            tile * channel_blocks + channel_block, down, across, channel_blocks, pooled_h, pooled_w, OUT_CHANNELS,
            BLOCK_P, TILE_W, BLOCK_O,
        )  # fmt: skip
        fields = _load_fields(
            input, image, window_y, window_x, inside, height, width, input_strides, CHANNELS, FIELD, STRIDE, PADDING,
            POOL_STRIDE, POOL_PADDING, INDEX, BLOCK_K,
        )  # fmt: skip
        disturbed += _disturbance(fields)
        values = tl.dot(fields, weights, input_precision=PRECISION)  # [BLOCK_P, 4 * BLOCK_O]
        values = tl.permute(tl.reshape(values, (BLOCK_P, 2, 2, BLOCK_O)), (0, 3, 1, 2))
        even, odd = tl.split(values)  # positions 0 and 2, 1 and 3
        value_0, value_2 = tl.split(even)
        value_1, value_3 = tl.split(odd)
        largest = tl.full((BLOCK_P, BLOCK_O), float("-inf"), tl.float32)
        chosen = tl.zeros((BLOCK_P, BLOCK_O), tl.int32)
        for position in tl.static_range(4):
            value = value_0 if position == 0 else value_1 if position == 1 else value_2 if position == 2 else value_3
            if CLIPPED:
                _, _, exist = window_pixels(
                    window_y, window_x, position, inside, convolved_h, convolved_w, STRIDE, PADDING, POOL, POOL_STRIDE,
                    POOL_PADDING, CLIPPED,
                )  # fmt: skip
                value = tl.where(exist[:, None], value, float("-inf"))
            largest, chosen = keep_larger(value, position, largest, chosen)
        store_pooled(
            largest, chosen, bias, output, positions, image, window_y, window_x, inside, channels, channels_exist,
            output_strides, INDEX,
        )  # fmt: skip
    if disturbed != 0.0:
        tl.debug_barrier()  # other threads may have stored what is stored once more
        for tile in range(tl.program_id(0) // channel_blocks, tiles, shares):
            image, window_y, window_x, inside, channels, channels_exist = locate(
                tile * channel_blocks + channel_block, down, across, channel_blocks, pooled_h, pooled_w, OUT_CHANNELS,
                BLOCK_P, TILE_W, BLOCK_O,
            )  # fmt: skip
            fields = _load_fields(
                input, image, window_y, window_x, inside, height, width, input_strides, CHANNELS, FIELD, STRIDE,
                PADDING, POOL_STRIDE, POOL_PADDING, INDEX, BLOCK_K,
            )  # fmt: skip
            if _disturbance(fields) != 0.0:
                largest, chosen = _pool_tap_by_tap(
                    input + image * input_strides[0], weight, window_y, window_x, inside, channels, channels_exist,
                    height, width, convolved_h, convolved_w, input_strides, weight_strides, CHANNELS, KERNEL, STRIDE,
                    PADDING, DILATION, POOL, POOL_STRIDE, POOL_PADDING, CLIPPED, INDEX,
                )  # fmt: skip
                store_pooled(
                    largest, chosen, bias, output, positions, image, window_y, window_x, inside, channels,
                    channels_exist, output_strides, INDEX,
                )  # fmt: skip


# ---- launcher ----

# 0.35 ms for 32 x 3 x 512^2 to 64 channels in bfloat16 (H100, 2026-11-26); no other tiles were tried yet. 64 windows by
# four positions of 64 channels are 128 sums for each thread of four warps.
FORWARD_PLANS = {
    f"{kind}-o{o}-k{k}": Plan({"BLOCK_P": 64, "BLOCK_O": o}, num_warps=4, num_stages=2)
    for kind in ("half", "single")
    for o in (16, 32, 64)
    for k in (16, 32, 64)
}
# Programs for each multiprocessor; other numbers were not tried: they keep their weights and go over the windows in
# turns.
SHARES_PER_MULTIPROCESSOR = 2


@replayed
def forward(tensors: ForwardTensors, options: Options) -> None:
    """As `fastseg.kernels.conv_relu_pool2d.forward`, for calls that `algorithms.fits_fields` of."""
    input, weight, _, output, _ = tensors
    if output.numel() == 0:
        return
    field, device = options.geometry.field(weight.shape[2:]), input.device
    block_k = next_power_of_2(field[0] * field[1] * weight.shape[1], 16)
    bucket = bucket_of(weight, weight.shape[0], block_k, block_k)
    plan = choose(conv_relu_pool2d_forward_fields, bucket, FORWARD_PLANS, device)
    images, out_channels, pooled_h, pooled_w = output.shape
    tiling = tile_map(plan.tile["BLOCK_P"], pooled_h, pooled_w)
    channel_blocks, tiles = cdiv(out_channels, plan.tile["BLOCK_O"]), images * tiling.count
    shares = min(tiles, cdiv(SHARES_PER_MULTIPROCESSOR * multiprocessors(device), channel_blocks))
    arguments = {
        **forward_arguments(tensors, options), **tiling.arguments, "channel_blocks": channel_blocks, "tiles": tiles,
        "shares": shares, "FIELD": field, "BLOCK_K": block_k,
    }  # fmt: skip
    launch(conv_relu_pool2d_forward_fields, bucket, plan, shares * channel_blocks, arguments)
