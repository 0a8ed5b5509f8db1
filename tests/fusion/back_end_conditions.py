"""What looks like a pattern of predictions and losses and must stay: each with its reason."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.fusion.back_end_cases import full_logits, full_mask_logits, logits, mask_logits
from tests.fusion.cases import Left, left_as_it_is

LEFT: dict[str, Left] = {}
left = partial(left_as_it_is, LEFT)


@left(logits, "mode 'bicubic'")
def bicubic(x: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    return F.interpolate(x, (24, 32), mode="bicubic").argmax(1)


@left(logits, "mode 'nearest-exact'")
def nearest_exact(x: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    return F.interpolate(x, (24, 32), mode="nearest-exact").argmax(1)


@left(logits, "antialias")
def antialiased(x: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    return F.interpolate(x, (3, 4), mode="bilinear", antialias=True).argmax(1)


@left(logits, "3 dimensions")
def sequences(x: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    return F.interpolate(x.flatten(2), scale_factor=2).argmax(1)


@left(logits, "5 dimensions")
def masks_of_volumes(x: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    return F.interpolate(x[..., None], scale_factor=2) > 0


@left(logits, "torch.uint8")
def logits_in_uint8(x: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    return F.interpolate(x.to(torch.uint8), (24, 32)).argmax(1)


@left(logits, "another dimension")
def argmax_of_rows(x: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    return F.interpolate(x, (24, 32)).argmax(2)


@left(logits, "another dimension")
def argmax_of_everything(x: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    return F.interpolate(x, (24, 32)).argmax()


@left(logits, "another dimension")
def softmax_of_rows(x: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    return F.interpolate(x, (24, 32)).softmax(2).argmax(1)


@left(logits, "softmax in another dtype")
def softmax_in_half(x: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    return F.interpolate(x, (24, 32)).softmax(1, dtype=torch.bfloat16).argmax(1)


@left(logits, "softmax (probabilities) has another user")
def probabilities_used_elsewhere(x: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    probabilities = F.interpolate(x, (24, 32)).softmax(1)
    return probabilities.argmax(1), probabilities.amax(1)


@left(logits, "comparison of logits with 1")
def logits_above_one(x: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    return F.interpolate(x, (24, 32)) > 1


@left(logits, "comparison of a sigmoid with 2")
def sigmoids_above_two(x: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    return F.interpolate(x, (24, 32)).sigmoid() > 2


@left(logits, "isn't a number")
def sigmoids_above_their_mean(x: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    return F.interpolate(x, (24, 32)).sigmoid() > x.mean()


@left(logits, "sigmoid (probabilities) has another user")
def sigmoids_used_elsewhere(x: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    probabilities = F.interpolate(x, (24, 32)).sigmoid()
    return probabilities > 0.5, probabilities.amax(1)


@left(logits, "isn't the sum over queries")
def masks_of_other_images(x: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    masks = F.interpolate(x, (24, 32)).sigmoid()
    return torch.einsum("aqc,bqhw->bchw", x[:, :, 0], masks).argmax(1)


@left(logits, "argmax over another dimension")
def largest_row_of_masks(x: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    masks = F.interpolate(x, (24, 32)).sigmoid()
    return torch.einsum("bqc,bqhw->bchw", x[:, :, 0], masks).argmax(2)


@left(logits, "changes a value in place")
def logits_changed_on_the_way(x: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    low = x * 1.0
    up = F.interpolate(low, (24, 32))
    low.mul_(2.0)
    return up.argmax(1) + low.argmax()


@left(full_logits, "no map of pixels")
def rows_of_logits(x: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    return F.cross_entropy(x.permute(0, 2, 3, 1).reshape(-1, 5), target.flatten(), ignore_index=255)


@left(full_logits, "log_softmax over another dimension")
def nll_of_rows(x: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    return F.nll_loss(F.log_softmax(x, 2), target, ignore_index=255)


@left(full_logits, "log_softmax in another dtype")
def nll_in_double(x: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    return F.nll_loss(F.log_softmax(x, 1, dtype=torch.float64), target, ignore_index=255)


@left(full_logits, "log_softmax (scores) has another user")
def scores_used_elsewhere(x: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    scores = F.log_softmax(x, 1)
    return F.nll_loss(scores, target, ignore_index=255), scores.exp()


@left(logits, "the largest values themselves are used")
def largest_logit_used(x: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    values, classes = F.interpolate(x, (24, 32)).max(1)
    return classes, values


@left(logits, "the largest probabilities need a gradient")
def confidence_with_gradient(x: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    confidence, classes = F.interpolate(x, (24, 32)).softmax(1).max(1)
    return confidence, classes


@left(logits, "converted to torch.bfloat16")
def logits_narrowed(x: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    return F.interpolate(x, (24, 32)).bfloat16().argmax(1)


@left(logits, "neither as a map nor as rows")
def rows_of_another_order(x: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Each row holds five columns of a line, not five classes."""
    rows = F.interpolate(x, (24, 30)).reshape(-1, 5)
    return F.cross_entropy(rows, target[:, :, :30].flatten(), ignore_index=255)


@left(logits, "neither as a map nor as rows")
def rows_of_a_map_on_its_side(x: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    rows = F.interpolate(x, (24, 32)).permute(0, 3, 2, 1).reshape(-1, 5)
    return F.cross_entropy(rows, target.flatten(), ignore_index=255)


@left(logits, "permute (rows) has another user")
def rows_used_elsewhere(x: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    rows = F.interpolate(x, (24, 32)).permute(0, 2, 3, 1)
    return F.cross_entropy(rows.reshape(-1, 5), target.flatten(), ignore_index=255), rows.sin()


@left(mask_logits, "weight is more than a number for each class")
def weight_of_pixels(x: Tensor, target: Tensor, counted: Tensor, weight: Tensor) -> Tensor:
    up = F.interpolate(x, (24, 32))
    return F.binary_cross_entropy_with_logits(up, target, counted.to(x.dtype))


@left(mask_logits, "a loss for each value")
def losses_of_values(x: Tensor, target: Tensor, counted: Tensor, weight: Tensor) -> Tensor:
    up = F.interpolate(x, (24, 32))
    return F.binary_cross_entropy_with_logits(up, target, reduction="none").mean()


@left(full_mask_logits, "target needs a gradient")
def learnt_target(x: Tensor, target: Tensor, counted: Tensor, weight: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(x, x.sigmoid())


@left(full_mask_logits, "size_average")
def old_arguments_of_masks(x: Tensor, target: Tensor, counted: Tensor, weight: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(x, target, None, False)


@left(full_mask_logits, "no map of pixels")
def masks_of_no_map(x: Tensor, target: Tensor, counted: Tensor, weight: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(x.flatten(0, 2), target.flatten(0, 2))


@left(logits, "another dimension")
def max_of_rows(x: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    return F.interpolate(x, (24, 32)).max(2)[1]


@left(full_logits, "size_average")
def old_arguments(x: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    return F.cross_entropy(x, target, None, False, 255)


@left(full_logits, "weight needs a gradient")
def learnt_weights(x: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    return F.cross_entropy(x, x.detach().softmax(1), weight * x.mean().exp())


@left(full_logits, "target needs a gradient")
def learnt_targets(x: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    return F.cross_entropy(x, x.softmax(1))
