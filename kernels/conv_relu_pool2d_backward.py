"""conv_relu_pool2d's gradients by Triton, from the pooled gradient and the positions: the dense one is never built.

The weight's gradient is a product over all windows of their gradients and the patches that won, position by position;
programs share the windows, and their sums are added in a fixed order. The input's gradient is gathered: each pixel sums
what comes from the windows whose winner it contributed to. No atomics, so that two runs are bitwise equal.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastseg.kernels.conv_relu_pool2d import (
    Options,
    bucket_of,
    geometry_constants,
    load_patches,
    sizes_of,
    window_pixels,
)
from fastseg.kernels.conv_relu_pool2d import options_of as options_of
from fastseg.kernels.launch import (
    Plan,
    cdiv,
    choose,
    fit,
    index_type,
    launch,
    multiprocessors,
    replayed,
    scratch,
    tile_map,
)
from fastseg.kernels.relu_pool2d import CUT, load_unpooled, locate, offsets_of, reach

# ---- weight and bias ----


@triton.jit
def conv_relu_pool2d_backward_weight(
    grad_output, positions, input, partials,
    height, width, convolved_h, convolved_w, pooled_h, pooled_w, down, across, channel_blocks, product_blocks, tiles,
    tiles_per_share, grad_strides, position_strides, input_strides,
    CHANNELS: tl.constexpr, OUT_CHANNELS: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr,
    PADDING: tl.constexpr, DILATION: tl.constexpr, POOL: tl.constexpr, POOL_STRIDE: tl.constexpr,
    POOL_PADDING: tl.constexpr, CLIPPED: tl.constexpr, PRECISION: tl.constexpr, WEIGHT: tl.constexpr,
    INDEX: tl.constexpr, BLOCK_P: tl.constexpr, TILE_W: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A share of the windows' sums, [shares, OUT_CHANNELS, products + 1]: the weight's gradient, then the bias'.

    A share is some tiles of windows in a row.
    """
    PRODUCTS: tl.constexpr = CHANNELS * KERNEL[0] * KERNEL[1]
    program = tl.program_id(0)
    step = program % product_blocks
    channel_block = program // product_blocks % channel_blocks
    share = program // product_blocks // channel_blocks
    total = tl.zeros((BLOCK_O, BLOCK_K), tl.float32)
    bias_total = tl.zeros((BLOCK_P, BLOCK_O), tl.float32)
    for tile in range(share * tiles_per_share, tl.minimum((share + 1) * tiles_per_share, tiles)):
        image, window_y, window_x, inside, channels, channels_exist = locate(
            tile * channel_blocks + channel_block, down, across, channel_blocks, pooled_h, pooled_w, OUT_CHANNELS,
            BLOCK_P, TILE_W, BLOCK_O,
        )  # fmt: skip
        mask = inside[:, None] & channels_exist[None, :]
        at = image * position_strides[0] + offsets_of(window_y, window_x, channels, position_strides, INDEX)
        chosen = tl.load(positions + at, mask, other=255).to(tl.int32)
        at = image * grad_strides[0] + offsets_of(window_y, window_x, channels, grad_strides, INDEX)
        gradient = tl.load(grad_output + at, mask, other=0)
        bias_total += tl.where(chosen == CUT, 0.0, gradient.to(tl.float32))
        if WEIGHT:
            for position in range(POOL[0] * POOL[1]):
                rows, columns, exist = window_pixels(
                    window_y, window_x, position, inside, convolved_h, convolved_w, STRIDE, PADDING, POOL, POOL_STRIDE,
                    POOL_PADDING, CLIPPED,
                )  # fmt: skip
                patches = load_patches(
                    input + image * input_strides[0], rows, columns, exist, step, height, width, input_strides,
                    CHANNELS, KERNEL, DILATION, INDEX, BLOCK_K,
                )  # fmt: skip
                passed = tl.where(chosen == position, gradient.to(tl.float32), 0.0).to(patches.dtype)
                total = tl.dot(tl.trans(passed), patches, total, input_precision=PRECISION)
    channels = channel_block * BLOCK_O + tl.arange(0, BLOCK_O)
    rows = partials + (share * OUT_CHANNELS + channels) * (PRODUCTS + 1)
    if WEIGHT:
        product = step * BLOCK_K + tl.arange(0, BLOCK_K)
        mask = (channels < OUT_CHANNELS)[:, None] & (product < PRODUCTS)[None, :]
        tl.store(rows[:, None] + product[None, :], total, mask)
    if step == 0:
        tl.store(rows + PRODUCTS, tl.sum(bias_total, 0), channels < OUT_CHANNELS)


