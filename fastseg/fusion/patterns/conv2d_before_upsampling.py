"""interpolate + [concatenation over the channels] + 1x1 conv2d becomes the convolution of the small maps, upsampled.

Interpolation mixes pixels and a 1x1 convolution channels, so that they commute: of an upsampled map the convolution has
as many products as pixels more than of the map itself, and the sum of the parts takes the place of the concatenation
(the head of SegFormer and of HRNet). Only where upsampling has no more channels to work on then. Half types stay:
each part would be rounded before their sum.
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
from fastseg.fusion.pattern import Match, Pattern, Unfit, demand
from fastseg.fusion.patterns._interpolation import ARGUMENTS
from fastseg.fusion.patterns.conv_relu_pool2d import NUMBERS
from fastseg.ops.convolution.geometry import resolve

# What a match has to spare; below, the calls of more convolutions cost more.
MIN_PRODUCTS = 10_000_000
_CHANNELS = (1, -3)  # their dimension
_MODES = ("nearest", "nearest-exact", "bilinear", "bicubic")


def conv_before_upsampling(
    parts: Sequence[tuple[Tensor, dict[str, Any] | None]], weight: Tensor, bias: Tensor | None, channels_last: bool
) -> Tensor:
    """What the graph calls: of each map its part of the convolution, upsampled as `F.interpolate`'s arguments say."""
    maps = []
    for (_, grid), group in groupby(parts, key=lambda part: (part[0].shape[2:], part[1])):
        inputs = [input for input, _ in group]
        maps.append((inputs[0] if len(inputs) == 1 else torch.cat(inputs, 1), grid))
    weights = torch.split_with_sizes(weight, [input.shape[1] for input, _ in maps], 1)
    result: Tensor | None = None
    for (input, grid), part in zip(maps, weights, strict=True):
        convolved = torch.conv2d(input, part, bias if result is None else None)
        if grid is not None:
            convolved = F.interpolate(convolved, **grid)
        result = convolved if result is None else result + convolved
    assert result is not None
    return result.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


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
    parts: list[tuple[fx.Node, dict[str, Any] | None]] = []
    spared = 0
    for input in inputs:
        call = conv.calls.get(input)
        if call is None or not _goes_after(call, convolved):
            parts.append((input, None))
            continue
        products = _spared_products(call, convolved)
        grid = {name: call[name] for name in (*ARGUMENTS, "antialias")}
        parts.append((call["input"], grid if products else None))
        before.append(call.node)
        spared += products
    demand(spared >= MIN_PRODUCTS)
    return Match(
        nodes=[node for node in conv.node.graph.nodes if node in before or node is conv.node],
        outputs={conv.node: None},
        function=conv_before_upsampling,
        arguments={
            "parts": parts,
            "weight": conv["weight"],
            "bias": conv["bias"],
            "channels_last": convolved.is_contiguous(memory_format=torch.channels_last),
        },
        not_kept=[conv["input"]],
    )


def _is_pointwise(conv: Call) -> bool:
    """Whether a convolution mixes channels alone, all of them."""
    weight, numbers = tensor_of(conv["weight"]), {name: conv[name] for name in NUMBERS}
    if weight is None or weight.shape[2:] != (1, 1) or has_nodes(list(numbers.values())):
        return False
    geometry, _ = resolve((1, 1), **numbers)
    return (geometry.stride, geometry.padding, geometry.groups) == ((1, 1), (0, 0), 1)


def _goes_after(call: Call, convolved: Tensor) -> bool:
    """Whether the convolution may go before a call: an interpolation that has no more channels to upsample then."""
    if call.operation != "interpolate" or len(call.node.users) > 1 or call["mode"] not in _MODES:
        return False
    input = tensor_of(call["input"])
    if input is None or input.ndim != 4 or input.dtype != convolved.dtype:
        return False
    products = _spared_products(call, convolved)
    if products == 0:  # heads resize their largest map, too, to its own size
        return call["size"] is not None and input.shape[2:] == convolved.shape[2:]
    return products > 0


def _spared_products(call: Call, convolved: Tensor) -> int:
    """How many products fewer the convolution has before an interpolation than after it; 0 of more channels."""
    input = tensor_of(call["input"])
    small, large = None if input is None else sizes_of(input), sizes_of(convolved)
    if small is None or large is None or large[1] > small[1]:
        return 0
    return large[0] * (math.prod(large[2:]) - math.prod(small[2:])) * small[1] * large[1]


CONV_BEFORE_UPSAMPLING = Pattern("interpolate + [cat] + 1x1 conv2d", "conv2d", "conv2d", _match)
