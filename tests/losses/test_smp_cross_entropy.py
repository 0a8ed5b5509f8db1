"""fastseg.losses.smp's cross-entropies against segmentation_models_pytorch's."""

import pytest
import torch

from fastseg.losses import smp
from fastseg.testing import make, make_labels
from tests.losses.cases import IGNORED, check, labels_for, logits
from tests.losses.smp_cases import check_both, originals


@pytest.mark.parametrize("ignore_index", [None, -100, IGNORED, 2])
@pytest.mark.parametrize("smooth_factor", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy(reduction: str, smooth_factor: float, ignore_index: int | None) -> None:
    input = logits()
    options = {"reduction": reduction, "smooth_factor": smooth_factor, "ignore_index": ignore_index}
    check_both("SoftCrossEntropyLoss", input, labels_for(input, ignore_index=ignore_index), **options)


@pytest.mark.parametrize("channel", [False, True], ids=["labels", "labels-with-a-channel"])
@pytest.mark.parametrize("ignore_index", [None, 2])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dim", [0, 1, 3, -1, -2])
def test_cross_entropy_dim(dim: int, reduction: str, ignore_index: int | None, channel: bool) -> None:
    input = logits((5, 6, 5, 7))
    classes = input.shape[dim]
    target = make_labels(input.select(dim, 0).shape, classes)
    options = {"dim": dim, "reduction": reduction, "ignore_index": ignore_index, "smooth_factor": 0.1}
    check_both("SoftCrossEntropyLoss", input, target.unsqueeze(dim) if channel else target, **options)


def test_cross_entropy_without_smoothing() -> None:
    input = logits()
    ours, original = smp.SoftCrossEntropyLoss(), originals().SoftCrossEntropyLoss(smooth_factor=0.0)
    check(ours, original, input, labels_for(input))
    check(ours, original, logits((0, 5, 4, 3)), torch.zeros(0, 4, 3, dtype=torch.int64))


@pytest.mark.parametrize("ignore_index", [None, -100, 1])
@pytest.mark.parametrize("smooth_factor", [None, 0.1])
@pytest.mark.parametrize("weight", [None, (5, 1, 1), (1, 5, 1, 1), (1,), (2, 5, 9, 13)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_soft_bce(
    reduction: str, weight: tuple[int, ...] | None, smooth_factor: float | None, ignore_index: int | None
) -> None:
    input = logits()
    target = make_labels(input.shape, 2, torch.float32, ignore_index=ignore_index)
    weights = {} if weight is None else {
        "weight": make(weight, seed=1).abs(), "pos_weight": make(weight, seed=2).abs()
    }  # fmt: skip
    options = {"reduction": reduction, "smooth_factor": smooth_factor, "ignore_index": ignore_index, **weights}
    check_both("SoftBCEWithLogitsLoss", input, target, **options)


def test_soft_bce_of_many_values_in_float16() -> None:
    """Their sum is more than float16 holds, their mean isn't."""
    input = logits((1, 1, 400, 400), torch.float16)
    loss = smp.SoftBCEWithLogitsLoss()(input, torch.ones_like(input))
    torch.testing.assert_close(loss.double(), -torch.nn.functional.logsigmoid(input.double()).mean(), rtol=1e-3, atol=0)
