"""focal_loss and upsample_focal_loss against plain PyTorch, kornia and the formula."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastseg import _native, functional, reference
from fastseg.testing import assert_parity, make, make_labels, values_and_gradients
from tests.ops import cross_entropy_cases, upsample_cases
from tests.ops.cross_entropy_cases import DTYPES, LABELS, REDUCTIONS, WEIGHTS, logits
from tests.ops.upsample_cases import GRIDS, MODES, Size, labels_for, slow_under_the_interpreter

GAMMAS = (0.0, 0.5, 1.0, 2.0, 5.0)


def check_focal(input: Tensor, target: Tensor, weight: Tensor | None = None, **options: Any) -> list[Tensor]:
    terms = cross_entropy_cases.terms_of(input)
    return cross_entropy_cases.check(input, target, weight, operator="focal_loss", terms=terms, **options)


def check_upsampled(input: Tensor, target: Tensor, weight: Tensor | None = None, **options: Any) -> list[Tensor]:
    terms = upsample_cases.terms_of(input, tuple(target.shape[1:]), options.get("mode", "bilinear"))
    return cross_entropy_cases.check(input, target, weight, operator="upsample_focal_loss", terms=terms, **options)


# ---- shapes, grids, dtypes, layouts ----

SHAPES = {
    "no-batch": (7,),
    "classifier": (37, 10),
    "sequence": (3, 7, 11),
    "image": (2, 21, 13, 17),
    "volume": (2, 5, 3, 4, 7),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_shapes(reduction: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    input = logits(shape, dtype)
    pixels = (*shape[:1], *shape[2:]) if len(shape) > 1 else ()
    target = make_labels(pixels, shape[min(1, len(shape) - 1)], ignore_index=255)
    loss, _ = check_focal(input, target, ignore_index=255, reduction=reduction)
    assert (loss.shape, loss.dtype) == (pixels if reduction == "none" else (), dtype)


@pytest.mark.parametrize(("before", "after"), GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_grids(mode: dict[str, Any], before: Size, after: Size) -> None:
    input = logits((2, 5, *before))
    check_upsampled(input, labels_for(input, after, ignore_index=255), ignore_index=255, reduction="none", **mode)


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_dtypes(implementation: str, reduction: str, dtype: torch.dtype, gamma: float) -> None:
    input = logits((3, 4, 5, 6), dtype)
    options = {"gamma": gamma, "reduction": reduction, "ignore_index": 1}
    check_upsampled(input, labels_for(input, (17, 11), ignore_index=1), **options)
    check_focal(input, labels_for(input, (5, 6), ignore_index=1), **options)


@pytest.mark.parametrize("classes", [1, 2, 3, 40] if _native.INTERPRETED else [1, 2, 3, 19, 150, 257])
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_class_counts(layout: str, classes: int) -> None:
    input = logits((2, classes, 3, 5), layout=layout)
    for gradient in (
        check_upsampled(input, labels_for(input, (7, 11)))[1],
        check_focal(input, labels_for(input, (3, 5)))[1],
    ):
        assert gradient.stride() == input.stride()


@slow_under_the_interpreter
def test_mean_of_many_pixels_keeps_its_digits() -> None:
    input = logits((1, 3, 250, 250))
    target = labels_for(input, (1000, 1000), ignore_index=-100)
    truth = reference.upsample_focal_loss(input.double(), target)
    actual = functional.upsample_focal_loss(input, target).double()
    # What every pixel's interpolation, exp, log and power have in common.
    torch.testing.assert_close(actual, truth, rtol=4 * torch.finfo(torch.float32).eps, atol=0)


# ---- the whole grid of options ----


@pytest.mark.parametrize(("label_dtype", "ignored"), LABELS.values(), ids=LABELS)
@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_options(reduction: str, weight: Tensor | None, label_dtype: torch.dtype, ignored: int | None) -> None:
    input = logits((2, 5, 4, 3))
    options = {"reduction": reduction} | ({} if ignored is None else {"ignore_index": ignored})
    check_upsampled(input, labels_for(input, (6, 7), label_dtype, ignore_index=ignored), weight, **options)


# ---- hard values ----


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("valid", [0, 1], ids=["all-ignored", "one-valid-pixel"])
def test_hardly_any_label(valid: int, reduction: str, gamma: float) -> None:
    input = logits((2, 5, 3, 4))
    target = torch.full((2, 6, 7), -100)
    target[1, 2, 3 : 3 + valid] = 4
    loss, gradient = check_upsampled(input, target, reduction=reduction, gamma=gamma)
    assert loss.isnan().any() == (valid == 0 and reduction == "mean")
    assert (gradient.count_nonzero() > 0) == (valid > 0)


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_probability_one(implementation: str, dtype: torch.dtype, gamma: float) -> None:
    margins = torch.tensor([0.0, 5.0, 20.0, 100.0, 1e4], dtype=dtype)
    input = torch.stack((margins, torch.zeros_like(margins)), 1)[..., None, None].requires_grad_()
    loss = functional.upsample_focal_loss(input, torch.zeros(5, 2, 2, dtype=torch.int64), reduction="sum", gamma=gamma)
    (gradient,) = torch.autograd.grad(loss, input, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), input)
    assert gradient.isfinite().all()
    assert second.isfinite().all()
    assert gradient[-1].count_nonzero() == 0


# ---- independent of fastseg.reference ----


@pytest.mark.parametrize("gamma", GAMMAS)
def test_formula(gamma: float) -> None:
    input = logits((2, 4, 5, 6), torch.float64)
    target = labels_for(input, (5, 6), ignore_index=-100)
    weight = [0.25, 1.0, 2.0, 0.0]
    expected = []
    for scores, label in zip(
        input.detach().movedim(1, -1).reshape(-1, 4).tolist(), target.flatten().tolist(), strict=True
    ):
        p = math.exp(scores[label]) / sum(map(math.exp, scores)) if label >= 0 else 1.0
        expected.append(weight[label] * (1 - p) ** gamma * -math.log(p) if label >= 0 else 0.0)
    expected = torch.tensor(expected, dtype=torch.float64).view(target.shape)
    losses = {
        reduction: functional.focal_loss(input, target, torch.tensor(weight), reduction=reduction, gamma=gamma).detach()
        for reduction in REDUCTIONS
    }
    torch.testing.assert_close(losses["none"], expected)
    torch.testing.assert_close(losses["sum"], expected.sum())
    torch.testing.assert_close(losses["mean"], expected.sum() / (target >= 0).sum())


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_agrees_with_kornia(gamma: float) -> None:
    kornia = pytest.importorskip("kornia.losses", reason="kornia isn't installed: it comes with the extra [train]")
    input = logits((2, 3, 12, 10), torch.float64)
    target = labels_for(input, (12, 10), ignore_index=-100)
    weight = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
    theirs = kornia.focal_loss(input, target, None, gamma, "sum", weight)
    ours = functional.focal_loss(input, target, weight, reduction="sum", gamma=gamma)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(loss, input)[0] for loss in (ours, theirs)))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_gamma_zero_is_cross_entropy(dtype: torch.dtype, reduction: str) -> None:
    input = logits((2, 5, 4, 3), dtype)
    target = labels_for(input, (9, 7), ignore_index=-100)
    focal = values_and_gradients(functional.upsample_focal_loss, [input, target], reduction=reduction, gamma=0.0)
    plain = values_and_gradients(functional.upsample_cross_entropy, [input, target], reduction=reduction)
    truth = values_and_gradients(reference.upsample_cross_entropy, [input, target], torch.float64, reduction=reduction)
    assert_parity(focal, plain, truth, terms=upsample_cases.terms_of(input, (9, 7)))


# ---- derivatives ----


@slow_under_the_interpreter
@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.strength(1)
def test_gradcheck_to_second_order(reduction: str, gamma: float) -> None:
    input = logits((2, 3, 2, 3), torch.float64)
    weight = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64, requires_grad=True)
    target = labels_for(input, (4, 5), ignore_index=1)
    options = {"ignore_index": 1, "reduction": reduction, "gamma": gamma}
    for function in (
        lambda x, w: functional.upsample_focal_loss(x, target, w, **options),
        lambda x, w: functional.focal_loss(x, target[:, :2, :3], w, **options),
    ):
        assert torch.autograd.gradcheck(function, (input, weight), fast_mode=True)
        assert torch.autograd.gradgradcheck(function, (input, weight), fast_mode=True)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_gradient_of_weight(dtype: torch.dtype) -> None:
    input, weight = logits((2, 5, 3, 4), dtype), make((5,), seed=1).abs().requires_grad_()
    assert len(check_upsampled(input, labels_for(input, (6, 7)), weight)) == 3


# ---- errors ----


@pytest.mark.parametrize("label", [4, -1, 255])
@pytest.mark.parametrize("weight", [None, torch.ones(4)], ids=["unweighted", "weighted"])
def test_label_outside_the_classes(weight: Tensor | None, label: int) -> None:
    input, target = torch.zeros(2, 4, 3, 3), torch.zeros(2, 6, 6, dtype=torch.int64)
    target[1, 2, 3] = label
    if _native.INTERPRETED or not input.is_cpu:  # a GPU's kernels, which can't raise
        loss = functional.upsample_focal_loss(input, target, weight, reduction="none")
        assert loss.isnan().nonzero().tolist() == [[1, 2, 3]]
        return
    with pytest.raises(IndexError, match=rf"target: expected classes in \[0, 4\) .*, got {label}$"):
        functional.upsample_focal_loss(input, target, weight)
