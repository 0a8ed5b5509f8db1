"""interpolate + cross_entropy becomes upsample_cross_entropy: the upsampled logits and their softmax are never made.

As `fastseg.fusion.patterns.cross_entropy`, also of log_softmax + nll_loss. The upsampled logits may be converted to a
wider dtype, and laid out as rows [N * H * W, C] with labels [N * H * W]. So may those of volumes be.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastseg import functional
from fastseg.fusion.calls import Call
from fastseg.fusion.pattern import Match, Pattern, demand
from fastseg.fusion.patterns import _interpolation
from fastseg.fusion.patterns.cross_entropy import calls_of, demand_labels, options_of, tensors_of


def interpolate_cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None, options: dict[str, Any], dtype: torch.dtype | None,
    size: Sequence[Any] | None,
) -> Tensor:  # fmt: skip
    """What the graph calls; the target of rows gets a map's size, which interpolate's arguments say."""
    if dtype is not None:
        input = input.to(dtype)
    if size is None:
        return functional.upsample_cross_entropy(input, target, weight, **options)
    target = target.reshape(input.shape[0], *_interpolation.output_size(input, *size))
    loss = functional.upsample_cross_entropy(input, target, weight, **options)
    return loss.flatten() if loss.ndim else loss


def _match(loss: Call) -> Match:
    calls = calls_of(loss)
    up = _interpolation.upsampled(calls[0].source(), volumes=True)
    _, target = tensors_of(calls)
    floating = target.is_floating_point()
    demand(not floating, "class probabilities hold the output's size for every class themselves")
    demand_labels(target)
    return Match(
        nodes=[*up.nodes, *(call.node for call in calls)],
        outputs={loss.node: None},
        function=interpolate_cross_entropy,
        arguments={
            "input": up.interpolate["input"],
            "target": loss["target"],
            "weight": loss["weight"],
            "options": options_of(loss) | _interpolation.grid_of_size(up),
            "size": [up.interpolate[name] for name in ("size", "scale_factor")] if up.rows else None,
            "dtype": up.dtype,
        },
        not_kept=[up.nodes[0], up.nodes[-1]],  # the logits, and their logarithmic softmax
        shared=up.nodes,
        across_autocast=True,
    )


UPSAMPLE_CROSS_ENTROPY = Pattern("interpolate + cross_entropy", "cross_entropy", "upsample_cross_entropy", _match)
UPSAMPLE_NLL_LOSS = Pattern("interpolate + log_softmax + nll_loss", "nll_loss", "upsample_cross_entropy", _match)
