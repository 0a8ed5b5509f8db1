"""cross_entropy of a map of logits, [N, C, d1, ...], and log_softmax + nll_loss, which it is made of.

fastseg's own keeps two numbers a pixel, not the softmax.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastseg import functional
from fastseg.functional._checks import FLOATING_DTYPES
from fastseg.fusion.calls import Call, tensor_of
from fastseg.fusion.pattern import Match, Pattern, Unfit, demand, source

OPTIONS = ("ignore_index", "reduction", "label_smoothing")


def calls_of(loss: Call) -> list[Call]:
    """The calls that are a cross-entropy of the first one's input: cross_entropy, or log_softmax and nll_loss."""
    return [loss] if loss.operation == "cross_entropy" else [source(loss, "log_softmax"), loss]


def tensors_of(calls: list[Call]) -> tuple[Tensor, Tensor]:
    """What is known of the logits and the target of `calls_of`; `Unfit` where their other arguments aren't served."""
    *softmaxes, loss = calls
    logits, target, weight = tensor_of(calls[0]["input"]), tensor_of(loss["target"]), tensor_of(loss["weight"])
    if logits is None or target is None:
        raise Unfit
    for softmax in softmaxes:
        demand(softmax["dim"] in (1, 1 - logits.ndim), "log_softmax over another dimension than the classes'")
        demand(softmax["dtype"] is None, "log_softmax in another dtype")
    unreduced = loss["size_average"] is None and loss["reduce"] is None
    demand(unreduced, f"{loss.operation}: size_average or reduce")
    demand(logits.dtype in FLOATING_DTYPES, f"cross_entropy: logits in {logits.dtype}")
    demand(weight is None or not weight.requires_grad, "cross_entropy: weight needs a gradient")
    return logits, target


def demand_labels(target: Tensor) -> None:
    """Raises `Unfit` where labels must go the plain way."""
    dtype = target.dtype
    demand(dtype == torch.int64, f"cross_entropy: torch takes labels in int64, and has its own way with {dtype}")


def options_of(loss: Call) -> dict[str, Any]:
    """The loss' arguments that are no tensors."""
    return {name: loss[name] for name in OPTIONS if name in loss.arguments}


def _match(loss: Call) -> Match:
    calls = calls_of(loss)
    input, target = tensors_of(calls)
    demand(input.ndim >= 3, "cross_entropy: no map of pixels, where torch's own is as fast")
    if target.is_floating_point():
        demand(loss.operation == "cross_entropy")  # nll_loss refuses them
        demand(not target.requires_grad, "cross_entropy: target needs a gradient")
    else:
        demand_labels(target)
    tensors = {"input": calls[0]["input"], "target": loss["target"], "weight": loss["weight"]}
    return Match(
        nodes=[call.node for call in calls],
        outputs={loss.node: None},
        function=functional.cross_entropy,
        arguments=tensors | options_of(loss),
        not_kept=[loss["input"]],  # the logarithmic softmax, as large as the logits
    )


CROSS_ENTROPY = Pattern("cross_entropy", "cross_entropy", "cross_entropy", _match)
NLL_LOSS = Pattern("log_softmax + nll_loss", "nll_loss", "cross_entropy", _match)
