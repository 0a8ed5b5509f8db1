"""interpolate + [softmax or log_softmax] + argmax over the classes becomes upsample_argmax.

The indices that torch.max gives along the classes' dimension are argmax, where nothing uses its values.

Softmax keeps the order of finite logits; fastseg compares them before it would round them to equal probabilities. In
half types the upsampled logits aren't rounded before they are compared, either. (A pixel with a NaN or an infinity has
NaN's for probabilities: through softmax, torch's argmax then is class 0; here it is that logit's class, as without
softmax.)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastseg import functional
from fastseg._native import log_slow_road
from fastseg.fusion.calls import Call, recognise, tensor_of
from fastseg.fusion.pattern import Match, Pattern, Unfit, demand, demand_free
from fastseg.fusion.patterns import _interpolation

CLASSES = (1, -3)  # the classes' dimension of [N, C, H, W]


def interpolate_argmax(
    input: Tensor, keepdim: bool, size: Any, scale_factor: Any, mode: str, align_corners: bool | None,
    recompute_scale_factor: bool | None,
) -> Tensor:  # fmt: skip
    """What the graph calls; where its maker knew no sizes, they are looked at here."""
    reason = _interpolation.why_not(input)
    if reason is not None:
        if not torch.compiler.is_compiling():
            log_slow_road("interpolate + argmax", reason)
        upsampled = F.interpolate(input, size, scale_factor, mode, align_corners, recompute_scale_factor)
        return upsampled.argmax(1, keepdim)
    if recompute_scale_factor:
        size, scale_factor = _interpolation.output_size(input, None, scale_factor), None
    labels = functional.upsample_argmax(input, size, scale_factor, mode, bool(align_corners), dtype=torch.int64)
    return labels.unsqueeze(1) if keepdim else labels  # type: ignore[union-attr,return-value]  # no tuple


def _match(argmax: Call) -> Match | None:
    calls, last = [argmax], argmax.node
    if argmax.operation == "indices of max":
        found = recognise(argmax["input"])
        assert found is not None
        argmax, calls = found, [found]
    call = recognise(argmax["input"])
    if call is not None and call.operation in ("softmax", "log_softmax"):
        calls.insert(0, call)
        call = recognise(call["input"])
    if call is None or call.operation != "interpolate":
        return None
    calls.insert(0, call)
    _interpolation.demand_grid(call)
    demand_free(*calls)
    demand(all(c["dim"] in CLASSES for c in calls[1:]), "softmax or argmax over another dimension than the classes'")
    logits = tensor_of(call["input"])
    if logits is None:
        demand(all(c["dim"] == 1 for c in calls[1:]), "a dimension from the end, of logits of unknown dimensions")
    elif (reason := _interpolation.why_not(logits)) is not None:
        raise Unfit(reason)
    if len(calls) == 3:
        demand(calls[1]["dtype"] is None, "softmax in another dtype")
    nodes = [*(c.node for c in calls), *([last] if last is not argmax.node else [])]
    return Match(
        nodes=nodes,
        outputs={last: None},
        function=interpolate_argmax,
        arguments={
            "input": call["input"],
            "keepdim": bool(argmax["keepdim"]),
            **{name: call[name] for name in _interpolation.ARGUMENTS},
        },
        not_kept=[c.node for c in calls[:-1]],
        shared=nodes[:-1],
    )


UPSAMPLE_ARGMAX = Pattern("interpolate + [softmax] + argmax", "argmax", "upsample_argmax", _match)
UPSAMPLE_MAX = Pattern("interpolate + [softmax] + max", "indices of max", "upsample_argmax", _match)
