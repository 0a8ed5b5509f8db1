"""class_sums, upsample_class_sums, and the sums of sigmoids' losses, against plain PyTorch and the formula."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastseg import _native, functional, reference
from fastseg.ops.upsample_sigmoid_sums import SigmoidOptions, upsample_sigmoid_sums
from fastseg.testing import assert_parity, make, make_labels, values_and_gradients
from tests.ops import upsample_cases
from tests.ops.cross_entropy_cases import DTYPES, logits
from tests.ops.upsample_cases import GRIDS, MODES, TILES, Size, labels_for, slow_under_the_interpreter

ACTIVATIONS = ("softmax", "sigmoid")
TARGETS = ("labels", "masks", "shares")

# Of focal factors: none at all, cross-entropies alone, and the exponents and thresholds that people set.
FACTORS: dict[str, dict[str, Any]] = {
    "class-sums": {},
    "smaller": {"smaller": True},
    "cross-entropy": {"gamma": 0.0},
    "focal": {"gamma": 2.0},
    "root": {"gamma": 0.5},
    "reduced": {"gamma": 2.0, "threshold": 0.5},
    "reduced-less": {"gamma": 1.5, "threshold": 0.3},
}


def target_for(kind: str, input: Tensor, size: Size, ignored: int | None = None) -> Tensor:
    if kind == "labels":
        return labels_for(input, size, ignore_index=ignored)
    shape = (*input.shape[:2], *size)
    if kind == "masks":
        return make_labels(shape, 2, torch.uint8, ignore_index=ignored)
    # In the dtype of the arithmetic, so that the truth's are the same numbers.
    return make(shape, torch.float64, seed=3).sigmoid().to(torch.promote_types(input.dtype, torch.float32))


def terms_for(input: Tensor, size: Size, mode: dict[str, Any]) -> int:
    return upsample_cases.terms_of(input, size, mode.get("mode", "bilinear"))


def check(input: Tensor, target: Tensor, operator: str = "upsample_class_sums", **options: Any) -> list[Tensor]:
    """Sums and gradient of a function, as near to the truth as plain PyTorch's."""
    terms = terms_for(input, tuple(target.shape[-2:]), options) if "upsample" in operator else input[:, 0].numel()
    return _check(getattr(functional, operator), getattr(reference, operator), [input, target], terms, **options)


def check_sums(input: Tensor, target: Tensor, options: SigmoidOptions) -> list[Tensor]:
    """The operator's sums and gradient, as near to the truth as plain PyTorch's."""
    size, (*summed, mode, corners) = tuple(target.shape[-2:]), options

    def plain(input: Tensor, target: Tensor) -> Tensor:
        logits = reference.upsample(input, size, None, mode, corners)
        return reference.sigmoid_sums(logits, target, *summed)

    def fused(input: Tensor, target: Tensor) -> Tensor:
        return upsample_sigmoid_sums(input, target, options)

    return _check(fused, plain, [input, target], terms_for(input, size, {"mode": mode}))


def _check(
    fused: Callable[..., Tensor], plain: Callable[..., Tensor], tensors: list[Tensor], terms: int, **options: Any
) -> list[Tensor]:
    actual, expected = (values_and_gradients(function, tensors, **options) for function in (fused, plain))
    assert_parity(actual, expected, values_and_gradients(plain, tensors, torch.float64, **options), terms=terms)
    return actual


# ---- values and gradients ----


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("before", "after"), GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_grids_of_sigmoids(
    implementation: str, mode: dict[str, Any], before: Size, after: Size, dtype: torch.dtype, kind: str
) -> None:
    input = logits((2, 3, *before), dtype)
    ignored = None if kind == "shares" else 255
    sums, gradient = check(
        input, target_for(kind, input, after, ignored), activation="sigmoid", ignore_index=ignored, **mode
    )
    assert (sums.shape, sums.dtype) == ((2, 3, 3), torch.promote_types(dtype, torch.float32))
    assert gradient.dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("before", "after"), GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_grids_of_softmax(mode: dict[str, Any], before: Size, after: Size, dtype: torch.dtype) -> None:
    input = logits((2, 3, *before), dtype)
    check(input, target_for("labels", input, after, 255), activation="softmax", ignore_index=255, **mode)


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("factor", FACTORS.values(), ids=FACTORS)
@pytest.mark.parametrize("size", [(9, 7), (21, 16)], ids=["copied", "upsampled"])
def test_factors(implementation: str, size: Size, factor: dict[str, Any], dtype: torch.dtype, kind: str) -> None:
    input = logits((2, 5, 9, 7), dtype)
    mode = "nearest" if size == (9, 7) else "bilinear"
    options = SigmoidOptions(3, **factor, mode=mode)
    sums, _ = check_sums(input, target_for(kind, input, size, 3), options)
    assert sums.shape == (6 if "gamma" in factor else 3, 2, 5)


