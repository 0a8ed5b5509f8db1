"""cross_entropy_dice and upsample_cross_entropy_dice against plain PyTorch, other libraries and the formula."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastseg import _native, functional, reference
from fastseg.testing import make, make_labels
from tests.losses import cases as losses_cases
from tests.ops import cross_entropy_cases
from tests.ops.cross_entropy_cases import DTYPES, INFINITY, LABELS, ROWS, WEIGHTS, logits
from tests.ops.dice_cases import COMBINATIONS, check_dice, check_upsampled
from tests.ops.upsample_cases import (
    GRIDS,
    MODES,
    VOLUME_GRIDS,
    VOLUME_MODES,
    Size,
    labels_for,
    slow_under_the_interpreter,
)

# ---- shapes, grids, dtypes, layouts ----

SHAPES = {
    "classifier": (7, 10),
    "sequence": (3, 7, 11),
    "sequence-in-rows": (2, 3, 48),
    "image": (2, 21, 13, 17),
    "volume": (2, 5, 3, 4, 7),
    "four-dimensions": (2, 3, 2, 3, 2, 5),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_shapes(implementation: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    input = logits(shape, dtype)
    target = cross_entropy_cases.labels_for(input, ignore_index=255)
    loss, _ = check_dice(input, target, ignore_index=255)
    assert (loss.shape, loss.dtype) == ((), dtype)


@pytest.mark.parametrize(("before", "after"), GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_grids(implementation: str, mode: dict[str, Any], before: Size, after: Size) -> None:
    input = logits((2, 5, *before))
    check_upsampled(input, labels_for(input, after, ignore_index=255), ignore_index=255, **mode)


@pytest.mark.usefixtures("plain_upsampling_of_cpus")
@pytest.mark.parametrize(("before", "after"), VOLUME_GRIDS.values(), ids=VOLUME_GRIDS)
@pytest.mark.parametrize("mode", VOLUME_MODES.values(), ids=VOLUME_MODES)
@pytest.mark.parametrize("combination", [{}, COMBINATIONS["nnunet"]], ids=["default", "nnunet"])
def test_upsampled_volumes(
    implementation: str, combination: dict[str, Any], mode: dict[str, Any], before: Size, after: Size
) -> None:
    input = logits((2, 5, *before))
    check_upsampled(input, labels_for(input, after, ignore_index=255), ignore_index=255, **combination, **mode)


@pytest.mark.parametrize("combination", COMBINATIONS.values(), ids=COMBINATIONS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_dtypes(implementation: str, dtype: torch.dtype, combination: dict[str, Any]) -> None:
    input = logits((3, 4, 5, 6), dtype)
    check_upsampled(input, labels_for(input, (17, 11), ignore_index=1), ignore_index=1, **combination)


@pytest.mark.parametrize("classes", [1, 2, 3, 19, 150, 257])
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_class_counts(implementation: str, dtype: torch.dtype, layout: str, classes: int) -> None:
    input = logits((2, classes, 2, 3), dtype, layout=layout)
    for gradient in (
        check_upsampled(input, labels_for(input, (4, 7)), batch_dice=True)[1],
        check_dice(input, labels_for(input, (2, 3)))[1],
    ):
        assert gradient.stride() == input.stride()


@slow_under_the_interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.strength(1)
def test_many_pixels_keep_their_digits(implementation: str, dtype: torch.dtype) -> None:
    input = logits((1, 3, 250, 250), dtype)
    target = labels_for(input, (1000, 1000), ignore_index=-100)
    for options in ({}, {"ce_weight": 0.0}):
        actual = functional.upsample_cross_entropy_dice(input, target, **options).double()
        truth = reference.upsample_cross_entropy_dice(input.double(), target, **options)
        # The result's rounding, and what every pixel's interpolation, exp and log have in common; a sum that carried a
        # float32 through a million pixels in one go would be off by hundreds of units.
        eps = torch.finfo(dtype).eps / 2 + 4 * torch.finfo(torch.float32).eps
        torch.testing.assert_close(actual, truth, rtol=eps, atol=0)


# ---- the whole grid of options ----


@pytest.mark.parametrize(("label_dtype", "ignored"), LABELS.values(), ids=LABELS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("combination", ["nnunet", "no-smooth"])
def test_options(
    combination: str, weight: Tensor | None, smoothing: float, label_dtype: torch.dtype, ignored: int | None
) -> None:
    input = logits((2, 5, 4, 3))
    target = labels_for(input, (6, 7), label_dtype, ignore_index=ignored)
    options = {"label_smoothing": smoothing, **COMBINATIONS[combination]}
    options |= {} if ignored is None else {"ignore_index": ignored}
    check_upsampled(input, target, weight, **options)


# ---- hard values ----


@pytest.mark.parametrize("combination", COMBINATIONS.values(), ids=COMBINATIONS)
@pytest.mark.parametrize("valid", [0, 1], ids=["all-ignored", "one-valid-pixel"])
def test_hardly_any_label(implementation: str, valid: int, combination: dict[str, Any]) -> None:
    input = logits((2, 5, 3, 4))
    target = torch.full((2, 6, 7), -100)
    target[1, 2, 3 : 3 + valid] = 4
    loss, gradient = check_upsampled(input, target, **combination)
    assert gradient.isfinite().all()
    if valid == 0:  # as nnU-Net's; without `smooth`, absent classes have Dice 0
        of_dice = combination.get("dice_weight", 1.0)
        torch.testing.assert_close(loss.item(), 0.0 if combination.get("smooth") != 0.0 else of_dice)
        assert gradient.count_nonzero() == 0


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_dice_alone_where_no_label_has_a_weight(implementation: str, smoothing: float) -> None:
    input = logits((2, 3, 6, 7))
    weight = torch.tensor([0.0, 0.0, 1.0])
    target = make_labels((2, 6, 7), 2)
    for gradient in (
        check_dice(input, target, weight, ce_weight=0.0, label_smoothing=smoothing)[1],
        check_upsampled(input, make_labels((2, 13, 9), 2), weight, ce_weight=0.0, label_smoothing=smoothing)[1],
    ):
        assert gradient.isfinite().all()
        assert gradient.count_nonzero() > 0


def test_masked_class_at_full_size(implementation: str) -> None:
    input = torch.randn(2, 4, 6, 7)
    input[:, 2] = -INFINITY  # which a neighbour's weight of 0 would make NaN of
    loss, gradient = check_upsampled(input.requires_grad_(), make_labels((2, 6, 7), 2))
    assert loss.isfinite()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("smooth", [0.0, 1e-5])
@pytest.mark.parametrize("batch_dice", [False, True])
def test_absent_classes(implementation: str, batch_dice: bool, smooth: float) -> None:
    input = logits((2, 6, 3, 4))
    target = make_labels((2, 6, 7), 2)  # four classes are nowhere
    target[1] = -100  # and an image doesn't count
    check_upsampled(input, target, smooth=smooth, batch_dice=batch_dice)


@pytest.mark.parametrize("smooth", [0.0, 1e-5])
def test_classes_of_no_probability(implementation: str, smooth: float) -> None:
    input = torch.full((2, 4, 3, 4), -200.0)  # exp gives 0: neither labels nor probability
    input[:, :2] = make((2, 2, 3, 4))
    _, gradient = check_upsampled(input.requires_grad_(), make_labels((2, 6, 7), 2), smooth=smooth)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_hard_rows(implementation: str, row: list[float]) -> None:
    input = torch.randn(2, 4, 1, 7)
    input[0, :, 0, 1:-1] = torch.tensor(row)[:, None]  # the other image must stay ordinary
    target = torch.tensor([[0, 0, 1, 2, 3, -100, 1]] * 2).unsqueeze(1)
    for options in ({}, {"ce_weight": 0.0}):
        _, gradient = check_dice(input.requires_grad_(), target, **options)
        assert options == {} or gradient[1].isfinite().all()


# ---- independent of fastseg.reference ----


def dice_by_hand(input: Tensor, target: Tensor, ignore_index: int, smooth: float) -> list[list[float]]:
    """Dice of each image and class in Python's numbers, which are float64."""
    result = []
    for image, labels in zip(input.double().softmax(1).flatten(2), target.flatten(1).tolist(), strict=True):
        rows = []
        for index, probabilities in enumerate(image.tolist()):
            counted = [(p, label == index) for p, label in zip(probabilities, labels, strict=True)
                       if label != ignore_index]  # fmt: skip
            intersection = sum(p for p, hit in counted if hit)
            denominator = sum(p for p, _ in counted) + sum(hit for _, hit in counted) + smooth
            rows.append((2 * intersection + smooth) / denominator)
        result.append(rows)
    return result


