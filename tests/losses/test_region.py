"""fastseg.losses' region losses against their formulas, for every task, with and without upsampling."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastseg import functional, losses, reference
from fastseg.testing import assert_parity, make_labels, values_and_gradients
from tests.losses.cases import SHAPES, logits
from tests.ops.upsample_cases import MODES

IGNORED = 255


def dice(p: Tensor, t: Tensor, smooth: float) -> Tensor:
    return 1 - ((2 * (p * t).sum(-1) + smooth) / (p.sum(-1) + t.sum(-1) + smooth)).mean()


def jaccard(p: Tensor, t: Tensor, smooth: float) -> Tensor:
    return 1 - (((p * t).sum(-1) + smooth) / ((p + t - p * t).sum(-1) + smooth)).mean()


def tversky(p: Tensor, t: Tensor, smooth: float) -> Tensor:
    positive, others, missed = (p * t).sum(-1), (p * (1 - t)).sum(-1), ((1 - p) * t).sum(-1)
    return 1 - ((positive + smooth) / (positive + 0.3 * others + 0.7 * missed + smooth)).mean()


def generalized_dice(p: Tensor, t: Tensor, smooth: float) -> Tensor:
    weights = 1 / t.sum(-1).clamp_min(1) ** 2
    overlap, union = (weights * (p * t).sum(-1)).sum(-1), (weights * (p + t).sum(-1)).sum(-1)
    return 1 - ((2 * overlap + smooth) / (union + smooth)).mean()


FORMULAS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "DiceLoss": dice, "JaccardLoss": jaccard, "TverskyLoss": tversky, "GeneralizedDiceLoss": generalized_dice,
}  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "ignored": {"ignore_index": IGNORED},
    "batch": {"batch": True, "smooth": 1.0},
    "foreground": {"include_background": False, "ignore_index": IGNORED},
}


def target_for(task: str, shape: tuple[int, ...], ignored: int | None) -> Tensor:
    if task == "multiclass":
        return make_labels((shape[0], *shape[2:]), shape[1], ignore_index=ignored)
    return make_labels(shape, 2, torch.uint8, ignore_index=ignored)


def plain(name: str, task: str, input: Tensor, target: Tensor, options: dict[str, Any]) -> Tensor:
    """The loss by its formula, over the pixels that count alone."""
    classes, ignored = input.shape[1], options.get("ignore_index")
    input = input.to(torch.promote_types(input.dtype, torch.float32))
    p = input.softmax(1) if task == "multiclass" else input.sigmoid()
    counted = (target != ignored).expand(target.shape) if ignored is not None else torch.ones_like(target).bool()
    target = target.masked_fill(~counted, 0)
    if task == "multiclass":
        target, counted = F.one_hot(target, classes).movedim(-1, 1), counted.unsqueeze(1)
    p, t = (values.to(p.dtype).mul(counted).flatten(2) for values in (p, target))
    # 1 - t and 1 - p of what doesn't count would be 1: a Tversky of it is made of the products alone.
    t, p = torch.where(counted.expand_as(target).flatten(2), t, 0), torch.where(counted.flatten(2), p, 0)
    if not options.get("include_background", True):
        p, t = p[:, 1:], t[:, 1:]
    if options.get("batch"):
        p, t = (values.movedim(0, 1).flatten(1).unsqueeze(0) for values in (p, t))
    return FORMULAS[name](p, t, options.get("smooth", 1e-5))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("task", ["multiclass", "multilabel", "binary"])
@pytest.mark.parametrize("name", FORMULAS)
def test_formula(name: str, task: str, dtype: torch.dtype, options: dict[str, Any], shape: tuple[int, ...]) -> None:
    if task == "binary" and "include_background" in options:
        pytest.skip("a binary loss has no background")
    shape = (shape[0], 1, *shape[2:]) if task == "binary" else shape
    input = logits(shape, dtype)
    target = target_for(task, shape, options.get("ignore_index"))
    loss = getattr(losses, name)(task, **options)

    def formula(input: Tensor, target: Tensor) -> Tensor:
        return plain(name, task, input, target, options).to(input.dtype)

    actual, expected = (values_and_gradients(function, [input, target]) for function in (loss, formula))
    truth = values_and_gradients(formula, [input, target], torch.float64)
    assert_parity(actual, expected, truth, terms=8 * shape[1] + input[:, 0].numel())


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("task", ["multiclass", "multilabel", "binary"])
@pytest.mark.parametrize("name", FORMULAS)
def test_upsampled(name: str, task: str, mode: dict[str, Any]) -> None:
    classes = 1 if task == "binary" else 4
    input = logits((2, classes, 5, 6), torch.float64)
    target = target_for(task, (2, classes, 13, 11), IGNORED)
    loss = getattr(losses, f"Upsample{name}")(task, ignore_index=IGNORED, **mode)
    upsampled = reference.upsample(input, (13, 11), None, mode.get("mode", "bilinear"), "align_corners" in mode)
    expected = getattr(losses, name)(task, ignore_index=IGNORED)(upsampled, target)
    torch.testing.assert_close(loss(input, target), expected)
    torch.testing.assert_close(*(torch.autograd.grad(each, input)[0] for each in (loss(input, target), expected)))


@pytest.mark.parametrize("upsampled", [False, True], ids=["full", "upsampled"])
@pytest.mark.parametrize("task", ["multiclass", "multilabel", "binary"])
@pytest.mark.parametrize("name", FORMULAS)
def test_with_cross_entropy(name: str, task: str, upsampled: bool) -> None:
    classes, size = 1 if task == "binary" else 4, (13, 11) if upsampled else (5, 6)
    input, target = logits((2, classes, 5, 6), torch.float64), target_for(task, (2, classes, *size), IGNORED)
    prefix, options = "Upsample" if upsampled else "", {"batch": True, "ignore_index": IGNORED}
    cross_entropy = "cross_entropy" if task == "multiclass" else "binary_cross_entropy"
    function = getattr(functional, f"upsample_{cross_entropy}" if upsampled else cross_entropy)
    region, loss = (getattr(losses, prefix + name)(task, ce_weight=weight, **options) for weight in (0.0, 0.7))
    expected = region(input, target) + 0.7 * function(input, target, ignore_index=IGNORED)
    torch.testing.assert_close(loss(input, target), expected)
    torch.testing.assert_close(*(torch.autograd.grad(each, input)[0] for each in (loss(input, target), expected)))
    assert "ce_weight=0.7" in repr(loss)


def test_dice_is_that_of_cross_entropy_dice() -> None:
    input, target = logits((2, 4, 5, 6)), make_labels((2, 5, 6), 4, ignore_index=IGNORED)
    for batch in (False, True):
        loss = losses.DiceLoss(ignore_index=IGNORED, batch=batch)(input, target)
        options = {"ignore_index": IGNORED, "batch_dice": batch, "ce_weight": 0.0}
        torch.testing.assert_close(loss, functional.cross_entropy_dice(input, target, **options))


def test_binary_masks_need_no_dimension_of_classes() -> None:
    input, masks = logits((2, 1, 5, 6)), make_labels((2, 5, 6), 2, torch.bool)
    loss = losses.JaccardLoss("binary")
    torch.testing.assert_close(loss(input, masks), loss(input, masks.unsqueeze(1)), rtol=0, atol=0)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "task": ({"task": "multi"}, "task: expected .*got 'multi'"),
    "smooth": ({"smooth": -1.0}, "smooth: expected a number of at least 0, got -1.0"),
    "ce_weight": ({"ce_weight": -1.0}, "ce_weight: expected a number of at least 0, got -1.0"),
    "alpha": ({"alpha": -1.0}, "alpha: expected a number of at least 0, got -1.0"),
    "beta": ({"beta": float("nan")}, "beta: expected .*got nan"),
    "background": ({"task": "binary", "include_background": False}, "include_background: task"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        losses.TverskyLoss(**options)


def test_refused_inputs() -> None:
    with pytest.raises(ValueError, match=r"input: task .* has one class, got shape"):
        losses.DiceLoss("binary")(torch.zeros(2, 3, 4, 4), torch.zeros(2, 4, 4))
    with pytest.raises(ValueError, match="target: expected a mask for each class"):
        losses.DiceLoss("multilabel")(torch.zeros(2, 3, 4, 4), torch.zeros(2, 4, 4))
    with pytest.raises(ValueError, match="include_background: with one class"):
        losses.DiceLoss(include_background=False)(torch.zeros(2, 1, 4, 4), torch.zeros(2, 4, 4, dtype=torch.int64))
    with pytest.raises(IndexError, match=r"target: expected classes in \[0, 3\)"):
        losses.DiceLoss()(torch.zeros(2, 3, 4, 4), torch.full((2, 4, 4), 3))
