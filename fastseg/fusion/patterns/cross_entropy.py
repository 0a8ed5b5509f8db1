"""cross_entropy of a map of logits, [N, C, d1, ...]: fastseg's own keeps two numbers a pixel, not the softmax."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastseg import functional
from fastseg.functional._checks import FLOATING_DTYPES
from fastseg.fusion.calls import Call, tensor_of
from fastseg.fusion.pattern import Match, Pattern, Unfit, demand, demand_free

OPTIONS = ("ignore_index", "reduction", "label_smoothing")


def map_cross_entropy(input: Tensor, target: Tensor, weight: Tensor | None, **options: Any) -> Tensor:
    """What the graph calls; where its maker knew no sizes, they are looked at here."""
    serve = functional.cross_entropy if why_not(input, target, weight) is None else F.cross_entropy
    return serve(input, target, weight, **options)


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


def demand_options(loss: Call) -> None:
    """Raises `Unfit` where the arguments that are no tensors aren't served."""
    demand_free(loss)
    demand(loss["size_average"] is None and loss["reduce"] is None, "cross_entropy: size_average or reduce")


def _match(loss: Call) -> Match | None:
    demand_options(loss)
    input, target = tensor_of(loss["input"]), tensor_of(loss["target"])
    reason = None if input is None or target is None else why_not(input, target, tensor_of(loss["weight"]))
    if reason is not None:
        raise Unfit(reason)
    return Match(
        nodes=[loss.node],
        outputs={loss.node: None},
        function=map_cross_entropy,
        arguments={name: loss[name] for name in ("input", "target", "weight", *OPTIONS)},
        not_kept=[loss["input"]],  # the logarithmic softmax, as large as the logits
    )


CROSS_ENTROPY = Pattern("cross_entropy", "cross_entropy", "cross_entropy", _match)
