"""Calls that the fusion pass finds, and calls that look like them and must stay: shared by its tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import fastseg
from fastseg.testing import make, make_labels

CLASSES = 5


def compiled(function: Callable[..., Any], **options: Any) -> Any:
    """``function`` through the pass, then plain PyTorch: Inductor takes its time, and has tests of its own."""
    torch._dynamo.reset()
    return torch.compile(function, backend="fastseg", options={"inner": "eager"}, **options)


def operators(report: fastseg.fusion.Report) -> list[str]:
    """The operators that the pass put in."""
    return sorted(replacement.operator for replacement in report.replaced)


class Case(NamedTuple):
    """A function of tensors, and the operators that it is to become."""

    function: Callable[..., Any]
    tensors: Callable[[torch.dtype, str], Sequence[Tensor | None]]
    operators: tuple[str, ...]
    terms: int = 1


# ---- front end ----


def images(dtype: torch.dtype, layout: str, *, channels: int = 4, groups: int = 1) -> list[Tensor | None]:
    """Images, a convolution's weight and bias."""
    return [
        make((2, channels, 13, 18), dtype, seed=1, layout=layout, requires_grad=True),
        make((8, channels // groups, 3, 3), dtype, seed=2, requires_grad=True),
        make((8,), dtype, seed=3, requires_grad=True),
    ]


def normalised(dtype: torch.dtype, layout: str) -> list[Tensor | None]:
    """The same, and what batch normalisation needs."""
    return [
        *images(dtype, layout),
        make((8,), dtype, seed=4),
        make((8,), dtype, seed=5).abs() + 0.5,
        make((8,), dtype, seed=6, requires_grad=True),
        make((8,), dtype, seed=7, requires_grad=True),
    ]


def conv_in_place(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.max_pool2d(F.relu(F.conv2d(x, weight, bias, padding=1), inplace=True), 2)


def conv_methods(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.max_pool2d(torch.conv2d(x, weight, bias).relu_(), 3, stride=2, padding=1, ceil_mode=True)


def conv_pool_relu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.relu(F.max_pool2d(F.conv2d(x, weight, bias, padding="same"), kernel_size=(2, 3)))


def conv_indices(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    output, positions = F.max_pool2d(F.relu(F.conv2d(x, weight, None, 2, 1)), 3, 2, 1, return_indices=True)
    return output * bias[:, None, None], positions


def conv_skip_indices(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    skip = F.relu(F.conv2d(x, weight, bias, padding=1))
    output, positions = F.max_pool2d_with_indices(skip, 2)
    return output, positions, skip


def conv_skip_early(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The skip is used before the pool."""
    skip = F.relu(F.conv2d(x, weight, bias, padding=1))
    other = skip.sin()
    return F.max_pool2d(skip, 2), other


def conv_two_pools(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """One of the pools is fused, the other reads the skip."""
    skip = F.relu(F.conv2d(x, weight, bias, padding=1))
    return F.max_pool2d(skip, 2), F.max_pool2d(skip, 3)


def conv_grouped(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.max_pool2d(F.relu(F.conv2d(x, weight, bias, dilation=2, groups=2)), 2, dilation=1)


def conv_unbatched(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.max_pool2d(F.relu(F.conv2d(x[0].contiguous(), weight, bias)), 2)


def two_convs(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """What the first replacement gives is what the second takes."""
    first = F.max_pool2d(F.relu(F.conv2d(x, weight, bias, padding=1)), 2)
    return F.max_pool2d(F.relu(F.conv2d(first[:, :4] * 1.0, weight, bias, padding=1)), 2)


def chained_convs(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    first = F.max_pool2d(F.relu(F.conv2d(x, weight, bias, padding=1)), 2)
    return F.max_pool2d(F.relu(F.conv2d(first, weight.repeat(1, 2, 1, 1), bias, padding=1)), 2)


def norm_relu_pool(x: Tensor, weight: Tensor, bias: Tensor, *norm: Tensor) -> Tensor:
    return F.max_pool2d(F.relu(F.batch_norm(F.conv2d(x, weight, bias, padding=1), *norm), inplace=True), 2)


def norm_pool_relu(x: Tensor, weight: Tensor, bias: Tensor, *norm: Tensor) -> Tensor:
    return F.relu(F.max_pool2d(F.batch_norm(F.conv2d(x, weight, bias, padding=1), *norm, eps=1e-2), 2))


def norm_skip(x: Tensor, weight: Tensor, bias: Tensor, *norm: Tensor) -> tuple[Tensor, Tensor]:
    skip = F.relu(F.batch_norm(F.conv2d(x, weight, None, padding=1), *norm))
    return F.max_pool2d(skip, 3, 2, 1) * bias[:, None, None], skip


def norm_not_affine(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    return F.max_pool2d(F.relu(F.batch_norm(F.conv2d(x, weight, bias, padding=1), mean, var)), 2)


def norm_in_training(x: Tensor, weight: Tensor, bias: Tensor, *norm: Tensor) -> Tensor:
    """The stem of a ResNet: no convolution can take in batch normalisation that needs the whole map."""
    normal = F.batch_norm(F.conv2d(x, weight, padding=1), None, None, *norm[2:], training=True)
    return F.max_pool2d(F.relu(normal, inplace=True), 3, 2, 1) * bias[:, None, None]


def norm_in_training_skip(x: Tensor, weight: Tensor, bias: Tensor, *norm: Tensor) -> tuple[Tensor, Tensor]:
    normal = F.batch_norm(F.conv2d(x, weight, padding=1), None, None, *norm[2:], training=True)
    skip = F.relu(normal)
    other = skip.sin()
    return F.max_pool2d(skip, 2) * bias[:, None, None], other


def pool_relu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.max_pool2d(torch.tanh(x), 3, 2, ceil_mode=True).relu_() * weight.sum() * bias.sum()


def relu_pool_indices(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    skip = F.relu(x)  # an input, which isn't written to
    output, positions = F.max_pool2d(skip, 2, return_indices=True)
    return output * weight.sum() * bias.sum(), positions, skip


def conv_used_before_relu(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    convolved = F.conv2d(x, weight, bias, padding=1)
    return F.max_pool2d(F.relu(convolved), 2), convolved.sin()


def wide_images(dtype: torch.dtype, layout: str) -> list[Tensor | None]:
    """As `images`, with so many channels that Winograd's algorithm serves the convolution without a pool, too."""
    return images(dtype, layout, channels=6)


def wide_normalised(dtype: torch.dtype, layout: str) -> list[Tensor | None]:
    return [*wide_images(dtype, layout), *normalised(dtype, layout)[3:]]


def conv_relu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.relu(F.conv2d(x, weight, bias, padding="same"), inplace=True)


def norm_relu(x: Tensor, weight: Tensor, bias: Tensor, *norm: Tensor) -> Tensor:
    return torch.relu(F.batch_norm(F.conv2d(x, weight, bias, padding=(1, 2)), *norm))


def conv_relu_dilated_pool(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """A pool that no operator serves, and another user of what is before it."""
    activated = F.relu(F.conv2d(x, weight, bias))
    return F.max_pool2d(activated, 2, dilation=2), activated


def wide_conv_skip(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The pool's pattern takes the convolution, and gives the un-pooled value as well."""
    activated = F.relu(F.conv2d(x, weight, bias))
    return F.max_pool2d(activated, 2), activated.sin()


def conv_alone(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.conv2d(x, weight, bias, padding=1).sin()


def norm_alone(x: Tensor, weight: Tensor, bias: Tensor, *norm: Tensor) -> Tensor:
    return F.batch_norm(F.conv2d(x, weight, bias, padding=1), *norm).sin()


def conv_norm_in_training(x: Tensor, weight: Tensor, bias: Tensor, *norm: Tensor) -> Tensor:
    return F.relu(F.batch_norm(F.conv2d(x, weight, bias, padding=1), None, None, *norm[2:], training=True))


def residual(x: Tensor, weight: Tensor, bias: Tensor, *norm: Tensor) -> Tensor:
    """The second half of a ResNet's block."""
    return F.relu(x.sum(1, keepdim=True) + F.batch_norm(F.conv2d(x, weight, bias, padding=1), *norm), inplace=True)


def wide_conv_used_before_relu(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """No ReLU or pool can be taken in; the convolution itself is replaced, and so is what follows."""
    convolved = F.conv2d(x, weight, bias)
    return F.max_pool2d(F.relu(convolved), 2), convolved.sin()


def wide_norm_used_before_relu(x: Tensor, weight: Tensor, bias: Tensor, *norm: Tensor) -> tuple[Tensor, Tensor]:
    normal = F.batch_norm(F.conv2d(x, weight, bias), *norm)
    return F.relu(normal), normal.sin()


# ---- back end ----


def logits(dtype: torch.dtype, layout: str) -> list[Tensor | None]:
    """Small logits, labels of 24 x 32 pixels, class weights."""
    return [
        make((2, CLASSES, 6, 8), dtype, seed=1, layout=layout, scale=3.0, requires_grad=True),
        make_labels((2, 24, 32), CLASSES, seed=2, ignore_index=255),
        make((CLASSES,), dtype, seed=3).abs(),
    ]


def full_logits(dtype: torch.dtype, layout: str) -> list[Tensor | None]:
    return [make((2, CLASSES, 24, 32), dtype, seed=1, layout=layout, requires_grad=True), *logits(dtype, layout)[1:]]


def upsampled_loss(x: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    up = F.interpolate(x, size=target.shape[-2:], mode="bilinear", align_corners=False)
    return F.cross_entropy(up, target, weight, ignore_index=255, label_smoothing=0.1)


def upsampled_loss_corners(x: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    up = F.interpolate(x, scale_factor=(4, 4), mode="bilinear", align_corners=True)
    return F.cross_entropy(up, target, ignore_index=255, reduction="none")


def upsampled_loss_nearest(x: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    return F.cross_entropy(F.interpolate(x, scale_factor=4.0), target, ignore_index=255, reduction="sum")


def upsampled_loss_recomputed(x: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    up = F.interpolate(x, scale_factor=4.01, mode="bilinear", recompute_scale_factor=True)
    return F.cross_entropy(up, target, ignore_index=255)


def upsampled_loss_exact(x: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """1.5 isn't whole, but the sizes that it gives are."""
    up = F.interpolate(x, scale_factor=1.5, mode="bilinear")
    return F.cross_entropy(up, target[:, :9, :12], ignore_index=255)


def upsampled_loss_of_volumes(x: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    up = F.interpolate(x[:, :, None], (3, *target.shape[1:]), mode="trilinear")
    return F.cross_entropy(up, target[:, None].expand(-1, 3, -1, -1), weight, ignore_index=255)


def upsampled_loss_of_voxels(x: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """As rows [N * D * H * W, C]."""
    rows = F.interpolate(x[:, :, None], scale_factor=(1, 4, 4)).permute(0, 2, 3, 4, 1).reshape(-1, CLASSES)
    return F.cross_entropy(rows, target.flatten(), ignore_index=255)


def two_upsampled_losses(x: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    up = F.interpolate(x, size=(24, 32), mode="bilinear")
    return F.cross_entropy(up, target, ignore_index=255) + F.cross_entropy(up, target, weight, ignore_index=255)


def loss_and_prediction(x: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both read the same upsampled logits, which nothing else does."""
    up = F.interpolate(x, size=(24, 32), mode="bilinear")
    return F.cross_entropy(up, target, ignore_index=255), up.softmax(dim=1).argmax(dim=1)


def upsampled_nll_loss(x: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    up = F.interpolate(x, size=target.shape[-2:], mode="bilinear")
    return F.nll_loss(F.log_softmax(up, dim=1), target, weight, ignore_index=255)


def upsampled_loss_of_rows(x: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    up = F.interpolate(x, size=target.shape[-2:], mode="bilinear")
    return F.cross_entropy(up.permute(0, 2, 3, 1).reshape(-1, CLASSES), target.view(-1), weight, ignore_index=255)


def upsampled_loss_of_each_row(x: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    rows = F.interpolate(x, scale_factor=4).permute(0, 2, 3, 1).contiguous().view(-1, CLASSES)
    return F.cross_entropy(rows, target.flatten(), ignore_index=255, reduction="none")


def upsampled_nll_loss_of_rows(x: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    rows = torch.flatten(F.interpolate(x, (24, 32), mode="bilinear"), 2).transpose(1, 2).reshape(-1, CLASSES).double()
    return F.nll_loss(rows.log_softmax(-1), target.reshape(-1), ignore_index=255)


def upsampled_loss_in_double(x: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    up = F.interpolate(x, size=target.shape[-2:], mode="bilinear")
    return F.cross_entropy(up.to(torch.float64), target, ignore_index=255)


def upsampled_loss_after_autocast(x: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=x.dtype == torch.float32):
        up = F.interpolate(x, size=target.shape[-2:], mode="bilinear")
    return F.cross_entropy(up.double(), target, ignore_index=255)


def nll_loss(x: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    return F.nll_loss(x.log_softmax(1), target, weight, ignore_index=255, reduction="none")


def prediction_by_max(x: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    return torch.max(F.interpolate(x, scale_factor=2, mode="bilinear"), 1)[1]


def prediction_by_max_indices(x: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    return F.interpolate(x, size=(13, 17)).softmax(1).max(dim=1, keepdim=True).indices


def prediction_and_confidence(x: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    confidence, labels = F.interpolate(x.detach(), (13, 17), mode="bilinear").softmax(1).max(1, keepdim=True)
    return labels, confidence


def confidence_in_double(x: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    return torch.max(F.interpolate(x.detach(), scale_factor=2).double().softmax(1), 1)[0]


def prediction(x: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    return torch.argmax(F.interpolate(x, scale_factor=2.5, mode="bilinear"), 1)


def prediction_of_volumes(x: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    return F.interpolate(x[:, :, None], scale_factor=(3, 1.5, 2), mode="trilinear").softmax(1).argmax(1)


def confidence_of_volumes(x: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    up = F.interpolate(x.detach()[:, :, None], (3, 9, 16), mode="trilinear", align_corners=True)
    return torch.max(up.double().softmax(-4), -4, keepdim=True)


def prediction_kept_dim(x: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    return F.log_softmax(F.interpolate(x, size=13, mode="nearest"), dim=-3).argmax(-3, keepdim=True)


def prediction_recomputed(x: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.3, mode="bilinear", recompute_scale_factor=True).argmax(1)


def masks_of_sigmoids(x: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    return torch.sigmoid(F.interpolate(x, (13, 17), mode="bilinear", align_corners=True)) > 0.3


def masks_by_method(x: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2).double().sigmoid().gt(0.5).long()


def masks_of_logits(x: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.3, mode="bilinear", recompute_scale_factor=True) > 0


def mask_logits(dtype: torch.dtype, layout: str) -> list[Tensor | None]:
    """Small logits, a target of 24 x 32 values for each class, and where these count."""
    return [
        logits(dtype, layout)[0],
        make((2, CLASSES, 24, 32), dtype, seed=2, layout=layout).sigmoid(),
        make_labels((2, 1, 24, 32), 2, seed=3),
        make((CLASSES, 1, 1), dtype, seed=4).abs(),
    ]


def full_mask_logits(dtype: torch.dtype, layout: str) -> list[Tensor | None]:
    return [full_logits(dtype, layout)[0], *mask_logits(dtype, layout)[1:]]


def upsampled_binary_loss(x: Tensor, target: Tensor, counted: Tensor, weight: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(F.interpolate(x, target.shape[-2:], mode="bilinear"), target)


def upsampled_binary_loss_weighted(x: Tensor, target: Tensor, counted: Tensor, weight: Tensor) -> Tensor:
    up = F.interpolate(x, scale_factor=4)
    return F.binary_cross_entropy_with_logits(up, target, weight, reduction="sum", pos_weight=weight + 1)


def upsampled_binary_loss_masked(x: Tensor, target: Tensor, counted: Tensor, weight: Tensor) -> Tensor:
    up = F.interpolate(x, target.shape[-2:], mode="bilinear", align_corners=True)
    return F.binary_cross_entropy_with_logits(up, target, (counted > 0).to(x.dtype), pos_weight=weight)


def binary_loss(x: Tensor, target: Tensor, counted: Tensor, weight: Tensor) -> Tensor:
    masked = F.binary_cross_entropy_with_logits(x, target, counted.bool().to(x.dtype))
    return masked + torch.nn.BCEWithLogitsLoss(weight, pos_weight=weight)(x, target)


def classes_of_masks(x: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    classes = x[:, :, 0, :4].softmax(2)[..., :-1]
    masks = F.interpolate(x, (13, 17), mode="bilinear").sigmoid()
    return torch.einsum("bqc, bqhw -> bchw", classes, masks).argmax(dim=1)


def classes_of_masks_kept_dim(x: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    masks = torch.sigmoid(F.interpolate(x, scale_factor=2))
    return torch.einsum("nqyx,nqk->nkyx", masks, x[:, :, 0].exp()).argmax(-3, keepdim=True)


def loss(x: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    return F.cross_entropy(x, target, weight, ignore_index=255)


def loss_of_probabilities(x: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    one_hot = F.one_hot(target.clamp(max=CLASSES - 1), CLASSES).permute(0, 3, 1, 2).to(x.dtype)
    return F.cross_entropy(x, one_hot)


PIXELS = 2 * 24 * 32
VALUES = CLASSES * PIXELS

CASES = {
    "conv, in place": Case(conv_in_place, images, ("conv_relu_pool2d",), PIXELS),
    "conv, methods": Case(conv_methods, images, ("conv_relu_pool2d",), PIXELS),
    "conv, pool before relu": Case(conv_pool_relu, images, ("conv_relu_pool2d",), PIXELS),
    "conv, indices": Case(conv_indices, images, ("conv_relu_pool2d",), PIXELS),
    "conv, skip and indices": Case(conv_skip_indices, images, ("conv_relu_pool2d",), PIXELS),
    "conv, skip used first": Case(conv_skip_early, images, ("conv_relu_pool2d",), PIXELS),
    "conv, two pools": Case(conv_two_pools, images, ("conv_relu_pool2d",), PIXELS),
    "conv, groups": Case(conv_grouped, lambda d, f: images(d, f, groups=2), ("conv_relu_pool2d",), PIXELS),
    "conv, no batch": Case(conv_unbatched, images, ("conv_relu_pool2d",), PIXELS),
    "conv, two": Case(two_convs, images, ("conv_relu_pool2d",) * 2, PIXELS),
    "conv, chained": Case(chained_convs, images, ("conv_relu_pool2d",) * 2, PIXELS),
    "norm": Case(norm_relu_pool, normalised, ("conv_relu_pool2d",), PIXELS),
    "norm, pool before relu": Case(norm_pool_relu, normalised, ("conv_relu_pool2d",), PIXELS),
    "norm, skip": Case(norm_skip, normalised, ("conv_relu_pool2d",), PIXELS),
    "norm, not affine": Case(norm_not_affine, lambda d, f: normalised(d, f)[:5], ("conv_relu_pool2d",), PIXELS),
    "conv, used before relu": Case(conv_used_before_relu, images, ("relu_pool2d",), PIXELS),
    "norm in training": Case(norm_in_training, normalised, ("relu_pool2d",), PIXELS),
    "norm in training, skip used first": Case(norm_in_training_skip, normalised, ("relu_pool2d",), PIXELS),
    "pool before relu": Case(pool_relu, images, ("relu_pool2d",), PIXELS),
    "relu, pool with indices": Case(relu_pool_indices, images, ("relu_pool2d",), PIXELS),
    "no pool": Case(conv_relu, wide_images, ("conv_relu_pool2d",), PIXELS),
    "no pool, norm": Case(norm_relu, wide_normalised, ("conv_relu_pool2d",), PIXELS),
    "no pool that is served": Case(conv_relu_dilated_pool, wide_images, ("conv_relu_pool2d",), PIXELS),
    "conv, wide, skip": Case(wide_conv_skip, wide_images, ("conv_relu_pool2d",), PIXELS),
    "conv alone": Case(conv_alone, wide_images, ("conv2d",), PIXELS),
    "norm alone": Case(norm_alone, wide_normalised, ("conv2d",), PIXELS),
    "norm alone, in training": Case(conv_norm_in_training, wide_normalised, ("conv2d",), PIXELS),
    "norm and sum": Case(residual, wide_normalised, ("conv2d",), PIXELS),
    "conv, wide, used before relu": Case(wide_conv_used_before_relu, wide_images, ("conv2d", "relu_pool2d"), PIXELS),
    "norm, wide, used before relu": Case(wide_norm_used_before_relu, wide_normalised, ("conv2d",), PIXELS),
    "upsampled loss": Case(upsampled_loss, logits, ("upsample_cross_entropy",), PIXELS),
    "upsampled loss, corners": Case(upsampled_loss_corners, logits, ("upsample_cross_entropy",), PIXELS),
    "upsampled loss, nearest": Case(upsampled_loss_nearest, logits, ("upsample_cross_entropy",), PIXELS),
    "upsampled loss, recomputed": Case(upsampled_loss_recomputed, logits, ("upsample_cross_entropy",), PIXELS),
    "upsampled loss, 1.5": Case(upsampled_loss_exact, logits, ("upsample_cross_entropy",), PIXELS),
    "upsampled loss, volumes": Case(upsampled_loss_of_volumes, logits, ("upsample_cross_entropy",), PIXELS),
    "upsampled loss, voxels": Case(upsampled_loss_of_voxels, logits, ("upsample_cross_entropy",), PIXELS),
    "upsampled losses": Case(two_upsampled_losses, logits, ("upsample_cross_entropy",) * 2, PIXELS),
    "loss and prediction": Case(loss_and_prediction, logits, ("upsample_argmax", "upsample_cross_entropy"), PIXELS),
    "prediction": Case(prediction, logits, ("upsample_argmax",)),
    "prediction, volumes": Case(prediction_of_volumes, logits, ("upsample_argmax",)),
    "prediction and confidence, volumes": Case(confidence_of_volumes, logits, ("upsample_argmax",), CLASSES),
    "prediction, kept dim": Case(prediction_kept_dim, logits, ("upsample_argmax",)),
    "prediction, max": Case(prediction_by_max, logits, ("upsample_argmax",)),
    "prediction, max, kept dim": Case(prediction_by_max_indices, logits, ("upsample_argmax",)),
    "upsampled loss, nll": Case(upsampled_nll_loss, logits, ("upsample_cross_entropy",), PIXELS),
    "upsampled loss, rows": Case(upsampled_loss_of_rows, logits, ("upsample_cross_entropy",), PIXELS),
    "upsampled loss, rows, none": Case(upsampled_loss_of_each_row, logits, ("upsample_cross_entropy",), PIXELS),
    "upsampled loss, rows, nll": Case(upsampled_nll_loss_of_rows, logits, ("upsample_cross_entropy",), PIXELS),
    "upsampled loss, cast": Case(upsampled_loss_in_double, logits, ("upsample_cross_entropy",), PIXELS),
    "upsampled loss, autocast": Case(upsampled_loss_after_autocast, logits, ("upsample_cross_entropy",), PIXELS),
    "prediction and confidence": Case(prediction_and_confidence, logits, ("upsample_argmax",)),
    "confidence, cast": Case(confidence_in_double, logits, ("upsample_argmax",), CLASSES),
    "loss, nll": Case(nll_loss, full_logits, ("cross_entropy",), PIXELS),
    "prediction, recomputed": Case(prediction_recomputed, logits, ("upsample_argmax",)),
    "masks": Case(masks_of_sigmoids, logits, ("upsample_threshold",)),
    "masks, methods, cast": Case(masks_by_method, logits, ("upsample_threshold",)),
    "masks, logits, recomputed": Case(masks_of_logits, logits, ("upsample_threshold",)),
    "upsampled binary loss": Case(upsampled_binary_loss, mask_logits, ("upsample_binary_cross_entropy",), VALUES),
    "upsampled binary loss, weighted": Case(
        upsampled_binary_loss_weighted, mask_logits, ("upsample_binary_cross_entropy",), VALUES
    ),
    "upsampled binary loss, masked": Case(
        upsampled_binary_loss_masked, mask_logits, ("upsample_binary_cross_entropy",), VALUES
    ),
    "binary loss": Case(binary_loss, full_mask_logits, ("binary_cross_entropy",) * 2, VALUES),
    "classes of masks": Case(classes_of_masks, logits, ("upsample_mask_argmax",)),
    "classes of masks, swapped, kept dim": Case(classes_of_masks_kept_dim, logits, ("upsample_mask_argmax",)),
    "loss": Case(loss, full_logits, ("cross_entropy",), PIXELS),
    "loss of probabilities": Case(loss_of_probabilities, full_logits, ("cross_entropy",), PIXELS),
}
