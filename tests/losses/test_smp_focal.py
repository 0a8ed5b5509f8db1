"""fastseg.losses.smp's focal loss against segmentation_models_pytorch's."""

from typing import Any

import pytest
import torch

from fastseg.losses import smp
from fastseg.testing import make_labels
from tests.losses.cases import IGNORED, labels_for, logits, maps_for
from tests.losses.smp_cases import CLASS_WEIGHTS, MAP_MODES, check_both, combinations, inputs, named

FOCAL_OPTIONS = combinations(
    alpha=(None, 0.25), gamma=(None, 0.5), normalized=(False, True), reduced_threshold=(None, 0.3)
)
FOCAL_REDUCTIONS = ("mean", "sum", "batchwise_mean", "none", None, "unknown")


@pytest.mark.parametrize("ignore_index", [None, IGNORED, 2])
@pytest.mark.parametrize("from_logits", [True, False], ids=["logits", "probabilities"])
@pytest.mark.parametrize("options", FOCAL_OPTIONS, ids=named)
def test_focal_multiclass(options: dict, from_logits: bool, ignore_index: int | None) -> None:
    input = inputs(from_logits)
    target = labels_for(input, ignore_index=ignore_index)
    options = {**options, "from_logits": from_logits, "ignore_index": ignore_index}
    check_both("FocalLoss", input, target, mode="multiclass", **options)


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("from_logits", [True, False], ids=["logits", "probabilities"])
@pytest.mark.parametrize("options", FOCAL_OPTIONS, ids=named)
@pytest.mark.parametrize("mode", MAP_MODES)
def test_focal_of_maps(mode: str, options: dict, from_logits: bool, soft: bool) -> None:
    input = inputs(from_logits)
    check_both(
        "FocalLoss", input, maps_for(input, soft), mode=mode, from_logits=from_logits, **options
    )  # fmt: skip


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("reduction", FOCAL_REDUCTIONS, ids=str)
@pytest.mark.parametrize(
    ("mode", "ignore_index"),
    [("multiclass", None), ("multiclass", 1), ("binary", None), ("binary", 1), ("multilabel", None)],
)
def test_focal_reductions(mode: str, ignore_index: int | None, reduction: str | None, normalized: bool) -> None:
    input = logits()
    target = labels_for(input) if mode == "multiclass" else maps_for(input, soft=False)
    options = {"reduction": reduction, "ignore_index": ignore_index, "normalized": normalized, "alpha": 0.3}
    check_both("FocalLoss", input, target, mode=mode, **options)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("mode", ["multiclass", "multilabel"])
def test_focal_class_weights(mode: str, reduction: str) -> None:
    input = logits()
    target = labels_for(input) if mode == "multiclass" else maps_for(input, soft=False)
    check_both("FocalLoss", input, target, mode=mode, reduction=reduction, class_weights=CLASS_WEIGHTS)


def test_focal_label_of_no_class() -> None:
    input = logits()
    check_both("FocalLoss", input, labels_for(input, ignore_index=IGNORED), mode="multiclass")


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("images", [0, 2])
def test_focal_of_nothing(images: int, reduction: str) -> None:
    input = logits((images, 5, 4, 3))
    target = torch.full((images, 4, 3), IGNORED)
    options = {"ignore_index": IGNORED, "reduction": reduction}
    loss, _ = check_both("FocalLoss", input, target, mode="multiclass", **options)
    assert loss.isnan() == (reduction == "mean")


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("options", [{}, {"reduced_threshold": 0.4, "normalized": True, "ignore_index": 3}], ids=str)
def test_focal_layouts(options: dict[str, Any], layout: str) -> None:
    input = logits((3, 5, 6, 7), layout=layout)
    _, gradient = check_both("FocalLoss", input, labels_for(input), mode="multiclass", **options)
    assert gradient.stride() == input.stride()


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_focal_gradient_is_finite_where_certain(gamma: float) -> None:
    input = torch.tensor([0.0, 5.0, 100.0, 1e4, -1e4]).view(-1, 1, 1, 1).requires_grad_()
    for mode, target in (("multiclass", torch.zeros(5, 1, 1).long()), ("binary", torch.ones(5, 1, 1, 1))):
        loss = smp.FocalLoss(mode, gamma=gamma, reduction="sum")(input, target)
        assert torch.autograd.grad(loss, input)[0].isfinite().all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "batchwise_mean"])
@pytest.mark.parametrize(
    "options", combinations(alpha=(None, 0.25), normalized=(False, True), reduced_threshold=(None, 0.5)), ids=named
)
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("mode", MAP_MODES)
def test_focal_of_masks(mode: str, gamma: float, options: dict[str, Any], reduction: str) -> None:
    if mode == "multilabel" and reduction == "batchwise_mean":
        options = {**options, "class_weights": None}
    input = logits()
    ignore_index = IGNORED if mode == "binary" else None
    masks = make_labels(input.shape, 2, ignore_index=ignore_index)
    options = {**options, "gamma": gamma, "reduction": reduction, "ignore_index": ignore_index}
    check_both("FocalLoss", input, masks, mode=mode, **options)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("ignored", [IGNORED, 1])
def test_focal_multilabel_ignores_values(reduction: str, ignored: int) -> None:
    """The original fails; of each class alone it is the binary loss, whose values are ignored one by one."""
    input = logits()
    masks = make_labels(input.shape, 2, ignore_index=ignored)
    options = {"ignore_index": ignored, "reduction": reduction, "alpha": 0.25, "normalized": True}
    loss = smp.FocalLoss("multilabel", **options)(input, masks)
    of_classes = [smp.FocalLoss("binary", **options)(input[:, c], masks[:, c]) for c in range(input.shape[1])]
    torch.testing.assert_close(loss, torch.stack(of_classes).mean())


def test_focal_of_floating_point_masks_of_zeros_and_ones_is_that_of_integers() -> None:
    input, masks = logits(), make_labels(logits().shape, 2, ignore_index=IGNORED)
    for mode in MAP_MODES:
        loss = smp.FocalLoss(mode, alpha=0.25, ignore_index=IGNORED)
        torch.testing.assert_close(loss(input, masks.float()), loss(input, masks), rtol=0, atol=0)
