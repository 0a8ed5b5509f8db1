"""class_sums and upsample_class_sums: what they mean, what they accept, and the checks of their arguments."""

from __future__ import annotations

from torch import Tensor

from fastseg import reference
from fastseg.functional._checks import (
    check_batch,
    check_grid,
    check_label_map,
    check_labels,
    check_map,
    check_shares,
    pixels_of,
)
from fastseg.functional._losses import as_map
from fastseg.ops.losses.options import IGNORE_NONE, LossOptions
from fastseg.ops.upsample_cross_entropy import upsample_cross_entropy
from fastseg.ops.upsample_sigmoid_sums import SigmoidOptions, upsample_sigmoid_sums
from fastseg.ops.upsampling import grid_between

ACTIVATIONS = ("softmax", "sigmoid")


def class_sums(input: Tensor, target: Tensor, ignore_index: int | None = None, activation: str = "softmax") -> Tensor:
    """The sums over pixels that region losses are made of: Dice, Jaccard, Tversky and their relatives.

    Of each image and class, with p the probability of the class in a pixel and t what the target says of it, the sums
    over the pixels that count of ``p * t``, ``p`` and ``t``. A loss is then a few lines on C numbers an image::

        overlap, predicted, labelled = class_sums(input, target).unbind(-1)
        loss = 1 - ((2 * overlap + 1) / (predicted + labelled + 1)).mean()

    and its gradient goes back in one pass over the logits. Of the logits' size it holds nothing but their gradient;
    for a softmax also two numbers a pixel. It sums in float32 (float64 for float64 and across blocks of pixels).
    Differentiable for ``input`` to any order; second derivatives run as plain PyTorch.

    Args:
        input: Logits ``[N, C]`` or ``[N, C, d1, ...]`` with at least one pixel an image; float32, float64, bfloat16 or
            float16, in any memory format. Never written to.
        target: Labels in [0, C), of input's shape without C, of any integer dtype: t is 1 for the label's class, else
            0. For "sigmoid" also t itself, of input's shape and of any boolean, integer or floating-point dtype: each
            class's own mask, or a share between 0 and 1.
        ignore_index: A label whose pixel adds nothing to any sum; of a target of input's shape, a value that adds
            nothing to its class's sums. None for none.
        activation: What makes probabilities of the logits: "softmax" over the classes, or "sigmoid" of each alone.

    Returns:
        ``[N, C, 3]`` in float32, for float64 logits in float64.

    Raises:
        IndexError: On a CPU, a label is neither in [0, C) nor ignore_index. A GPU can't raise one without waiting for
            it, and gives NaN.
        ValueError: Shapes, devices or arguments don't fit; the message names the argument.
        TypeError: A dtype that isn't supported.
    """
    return _sums(*_maps(input, target, ignore_index, activation), ignore_index, activation)[0]


def upsample_class_sums(
    input: Tensor,
    target: Tensor,
    ignore_index: int | None = None,
    activation: str = "softmax",
    *,
    mode: str = "bilinear",
    align_corners: bool = False,
) -> Tensor:
    """The sums of `fastseg.functional.class_sums` of logits upsampled to the target's size, without these.

    Equals ``class_sums(interpolate(input, size=target.shape[-2:], mode=mode, align_corners=align_corners), target,
    ...)``; see there for the sums, and `fastseg.functional.upsample_cross_entropy` for the grids. Second derivatives
    run as plain PyTorch, with the upsampled logits in memory.

    Args:
        input: Logits ``[N, C, h, w]``; float32, float64, bfloat16 or float16, in any memory format. Never written to.
        target: Labels ``[N, H, W]``, or for "sigmoid" also shares ``[N, C, H, W]``, as in
            `fastseg.functional.class_sums`; larger or smaller than input, by any ratio.
        ignore_index: As there.
        activation: As there.
        mode: "bilinear" or "nearest".
        align_corners: As in `fastseg.functional.upsample_cross_entropy`.

    Returns:
        ``[N, C, 3]`` in float32, for float64 logits in float64.

    Raises:
        IndexError: As `fastseg.functional.class_sums`.
        ValueError: Shapes, devices or arguments don't fit; the message names the argument.
        TypeError: A dtype that isn't supported.
    """
    return _sums(
        *_upsampled_maps(input, target, ignore_index, activation, mode, align_corners), ignore_index, activation
    )[0]


def sums_and_cross_entropy(
    input: Tensor,
    target: Tensor,
    ignore_index: int | None,
    activation: str,
    grid: tuple[str, bool] | None,
) -> tuple[Tensor, Tensor]:
    """The sums, of logits upsampled on a grid where one is given, and from the same pass the mean cross-entropy.

    For "sigmoid" it is the binary one. Both in the sums' dtype.
    """
    if grid is None:
        maps = _maps(input, target, ignore_index, activation)
    else:
        maps = _upsampled_maps(input, target, ignore_index, activation, *grid)
    sums, loss = _sums(*maps, ignore_index, activation, with_loss=True)
    return sums, loss


_Maps = tuple[Tensor, Tensor, tuple[str, bool]]  # of logits and of their target, and the grid between them


def _maps(input: Tensor, target: Tensor, ignore_index: int | None, activation: str) -> _Maps:
    """The arguments of `class_sums`, checked."""
    _check_activation(activation)
    check_batch(input)
    if activation == "sigmoid" and target.ndim == input.ndim:
        target = as_map(check_shares(target, tuple(input.shape), input), 2)
    else:
        target = as_map(check_labels(target, pixels_of(input), input, ignore_index), 1)
    return as_map(input, 2), target, ("nearest", False)


def _upsampled_maps(
    input: Tensor, target: Tensor, ignore_index: int | None, activation: str, mode: str, align_corners: bool
) -> _Maps:
    """The arguments of `upsample_class_sums`, checked."""
    _check_activation(activation)
    check_grid(mode, align_corners)
    classes = check_map(input)
    if activation == "sigmoid" and target.ndim == input.ndim:
        target = check_shares(target, (input.shape[0], classes, *target.shape[2:]), input)
    else:
        target = check_label_map(target, input, ignore_index)
    return input, target, grid_between(input.shape[2:], target.shape[-2:], mode, align_corners)


def _check_activation(activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f'activation: expected "softmax" or "sigmoid", got {activation!r}')


def _sums(
    input: Tensor, target: Tensor, grid: tuple[str, bool], ignore_index: int | None, activation: str,
    with_loss: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The sums ``[N, C, 3]`` of maps, and the mean cross-entropy, which means nothing unless it is asked for."""
    mode, align_corners = grid
    ignored = IGNORE_NONE if ignore_index is None else ignore_index
    if activation == "sigmoid":
        gamma = 0.0 if with_loss else None
        sums = upsample_sigmoid_sums(
            input, target, SigmoidOptions(ignored, gamma, mode=mode, align_corners=align_corners)
        )
        loss = reference.combine_binary(sums, None, None, "mean") if with_loss else sums
        return sums[:3].movedim(0, -1), loss
    options = LossOptions(ignored, "mean" if with_loss else "sum", mode=mode, align_corners=align_corners)
    loss, overlap = upsample_cross_entropy(input, target, None, options, with_overlap=True)
    return overlap.movedim(0, -1), loss
