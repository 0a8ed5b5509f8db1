"""Every operator in plain PyTorch: the definition that the kernels are held to, the baseline, and the fallback.

Imports torch alone. All functions are differentiable, to any order, by PyTorch's own autograd.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastseg._reference_sums import IGNORE_NONE, binary_cross_entropy, is_ignored, overlap, sigmoid_sums
from fastseg._reference_sums import combine_binary as combine_binary

IntOrPair = int | tuple[int, ...]
FloatOrPair = float | tuple[float, ...]

# A soft Dice's denominator is at least this: without `smooth`, a class that is nowhere has 0 / 0.
LEAST_DENOMINATOR = 1e-8


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntOrPair = 1,
    padding: str | IntOrPair = 0,
    dilation: IntOrPair = 1,
    groups: int = 1,
) -> Tensor:
    """`torch.nn.functional.conv2d` itself; see `fastseg.functional`."""
    return F.conv2d(input, weight, bias, stride, padding, dilation, groups)


def conv_relu_pool2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntOrPair = 1,
    padding: str | IntOrPair = 0,
    dilation: IntOrPair = 1,
    groups: int = 1,
    *,
    pool_size: IntOrPair = 2,
    pool_stride: IntOrPair | None = None,
    pool_padding: IntOrPair = 0,
    ceil_mode: bool = False,
    return_indices: bool = False,
    return_skip: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """``max_pool2d(relu(conv2d(input, weight, bias, ...)), pool_size, ...)``; see `fastseg.functional`."""
    # In place, as networks are written: this is the baseline of the benchmarks too, and it should be a strong one.
    skip = F.relu(F.conv2d(input, weight, bias, stride, padding, dilation, groups), inplace=True)
    one = (1, (1, 1))
    if pool_size in one and pool_stride in (None, *one) and not (return_indices or return_skip):
        return skip  # a window of one position is that position
    output, indices = F.max_pool2d(skip, pool_size, pool_stride, pool_padding, ceil_mode=ceil_mode, return_indices=True)
    results = (output, *((indices,) if return_indices else ()), *((skip,) if return_skip else ()))
    return results if len(results) > 1 else output


def instance_norm(
    input: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5,
    negative_slope: float = 1.0,
) -> Tensor:  # fmt: skip
    """`torch.nn.functional.instance_norm`, and a leaky ReLU: with a slope of 0 a ReLU, with 1 none.

    Args:
        input: Maps ``[N, C, ...]``. Each channel of each image gets the mean 0 and the variance 1.
        weight: ``[C]``, by which the channels are multiplied afterwards.
        bias: ``[C]``, which is added to that.
        eps: Added to the variance.
        negative_slope: What results below 0 are multiplied by.
    """
    normal = F.instance_norm(input, None, None, weight, bias, True, 0.0, eps)
    return normal if negative_slope == 1 else F.leaky_relu(normal, negative_slope)


def relu_pool2d(
    input: Tensor,
    pool_size: IntOrPair = 2,
    pool_stride: IntOrPair | None = None,
    pool_padding: IntOrPair = 0,
    ceil_mode: bool = False,
    *,
    return_indices: bool = False,
    return_skip: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """``max_pool2d(relu(input), pool_size, ...)``; see `fastseg.functional`."""
    skip = F.relu(input)
    output, indices = F.max_pool2d(skip, pool_size, pool_stride, pool_padding, ceil_mode=ceil_mode, return_indices=True)
    results = (output, *((indices,) if return_indices else ()), *((skip,) if return_skip else ()))
    return results if len(results) > 1 else output


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    pixel_weight: Tensor | None = None,
) -> Tensor:
    """`torch.nn.functional.cross_entropy`, for class indices of any integer dtype; see `fastseg.functional`."""
    if not target.is_floating_point():
        target = target.long()
    if weight is not None:
        weight = weight.to(input.dtype)
    losses = F.cross_entropy(
        input, target, weight, ignore_index=ignore_index, label_smoothing=label_smoothing,
        reduction=reduction if pixel_weight is None else "none",
    )  # fmt: skip
    return losses if pixel_weight is None else weigh(losses, target, weight, pixel_weight, ignore_index, reduction)


def weigh(
    losses: Tensor, target: Tensor, weight: Tensor | None, pixel_weight: Tensor, ignore_index: int, reduction: str
) -> Tensor:
    """Losses of pixels (class weights in them), weighed and reduced; "mean" divides by the sum of all weights."""
    pixel_weight = pixel_weight.to(losses.dtype)
    if not target.is_floating_point():
        ignored = is_ignored(target, ignore_index)
        pixel_weight = pixel_weight.masked_fill(ignored, 0)
    losses = losses * pixel_weight
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    if weight is not None and not target.is_floating_point():
        pixel_weight = pixel_weight * _weights_of_labels(weight.to(losses.dtype), target, ignored)
    return losses.sum() / pixel_weight.sum()


def _weights_of_labels(weight: Tensor, target: Tensor, ignored: Tensor) -> Tensor:
    """Each label's weight; some class's where it is ignored, or outside the classes (the loss is NaN there)."""
    return weight[target.long().masked_fill(ignored, 0).clamp(0, len(weight) - 1)]


def upsample_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    mode: str = "bilinear",
    align_corners: bool = False,
    pixel_weight: Tensor | None = None,
) -> Tensor:
    """`cross_entropy` of the logits upsampled to target's size; see `fastseg.functional`."""
    logits = upsample(input, target.shape[2 - input.ndim :], None, mode, align_corners)
    return cross_entropy(logits, target, weight, ignore_index, reduction, label_smoothing, pixel_weight=pixel_weight)


