"""interpolate + cross_entropy becomes upsample_cross_entropy: the upsampled logits and their softmax are never made.

As `fastseg.fusion.patterns.cross_entropy`, also of log_softmax + nll_loss.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastseg import functional
from fastseg._native import log_slow_road
from fastseg.fusion.calls import Call, number_of, recognise, tensor_of
from fastseg.fusion.pattern import Match, Pattern, Unfit
from fastseg.fusion.patterns import _interpolation
from fastseg.fusion.patterns.cross_entropy import calls_of, demand_options, options_of, plain_loss, why_not_labels


def interpolate_cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None, interpolation: dict[str, Any], options: dict[str, Any]
) -> Tensor:
    """What the graph calls; where its maker knew no sizes, they are looked at here."""
    reason = why_not(input, target, interpolation)
    if reason is None and not torch.compiler.is_compiling():  # compilers have compared the sizes
        size = _interpolation.output_size(input, interpolation["size"], interpolation["scale_factor"])
        reason = None if size == tuple(target.shape[1:]) else f"logits of size {size}, labels of {target.shape[1:]}"
    if reason is not None:
        if not torch.compiler.is_compiling():
            log_slow_road("interpolate + cross_entropy", reason)
        return plain_loss(F.interpolate(input, **interpolation), target, weight, **options)
    return functional.upsample_cross_entropy(
        input, target, weight, **options,
        mode=interpolation["mode"], align_corners=bool(interpolation["align_corners"]),
    )  # fmt: skip


def why_not(input: Tensor, target: Tensor, interpolation: dict[str, Any]) -> str | None:
    """Why tensors must go the plain way, or None."""
    if target.is_floating_point():
        return "class probabilities hold the output's size for every class themselves"
    reason = _interpolation.why_not(input) or why_not_labels(target)
    if reason is not None:
        return reason
    factor = interpolation["scale_factor"]
    options = (interpolation["align_corners"], interpolation["recompute_scale_factor"])
    if not _interpolation.is_grid_of_size(input, factor, *options):
        return f"interpolate: the grid of scale_factor {factor} isn't that of the size which it gives"
    return None


def _match(loss: Call) -> Match | None:
    calls = calls_of(loss)
    interpolate = None if calls is None else recognise(calls[0]["input"])
    if calls is None or interpolate is None or interpolate.operation != "interpolate":
        return None
    _interpolation.demand_grid(interpolate)
    demand_options(calls)
    interpolation = {name: interpolate[name] for name in _interpolation.ARGUMENTS}
    logits, target = tensor_of(interpolate["input"]), tensor_of(loss["target"])
    if logits is not None and target is not None:
        factor = number_of(interpolation["scale_factor"])
        reason = why_not(logits, target, interpolation | {"scale_factor": factor})
        if reason is not None:
            raise Unfit(reason)
    return Match(
        nodes=[interpolate.node, *(call.node for call in calls)],
        outputs={loss.node: None},
        function=interpolate_cross_entropy,
        arguments={
            "input": interpolate["input"],
            "target": loss["target"],
            "weight": loss["weight"],
            "interpolation": interpolation,
            "options": options_of(loss),
        },
        not_kept=[interpolate.node, interpolate.node],  # the logits, and their logarithmic softmax
        shared=[interpolate.node],
    )


UPSAMPLE_CROSS_ENTROPY = Pattern("interpolate + cross_entropy", "cross_entropy", "upsample_cross_entropy", _match)
UPSAMPLE_NLL_LOSS = Pattern("interpolate + log_softmax + nll_loss", "nll_loss", "upsample_cross_entropy", _match)
