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
from fastseg.fusion.calls import Call, has_nodes, sizes_of, tensor_of
from fastseg.fusion.pattern import Match, Pattern, demand, source

# Values of a map. A call costs what Inductor's own loops take for some thousands (2 cores of an AMD Zen 3, 2026-11-28).
LEAST_VALUES = 1 << 14


def norm_and_activation(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, negative_slope: float
) -> Tensor:
    """What the graph calls."""
    output, _ = torch.ops.fastseg.instance_norm.default(input, weight, bias, eps, negative_slope)
    return output


def _match_activation(activation: Call) -> Match:
    before = source(activation, "instance_norm", "dropout")
    between = [before] if before.operation == "dropout" else []
    if between:
        demand(before["p"] == 0 or before["training"] is False)
        before = source(before, "instance_norm")
    if activation["inplace"]:
        reason = effects.use_of_overwritten(activation["input"], activation.node)
        demand(reason is None, f"{activation.operation} in place: {reason}")
    slope = 0.0 if activation.operation == "relu" else activation["negative_slope"]
    demand(not has_nodes(slope))
    return _make(before, [*between, activation], float(slope))


def _make(norm: Call, rest: list[Call], slope: float) -> Match:
    input, output = tensor_of(norm["input"]), tensor_of(norm.node)
    demand(input is not None and output is not None and input.device.type == "cpu" and _native._C is not None)
    demand(input.dtype == output.dtype and input.dtype in (torch.float32, torch.float64))
    demand(norm["running_mean"] is None and norm["running_var"] is None and not has_nodes(norm["eps"]))
    affine = [tensor_of(norm[name]) for name in ("weight", "bias") if norm[name] is not None]
    demand(all(tensor is not None and tensor.dtype == input.dtype for tensor in affine))
    sizes = sizes_of(input)
    demand(sizes is not None and 4 <= len(sizes) <= 5 and math.prod(sizes) >= LEAST_VALUES)
    calls = [norm, *rest]
    arguments: dict[str, Any] = {name: norm[name] for name in ("input", "weight", "bias", "eps")}
    arguments["negative_slope"] = slope
    last = calls[-1].node
    return Match([call.node for call in calls], {last: None}, norm_and_activation, arguments)


def _match_norm(norm: Call) -> Match:
    return _make(norm, [], 1.0)


NORM_RELU = Pattern("instance_norm + [dropout] + relu", "relu", "instance_norm", _match_activation)
NORM_LEAKY_RELU = Pattern("instance_norm + [dropout] + leaky_relu", "leaky_relu", "instance_norm", _match_activation)
NORM = Pattern("instance_norm", "instance_norm", "instance_norm", _match_norm)
