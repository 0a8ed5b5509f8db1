"""What the drop-in losses share: the checks of their arguments, and the sums over a softmax in one pass."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastseg._native import log_fallback
from fastseg.functional._checks import (
    FLOATING_DTYPES,
    LABEL_DTYPES,
    check_class_weight,
    pixels_of,
    widen_labels,
)
from fastseg.functional._losses import as_map, in_accumulation_dtype
from fastseg.ops import upsample_cross_entropy as operator
from fastseg.ops.losses.options import LossOptions


def check_scores(name: str, scores: Tensor, min_dims: int) -> None:
    """Refuses what isn't logits or probabilities ``[N, C, ...]`` with pixels."""
    if scores.ndim < min_dims or 0 in scores.shape[1:]:
        expected = "[N, C, d1, ...]" if min_dims > 2 else "[N, C] or [N, C, d1, ...]"
        raise ValueError(f"{name}: expected {expected} with classes and pixels, got shape {tuple(scores.shape)}")
    if scores.dtype not in FLOATING_DTYPES:
        raise TypeError(f"{name}: expected float32, float64, bfloat16 or float16, got {scores.dtype}")


def check_labels(name: str, target: Tensor, shape: tuple[int, ...], scores: Tensor) -> None:
    """Refuses a target of another shape or on another device than the scores'."""
    if target.shape != shape:
        raise ValueError(f"{name}: expected labels of shape {shape}, got {tuple(target.shape)}")
    if target.device != scores.device:
        raise ValueError(f"{name}: expected the logits' device {scores.device}, got {target.device}")


def as_labels(name: str, target: Tensor, scores: Tensor) -> Tensor:
    """The labels ``[N, d1, ...]`` of scores ``[N, C, d1, ...]``; target may have a dimension of one channel more."""
    shape = pixels_of(scores)
    if target.shape[:1] == shape[:1] and target.numel() == math.prod(shape):
        target = target.reshape(shape)
    check_labels(name, target, shape, scores)
    return as_integers(target)


def as_integers(labels: Tensor) -> Tensor:
    """Labels in a dtype that the operators read."""
    # Other libraries' labels may be floating-point numbers, too.
    return widen_labels(labels, None) if labels.dtype == torch.uint64 or labels.dtype in LABEL_DTYPES else labels.long()


def one_hot(name: str, labels: Tensor, classes: int, dtype: torch.dtype) -> Tensor:
    """Labels ``[N, d1, ...]`` as ``[N, C, d1, ...]`` of zeros and ones.

    Raises:
        IndexError: On a CPU, a label isn't in [0, C).
    """
    labels = labels.long()
    if labels.is_cpu and not torch.compiler.is_compiling():
        outside = labels[(labels < 0) | (labels >= classes)]
        if len(outside) > 0:
            raise IndexError(f"{name}: expected classes in [0, {classes}), got {outside[0].item()}")
    shape = (labels.shape[0], classes, *labels.shape[1:])
    return torch.zeros(shape, dtype=dtype, device=labels.device).scatter_(1, labels.unsqueeze(1), 1)


def softmax_sums(
    input: Tensor, labels: Tensor, options: LossOptions, weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The cross-entropy, and `fastseg.reference.overlap`'s ``[3, N, C]``, in the accumulation dtype."""
    check_class_weight(weight, input.shape[1], input)
    if weight is not None and weight.requires_grad and torch.is_grad_enabled():
        raise ValueError("weight: it has no gradient here, as in torch's cross-entropy of labels; detach it")
    weight = in_accumulation_dtype(weight, input)
    return operator.upsample_cross_entropy(as_map(input, 2), as_map(labels, 1), weight, options, with_overlap=True)


def log_plain(loss: str, reason: str) -> None:
    """Say once, on the logger `fastseg`, why plain PyTorch serves a loss whose softmax fastseg could have fused."""
    if not torch.compiler.is_compiling():
        log_fallback(f"fastseg.losses.{loss}", reason)