@pytest.mark.parametrize("classes", [1, 2, 5] if _native.INTERPRETED else [1, 2, 19, 150, 257])
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("kind", TARGETS)
def test_class_counts(kind: str, layout: str, classes: int) -> None:
    input = logits((2, classes, 3, 5), layout=layout)
    options = SigmoidOptions(255, 2.0, mode="bilinear")
    _, gradient = check_sums(input, target_for(kind, input, (7, 11), 255 if kind == "labels" else None), options)
    assert gradient.stride() == input.stride()


@slow_under_the_interpreter
@pytest.mark.parametrize(("shape", "size"), TILES.values(), ids=TILES)
@pytest.mark.parametrize("kind", TARGETS)
def test_tiles(kind: str, shape: tuple[int, int, int], size: Size, isa: str) -> None:
    input = logits((1, *shape))
    check_sums(input, target_for(kind, input, size), SigmoidOptions(255, 2.0, mode="bilinear"))


@slow_under_the_interpreter
def test_rows_of_more_columns_than_are_added_in_single(isa: str) -> None:
    input = logits((1, 1, 2, 1300))
    check_sums(input, target_for("masks", input, (3, 2600)), SigmoidOptions(255, 0.0, mode="bilinear"))


@slow_under_the_interpreter
def test_sums_of_many_pixels_keep_their_digits() -> None:
    input = logits((1, 3, 250, 250))
    target = labels_for(input, (1000, 1000), ignore_index=255)
    for activation in ACTIVATIONS:
        truth = reference.upsample_class_sums(input.double(), target, 255, activation)
        actual = functional.upsample_class_sums(input, target, 255, activation).double()
        torch.testing.assert_close(actual, truth, rtol=4 * torch.finfo(torch.float32).eps, atol=0)


MASK_DTYPES = (
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.bfloat16,
    torch.float16, torch.float32, torch.float64,
)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mask_dtype", MASK_DTYPES, ids=str)
def test_masks_of_any_dtype(mask_dtype: torch.dtype, dtype: torch.dtype) -> None:
    input = logits((2, 3, 4, 5), dtype)
    masks = make_labels((2, 3, 8, 9), 2, mask_dtype)
    upsampled = functional.upsample_class_sums(input, masks, activation="sigmoid")
    expected = functional.upsample_class_sums(input, masks.to(torch.uint8), activation="sigmoid")
    torch.testing.assert_close(upsampled, expected, rtol=0, atol=0)


@pytest.mark.parametrize("view", ["transposed", "strided", "expanded"])
def test_masks_of_any_strides(view: str) -> None:
    masks = {
        "transposed": make_labels((2, 3, 9, 8), 2, torch.uint8).transpose(2, 3),
        "strided": make_labels((4, 6, 16, 18), 2, torch.int32)[::2, 1::2, ::2, ::2],
        "expanded": make_labels((1, 3, 8, 1), 2, torch.bool).expand(2, -1, -1, 9),
    }[view]
    input = logits((2, 3, 4, 5))
    results = [functional.upsample_class_sums(input, given, activation="sigmoid") for given in (masks, masks.clone())]
    torch.testing.assert_close(*results, rtol=0, atol=0)


SHAPES = {"vectors": (7, 4), "sequence": (3, 4, 11), "image": (2, 4, 5, 6), "volume": (2, 4, 3, 2, 5)}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("labelled", [True, False], ids=["labels", "masks"])
def test_shapes(labelled: bool, activation: str, shape: tuple[int, ...]) -> None:
    if activation == "softmax" and not labelled:
        pytest.skip("the softmax takes labels")
    input = logits(shape)
    pixels = (shape[0], *shape[2:])
    target = make_labels(pixels, 4, ignore_index=2) if labelled else make_labels(shape, 2, ignore_index=2)
    sums, _ = check(input, target, "class_sums", ignore_index=2, activation=activation)
    assert sums.shape == (*shape[:2], 3)


# ---- hard values ----