# ---- input ----


@triton.jit
def conv_relu_pool2d_backward_input(
    grad_output, positions, weight, grad_input,
    height, width, convolved_h, convolved_w, pooled_h, pooled_w, down, across, channel_blocks,
    grad_strides, position_strides, weight_strides, grad_input_strides,
    CHANNELS: tl.constexpr, OUT_CHANNELS: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr,
    PADDING: tl.constexpr, DILATION: tl.constexpr, POOL: tl.constexpr, POOL_STRIDE: tl.constexpr,
    POOL_PADDING: tl.constexpr, CLIPPED: tl.constexpr, PRECISION: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_P: tl.constexpr, TILE_W: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The input's gradient. Here BLOCK_O is of the input's channels, BLOCK_K of the output's."""
    image, rows, columns, exist, channels, channels_exist = locate(
        tl.program_id(0), down, across, channel_blocks, height, width, CHANNELS, BLOCK_P, TILE_W, BLOCK_O
    )
    BLOCKS_A_TAP: tl.constexpr = (OUT_CHANNELS + BLOCK_K - 1) // BLOCK_K
    total = tl.zeros((BLOCK_P, BLOCK_O), tl.float32)
    for step in range(KERNEL[0] * KERNEL[1] * BLOCKS_A_TAP):
        tap = step // BLOCKS_A_TAP
        tap_y, tap_x = tap // KERNEL[1], tap % KERNEL[1]
        out_channels = step % BLOCKS_A_TAP * BLOCK_K + tl.arange(0, BLOCK_K)
        out_exist = out_channels < OUT_CHANNELS
        # The pixel of the convolution's output that sees this pixel of the input through the tap.
        y, x = rows + PADDING[0] - tap_y * DILATION[0], columns + PADDING[1] - tap_x * DILATION[1]
        seen = exist & (y >= 0) & (y % STRIDE[0] == 0) & (x >= 0) & (x % STRIDE[1] == 0)
        y, x = y // STRIDE[0], x // STRIDE[1]
        seen = seen & (y < convolved_h) & (x < convolved_w)
        gradient = load_unpooled(
            grad_output, positions, image, y, x, seen, out_channels, out_exist, pooled_h, pooled_w, grad_strides,
            position_strides, POOL, POOL_STRIDE, POOL_PADDING, tl.float32, INDEX,
        )  # fmt: skip
        of_tap = out_channels * weight_strides[0] + tap_y * weight_strides[2] + tap_x * weight_strides[3]
        offsets = of_tap[:, None] + (channels * weight_strides[1])[None, :]
        weights = tl.load(weight + offsets, out_exist[:, None] & channels_exist[None, :], other=0)
        total = tl.dot(gradient.to(weights.dtype), weights, total, input_precision=PRECISION)
    at = image * grad_input_strides[0] + offsets_of(rows, columns, channels, grad_input_strides, INDEX)
    tl.store(grad_input + at, total, exist[:, None] & channels_exist[None, :])


# ---- launchers ----

# No other tiles were tried on a GPU yet. More than 64 windows by 64 channels on 4 warps spill, and so do singles
# without TF32 before Hopper.
WEIGHT_PLANS = {
    f"{kind}-o{o}-k{k}": Plan({"BLOCK_P": 64, "BLOCK_O": o, "BLOCK_K": k}, num_warps=warps, num_stages=2)
    for kind, most_warps in (("half", 4), ("single", 8))
    for o, warps in ((16, 4), (32, 4), (64, most_warps))
    for k in (16, 32)
}
INPUT_PLANS = {
    f"{kind}-o{o}-k{k}": Plan({"BLOCK_P": pixels, "BLOCK_O": o, "BLOCK_K": k}, num_warps=4, num_stages=2)
    for kind, pixels in (("half", 128), ("single", 64))
    for o in (16, 32, 64)
    for k in (16, 32)
}
LEAST_PIXELS = 64  # smallest BLOCK_P of the input's gradient: Hopper's matrix instruction has 64 rows
# Programs for each multiprocessor that share the windows; other numbers were not tried. Best are as many as run on it
# at once, since each has as much to do as the others.
SHARES_PER_MULTIPROCESSOR = 3


class WeightTensors(NamedTuple):
    """What the gradients of weight and bias are made of."""

    grad_output: Tensor
    positions: Tensor
    input: Tensor
    weight: Tensor


class InputTensors(NamedTuple):
    """What the gradient of the input is made of, and it."""

    grad_output: Tensor
    positions: Tensor
    weight: Tensor
    grad_input: Tensor


def backward_weight(tensors: WeightTensors, with_weight: bool, options: Options) -> tuple[Tensor, Tensor]:
    """The gradients of weight [K, height, width, C] and bias [K], in float32; without ``with_weight`` only the bias'.

    See `fastseg.ops.conv_relu_pool2d`.
    """
    out_channels, channels, *kernel = tensors.weight.shape
    totals = _backward_weight(tensors, (with_weight, options)).sum(0)  # type: ignore[union-attr]
    return totals[:, :-1].view(out_channels, *kernel, channels), totals[:, -1]


@replayed
def _backward_weight(tensors: WeightTensors, with_options: tuple[bool, Options]) -> Tensor:
    """Each share's sums."""
    grad_output, positions, input, weight = tensors
    with_weight, options = with_options
    out_channels, products = weight.shape[0], weight[0].numel()
    bucket, device = bucket_of(weight, out_channels, products), input.device
    plan = choose(conv_relu_pool2d_backward_weight, bucket, WEIGHT_PLANS, device)
    tiling = tile_map(plan.tile["BLOCK_P"], *grad_output.shape[2:])
    channel_blocks = cdiv(out_channels, plan.tile["BLOCK_O"])
    product_blocks = cdiv(products, plan.tile["BLOCK_K"]) if with_weight else 1
    tiles = len(grad_output) * tiling.count
    shares = cdiv(SHARES_PER_MULTIPROCESSOR * multiprocessors(device), channel_blocks * product_blocks)
    tiles_per_share = max(1, cdiv(tiles, shares))
    shares = cdiv(tiles, tiles_per_share)
    partials = scratch((shares, out_channels, products + 1), torch.float32, device)
    arguments = {
        **tensors._asdict(), "partials": partials, **sizes_of(input, options.convolved, grad_output),
        **tiling.arguments, "channel_blocks": channel_blocks, "product_blocks": product_blocks, "tiles": tiles,
        "tiles_per_share": tiles_per_share, "grad_strides": grad_output.stride(),
        "position_strides": positions.stride(), "input_strides": input.stride(), "WEIGHT": with_weight,
        "INDEX": index_type(reach(input, grad_output, positions)),
        **geometry_constants(weight, grad_output.shape[2:], options),
    }  # fmt: skip
    programs = shares * channel_blocks * product_blocks
    launch(conv_relu_pool2d_backward_weight, bucket, plan, programs, arguments)
    return partials


@replayed
def backward_input(tensors: InputTensors, options: Options) -> None:
    """Fills grad_input; see `fastseg.ops.conv_relu_pool2d`."""
    grad_output, positions, weight, grad_input = tensors
    if grad_input.numel() == 0:
        return
    images, channels, height, width = grad_input.shape
    device = grad_input.device
    bucket = bucket_of(weight, channels, weight.shape[0])
    plan = choose(conv_relu_pool2d_backward_input, bucket, INPUT_PLANS, device)
    channel_blocks = cdiv(channels, plan.tile["BLOCK_O"])
    plan = fit(plan, "BLOCK_P", LEAST_PIXELS, images * height * width * channel_blocks, device)
    tiling = tile_map(plan.tile["BLOCK_P"], height, width)
    arguments = {
        **tensors._asdict(), **sizes_of(grad_input, options.convolved, grad_output), **tiling.arguments,
        "channel_blocks": channel_blocks, "grad_strides": grad_output.stride(),
        "position_strides": positions.stride(), "weight_strides": weight.stride(),
        "grad_input_strides": grad_input.stride(), "INDEX": index_type(reach(grad_input, grad_output, positions)),
        **geometry_constants(weight, grad_output.shape[2:], options),
    }  # fmt: skip
    launch(conv_relu_pool2d_backward_input, bucket, plan, images * tiling.count * channel_blocks, arguments)
