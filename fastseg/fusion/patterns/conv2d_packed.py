"""conv2d + [batch_norm in evaluation] becomes, in predictions, oneDNN's convolution of weights that are kept for it.

Only on a CPU, and only what no kernel of fastseg's own serves; such places, which are everywhere, are no news for the
report. What follows (an activation, a residual's sum) stays: oneDNN could do both in passing, but its ReLU makes 0 of
NaN. Inductor's "freezing" does that: a graph that has its weights as attributes, as that setting wants, leaves it the
convolutions, but for those that take fewer products here.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch._inductor.config
from torch import Tensor, fx

from fastseg.fusion.calls import Call, tensor_of
from fastseg.fusion.pattern import Match, Pattern, demand
from fastseg.fusion.patterns.conv2d import match_of
from fastseg.fusion.patterns.conv_relu import looks_served
from fastseg.fusion.patterns.conv_relu_pool2d import convolution, fold
from fastseg.ops.convolution.algorithms import serves_conv2d_packed
from fastseg.ops.convolution.geometry import clamp_strides, flatten, resolve


def packed_conv_batch_norm(
    input: Tensor, weight: Tensor, bias: Tensor | None, batch_norm: dict[str, Any] | None, **numbers: Any
) -> Tensor:
    """What the graph calls."""
    weight, bias, scale = fold(weight, bias, batch_norm)
    geometry, _ = resolve(tuple(weight.shape[2:]), **numbers)
    geometry = clamp_strides(geometry, input.shape[2:], weight.shape[2:])
    return torch.ops.fastseg.conv2d_packed.default(input, weight, bias, scale, flatten(geometry))


def _match(last: Call) -> Match:
    chain = convolution(last)
    demand(_is_prediction(chain[0]))
    frozen = torch._inductor.config.freezing and chain[0]["weight"].op == "get_attr"
    demand(looks_served(chain[0], functools.partial(serves_conv2d_packed, frozen=frozen)))
    return match_of(chain, packed_conv_batch_norm)


def _is_prediction(conv: Call) -> bool:
    """Whether no gradient is recorded of a convolution in float32 whose weights are likely to come again."""
    convolved, weight = tensor_of(conv.node), conv["weight"]
    if convolved is None or convolved.dtype != torch.float32 or convolved.requires_grad:
        return False
    return isinstance(weight, fx.Node) and weight.op in ("placeholder", "get_attr")


PACKED_CONV_NORM, PACKED_CONV = (
    Pattern("conv2d + [batch_norm]", anchor, "conv2d", _match) for anchor in ("batch_norm", "conv2d")
)
