"""interpolate + [concatenation over the channels] + 1x1 conv2d becomes the convolution of the small maps, upsampled.

Interpolation mixes pixels and a 1x1 convolution channels, so that they commute: of an upsampled map the convolution has
as many products as pixels more than of the map itself, and the sum of the parts takes the place of the concatenation
(the head of SegFormer and of HRNet). Only where upsampling has no more channels to work on then. A linear layer that
has made such a map (SegFormer's) and its part of the convolution are one product of the two weights where that has
fewer products. Half types stay: each part would be rounded before their sum.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fastseg.fusion.calls import Call, has_nodes, sizes_of, tensor_of
from fastseg.fusion.pattern import Match, Pattern, Unfit, demand, source
from fastseg.fusion.patterns._interpolation import ARGUMENTS, laid_out
from fastseg.fusion.patterns.conv_relu_pool2d import NUMBERS
from fastseg.ops.convolution.geometry import resolve
from fastseg.ops.layouts import memory_format_of

# What a match has to spare; below, the calls of more convolutions cost more.
MIN_PRODUCTS = 10_000_000
_CHANNELS = (1, -3)  # their dimension
_MODES = ("nearest", "nearest-exact", "bilinear", "bicubic")

# A part of what is convolved: a map, or where a linear layer makes it that layer's input [N, h * w, C]; the arguments
# of F.interpolate, or None; the layer's weight and bias, and h and w, or None.
Part = tuple[Any, dict[str, Any] | None, tuple[Any, Any, Sequence[Any]] | None]


def conv_before_upsampling(
    parts: Sequence[Part], weight: Tensor, bias: Tensor | None, memory_format: torch.memory_format
) -> Tensor:
    """What the graph calls: of each part its convolution, upsampled; their sum."""
    groups = [list(group) for _, group in groupby(parts, key=_together)]
    counts = [sum(_channels(part) for part in group) for group in groups]
    result: Tensor | None = None
    for group, own in zip(groups, torch.split_with_sizes(weight, counts, 1), strict=True):
        input, grid, layer = group[0]
        if layer is None:
            convolved = torch.conv2d(input if len(group) == 1 else torch.cat([part[0] for part in group], 1), own)
        else:
            inner, inner_bias, sizes = layer
            rows = F.linear(input, own.flatten(1) @ inner)
            convolved = rows.transpose(1, 2).reshape(input.shape[0], own.shape[0], *sizes)
            if inner_bias is not None:
                more = own.flatten(1) @ inner_bias
                bias = more if bias is None else bias + more
        if grid is not None:
            convolved = F.interpolate(convolved, **grid)
        result = convolved if result is None else result + convolved
    assert result is not None
    if bias is not None:
        result = result + bias[:, None, None]
    return result.contiguous(memory_format=memory_format)


def _together(part: Part) -> Any:
    """What neighbours have in common that are convolved together."""
    input, grid, layer = part
    return (grid, input.shape[2:]) if layer is None else id(part)


def _channels(part: Part) -> int:
    input, _, layer = part
    return input.shape[1] if layer is None else layer[0].shape[0]


def _match(conv: Call) -> Match:
    convolved = tensor_of(conv.node)
    if convolved is None or convolved.ndim != 4 or convolved.dtype not in (torch.float32, torch.float64):
        raise Unfit
    demand(_is_pointwise(conv))
    last = conv.source()
    inputs, before = [conv["input"]], []
    if last is not None and last.operation == "cat":
        demand(isinstance(last["tensors"], Sequence) and last["dim"] in _CHANNELS and len(last.node.users) == 1)
        inputs, before = last["tensors"], [last.node]
    parts: list[Part] = []
    spared = 0
    for input in inputs:
        call, map, grid = conv.calls.get(input), input, None
        products = None if call is None else _spared_products(call, convolved)
        if call is not None and products is not None:
            map = call["input"]
            before.append(call.node)
            spared += products
            if products > 0:
                grid = {name: call[name] for name in (*ARGUMENTS, "antialias")}
        layer = _layer_of(conv.calls.get(map), convolved)
        if layer is None:
            parts.append((map, grid, None))
        else:
            linear, nodes, sizes = layer
            parts.append((linear["input"], grid, (linear["weight"], linear["bias"], sizes)))
            before += nodes
    demand(spared >= MIN_PRODUCTS)
    return Match(
        nodes=[node for node in conv.node.graph.nodes if node in before or node is conv.node],
        outputs={conv.node: None},
        function=conv_before_upsampling,
        arguments={
            "parts": parts,
            "weight": conv["weight"],
            "bias": conv["bias"],
            "memory_format": memory_format_of(convolved),
        },
        not_kept=[conv["input"]],
    )


def _layer_of(reshape: Call | None, convolved: Tensor) -> tuple[Call, list[fx.Node], Sequence[Any]] | None:
    """The linear layer that makes a map, its calls, and the map's height and width; None where it had better stay."""
    if reshape is None or reshape.operation != "reshape":
        return None
    try:
        transpose = source(reshape, "transpose", "permute")
        linear = source(transpose, "linear")
    except Unfit:
        return None
    calls = (linear, transpose, reshape)
    rows, swapped, map = (tensor_of(call.node) for call in calls)
    inner, shape = tensor_of(linear["weight"]), reshape["shape"]
    if isinstance(shape[0], Sequence):
        (shape,) = shape
    if rows is None or swapped is None or map is None or inner is None or rows.ndim != 3 or len(shape) != 4:
        return None
    if laid_out(transpose, [(0,), (1,), (2,)]) != [(0,), (2,), (1,)] or map.shape[:2] != swapped.shape[:2]:
        return None
    sizes = sizes_of(rows)
    if sizes is None or map.dtype != convolved.dtype or any(len(call.node.users) > 1 for call in calls):
        return None
    pixels, outputs, (between, channels) = sizes[0] * sizes[1], convolved.shape[1], inner.shape
    apart, together = pixels * between * (channels + outputs), (pixels + between) * channels * outputs
    return (linear, [call.node for call in calls], shape[2:]) if together < apart else None


def _is_pointwise(conv: Call) -> bool:
    """Whether a convolution mixes channels alone, all of them."""
    weight, numbers = tensor_of(conv["weight"]), {name: conv[name] for name in NUMBERS}
    if weight is None or weight.shape[2:] != (1, 1) or has_nodes(list(numbers.values())):
        return False
    geometry, _ = resolve((1, 1), **numbers)
    return (geometry.stride, geometry.padding, geometry.groups) == ((1, 1), (0, 0), 1)


def _spared_products(call: Call, convolved: Tensor) -> int | None:
    """How many products fewer the convolution has before a call, an interpolation, than after it; None: it stays after.

    0 is one to the map's own size, which isn't needed: heads resize their largest map, too. Where the convolution makes
    more channels, upsampling would have more to do.
    """
    if call.operation != "interpolate" or len(call.node.users) > 1 or call["mode"] not in _MODES:
        return None
    input = tensor_of(call["input"])
    if input is None or input.ndim != 4 or input.dtype != convolved.dtype:
        return None
    if call["size"] is not None and input.shape[2:] == convolved.shape[2:]:
        return 0
    small, large = sizes_of(input), sizes_of(convolved)
    if small is None or large is None or large[1] > small[1] or math.prod(large[2:]) <= math.prod(small[2:]):
        return None
    return large[0] * (math.prod(large[2:]) - math.prod(small[2:])) * small[1] * large[1]


CONV_BEFORE_UPSAMPLING = Pattern("interpolate + [cat] + 1x1 conv2d", "conv2d", "conv2d", _match)
