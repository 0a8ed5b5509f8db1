"""conv_relu_pool2d's Triton kernel: convolution, bias, ReLU and max pooling, without the full-resolution map.

An implicit matrix product: rows are pooling windows, columns output channels, and the sum runs over the kernel's taps
and input channels. A program computes one position of all its windows after the other and keeps the largest value of
each; bias and ReLU, which commute with the maximum, come once per window. Pooled values and positions are all that is
written. NCHW and channels_last are read by their strides.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastseg._tf32 import convolutions_take_tf32
from fastseg.kernels.launch import Plan, cdiv, choose, fit, index_type, launch, next_power_of_2, replayed, tile_map
from fastseg.kernels.relu_pool2d import keep_larger, locate, reach, store_pooled

FAR = tl.constexpr(2**29)  # farther than any image reaches, and two of them still fit into 32 bits

# ---- parts that the backward kernels share ----


@triton.jit
def taps(step, CHANNELS: tl.constexpr, KERNEL: tl.constexpr, BLOCK_K: tl.constexpr):
    """Kernel row, kernel column and channel [BLOCK_K] of the products of a step, and which of them exist.

    Channels run fastest. Where they come in whole blocks, a step has one tap, so that its rows and columns are the same
    throughout and the compiler reads whole vectors of channels.
    """
    local = tl.arange(0, BLOCK_K)
    if CHANNELS % BLOCK_K == 0:
        tap = tl.zeros((BLOCK_K,), tl.int32) + step // (CHANNELS // BLOCK_K)
        channel = step % (CHANNELS // BLOCK_K) * BLOCK_K + local
    else:
        tap, channel = (step * BLOCK_K + local) // CHANNELS, (step * BLOCK_K + local) % CHANNELS
    return tap // KERNEL[1], tap % KERNEL[1], channel, tap < KERNEL[0] * KERNEL[1]


@triton.jit
def load_patches(
    image, rows, columns, exist, step, height, width, strides,
    CHANNELS: tl.constexpr, KERNEL: tl.constexpr, DILATION: tl.constexpr, INDEX: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """What a step's taps see [BLOCK_P, BLOCK_K], for patches whose first tap is at rows and columns of an image."""
    tap_y, tap_x, channel, taps_exist = taps(step, CHANNELS, KERNEL, BLOCK_K)
    tap_y, tap_x = tap_y * DILATION[0], tap_x * DILATION[1]
    pixels = rows.to(INDEX) * strides[2] + columns.to(INDEX) * strides[3]
    products = tap_y.to(INDEX) * strides[2] + tap_x.to(INDEX) * strides[3] + channel.to(INDEX) * strides[1]
    # What doesn't exist is moved out of the image, whose border has to be watched anyway: no more masks.
    y = tl.where(exist, rows, -FAR)[:, None] + tl.where(taps_exist, tap_y, -FAR)[None, :]
    x = columns[:, None] + tap_x[None, :]
    mask = within(y, height) & within(x, width)
    return tl.load(image + (pixels[:, None] + products[None, :]), mask, other=0)


@triton.jit
def within(at, size):
    """Whether 0 <= at < size, in one comparison."""
    return at.to(tl.uint32, bitcast=True) < tl.cast(size, tl.uint32)


@triton.jit
def window_pixels(
    window_y, window_x, position, inside, convolved_h, convolved_w,
    STRIDE: tl.constexpr, PADDING: tl.constexpr, POOL: tl.constexpr, POOL_STRIDE: tl.constexpr,
    POOL_PADDING: tl.constexpr, CLIPPED: tl.constexpr,
):  # fmt: skip
    """Where the patches of windows' pixels at a position begin in the input, and which of the pixels exist.

    Unless windows are CLIPPED by the map's border, all do, but for windows that don't exist themselves.
    """
    row = window_y * POOL_STRIDE[0] - POOL_PADDING[0] + position // POOL[1]
    column = window_x * POOL_STRIDE[1] - POOL_PADDING[1] + position % POOL[1]
    exist = inside
    if CLIPPED:
        exist = exist & within(row, convolved_h) & within(column, convolved_w)
    return row * STRIDE[0] - PADDING[0], column * STRIDE[1] - PADDING[1], exist


