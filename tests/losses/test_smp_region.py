"""fastseg.losses.smp's region losses against segmentation_models_pytorch's."""

from typing import Any

import pytest
import torch

from fastseg.losses import smp
from fastseg.testing import make_labels
from tests.losses.cases import DTYPES, IGNORED, SHAPES, labels_for, logits, maps_for
from tests.losses.smp_cases import CLASS_WEIGHTS, MAP_MODES, REGIONS, check_both, combinations, inputs, named

DICE_OPTIONS = combinations(
    classes=(None, [1, 3]), log_loss=(False, True), smooth=(None, 1.0), class_weights=(None, CLASS_WEIGHTS)
)


@pytest.mark.parametrize("ignore_index", [None, IGNORED, 2])
@pytest.mark.parametrize("from_logits", [True, False], ids=["logits", "probabilities"])
@pytest.mark.parametrize("options", DICE_OPTIONS, ids=named)
def test_dice_multiclass(options: dict, from_logits: bool, ignore_index: int | None) -> None:
    input = inputs(from_logits)
    target = labels_for(input, ignore_index=ignore_index)
    options = {**options, "from_logits": from_logits, "ignore_index": ignore_index}
    check_both("DiceLoss", input, target, mode="multiclass", **options)


@pytest.mark.parametrize("ignore_index", [None, 0, 1])
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("from_logits", [True, False], ids=["logits", "probabilities"])
@pytest.mark.parametrize("options", combinations(log_loss=(False, True), smooth=(None, 1.0)), ids=named)
@pytest.mark.parametrize("mode", MAP_MODES)
def test_dice_of_maps(mode: str, options: dict, from_logits: bool, soft: bool, ignore_index: int | None) -> None:
    input = inputs(from_logits)
    options = {**options, "from_logits": from_logits, "ignore_index": ignore_index}
    check_both("DiceLoss", input, maps_for(input, soft), mode=mode, **options)


@pytest.mark.parametrize(
    "options", combinations(classes=(None, [0, 4]), class_weights=(None, CLASS_WEIGHTS)), ids=named
)
def test_dice_multilabel_classes(options: dict[str, Any]) -> None:
    input = logits()
    check_both("DiceLoss", input, maps_for(input, soft=False), mode="multilabel", **options)


@pytest.mark.parametrize("absent", [[1], [0, 2, 3], [0, 1, 2, 4]], ids=str)
@pytest.mark.parametrize("options", combinations(log_loss=(False, True), smooth=(None, 1.0)), ids=named)
def test_dice_of_absent_classes(options: dict[str, Any], absent: list[int]) -> None:
    input = logits()
    target = labels_for(input)
    target[torch.isin(target, torch.tensor(absent))] = min(set(range(5)) - set(absent))
    check_both("DiceLoss", input, target, mode="multiclass", **options)


@pytest.mark.parametrize("mode", ["multiclass", *MAP_MODES])
def test_dice_of_nothing_labelled_is_zero(mode: str) -> None:
    input = logits()
    target = torch.full_like(labels_for(input) if mode == "multiclass" else input.detach(), IGNORED)
    loss, gradient = check_both("DiceLoss", input, target, mode=mode, ignore_index=IGNORED)
    assert loss == 0
    assert gradient.count_nonzero() == 0


def test_dice_of_no_image_is_zero() -> None:
    input = logits((0, 5, 4, 3))
    loss = smp.DiceLoss("multiclass")(input, labels_for(input))
    (gradient,) = torch.autograd.grad(loss, input)
    assert loss == 0
    assert gradient.shape == input.shape


def test_dice_target_with_a_channel() -> None:
    input = logits()
    check_both("DiceLoss", input, labels_for(input).unsqueeze(1), mode="multiclass")


# ---- jaccard and tversky ----


@pytest.mark.parametrize("ignore_index", [None, IGNORED, 2])
@pytest.mark.parametrize("from_logits", [True, False], ids=["logits", "probabilities"])
@pytest.mark.parametrize("options", DICE_OPTIONS, ids=named)
@pytest.mark.parametrize("name", ["JaccardLoss", "TverskyLoss"])
def test_regions_multiclass(name: str, options: dict[str, Any], from_logits: bool, ignore_index: int | None) -> None:
    input = inputs(from_logits)
    target = labels_for(input, ignore_index=ignore_index)
    if name == "TverskyLoss":
        options = {"alpha": 0.3, "beta": 0.7, "gamma": 1.5, **options}
    options = {**options, "from_logits": from_logits, "ignore_index": ignore_index}
    check_both(name, input, target, mode="multiclass", **options)


@pytest.mark.parametrize("ignore_index", [None, 0, 1, IGNORED])
@pytest.mark.parametrize("kind", ["masks", "hard", "soft"])
@pytest.mark.parametrize("from_logits", [True, False], ids=["logits", "probabilities"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("mode", MAP_MODES)
@pytest.mark.parametrize("name", REGIONS)
def test_regions_of_maps(
    name: str, mode: str, dtype: torch.dtype, from_logits: bool, kind: str, ignore_index: int | None
) -> None:
    input = inputs(from_logits, SHAPES["image"], dtype)
    masks = make_labels(input.shape, 2, ignore_index=ignore_index)
    target = masks if kind == "masks" else maps_for(input, soft=kind == "soft")
    check_both(name, input, target, mode=mode, from_logits=from_logits, ignore_index=ignore_index)
