"""interpolate + cross_entropy becomes upsample_cross_entropy: the upsampled logits and their softmax are never made.

As `fastseg.fusion.patterns.cross_entropy`, also of log_softmax + nll_loss. The upsampled logits may be converted to a
wider dtype, and laid out as rows [N * H * W, C] with labels [N * H * W]. So may those of volumes be.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastseg import functional
from fastseg.fusion.calls import Call, number_of
from fastseg.fusion.pattern import Match, Pattern, demand
from fastseg.fusion.patterns import _interpolation
from fastseg.fusion.patterns.cross_entropy import calls_of, demand_labels, options_of, tensors_of


def interpolate_cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None, interpolation: dict[str, Any], options: dict[str, Any],
    dtype: torch.dtype | None, rows: bool,
) -> Tensor:  # fmt: skip
    """What the graph calls."""
    if dtype is not None:
        input = input.to(dtype)
    if rows:
        size = _interpolation.output_size(input, interpolation["size"], interpolation["scale_factor"])
        target = target.reshape(input.shape[0], *size)
    loss = functional.upsample_cross_entropy(
        input, target, weight, **options,
        mode=interpolation["mode"], align_corners=bool(interpolation["align_corners"]),
    )  # fmt: skip
    return loss.flatten() if rows and loss.ndim else loss


def _match(loss: Call) -> Match:
    calls = calls_of(loss)
    up = _interpolation.upsampled(calls[0].source(), volumes=True)
    _, target = tensors_of(calls)
    floating = target.is_floating_point()
    demand(not floating, "class probabilities hold the output's size for every class themselves")
    demand_labels(target)
    interpolation = {name: up.interpolate[name] for name in _interpolation.ARGUMENTS}
    factor = number_of(interpolation["scale_factor"])
    corners, recomputed = interpolation["align_corners"], interpolation["recompute_scale_factor"]
    demand(
        _interpolation.is_grid_of_size(up.logits, factor, corners, recomputed),
        f"interpolate: the grid of scale_factor {factor} isn't that of the size which it gives",
    )
    return Match(
        nodes=[*up.nodes, *(call.node for call in calls)],
        outputs={loss.node: None},
        function=interpolate_cross_entropy,
        arguments={
            "input": up.interpolate["input"],
            "target": loss["target"],
            "weight": loss["weight"],
            "interpolation": interpolation,
            "options": options_of(loss),
            "dtype": up.dtype,
            "rows": up.rows,
        },
        not_kept=[up.nodes[0], up.nodes[-1]],  # the logits, and their logarithmic softmax
        shared=up.nodes,
        across_autocast=True,
    )


UPSAMPLE_CROSS_ENTROPY = Pattern("interpolate + cross_entropy", "cross_entropy", "upsample_cross_entropy", _match)
UPSAMPLE_NLL_LOSS = Pattern("interpolate + log_softmax + nll_loss", "nll_loss", "upsample_cross_entropy", _match)
