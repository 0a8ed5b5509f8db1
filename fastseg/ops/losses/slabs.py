"""upsample_cross_entropy of volumes by kernels that know images alone: slab by slab, as `fastseg.ops.volumes` has them.

The arguments are those of the operator's registration; ``kernels`` is `fastseg.kernels.upsample_cross_entropy`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastseg.ops.losses.options import LossOptions
from fastseg.ops.upsampling import Upsampling
from fastseg.ops.volumes import Slab, slabs, sum_gradients


def forward(kernels: Any, tensors: Any, options: LossOptions, upsampling: Upsampling) -> None:
    """Fills loss, statistics, total_weight and overlap of volumes; sums over slabs are added up in float64."""
    input, target, weight, loss, statistics, total_weight, overlap = tensors
    reduced = options.reduction != "none"
    sums, overlaps = loss.new_zeros(2, dtype=torch.float64), overlap.double().zero_()
    for slab in slabs(input, target.shape[1:], upsampling):
        labels = target[slab.at]
        losses = loss.new_empty(()) if reduced else loss[slab.at]
        kept = statistics.new_empty((2, len(labels) if statistics.numel() > 0 else 0, *labels.shape[1:]))
        weights, overlapping = losses.new_empty(()), overlap.new_empty((len(overlap), len(labels), input.shape[1]))
        parts = kernels.ForwardTensors(slab.logits, labels, weight, losses, kept, weights, overlapping)
        kernels.forward(parts, _of_slabs(options), slab.grid)
        if reduced:
            sums += torch.stack((losses, weights))
        if len(overlap) > 0:
            overlaps[:, slab.at[0]] += overlapping.sum(1, dtype=torch.float64)
        if statistics.numel() > 0:
            _part(statistics, slab).copy_(kept)
    overlap.copy_(overlaps)
    total_weight.copy_(sums[1])
    if reduced:
        loss.copy_(_reduced(sums, options))


def _part(statistics: Tensor, slab: Slab) -> Tensor:
    image, planes = slab.at
    return statistics[:, image, planes]


def _of_slabs(options: LossOptions) -> LossOptions:
    return options if options.reduction == "none" else options._replace(reduction="sum")


def _reduced(sums: Tensor, options: LossOptions) -> Tensor:
    """The loss, of the sums of losses and of their weights."""
    loss, weight = sums
    if options.reduction == "sum":
        return loss
    mean = loss / weight
    # Where no label has weight, the labels' own share is 0 / 0, whatever the smoothing's is.
    return mean.masked_fill(weight == 0, torch.nan) if options.label_smoothing > 0 else mean


def backward(kernels: Any, tensors: Any, options: LossOptions, upsampling: Upsampling) -> Tensor:
    """The gradient of volumes' logits."""
    grad_loss, grad_overlap, input, target, weight, statistics, total_weight = tensors

    def gradient_of(slab: Slab) -> Tensor:
        labels, gradient = target[slab.at], torch.empty_like(slab.logits)
        grad_losses = grad_loss[slab.at] if options.reduction == "none" else grad_loss
        of_image = grad_overlap[:, slab.at[0], None].expand(-1, len(labels), -1)
        kept = _part(statistics, slab).contiguous()
        parts = kernels.BackwardTensors(
            grad_losses, of_image, slab.logits, labels, weight, kept, total_weight, gradient
        )
        kernels.backward(parts, options, slab.grid)
        return gradient

    return sum_gradients(input, target.shape[1:], upsampling, gradient_of)
