"""instance_norm, or instance_norm + [idle dropout] + (leaky) relu, becomes fastseg's instance_norm.

Only on a CPU, of statistics of the images themselves, in float32 and float64, and where the maps are so large that the
kernel saves more than a call costs.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastseg import _native
from fastseg.fusion import effects
from fastseg.fusion.calls import Call, has_nodes, number_of, sizes_of, tensor_of
from fastseg.fusion.pattern import Match, Pattern, demand, source

# Up to so many values Inductor's own loops take less than a call costs: for 65536 165 us where the operator takes 225
# to 260, for 73728 460 to 530 where it takes 200 to 330 (AVX2, 2 threads, 2026-11-28).
PLAIN_MAX_VALUES = 1 << 16


def norm_and_activation(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, negative_slope: float
) -> Tensor:
    """What the graph calls."""
    output, _ = torch.ops.fastseg.instance_norm.default(input, weight, bias, eps, negative_slope)
    return output


def _match_activation(activation: Call) -> Match:
    before = source(activation, "instance_norm", "dropout")
    between = []
    if before.operation == "dropout":
        demand(before["p"] == 0 or before["training"] is False)
        between, before = [before], source(before, "instance_norm")
    if activation["inplace"]:
        reason = effects.use_of_overwritten(activation["input"], activation.node)
        demand(reason is None, f"{activation.operation} in place: {reason}")
    slope = 0.0 if activation.operation == "relu" else number_of(activation["negative_slope"])
    demand(not has_nodes(slope))
    return _make([before, *between, activation], float(slope))


def _match_norm(norm: Call) -> Match:
    return _make([norm], 1.0)


def _make(calls: list[Call], slope: float) -> Match:
    norm, nodes = calls[0], [call.node for call in calls]
    demand(_is_served(norm))
    arguments: dict[str, Any] = {name: norm[name] for name in ("input", "weight", "bias")}
    arguments |= {"eps": number_of(norm["eps"]), "negative_slope": slope}
    return Match(nodes, {nodes[-1]: None}, norm_and_activation, arguments)


def _is_served(norm: Call) -> bool:
    input, output = tensor_of(norm["input"]), tensor_of(norm.node)
    if input is None or output is None or input.device.type != "cpu" or _native._C is None:
        return False
    if norm["running_mean"] is not None or norm["running_var"] is not None or has_nodes(number_of(norm["eps"])):
        return False
    affine = [tensor_of(norm[name]) for name in ("weight", "bias") if norm[name] is not None]
    dtypes = {None if tensor is None else tensor.dtype for tensor in (input, output, *affine)}
    sizes = sizes_of(input)
    return (
        dtypes <= {input.dtype}
        and input.dtype in (torch.float32, torch.float64)
        and input.ndim in (4, 5)
        and sizes is not None
        and math.prod(sizes) > PLAIN_MAX_VALUES
    )


NORM_RELU = Pattern("instance_norm + [dropout] + relu", "relu", "instance_norm", _match_activation)
NORM_LEAKY_RELU = Pattern("instance_norm + [dropout] + leaky_relu", "leaky_relu", "instance_norm", _match_activation)
NORM = Pattern("instance_norm", "instance_norm", "instance_norm", _match_norm)
