"""interpolate + sigmoid + einsum + argmax over the classes becomes upsample_mask_argmax.

It is how MaskFormer and its successors make classes of masks: ``einsum("bqc,bqhw->bchw", classes, masks).argmax(1)``.
In half types neither the upsampled masks nor the sums are rounded before they are compared.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastseg import functional
from fastseg.functional._checks import FLOATING_DTYPES
from fastseg.fusion.calls import Call, tensor_of
from fastseg.fusion.pattern import Match, Pattern, Unfit, demand, source
from fastseg.fusion.patterns import _interpolation
from fastseg.fusion.patterns.upsample_argmax import CLASSES


def interpolate_mask_argmax(class_probabilities: Tensor, keepdim: bool, **upsampling: Any) -> Tensor:
    """What the graph calls."""
    input, grid = _interpolation.before(**upsampling)
    labels = functional.upsample_mask_argmax(input, class_probabilities, **grid, dtype=torch.int64)
    return labels.unsqueeze(1) if keepdim else labels


def _match(argmax: Call) -> Match:
    einsum = source(argmax, "einsum")
    probabilities, masks = _operands(einsum)
    sigmoid = einsum.calls.get(masks)
    if sigmoid is None or sigmoid.operation != "sigmoid":
        raise Unfit
    up = _interpolation.upsampled(sigmoid.source())
    demand(not up.rows)
    demand(argmax["dim"] in CLASSES, "argmax over another dimension than the classes'")
    weights = tensor_of(probabilities)
    demand(weights is not None and weights.dtype in FLOATING_DTYPES)
    nodes = [*up.nodes, sigmoid.node, einsum.node, argmax.node]
    return Match(
        nodes=nodes,
        outputs={argmax.node: None},
        function=interpolate_mask_argmax,
        arguments=up.arguments | {"class_probabilities": probabilities, "keepdim": bool(argmax["keepdim"])},
        not_kept=[*up.nodes[:1], sigmoid.node, einsum.node],
    )


def _operands(einsum: Call) -> tuple[Any, Any]:
    """Class probabilities and masks of a sum over queries; `Unfit` where the equation says something else."""
    operands = einsum["operands"]
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = operands[0]
    if not isinstance(einsum["equation"], str) or len(operands) != 2:
        raise Unfit
    terms, _, result = einsum["equation"].replace(" ", "").partition("->")
    named = dict(zip(terms.split(","), operands, strict=False))
    for probabilities, masks in (list(named), list(named)[::-1]) if len(named) == 2 else ():
        if len(set(probabilities + masks)) == 5 and len(probabilities) == 3 and len(masks) == 4:
            image, label = probabilities[0], probabilities[2]
            if masks[:2] == probabilities[:2] and result == image + label + masks[2:]:
                return named[probabilities], named[masks]
    raise Unfit("einsum: it isn't the sum over queries of class probabilities and masks")


UPSAMPLE_MASK_ARGMAX = Pattern("interpolate + sigmoid + einsum + argmax", "argmax", "upsample_mask_argmax", _match)