def upsample(
    input: Tensor, size: IntOrPair | None, scale_factor: FloatOrPair | None, mode: str, align_corners: bool
) -> Tensor:
    """`torch.nn.functional.interpolate`, which refuses ``align_corners`` where it has no meaning."""
    if _upsampled_size(input, size, scale_factor) == tuple(input.shape[2:]):
        return input  # torch would copy, or count neighbours 0 times, which makes NaN of infinity
    corners = None if mode == "nearest" else align_corners
    return F.interpolate(input, size, scale_factor, mode, corners)


def _upsampled_size(input: Tensor, size: IntOrPair | None, scale_factor: FloatOrPair | None) -> tuple[int, ...]:
    """The output's size that `torch.nn.functional.interpolate` gives."""
    if size is not None:
        return tuple(size) if isinstance(size, (tuple, list)) else (size,) * (input.ndim - 2)
    assert scale_factor is not None
    factors = scale_factor if isinstance(scale_factor, (tuple, list)) else (scale_factor,) * (input.ndim - 2)
    return tuple(math.floor(extent * factor) for extent, factor in zip(input.shape[2:], factors, strict=True))


def upsample_argmax(
    input: Tensor,
    size: IntOrPair | None = None,
    scale_factor: FloatOrPair | None = None,
    mode: str = "bilinear",
    align_corners: bool = False,
    *,
    dtype: torch.dtype | None = None,
    return_confidence: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The class of the largest upsampled logit, and its softmax value; see `fastseg.functional`."""
    logits = upsample(input, size, scale_factor, mode, align_corners)
    labels = logits.argmax(1).to(dtype or label_dtype(input.shape[1]))
    return (labels, logits.softmax(1).amax(1)) if return_confidence else labels


def label_dtype(classes: int) -> torch.dtype:
    """The dtype of predicted labels unless another is asked for: the smaller of uint8 and int64 that holds them."""
    return torch.uint8 if classes <= 256 else torch.int64


def upsample_confusion_matrix(
    input: Tensor,
    target: Tensor,
    ignore_index: int | None = None,
    *,
    mode: str = "bilinear",
    align_corners: bool = False,
) -> Tensor:
    """Pixels of each pair of true and predicted class; see `fastseg.functional`."""
    classes = input.shape[1]
    prediction = upsample(input, target.shape[1:], None, mode, align_corners).argmax(1)
    pairs = target.long() * classes + prediction
    counted = pairs if ignore_index is None else pairs[~is_ignored(target, ignore_index)]
    return torch.bincount(counted.flatten(), minlength=classes**2).view(classes, classes)


def upsample_threshold(
    input: Tensor,
    size: IntOrPair | None = None,
    threshold: float = 0.5,
    *,
    scale_factor: FloatOrPair | None = None,
    mode: str = "bilinear",
    align_corners: bool = False,
    return_scores: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Where the upsampled logits' sigmoid is above a threshold, with scores and boxes; see `fastseg.functional`."""
    probabilities = upsample(input, size, scale_factor, mode, align_corners).sigmoid()
    inside = probabilities > threshold
    if not return_scores:
        return inside.byte()
    sums = probabilities.masked_fill(~inside, 0).sum((2, 3), dtype=torch.promote_types(input.dtype, torch.float32))
    scores = (sums / inside.sum((2, 3)).clamp(min=1)).to(input.dtype)
    return inside.byte(), scores, _boxes_around(inside)


def upsample_mask_argmax(
    input: Tensor,
    class_probabilities: Tensor,
    size: IntOrPair | None = None,
    *,
    scale_factor: FloatOrPair | None = None,
    mode: str = "bilinear",
    align_corners: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The class that the upsampled masks of all queries add up to most of; see `fastseg.functional`."""
    masks = upsample(input, size, scale_factor, mode, align_corners).sigmoid()
    scores = torch.einsum("bqc,bqhw->bchw", class_probabilities.to(masks.dtype), masks)
    return scores.argmax(1).to(dtype or label_dtype(class_probabilities.shape[2]))


def _boxes_around(inside: Tensor) -> Tensor:
    """``[N, C, 4]``: of masks [N, C, H, W] the first column and row, and the first beyond; 0 where there is none."""
    ends = []
    for met in (inside.any(2), inside.any(3)):  # columns, rows
        positions = torch.arange(met.shape[-1], device=met.device)
        beyond = ((positions + 1) * met).amax(-1)
        first = positions.where(met, met.shape[-1]).amin(-1)
        ends.append((first.minimum(beyond), beyond))
    return torch.stack([*(first for first, _ in ends), *(beyond for _, beyond in ends)], -1)


def cross_entropy_dice(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    *,
    ce_weight: float = 1.0,
    dice_weight: float = 1.0,
    smooth: float = 1e-5,
    batch_dice: bool = False,
    include_background: bool = True,
) -> Tensor:
    """The sum of cross-entropy and soft Dice loss; see `fastseg.functional`."""
    loss = cross_entropy(input, target, weight, ignore_index, "mean", label_smoothing)
    sums = overlap(input, target, ignore_index)
    return combine_dice(loss, sums, ce_weight, dice_weight, smooth, batch_dice, include_background)


def combine_dice(
    loss: Tensor, overlap: Tensor, ce_weight: float, dice_weight: float, smooth: float, batch_dice: bool,
    include_background: bool,
) -> Tensor:  # fmt: skip
    """The weighted sum of a cross-entropy and the soft Dice loss that follows from what `overlap` gives."""
    dice = dice_weight * dice_loss(overlap, smooth, batch_dice, include_background).to(loss.dtype)
    if not ce_weight:
        return dice  # the other may be NaN, which a factor of 0 would keep
    of_no_pixel = overlap[2].sum() == 0  # the cross-entropy is NaN; as in nnU-Net, it adds nothing
    return dice + ce_weight * loss.masked_fill(of_no_pixel, 0)


def class_sums(input: Tensor, target: Tensor, ignore_index: int | None = None, activation: str = "softmax") -> Tensor:
    """``[N, C, 3]``: sums of p t, p and t over an image's pixels; see `fastseg.functional`."""
    ignored = IGNORE_NONE if ignore_index is None else ignore_index
    sums = overlap(input, target, ignored) if activation == "softmax" else sigmoid_sums(input, target, ignored)
    return sums.movedim(0, -1)


def upsample_class_sums(
    input: Tensor,
    target: Tensor,
    ignore_index: int | None = None,
    activation: str = "softmax",
    *,
    mode: str = "bilinear",
    align_corners: bool = False,
) -> Tensor:
    """`class_sums` of the logits upsampled to target's size; see `fastseg.functional`."""
    logits = upsample(input, target.shape[-2:], None, mode, align_corners)
    return class_sums(logits, target, ignore_index, activation)


def upsample_binary_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    ignore_index: int | None = None,
    reduction: str = "mean",
    *,
    mode: str = "bilinear",
    align_corners: bool = False,
) -> Tensor:
    """`binary_cross_entropy` of the logits upsampled to target's size; see `fastseg.functional`."""
    logits = upsample(input, target.shape[-2:], None, mode, align_corners)
    return binary_cross_entropy(logits, target, weight, pos_weight, ignore_index, reduction)


def dice_loss(overlap: Tensor, smooth: float, batch_dice: bool, include_background: bool) -> Tensor:
    """One minus the mean soft Dice, from what `overlap` gives."""
    sums = overlap.sum(1) if batch_dice else overlap
    intersection, predicted, labelled = sums if include_background else sums[..., 1:]
    dice = (2 * intersection + smooth) / (predicted + labelled + smooth).clamp_min(LEAST_DENOMINATOR)
    return 1 - dice.mean()


def upsample_cross_entropy_dice(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    *,
    mode: str = "bilinear",
    align_corners: bool = False,
    ce_weight: float = 1.0,
    dice_weight: float = 1.0,
    smooth: float = 1e-5,
    batch_dice: bool = False,
    include_background: bool = True,
) -> Tensor:
    """`cross_entropy_dice` of the logits upsampled to target's size; see `fastseg.functional`."""
    return cross_entropy_dice(
        upsample(input, target.shape[1:], None, mode, align_corners), target, weight, ignore_index, label_smoothing,
        ce_weight=ce_weight, dice_weight=dice_weight, smooth=smooth, batch_dice=batch_dice,
        include_background=include_background,
    )  # fmt: skip


def focal_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    *,
    gamma: float = 2.0,
) -> Tensor:
    """The focal loss of softmax probabilities; see `fastseg.functional`."""
    losses = cross_entropy(input, target, None, ignore_index, "none")
    return focus(losses, target, weight, ignore_index, reduction, gamma)


def focus(
    losses: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str, gamma: float
) -> Tensor:
    """The focal losses of pixels, from their cross-entropies -log(p), reduced."""
    ignored = is_ignored(target, ignore_index)
    # 1 - p; bounded, since the derivative of a root of zero is infinite.
    others = (-torch.expm1(-losses)).clamp_min(torch.finfo(losses.dtype).tiny)
    losses = others.pow(gamma) * losses
    if weight is not None:
        losses = losses * _weights_of_labels(weight.to(losses.dtype), target, ignored)
    losses = losses.masked_fill(ignored, 0)
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / (~ignored).sum()


def upsample_focal_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    *,
    gamma: float = 2.0,
    mode: str = "bilinear",
    align_corners: bool = False,
) -> Tensor:
    """`focal_loss` of the logits upsampled to target's size; see `fastseg.functional`."""
    logits = upsample(input, target.shape[-2:], None, mode, align_corners)
    return focal_loss(logits, target, weight, ignore_index, reduction, gamma=gamma)
