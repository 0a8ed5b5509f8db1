"""Calls that look like a pattern and must stay as they are: each with its reason, and not a bit different."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastseg
from tests.fusion.back_end_cases import full_logits, full_mask_logits, logits, mask_logits
from tests.fusion.cases import compiled, operators
from tests.fusion.front_end_cases import conv_in_place, images, normalised

# A function whose calls stay, its tensors, the reason, and the operators that take a part of them all the same.
LEFT: dict[str, tuple[Callable[..., Any], Callable[..., Any], str, list[str]]] = {}


def left(
    tensors: Callable[..., Any], reason: str, *replaced: str
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a function."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        LEFT[function.__name__] = (function, tensors, reason, list(replaced))
        return function

    return register


# ---- front end ----


@left(images, "dilation")
def dilated_pool(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.max_pool2d(F.relu(F.conv2d(x, weight, bias)), 2, dilation=2)


@left(images, "more than 255 positions")
def large_window(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.max_pool2d(F.relu(F.conv2d(x, weight, bias, padding=8)), 16)


@left(images, "conv2d (convolved) has another user", "relu_pool2d")
def convolution_used_elsewhere(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    convolved = F.conv2d(x, weight, bias)
    return F.max_pool2d(F.relu(convolved), 2), convolved.sin()


@left(images, "max_pool2d (pooled) has another user")
def pool_used_before_relu(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    pooled = F.max_pool2d(F.conv2d(x, weight, bias), 2)
    return F.relu(pooled), pooled.sin()


@left(images, "dilation")
def dilated_pool_alone(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.max_pool2d(F.relu(x.sin()), 2, dilation=2) * weight.sum() * bias.sum()


@left(images, "relu in place: shifted is used elsewhere")
def overwritten_and_used(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    shifted = x + weight.sum() + bias.sum()
    return F.max_pool2d(F.relu(shifted, inplace=True), 2), shifted.sin()


@left(images, "relu in place: getitem is part of another value")
def overwritten_part(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    shifted = x + weight.sum() + bias.sum()
    return F.max_pool2d(shifted[:, :2].relu_(), 2), shifted


@left(images, "relu in place: it changes what isn't the graph's own")
def overwritten_input(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    with torch.no_grad():
        return F.max_pool2d(F.relu(x, inplace=True), 2)


@left(images, "changes a value in place")
def activation_changed_before_the_pool(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    with torch.no_grad():
        activated = F.relu(x.sin())
        activated[:, 0].add_(1.0)
        return F.max_pool2d(activated, 2)


@left(normalised, "batch_norm (normal) has another user", "relu_pool2d")
def norm_used_elsewhere(x: Tensor, weight: Tensor, bias: Tensor, *norm: Tensor) -> tuple[Tensor, Tensor]:
    normal = F.batch_norm(F.conv2d(x, weight, bias), *norm)
    return F.max_pool2d(F.relu(normal), 2), normal.sin()


@left(images, "changes a value in place")
def skip_changed_before_the_pool(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    with torch.no_grad():  # or else autograd itself refuses it
        skip = F.relu(F.conv2d(x, weight, bias))
        skip[:, 0].add_(1.0)
        return F.max_pool2d(skip, 2)


@left(images, "changes a value in place", "relu_pool2d")
def input_changed_on_the_way(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        shifted = x + 1
    convolved = F.conv2d(shifted, weight.detach(), bias.detach())
    shifted += 1
    return F.max_pool2d(F.relu(convolved), 2) * bias[:, None, None], shifted * weight.sum() * x


@left(images, "changes a value in place", "relu_pool2d")
def weight_changed_on_the_way(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    with torch.no_grad():
        moving = weight.clone()
        convolved = F.conv2d(x, moving, bias)
        moving[0] = 0
        return F.max_pool2d(F.relu(convolved), 2)


@left(images, "autograd's or autocast's state", "relu_pool2d")
def convolution_without_gradient(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    with torch.no_grad():
        convolved = F.conv2d(x, weight, bias)
    return F.max_pool2d(F.relu(convolved), 2) * bias[:, None, None] * weight.sum() * x.sum()


@left(images, "autograd's or autocast's state", "relu_pool2d")
def convolution_in_autocast(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        convolved = F.conv2d(x, weight, bias)
    return F.max_pool2d(F.relu(convolved), 2)


@left(lambda dtype, layout: images(torch.bfloat16, layout), "in half types", "relu_pool2d")
def indices_in_bfloat16(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return F.max_pool2d(F.relu(F.conv2d(x, weight, bias)), 2, return_indices=True)


@left(lambda dtype, layout: images(dtype, "channels_last"), "strides", "relu_pool2d")
def unbatched_channels_last(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.max_pool2d(F.relu(F.conv2d(x[0], weight, bias)), 2)


@left(images, "torch.func")
def mapped(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.func.vmap(lambda image: conv_in_place(image[None], weight, bias))(x)


# ---- back end ----


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


@pytest.mark.parametrize("name", LEFT)
@pytest.mark.filterwarnings("ignore:size_average")
def test_left_as_it_is(name: str) -> None:
    function, tensors, reason, replaced = LEFT[name]
    given = tensors(torch.float32, "nchw")
    fused = compiled(function, fullgraph=True)
    actual, plain = (outcome(f, given) for f in (fused, function))
    report = fastseg.report(fused)
    assert operators(report) == replaced
    (pattern, *_) = (leftover.pattern for leftover in report.left if reason in leftover.reason)
    assert ("interpolate" in pattern) == (tensors in (logits, mask_logits)), report
    assert replaced or "the model runs as it was" in report.summary()
    for a, p in zip(actual, plain, strict=True):
        torch.testing.assert_close(a, p, rtol=0, atol=0)


def outcome(function: Callable[..., Any], tensors: list[Tensor]) -> list[Tensor]:
    """Outputs and gradients."""
    leaves = [t.detach().clone().requires_grad_(t.requires_grad) for t in tensors]
    results = function(*leaves)
    outputs = list(results) if isinstance(results, tuple) else [results]
    total = sum((o.sum() for o in outputs if o.requires_grad), torch.zeros(()))
    if total.requires_grad:
        total.backward()
    return [*(o.detach() for o in outputs), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def test_logits_used_elsewhere_are_upsampled_but_the_loss_is_fused() -> None:
    def function(x: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        up = F.interpolate(x, target.shape[-2:], mode="bilinear")
        return F.cross_entropy(up, target, weight, ignore_index=255), up

    fused = compiled(function, fullgraph=True)
    fused(*logits(torch.float32, "nchw"))
    report = fastseg.report(fused)
    assert [r.operator for r in report.replaced] == ["cross_entropy"]
    assert [leftover.reason for leftover in report.left] == ["interpolate (up) has another user: the graph's output"]


def test_changes_in_place_elsewhere_do_not_matter() -> None:
    """Before, after, and between of values that the replaced calls don't read."""

    def function(x: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        scaled = (x * 2).mul_(0.5)
        counter = target.clone()
        up = F.interpolate(scaled, (24, 32), mode="bilinear")
        counter.add_(1)
        other = F.dropout(F.relu(scaled.neg(), inplace=True), 0.0, True, True)
        loss = F.cross_entropy(up, target, ignore_index=255)
        loss += other.mean()
        return loss + counter.sum()

    fused, given = compiled(function, fullgraph=True), logits(torch.float32, "nchw")
    torch.testing.assert_close(fused(*given), function(*given))
    report = fastseg.report(fused)
    assert [r.operator for r in report.replaced] == ["upsample_cross_entropy"]
    assert not report.left


def test_a_scale_factor_with_another_grid() -> None:
    def function(x: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        up = F.interpolate(x, scale_factor=1.7, mode="bilinear")
        return F.cross_entropy(up, target[:, :10, :13], ignore_index=255)

    fused, given = compiled(function, fullgraph=True), logits(torch.float32, "nchw")
    torch.testing.assert_close(fused(*given), function(*given))
    report = fastseg.report(fused)
    assert [r.operator for r in report.replaced] == ["cross_entropy"]
    assert "isn't that of the size" in report.left[0].reason


def test_probabilities_are_no_labels() -> None:
    def function(x: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        return F.cross_entropy(F.interpolate(x, (12, 16)), F.interpolate(x.detach(), (12, 16)).softmax(1))

    fused = compiled(function, fullgraph=True)
    fused(*logits(torch.float32, "nchw"))
    report = fastseg.report(fused)
    assert [r.operator for r in report.replaced] == ["cross_entropy"]
    assert "class probabilities" in report.left[0].reason
