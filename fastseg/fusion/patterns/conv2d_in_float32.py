"""conv2d + [batch_norm in evaluation] in bfloat16 becomes conv2d in float32 on a CPU that doesn't multiply bfloat16.

oneDNN emulates bfloat16 there, and takes 2 to 3 times as long as for float32. Depthwise convolutions, whose time is
their memory's, stay. Such places are everywhere, and no news for the report.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastseg import _bfloat16
from fastseg.functional import conv2d
from fastseg.fusion.calls import Call, has_nodes, tensor_of
from fastseg.fusion.pattern import Match, Pattern, demand
from fastseg.fusion.patterns.conv2d import match_of
from fastseg.fusion.patterns.conv_relu_pool2d import NUMBERS, convolution, fold


def conv_batch_norm_in_float32(
    input: Tensor, weight: Tensor, bias: Tensor | None, batch_norm: dict[str, Any] | None, **numbers: Any
) -> Tensor:
    """What the graph calls."""
    with torch.autocast("cpu", enabled=False):
        weight, bias, scale = fold(weight.float(), None if bias is None else bias.float(), batch_norm)
        return conv2d(input.float(), weight, bias, **numbers, scale=scale).bfloat16()


def _match(last: Call) -> Match:
    chain = convolution(last)
    convolved, weight = tensor_of(chain[0].node), tensor_of(chain[0]["weight"])
    demand(convolved is not None and convolved.is_cpu and convolved.dtype == torch.bfloat16)
    demand(weight is not None and weight.shape[1] > 1 and not has_nodes([chain[0][name] for name in NUMBERS]))
    demand(not _bfloat16.cpu_multiplies_bfloat16())
    return match_of(chain, conv_batch_norm_in_float32)


CONV_NORM_IN_FLOAT32, CONV_IN_FLOAT32 = (
    Pattern("conv2d in bfloat16 + [batch_norm]", anchor, "conv2d", _match) for anchor in ("batch_norm", "conv2d")
)
