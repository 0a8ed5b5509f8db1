"""The sums over pixels that losses are made of, in plain PyTorch: a part of `fastseg.reference`, and as independent."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# The ignore_index where no label is to be ignored: a number that is no class either.
IGNORE_NONE = torch.iinfo(torch.int64).min


def is_ignored(target: Tensor, ignore_index: int) -> Tensor:
    """Where the labels are ``ignore_index``; compared as int64, since torch would wrap -100 to uint8's 156."""
    return target.long() == ignore_index


def overlap(input: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """``[3, N, C]``: each image's sums of P [target = c], P and [target = c] for each class c, P = softmax(input)."""
    # Half types hold neither the sums over many pixels nor the quotients of small ones.
    probabilities = input.softmax(1, torch.promote_types(input.dtype, torch.float32))
    shares, counted = shares_of(target, probabilities, ignore_index)
    return _sum_pixels([probabilities * shares, probabilities, shares], counted)


def sigmoid_sums(
    input: Tensor,
    target: Tensor,
    ignore_index: int,
    gamma: float | None = None,
    threshold: float | None = None,
    smaller: bool = False,
) -> Tensor:
    """``[3, N, C]``, with gamma ``[6, N, C]``: sums over each image's pixels; see `fastseg.ops.upsample_sigmoid_sums`.

    The target has labels ``[N, d1, ...]``, or each class's share of a pixel ``[N, C, d1, ...]``.
    """
    logits = input.to(torch.promote_types(input.dtype, torch.float32))
    shares, counted = shares_of(target, logits, ignore_index)
    logits = logits.masked_fill(~counted, 0)
    probabilities = logits.sigmoid()
    overlap = torch.minimum(probabilities, shares) if smaller else probabilities * shares
    terms = [overlap, probabilities, shares]
    if gamma is not None:
        signed = logits * (2 * shares - 1)
        # 1 - q; bounded, since the derivative of a root of zero is infinite.
        others = (-signed).sigmoid().clamp_min(torch.finfo(signed.dtype).tiny)
        factors = (others if threshold is None else others / threshold).pow(gamma)
        if threshold is not None:
            factors = factors.masked_fill(signed.sigmoid() < threshold, 1)
        own, other = -F.logsigmoid(logits) * shares, -F.logsigmoid(-logits) * (1 - shares)
        terms += [factors * own, factors * other, factors]
    return _sum_pixels(terms, counted)


def shares_of(target: Tensor, values: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Each class's share of a pixel, of values' shape, zero where it is ignored; and where it isn't.

    Of labels, which give one class all of it, or of shares, of which each may be ignored.
    """
    if target.ndim == values.ndim:
        shares = target.to(values.dtype)
        counted = shares != ignore_index
        return shares.masked_fill(~counted, 0), counted
    ignored = is_ignored(target, ignore_index)
    one_hot = F.one_hot(target.long().masked_fill(ignored, 0), values.shape[1]).movedim(-1, 1)
    counted = ~ignored.unsqueeze(1).expand_as(values)
    return one_hot.to(values.dtype).masked_fill(~counted, 0), counted


def _sum_pixels(terms: list[Tensor], counted: Tensor) -> Tensor:
    """Sums ``[terms, N, C]`` of terms ``[N, C, d1, ...]`` over the pixels that count."""
    # The new dimension lets [N, C] be images of one pixel.
    return torch.stack([term.masked_fill(~counted, 0).unsqueeze(-1).flatten(2).sum(2) for term in terms])


def binary_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    ignore_index: int | None = None,
    reduction: str = "mean",
) -> Tensor:
    """`torch.nn.functional.binary_cross_entropy_with_logits` of the values that count; see `fastseg.functional`."""
    target = target.unsqueeze(1) if target.ndim < input.ndim else target
    shares, counted = shares_of(target, input, IGNORE_NONE if ignore_index is None else ignore_index)
    weights = [
        None if each is None else each.to(input.dtype).view(-1, *[1] * (input.ndim - 2))
        for each in (weight, pos_weight)
    ]
    losses = F.binary_cross_entropy_with_logits(
        input.masked_fill(~counted, 0), shares, weights[0], pos_weight=weights[1], reduction="none"
    ).masked_fill(~counted, 0)
    if reduction == "none":
        return losses
    return losses.sum() / counted.sum() if reduction == "mean" else losses.sum()


def combine_binary(sums: Tensor, weight: Tensor | None, pos_weight: Tensor | None, reduction: str) -> Tensor:
    """The reduced binary cross-entropy that follows from what `sigmoid_sums` gives for gamma 0."""
    own, others, counted = sums[3:].sum(1)
    losses = (own if pos_weight is None else own * pos_weight.to(own.dtype)) + others
    total = (losses if weight is None else losses * weight.to(losses.dtype)).sum()
    return total / counted.sum() if reduction == "mean" else total