@pytest.mark.parametrize("ignore_index", [2, 255, -100])
@pytest.mark.parametrize("smooth", [0.0, 1e-5, 1.0])
def test_formula(smooth: float, ignore_index: int) -> None:
    input = logits((2, 4, 5, 6), torch.float64)
    target = labels_for(input, (5, 6), ignore_index=ignore_index)
    dice = torch.tensor(dice_by_hand(input.detach(), target, ignore_index, smooth), dtype=torch.float64)
    plain = F.cross_entropy(input.detach(), target, ignore_index=ignore_index)
    options = {"ignore_index": ignore_index, "smooth": smooth}
    for include in (True, False):
        loss = functional.cross_entropy_dice(input, target, **options, include_background=include)
        torch.testing.assert_close(loss.detach(), plain + 1 - dice[:, 0 if include else 1 :].mean())
    loss = functional.cross_entropy_dice(input, target, **options, ce_weight=0.5, dice_weight=3.0)
    torch.testing.assert_close(loss.detach(), 0.5 * plain + 3 * (1 - dice.mean()))
    one = functional.cross_entropy_dice(input[:1], target[:1], **options, batch_dice=True, ce_weight=0.0)
    torch.testing.assert_close(one.detach(), 1 - dice[0].mean())


def test_agrees_with_kornia() -> None:
    kornia = pytest.importorskip("kornia.losses", reason="kornia isn't installed: it comes with the extra [train]")
    input = logits((2, 3, 12, 10), torch.float64)
    target = labels_for(input, (12, 10), ignore_index=255)  # every class is in every image, else kornia leaves it out
    theirs = kornia.dice_loss(input, target, average="macro", eps=0.0, ignore_index=255)
    ours = functional.cross_entropy_dice(input, target, ignore_index=255, ce_weight=0.0, smooth=0.0)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(loss, input)[0] for loss in (ours, theirs)))