# ---- forward ----


@triton.jit
def _load_weights(
    weight, step, channels, channels_exist, strides,
    CHANNELS: tl.constexpr, KERNEL: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A step's weights [BLOCK_K, BLOCK_O]."""
    tap_y, tap_x, channel, exist = taps(step, CHANNELS, KERNEL, BLOCK_K)
    products = channel * strides[1] + tap_y * strides[2] + tap_x * strides[3]
    offsets = products[:, None] + (channels * strides[0])[None, :]
    return tl.load(weight + offsets, exist[:, None] & channels_exist[None, :], other=0)


@triton.jit
def conv_relu_pool2d_forward(
    input, weight, bias, output, positions,
    height, width, convolved_h, convolved_w, pooled_h, pooled_w, down, across, channel_blocks,
    input_strides, weight_strides, output_strides,
    CHANNELS: tl.constexpr, OUT_CHANNELS: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr,
    PADDING: tl.constexpr, DILATION: tl.constexpr, POOL: tl.constexpr, POOL_STRIDE: tl.constexpr,
    POOL_PADDING: tl.constexpr, CLIPPED: tl.constexpr, PRECISION: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_P: tl.constexpr, TILE_W: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Pooled values, and positions where they are wanted."""
    STEPS: tl.constexpr = (CHANNELS * KERNEL[0] * KERNEL[1] + BLOCK_K - 1) // BLOCK_K
    image, window_y, window_x, inside, channels, channels_exist = locate(
        tl.program_id(0), down, across, channel_blocks, pooled_h, pooled_w, OUT_CHANNELS, BLOCK_P, TILE_W, BLOCK_O
    )
    input += image * input_strides[0]
    if STEPS == 1:  # all of the weights are one tile: read once, not for every position
        weights = _load_weights(weight, 0, channels, channels_exist, weight_strides, CHANNELS, KERNEL, BLOCK_K)
    largest = tl.full((BLOCK_P, BLOCK_O), float("-inf"), tl.float32)
    chosen = tl.zeros((BLOCK_P, BLOCK_O), tl.int32)
    for position in range(POOL[0] * POOL[1]):
        rows, columns, exist = window_pixels(
            window_y, window_x, position, inside, convolved_h, convolved_w, STRIDE, PADDING, POOL, POOL_STRIDE,
            POOL_PADDING, CLIPPED,
        )  # fmt: skip
        value = tl.zeros((BLOCK_P, BLOCK_O), tl.float32)
        for step in range(STEPS):
            patches = load_patches(
                input, rows, columns, exist, step, height, width, input_strides, CHANNELS, KERNEL, DILATION, INDEX,
                BLOCK_K,
            )  # fmt: skip
            if STEPS > 1:
                weights = _load_weights(
                    weight, step, channels, channels_exist, weight_strides, CHANNELS, KERNEL, BLOCK_K
                )
            value = tl.dot(patches, weights, value, input_precision=PRECISION)
        if CLIPPED:
            value = tl.where(exist[:, None], value, float("-inf"))
        largest, chosen = keep_larger(value, position, largest, chosen)
    store_pooled(
        largest, chosen, bias, output, positions, image, window_y, window_x, inside, channels, channels_exist,
        output_strides, INDEX,
    )  # fmt: skip


# ---- launcher ----

# No other tiles were tried on a GPU yet. 128 windows by 64 channels on 8 warps (two groups of four for Hopper's matrix
# instruction) leave each thread 32 sums, 32 maxima and 32 positions.
FORWARD_PLANS = {
    f"{kind}-o{o}-k{k}": Plan({"BLOCK_P": windows, "BLOCK_O": o, "BLOCK_K": k}, num_warps=warps, num_stages=3)
    for kind, windows in (("half", 128), ("single", 64))
    for o, warps in ((16, 4), (32, 4), (64, 8))
    for k in (16, 32)
}
LEAST_WINDOWS = 64  # smallest BLOCK_P: Hopper's matrix instruction has 64 rows


def bucket_of(weight: Tensor, channels: int, products: int, most_products: int = 32) -> str:
    """The bucket of a matrix product: its weight's dtype's size, its columns, and how many products a sum has."""
    kind = "half" if weight.dtype.itemsize == 2 else "single"
    return f"{kind}-o{next_power_of_2(channels, 16, 64)}-k{next_power_of_2(products, 16, most_products)}"


def _takes_tf32(weight: Tensor) -> bool:
    return weight.dtype == torch.float32 and not weight.is_cpu and convolutions_take_tf32()


def sizes_of(input: Tensor, convolved: tuple[int, int], output: Tensor) -> dict[str, int]:
    """Height and width of the three maps."""
    return {
        "height": input.shape[2], "width": input.shape[3], "convolved_h": convolved[0], "convolved_w": convolved[1],
        "pooled_h": output.shape[2], "pooled_w": output.shape[3],
    }  # fmt: skip


def geometry_constants(weight: Tensor, pooled: Any, options: Options) -> dict[str, Any]:
    """The constants of a call, for any of the kernels; ``pooled`` are the height and the width of the output."""
    out_channels, channels, *kernel = weight.shape
    convolved, geometry, takes_tf32 = options
    size, stride, padding = geometry.pool
    ends = [(pooled[axis] - 1) * stride[axis] - padding[axis] + size[axis] for axis in (0, 1)]
    return {
        "CHANNELS": channels, "OUT_CHANNELS": out_channels, "KERNEL": tuple(kernel), "STRIDE": geometry.stride,
        "PADDING": geometry.padding, "DILATION": geometry.dilation, "POOL": size, "POOL_STRIDE": stride,
        "POOL_PADDING": padding, "CLIPPED": max(padding) > 0 or ends[0] > convolved[0] or ends[1] > convolved[1],
        "PRECISION": "tf32" if takes_tf32 else "ieee",
    }  # fmt: skip


class ForwardTensors(NamedTuple):
    """What forward reads and fills; see `fastseg.ops.conv_relu_pool2d`."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None
    output: Tensor
    positions: Tensor | None


class Options(NamedTuple):
    """Height and width of the convolution's output, the geometry (of one group), and torch's setting of TF32."""

    convolved: tuple[int, int]
    geometry: Any
    takes_tf32: bool


def options_of(weight: Tensor, convolved: tuple[int, ...], geometry: Any) -> Options:
    """The options of a call."""
    return Options((convolved[0], convolved[1]), geometry, _takes_tf32(weight))


@replayed
def forward(tensors: ForwardTensors, options: Options) -> None:
    """Fills output and positions."""
    input, weight, _, output, _ = tensors
    if output.numel() == 0:
        return
    images, out_channels, pooled_h, pooled_w = output.shape
    bucket, device = bucket_of(weight, out_channels, weight[0].numel()), input.device
    plan = choose(conv_relu_pool2d_forward, bucket, FORWARD_PLANS, device)
    channel_blocks = cdiv(out_channels, plan.tile["BLOCK_O"])
    plan = fit(plan, "BLOCK_P", LEAST_WINDOWS, images * pooled_h * pooled_w * channel_blocks, device)
    tiling = tile_map(plan.tile["BLOCK_P"], pooled_h, pooled_w)
    arguments = {
        **forward_arguments(tensors, options), **tiling.arguments, "channel_blocks": channel_blocks,
    }  # fmt: skip
    launch(conv_relu_pool2d_forward, bucket, plan, images * tiling.count * channel_blocks, arguments)


def forward_arguments(tensors: ForwardTensors, options: Options) -> dict[str, Any]:
    """What forward kernels take beside how their programs share the windows."""
    input, weight, _, output, _ = tensors
    return {
        **tensors._asdict(), **sizes_of(input, options.convolved, output), "input_strides": input.stride(),
        "weight_strides": weight.stride(), "output_strides": output.stride(),
        "INDEX": index_type(reach(input, output)), **geometry_constants(weight, output.shape[2:], options),
    }  # fmt: skip