@pytest.mark.parametrize("factor", FACTORS.values(), ids=FACTORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)  # of float64 plain PyTorch is its own truth
def test_large_logits(implementation: str, dtype: torch.dtype, factor: dict[str, Any]) -> None:
    values = torch.tensor([0.0, 20.0, -20.0, 100.0, -100.0, 1e4, -1e4, 88.0, -88.0, 0.5], dtype=dtype)
    input = values.view(1, 1, 1, -1).requires_grad_()
    for mask in (torch.zeros, torch.ones):
        options = SigmoidOptions(255, **factor)
        sums, gradient = check_sums(input, mask(1, 1, 1, 10, dtype=torch.uint8), options)
        assert sums.isfinite().all()
        assert gradient.isfinite().all()


@pytest.mark.parametrize("kind", ["labels", "masks"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_ignored_pixels_hide_what_they_hold(implementation: str, value: float, kind: str) -> None:
    input = logits((1, 2, 2, 2))
    with torch.no_grad():
        input[0, :, 0, 0] = value
    target = torch.tensor([[[3, 1], [0, 1]]])
    target = target if kind == "labels" else target.unsqueeze(1).repeat(1, 2, 1, 1)
    sums = upsample_sigmoid_sums(input, target, SigmoidOptions(3, 2.0))
    (gradient,) = torch.autograd.grad(sums.sum(), input)
    assert sums.isfinite().all()
    assert gradient.isfinite().all()
    assert gradient[0, :, 0, 0].count_nonzero() == 0


def test_nan_stays_nan(implementation: str) -> None:
    input = logits((1, 2, 2, 2))
    with torch.no_grad():
        input[0, 1, 0, 0] = math.nan
    sums = functional.class_sums(input, torch.zeros(1, 2, 2, dtype=torch.int64), activation="sigmoid")
    assert sums[0, 0].isfinite().all()
    assert sums[0, 1, :2].isnan().all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_all_ignored(activation: str) -> None:
    input, target = logits((2, 3, 2, 2)), torch.full((2, 4, 5), 255)
    sums, gradient = check(input, target, activation=activation, ignore_index=255)
    assert sums.count_nonzero() == gradient.count_nonzero() == 0


@pytest.mark.parametrize("label", [4, -1, 255])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_label_outside_the_classes(activation: str, label: int) -> None:
    input, target = torch.zeros(2, 4, 3, 3, requires_grad=True), torch.zeros(2, 6, 6, dtype=torch.int64)
    target[1, 2, 3] = label
    if _native.INTERPRETED or not input.is_cpu:  # a GPU's kernels, which can't raise
        sums = functional.upsample_class_sums(input, target, activation=activation)
        assert sums[0].isfinite().all()
        assert sums[1, :, 1].isnan().all()
        return
    with pytest.raises(IndexError, match=rf"target: expected classes in \[0, 4\), got {label}$"):
        functional.upsample_class_sums(input, target, activation=activation)


# ---- independent of fastseg.reference ----


@pytest.mark.parametrize("ignore_index", [2, 255])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_formula(activation: str, ignore_index: int) -> None:
    input = logits((2, 4, 5, 6), torch.float64)
    target = labels_for(input, (5, 6), ignore_index=ignore_index)
    p = input.detach().softmax(1) if activation == "softmax" else input.detach().sigmoid()
    expected = torch.zeros(2, 4, 3, dtype=torch.float64)
    for n, c, y, x in itertools.product(range(2), range(4), range(5), range(6)):
        if target[n, y, x] != ignore_index:
            t = float(target[n, y, x] == c)
            expected[n, c] += torch.tensor([p[n, c, y, x].item() * t, p[n, c, y, x].item(), t])
    torch.testing.assert_close(functional.class_sums(input, target, ignore_index, activation).detach(), expected)


def test_formula_of_masks() -> None:
    input, masks = logits((2, 3, 4, 5), torch.float64), make((2, 3, 4, 5), torch.float64, seed=1).sigmoid()
    p = input.sigmoid()
    expected = torch.stack([(p * masks).sum((2, 3)), p.sum((2, 3)), masks.sum((2, 3))], -1)
    torch.testing.assert_close(functional.class_sums(input, masks, activation="sigmoid"), expected)


def test_a_region_loss_of_three_lines() -> None:
    input, target = logits((2, 4, 5, 6)), make_labels((2, 10, 12), 4)
    overlap, predicted, labelled = functional.upsample_class_sums(input, target).unbind(-1)
    loss = 1 - ((2 * overlap + 1e-5) / (predicted + labelled + 1e-5)).mean()
    dice = functional.upsample_cross_entropy_dice(input, target, ce_weight=0.0)
    torch.testing.assert_close(loss, dice, rtol=0, atol=1e-6)
