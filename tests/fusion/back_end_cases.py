"""Losses and predictions of logits, upsampled or not, as networks write them, and the operators that they become."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastseg.testing import make, make_labels
from tests.fusion.cases import CLASSES, PIXELS, Case


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


VALUES = CLASSES * PIXELS

CASES = {
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
