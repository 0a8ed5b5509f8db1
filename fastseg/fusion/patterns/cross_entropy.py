"""cross_entropy of a map of logits, [N, C, d1, ...], and log_softmax + nll_loss, which it is made of.

fastseg's own keeps two numbers a pixel, not the softmax.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastseg import functional
from fastseg.functional._checks import FLOATING_DTYPES
from fastseg.fusion.calls import Call, recognise, tensor_of
from fastseg.fusion.pattern import Match, Pattern, Unfit, demand, demand_free

OPTIONS = ("ignore_index", "reduction", "label_smoothing")


def map_cross_entropy(input: Tensor, target: Tensor, weight: Tensor | None, **options: Any) -> Tensor:
    """What the graph calls; where its maker knew no sizes, they are looked at here."""
    serves = why_not(input, target, weight) is None and not is_nll_of_probabilities(target, options)
    return (functional.cross_entropy if serves else plain_loss)(input, target, weight, **options)


def plain_loss(input: Tensor, target: Tensor, weight: Tensor | None, **options: Any) -> Tensor:
    """The loss in plain PyTorch: nll_loss is the one that knows no label smoothing."""
    if "label_smoothing" in options:
        return F.cross_entropy(input, target, weight, **options)
    return F.nll_loss(F.log_softmax(input, 1), target, weight, **options)


def is_nll_of_probabilities(target: Tensor, options: Mapping[str, Any]) -> bool:
    """Whether a target isn't labels, which nll_loss refuses."""
    return target.is_floating_point() and "label_smoothing" not in options


def why_not(input: Tensor, target: Tensor, weight: Tensor | None) -> str | None:
    """Why tensors must go the plain way, or None."""
    if input.ndim < 3:
        return "cross_entropy: no map of pixels, where torch's own is as fast"
    if input.dtype not in FLOATING_DTYPES:
        return f"cross_entropy: logits in {input.dtype}"
    if weight is not None and weight.requires_grad:
        return "cross_entropy: weight needs a gradient"
    if target.is_floating_point():
        return "cross_entropy: target needs a gradient" if target.requires_grad else None
    return why_not_labels(target)


def why_not_labels(target: Tensor) -> str | None:
    """Why labels must go the plain way, or None."""
    if target.dtype != torch.int64:
        return f"cross_entropy: torch takes labels in int64, and has its own way with {target.dtype}"
    return None


def calls_of(loss: Call) -> list[Call] | None:
    """The calls that are a cross-entropy of the first one's input: cross_entropy, or log_softmax and nll_loss."""
    if loss.operation == "cross_entropy":
        return [loss]
    softmax = recognise(loss["input"])
    return [softmax, loss] if softmax is not None and softmax.operation == "log_softmax" else None


def demand_options(calls: list[Call]) -> None:
    """Raises `Unfit` where the arguments of `calls_of` that are no tensors aren't served."""
    demand_free(*calls)
    for softmax in calls[:-1]:
        logits = tensor_of(softmax["input"])
        classes = (1,) if logits is None else (1, 1 - logits.ndim)
        demand(softmax["dim"] in classes, "log_softmax over another dimension than the classes'")
        demand(softmax["dtype"] is None, "log_softmax in another dtype")
    loss = calls[-1]
    unreduced = loss["size_average"] is None and loss["reduce"] is None
    demand(unreduced, f"{loss.operation}: size_average or reduce")


def options_of(loss: Call) -> dict[str, Any]:
    """The loss' arguments that are no tensors."""
    return {name: loss[name] for name in OPTIONS if name in loss.arguments}


def _match(loss: Call) -> Match | None:
    calls = calls_of(loss)
    if calls is None:
        return None
    demand_options(calls)
    input, target = tensor_of(calls[0]["input"]), tensor_of(loss["target"])
    reason = None if input is None or target is None else why_not(input, target, tensor_of(loss["weight"]))
    if reason is not None:
        raise Unfit(reason)
    tensors = {"input": calls[0]["input"], "target": loss["target"], "weight": loss["weight"]}
    return Match(
        nodes=[call.node for call in calls],
        outputs={loss.node: None},
        function=map_cross_entropy,
        arguments=tensors | options_of(loss),
        not_kept=[loss["input"]],  # the logarithmic softmax, as large as the logits
    )


CROSS_ENTROPY = Pattern("cross_entropy", "cross_entropy", "cross_entropy", _match)
NLL_LOSS = Pattern("log_softmax + nll_loss", "nll_loss", "cross_entropy", _match)
