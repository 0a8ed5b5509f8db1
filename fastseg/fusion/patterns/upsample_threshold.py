"""interpolate + sigmoid + comparison with a number becomes upsample_threshold, as does interpolate + comparison with 0.

fastseg compares logits: where torch's sigmoid is rounded to the threshold, or to 0 or 1, the two may differ. In half
types the upsampled logits aren't rounded before they are compared, either.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastseg import functional
from fastseg.fusion.calls import Call, number_of
from fastseg.fusion.pattern import Match, Pattern, demand
from fastseg.fusion.patterns import _interpolation
from fastseg.ops.layouts import memory_format_of


def interpolate_threshold(threshold: float, **upsampling: Any) -> Tensor:
    """What the graph calls: masks, in torch's bool and in the memory format that interpolate would give them."""
    input, grid = _interpolation.before(**upsampling)
    masks = functional.upsample_threshold(input, threshold=threshold, **grid)
    return masks.view(torch.bool).contiguous(memory_format=memory_format_of(input))  # type: ignore[union-attr]  # no tuple


def _match(comparison: Call) -> Match:
    calls, before = [comparison], comparison.source()
    threshold = number_of(comparison["other"])
    if before is not None and before.operation == "sigmoid":
        calls.insert(0, before)
        before = before.source()
    up = _interpolation.upsampled(before)
    demand(not up.rows)
    is_number = isinstance(threshold, int | float) and not isinstance(threshold, bool)
    demand(is_number, "comparison with a value that isn't a number")
    if len(calls) == 2:
        demand(0 <= threshold <= 1, f"comparison of a sigmoid with {threshold}")
    else:
        demand(threshold == 0, f"comparison of logits with {threshold}")
        threshold = 0.5
    nodes = [*up.nodes, *(call.node for call in calls)]
    return Match(
        nodes=nodes,
        outputs={comparison.node: None},
        function=interpolate_threshold,
        arguments=up.arguments | {"threshold": float(threshold)},
        not_kept=[*up.nodes[:1], *(call.node for call in calls[:-1])],
        shared=nodes[:-1],
        across_autocast=True,
    )


UPSAMPLE_THRESHOLD = Pattern("interpolate + [sigmoid] + gt", "gt", "upsample_threshold", _match)
