"""The pixel losses in plain PyTorch: what runs on devices without a kernel, and what the operators decompose into."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastseg import reference
from fastseg.ops.losses.options import LossOptions


def cross_entropy(
    logits: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, statistics and total_weight of logits ``[N, C, d1, ...]`` in the accumulation dtype."""
    largest = logits.amax(1)
    statistics = torch.stack((largest, (logits - largest.unsqueeze(1)).exp().sum(1).log()))
    # In parts, since ONNX's translation of cross_entropy (torch 2.13, onnxscript 0.7) takes probabilities for labels,
    # and leaves out the smoothing.
    scores = F.log_softmax(logits, 1)
    smoothing = options.label_smoothing
    if target.is_floating_point():
        total_weight = largest.new_full((), largest.numel())
        shares = target * (1 - smoothing) + smoothing / logits.shape[1]
        losses = -(_weighed(scores, weight) * shares).sum(1)
        return _reduced(losses, total_weight, options.reduction), statistics, total_weight
    ignored = reference.is_ignored(target, options.ignore_index)
    labels = target.long()
    counts = ~ignored if weight is None else weight[labels.masked_fill(ignored, 0)].masked_fill(ignored, 0)
    total_weight = counts.sum().to(statistics.dtype)
    own = scores * (1 - smoothing) if smoothing > 0 else scores
    loss = F.nll_loss(own, labels, weight, ignore_index=options.ignore_index, reduction=options.reduction)
    if smoothing > 0:
        shares = _weighed(scores, weight) * (smoothing / logits.shape[1])
        loss = loss - _reduced(shares.sum(1).masked_fill(ignored, 0), total_weight, options.reduction)
    return loss, statistics, total_weight


def _weighed(scores: Tensor, weight: Tensor | None) -> Tensor:
    return scores if weight is None else scores * weight.view(-1, *[1] * (scores.ndim - 2))


def _reduced(losses: Tensor, total_weight: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return losses
    return losses.sum() / total_weight if reduction == "mean" else losses.sum()


def cross_entropy_backward(
    grad_loss: Tensor, saved: tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor], options: LossOptions
) -> Tensor:
    """The gradient of the logits; ``saved`` are logits, target, weight, statistics and total_weight."""
    logits, target, weight, statistics, total_weight = saved
    largest, log_sum = statistics.unsqueeze(2)
    probabilities = (logits - largest - log_sum).exp()
    grad = (grad_loss / total_weight if options.reduction == "mean" else grad_loss).expand_as(statistics[0])
    # How much a class counts: the target's share of it * scale + shift.
    smoothing, classes = options.label_smoothing, logits.shape[1]
    weights = statistics.new_ones(classes) if weight is None else weight
    scale, shift = (
        term.view(-1, *[1] * (logits.ndim - 2)) for term in (weights * (1 - smoothing), weights * smoothing / classes)
    )
    if target.is_floating_point():
        share = target * scale + shift
        return (probabilities * share.sum(1, keepdim=True) - share) * grad.unsqueeze(1)
    ignored = reference.is_ignored(target, options.ignore_index)
    labels = target.masked_fill(ignored, 0).long()
    grad = grad.masked_fill(ignored, 0)
    one_hot = torch.zeros_like(probabilities).scatter(1, labels.unsqueeze(1), 1)
    grad_logits = (probabilities - one_hot) * (scale.flatten()[labels] * grad).unsqueeze(1)
    if smoothing > 0:
        grad_logits = grad_logits + (probabilities * shift.sum() - shift) * grad.unsqueeze(1)
    return grad_logits


def overlap_backward(
    grad_overlap: Tensor, logits: Tensor, target: Tensor, statistics: Tensor, ignore_index: int
) -> Tensor:
    """What `fastseg.reference.overlap` passes on to the logits."""
    largest, log_sum = statistics.unsqueeze(2)
    ignored = reference.is_ignored(target, ignore_index).unsqueeze(1)
    probabilities = (logits - largest - log_sum).exp().masked_fill(ignored, 0)
    labels = target.unsqueeze(1).long().masked_fill(ignored, 0)
    of_intersection, of_predicted, _ = grad_overlap.view(*grad_overlap.shape, *[1] * (logits.ndim - 2))
    one_hot = torch.zeros_like(probabilities).scatter(1, labels, 1)
    grad = of_predicted + one_hot * of_intersection
    return probabilities * (grad - (probabilities * grad).sum(1, keepdim=True))
