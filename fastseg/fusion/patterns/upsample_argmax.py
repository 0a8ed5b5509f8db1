"""interpolate + [softmax or log_softmax] + argmax over the classes becomes upsample_argmax.

The indices that torch.max gives along the classes' dimension are argmax; after softmax, its values are the confidence.

Softmax keeps the order of finite logits; fastseg compares them before it would round them to equal probabilities. In
half types the upsampled logits aren't rounded before they are compared, either. (A pixel with a NaN or an infinity has
NaN's for probabilities: through softmax, torch's argmax then is class 0; here it is that logit's class, as without
softmax.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fastseg import functional
from fastseg.fusion.calls import Call, tensor_of
from fastseg.fusion.pattern import Match, Pattern, demand
from fastseg.fusion.patterns import _interpolation

CLASSES = (1, -3)  # the classes' dimension of [N, C, H, W]
CLASSES_OF_VOLUMES = (1, -4)
_VALUES, _INDICES = 0, 1  # of torch.max's parts


def interpolate_argmax(keepdim: bool, with_confidence: bool, **upsampling: Any) -> Any:
    """What the graph calls: the labels, or (confidence, labels)."""
    input, grid = _interpolation.before(**upsampling)
    results = functional.upsample_argmax(input, **grid, dtype=torch.int64, return_confidence=with_confidence)
    if not with_confidence:
        return results.unsqueeze(1) if keepdim else results  # type: ignore[union-attr]  # no tuple
    labels, confidence = results
    return (confidence.unsqueeze(1), labels.unsqueeze(1)) if keepdim else (confidence, labels)


def _match_argmax(argmax: Call) -> Match:
    return _make(argmax, {argmax.node: None}, False)


def _match_max(maximum: Call) -> Match:
    parts = {node: maximum.calls.get(node) for node in maximum.node.users}
    indices = {node: part["index"] for node, part in parts.items() if part is not None}
    demand(bool(parts) and parts.keys() == indices.keys())
    demand(all(index in (_VALUES, _INDICES) for index in indices.values()))
    values = [node for node, index in indices.items() if index == _VALUES]
    if not values:
        return _make(maximum, dict.fromkeys(indices), False)
    match = _make(maximum, indices, True)
    softmax = maximum.source()
    demand(softmax is not None and softmax.operation == "softmax", "max: the largest values themselves are used")
    needing = any(tensor.requires_grad for tensor in map(tensor_of, values) if tensor is not None)
    demand(not needing, "max: the largest probabilities need a gradient")
    return match


def _make(last: Call, outputs: dict[fx.Node, int | None], with_confidence: bool) -> Match:
    calls, before = [last], last.source()
    if before is not None and before.operation in ("softmax", "log_softmax"):
        calls.insert(0, before)
        before = before.source()
    up = _interpolation.upsampled(before, volumes=True)
    demand(not up.rows)
    classes = CLASSES if up.logits.ndim == 4 else CLASSES_OF_VOLUMES
    demand(all(c["dim"] in classes for c in calls), "softmax or argmax over another dimension than the classes'")
    demand(all(c["dtype"] is None for c in calls[:-1]), "softmax in another dtype")
    nodes = [*up.nodes, *(call.node for call in calls)]
    parts = [node for node in last.node.graph.nodes if node in outputs and node is not last.node]
    return Match(
        nodes=nodes + parts,
        outputs=outputs,
        function=interpolate_argmax,
        arguments=up.arguments | {"keepdim": bool(last["keepdim"]), "with_confidence": with_confidence},
        not_kept=[*up.nodes[:1], *(call.node for call in calls[:-1])],
        shared=[node for node in nodes if node not in outputs],
        across_autocast=True,
    )


UPSAMPLE_ARGMAX = Pattern("interpolate + [softmax] + argmax", "argmax", "upsample_argmax", _match_argmax)
UPSAMPLE_MAX = Pattern("interpolate + [softmax] + max", "max", "upsample_argmax", _match_max)
