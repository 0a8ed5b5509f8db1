"""relu + max_pool2d, in either order, becomes relu_pool2d where no convolution before them can be taken in.

The commonest such place is the stem of a ResNet in training: batch normalisation needs the whole map before ReLU. The
ReLU's result may be used elsewhere, too.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from fastseg.functional import relu_pool2d
from fastseg.functional._checks import FLOATING_DTYPES
from fastseg.fusion import effects
from fastseg.fusion.calls import Call, tensor_of
from fastseg.fusion.pattern import Match, Pattern, demand, source
from fastseg.fusion.patterns.conv_relu_pool2d import why_not_pool


def relu_and_pool(
    input: Tensor, pool_size: Any, pool_stride: Any, pool_padding: Any, ceil_mode: bool, return_indices: bool,
    return_skip: bool,
) -> Any:  # fmt: skip
    """What the graph calls: the pooled value (with its indices where asked, as max_pool2d), then the skip."""
    results = relu_pool2d(
        input, pool_size, pool_stride, pool_padding, ceil_mode, return_indices=return_indices, return_skip=return_skip
    )
    if return_indices and return_skip:
        output, indices, skip = results
        return (output, indices), skip
    return results


def _match_relu_pool(pool: Call) -> Match:
    relu = source(pool, "relu")
    _demand_served(pool, relu["input"])
    if relu["inplace"]:
        reason = effects.use_of_overwritten(relu["input"], relu.node)
        demand(reason is None, f"relu in place: {reason}")
    with_skip = len(relu.node.users) > 1
    outputs: dict[fx.Node, int | None] = {relu.node: 1, pool.node: 0} if with_skip else {pool.node: None}
    return _make(relu, pool, relu["input"], outputs, with_skip, [] if with_skip else [relu.node])


def _match_pool_relu(relu: Call) -> Match:
    pool = source(relu, "max_pool2d")
    _demand_served(pool, pool["input"])
    value = pool["input"]
    not_kept = [value] if isinstance(value, fx.Node) and len(value.users) == 1 else []
    return _make(pool, relu, value, {relu.node: None}, False, not_kept)


def _demand_served(pool: Call, value: Any) -> None:
    """Raises `Unfit` where the operator doesn't serve a pool of a value."""
    reason = why_not_pool(pool)
    demand(reason is None, f"{reason}")
    tensor = tensor_of(value)
    demand(tensor is not None and tensor.ndim in (3, 4) and tensor.dtype in FLOATING_DTYPES)


def _make(
    first: Call, last: Call, input: Any, outputs: dict[fx.Node, int | None], with_skip: bool, not_kept: list[fx.Node]
) -> Match:
    pool = last if last.operation == "max_pool2d" else first
    arguments = {
        "input": input,
        "pool_size": pool["kernel_size"],
        "pool_stride": pool["stride"] or None,  # torch takes an empty list for None
        "pool_padding": pool["padding"],
        "ceil_mode": bool(pool["ceil_mode"]),
        "return_indices": bool(pool["return_indices"]),
        "return_skip": with_skip,
    }
    return Match([first.node, last.node], outputs, relu_and_pool, arguments, not_kept)


RELU_POOL = Pattern("relu + max_pool2d", "max_pool2d", "relu_pool2d", _match_relu_pool)
POOL_RELU = Pattern("max_pool2d + relu", "relu", "relu_pool2d", _match_pool_relu)
