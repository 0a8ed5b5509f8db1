"""binary_cross_entropy_with_logits of a map, [N, C, d1, ...], with or without interpolate before it.

Its weight may be one number a class, or the conversion of a mask of the pixels that count. Where such a mask leaves out
a logit that is NaN, fastseg's loss isn't NaN.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastseg import functional
from fastseg.functional._binary_cross_entropy import is_of_classes, mean_over_all, of_each_class
from fastseg.functional._checks import FLOATING_DTYPES
from fastseg.fusion.calls import Call, tensor_of
from fastseg.fusion.pattern import Match, Pattern, Unfit, demand
from fastseg.fusion.patterns import _interpolation

# The target of a value that a mask leaves out: a number that all floating-point dtypes have, and no target is.
LEFT_OUT = -(2**14)


def binary_cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None, pos_weight: Tensor | None, mask: Tensor | None,
    reduction: str, dtype: torch.dtype | None = None, grid: dict[str, Any] | None = None,
) -> Tensor:  # fmt: skip
    """What the graph calls."""
    classes = input.shape[1]
    if dtype is not None:
        input = input.to(dtype)
    if mask is not None:
        target = target.masked_fill(~mask, LEFT_OUT)
    weight, pos_weight = of_each_class(weight, classes), of_each_class(pos_weight, classes)
    if reduction == "mean":  # masked values are among the divisor's
        weight = mean_over_all(weight, target)
    if grid is None:
        return functional.binary_cross_entropy(input, target, weight, pos_weight, LEFT_OUT, "sum")
    return functional.upsample_binary_cross_entropy(input, target, weight, pos_weight, LEFT_OUT, "sum", **grid)


def _arguments(loss: Call) -> tuple[Tensor, dict[str, Any]]:
    """What is known of the logits, and the loss' arguments; `Unfit` where they aren't served."""
    logits, target = tensor_of(loss["input"]), tensor_of(loss["target"])
    if logits is None or target is None:
        raise Unfit
    demand(logits.dtype in FLOATING_DTYPES, f"binary_cross_entropy: logits in {logits.dtype}")
    demand(logits.ndim >= 3, "binary_cross_entropy: no map of pixels")
    demand(logits.ndim == target.ndim)
    demand(target.is_floating_point(), f"binary_cross_entropy: torch has its own way with a target in {target.dtype}")
    demand(not target.requires_grad, "binary_cross_entropy: target needs a gradient")
    demand(loss["size_average"] is None and loss["reduce"] is None, "binary_cross_entropy: size_average or reduce")
    demand(loss["reduction"] != "none", "binary_cross_entropy: a loss for each value is of the upsampled logits' size")
    arguments = {name: loss[name] for name in ("target", "weight", "pos_weight", "reduction")} | {"mask": None}
    conversion = loss.source("weight") if loss["weight"] is not None else None
    if conversion is not None and conversion.operation == "cast":
        before = tensor_of(conversion["input"])
        if before is not None and before.dtype == torch.bool:
            arguments |= {"weight": None, "mask": conversion["input"]}
    for name in ("weight", "pos_weight"):
        weight = tensor_of(arguments[name])
        fits = arguments[name] is None or (weight is not None and is_of_classes(weight, logits))
        demand(fits, f"binary_cross_entropy: {name} is more than a number for each class")
    return logits, arguments


def _match(loss: Call) -> Match:
    _, arguments = _arguments(loss)
    return Match(
        nodes=[loss.node],
        outputs={loss.node: None},
        function=binary_cross_entropy,
        arguments={"input": loss["input"], **arguments},
        not_kept=[loss["input"]],  # the losses, as large as the logits
    )


def _match_upsampled(loss: Call) -> Match:
    up = _interpolation.upsampled(loss.source())
    _, arguments = _arguments(loss)
    demand(not up.rows)
    return Match(
        nodes=[*up.nodes, loss.node],
        outputs={loss.node: None},
        function=binary_cross_entropy,
        arguments={
            "input": up.interpolate["input"], **arguments, "dtype": up.dtype, "grid": _interpolation.grid_of_size(up)
        },
        not_kept=[up.nodes[0], up.nodes[-1]],  # the logits, and the losses
        shared=up.nodes,
        across_autocast=True,
    )  # fmt: skip


_LOSS = "binary_cross_entropy_with_logits"
BINARY_CROSS_ENTROPY = Pattern(_LOSS, _LOSS, "binary_cross_entropy", _match)
UPSAMPLE_BINARY_CROSS_ENTROPY = Pattern(
    f"interpolate + {_LOSS}", _LOSS, "upsample_binary_cross_entropy", _match_upsampled
)
