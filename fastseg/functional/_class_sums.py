"""class_sums and upsample_class_sums: what they mean, what they accept, and the checks of their arguments."""

from __future__ import annotations

from torch import Tensor

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
    _check_activation(activation)
    check_batch(input)
    ignored = IGNORE_NONE if ignore_index is None else ignore_index
    if activation == "sigmoid" and target.ndim == input.ndim:
        shares = check_shares(target, tuple(input.shape), input)
        return _sums(as_map(input, 2), as_map(shares, 2), ignored, activation, ("nearest", False))
    labels = check_labels(target, pixels_of(input), input, ignore_index)
    return _sums(as_map(input, 2), as_map(labels, 1), ignored, activation, ("nearest", False))


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
    _check_activation(activation)
    check_grid(mode, align_corners)
    classes = check_map(input)
    if activation == "sigmoid" and target.ndim == input.ndim:
        target = check_shares(target, (input.shape[0], classes, *target.shape[2:]), input)
    else:
        target = check_label_map(target, input, ignore_index)
    grid = grid_between(input.shape[2:], target.shape[-2:], mode, align_corners)
    return _sums(input, target, IGNORE_NONE if ignore_index is None else ignore_index, activation, grid)


def _check_activation(activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f'activation: expected "softmax" or "sigmoid", got {activation!r}')


def _sums(input: Tensor, target: Tensor, ignore_index: int, activation: str, grid: tuple[str, bool]) -> Tensor:
    """The sums ``[N, C, 3]`` of maps, which are checked."""
    mode, align_corners = grid
    if activation == "sigmoid":
        options = SigmoidOptions(ignore_index, mode=mode, align_corners=align_corners)
        return upsample_sigmoid_sums(input, target, options).movedim(0, -1)
    of_loss = LossOptions(ignore_index, "sum", mode=mode, align_corners=align_corners)
    return upsample_cross_entropy(input, target, None, of_loss, with_overlap=True)[1].movedim(0, -1)