def test_agrees_with_torchmetrics_on_certain_predictions() -> None:
    torchmetrics = losses_cases.original("torchmetrics.functional.segmentation")
    prediction, target = make_labels((2, 9, 8), 4, seed=1), make_labels((2, 9, 8), 4)
    input = F.one_hot(prediction, 4).movedim(-1, 1) * 1e4  # the softmax of it is the one-hot prediction
    options = {"average": "none", "input_format": "index", "aggregation_level": "samplewise"}
    theirs = torchmetrics.dice_score(prediction, target, 4, **options)
    ours = functional.cross_entropy_dice(input, target, ce_weight=0.0, smooth=0.0)
    torch.testing.assert_close(1 - ours, theirs.mean())


# ---- beside the values ----


@slow_under_the_interpreter
@pytest.mark.parametrize("combination", COMBINATIONS.values(), ids=COMBINATIONS)
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.strength(1)
def test_gradcheck_to_second_order(mode: dict[str, Any], combination: dict[str, Any]) -> None:
    input = logits((2, 3, 2, 3), torch.float64)
    target = labels_for(input, (4, 5), ignore_index=1)
    options = {"ignore_index": 1, "label_smoothing": 0.1, "weight": torch.tensor([0.5, 2.0, 1.0]), **combination}
    for function in (
        lambda x: functional.upsample_cross_entropy_dice(x, target, **options, **mode),
        lambda x: functional.cross_entropy_dice(x, target[:, :2, :3], **options),
    ):
        assert torch.autograd.gradcheck(function, input, fast_mode=True)
        assert torch.autograd.gradgradcheck(function, input, fast_mode=True)


@pytest.mark.parametrize("label", [4, -1, 255])
def test_label_outside_the_classes_of_dice_alone(label: int) -> None:
    input, target = torch.zeros(2, 4, 3, 3), torch.zeros(2, 6, 6, dtype=torch.int64)
    target[1, 2, 3] = label
    if _native.INTERPRETED or not input.is_cpu:  # a GPU's kernels, which can't raise
        assert functional.upsample_cross_entropy_dice(input, target, ce_weight=0.0).isnan()
        return
    with pytest.raises(IndexError, match=rf"target: expected classes in \[0, 4\) .*, got {label}$"):
        functional.upsample_cross_entropy_dice(input, target, ce_weight=0.0)
