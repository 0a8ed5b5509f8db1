"""upsample_threshold against plain PyTorch: masks, scores, boxes, grids, thresholds."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastseg import functional, reference
from fastseg.ops import upsample_threshold as operator
from fastseg.testing import assert_parity, make
from tests.ops.cross_entropy_cases import DTYPES, INFINITY, NAN
from tests.ops.upsample_cases import (
    GRIDS,
    LARGE_GRIDS,
    MODES,
    TILES,
    Size,
    grid_of,
    roundings,
    slow_under_the_interpreter,
)


def check(input: Tensor, size: Any, threshold: float = 0.5, **mode: Any) -> Tensor:
    """The masks; asserts that rounding alone decides where they aren't plain PyTorch's, and their scores and boxes."""
    before = input.clone()
    masks, scores, boxes = functional.upsample_threshold(input, size, threshold, return_scores=True, **mode)
    assert torch.equal(functional.upsample_threshold(input, size, threshold, **mode), masks)
    torch.testing.assert_close(input, before, rtol=0, atol=0, equal_nan=True)
    logits = reference.upsample(input.double(), size, None, *grid_of(mode))
    assert (masks.shape, masks.dtype) == (logits.shape, torch.uint8)
    wrong = masks.bool() != (logits.sigmoid() > threshold)
    if wrong.any():
        precision = torch.finfo(torch.float64 if input.dtype == torch.float64 else torch.float32).eps
        bound = (roundings(input, masks.shape[2:]) + 2) * precision * input.double().abs().amax()
        assert (logits - operator._logit(threshold))[wrong].abs().max() <= bound
    assert_scores(input, masks, scores, logits)
    assert torch.equal(boxes, reference._boxes_around(masks.bool()))
    return masks


def assert_scores(input: Tensor, masks: Tensor, scores: Tensor, logits: Tensor) -> None:
    """The scores are as near to the mean probability inside the masks as plain PyTorch's."""

    def mean_inside(logits: Tensor) -> Tensor:
        return logits.sigmoid().masked_fill(masks == 0, 0).sum((2, 3)) / masks.sum((2, 3)).clamp(min=1)

    truth = mean_inside(logits)
    plain = mean_inside(logits.to(input.dtype)).to(input.dtype)
    terms = masks[0, 0].numel() + roundings(input, masks.shape[2:]) ** 2
    assert_parity(scores, plain, truth, terms=terms)


# ---- grids, dtypes, layouts ----


@pytest.mark.parametrize(("before", "after"), GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_grids(implementation: str, dtype: torch.dtype, mode: dict[str, Any], before: Size, after: Size) -> None:
    check(make((2, 5, *before), dtype, scale=3.0), after, **mode)


@slow_under_the_interpreter
@pytest.mark.parametrize(("before", "after"), LARGE_GRIDS.values(), ids=LARGE_GRIDS)
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_large_grids(implementation: str, mode: dict[str, Any], before: Size, after: Size) -> None:
    check(make((2, 3, *before), scale=3.0), after, **mode)


@slow_under_the_interpreter
@pytest.mark.parametrize(("shape", "size"), TILES.values(), ids=TILES)
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_several_tiles(isa: str, mode: dict[str, Any], shape: tuple[int, int, int], size: Size) -> None:
    check(make((1, *shape)), size, **mode)


@pytest.mark.parametrize("classes", [1, 2, 8, 9, 19, 150])
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_class_counts(implementation: str, dtype: torch.dtype, layout: str, classes: int) -> None:
    check(make((2, classes, 3, 5), dtype, layout=layout, scale=3.0), (7, 11))


# ---- thresholds ----


@pytest.mark.parametrize("threshold", [0.0, 1e-30, 0.1, 0.5, 0.9, 1 - 1e-9, 1.0])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_thresholds(implementation: str, dtype: torch.dtype, threshold: float) -> None:
    check(make((2, 3, 4, 5), dtype, scale=3.0), (9, 11), threshold)


def test_no_sigmoid_is_rounded_to_the_threshold(isa: str) -> None:
    input = torch.tensor([1e-30, -1e-30, 200.0, -200.0]).view(1, 4, 1, 1)
    above = {0.5: [1, 0, 1, 0], 0.0: [1, 1, 1, 1], 1.0: [0, 0, 0, 0]}
    for threshold, expected in above.items():
        masks = functional.upsample_threshold(input, (2, 3), threshold)
        assert torch.equal(masks, torch.tensor(expected, dtype=torch.uint8).view(1, 4, 1, 1).expand(1, 4, 2, 3))


EXACT_GRIDS: dict[str, tuple[Size, dict[str, Any]]] = {
    "x2": ((8, 10), {}),
    "align_corners": ((7, 9), {"align_corners": True}),
    "nearest": ((8, 10), {"mode": "nearest"}),
}


@pytest.mark.parametrize(("size", "mode"), EXACT_GRIDS.values(), ids=EXACT_GRIDS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_logits_at_the_threshold_are_outside(
    implementation: str, dtype: torch.dtype, size: Size, mode: dict[str, Any]
) -> None:
    # Small integers with weights of at most 1/16: every dtype interpolates them exactly, and many become 0.
    input = torch.randint(-1, 2, (2, 5, 4, 5)).to(dtype)
    logits = reference.upsample(input.double(), size, None, *grid_of(mode))
    assert (logits == 0).sum() > 50
    assert torch.equal(functional.upsample_threshold(input, size, **mode), (logits > 0).byte())


@pytest.mark.usefixtures("plain_upsampling_of_cpus")
@pytest.mark.parametrize("size", [(8, 10), (8, 5), (4, 5)], ids=["x2", "rows-alone", "same"])
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("value", [NAN, INFINITY, -INFINITY], ids=str)
@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0])
def test_special_values_as_torch(
    implementation: str, threshold: float, value: float, mode: dict[str, Any], size: Size
) -> None:
    input = make((2, 5, 4, 5), scale=3.0)
    input[torch.rand(input.shape) < 0.2] = value
    input[0, 0] = value
    masks, scores, boxes = functional.upsample_threshold(input, size, threshold, return_scores=True, **mode)
    expected = reference.upsample_threshold(input, size, threshold, return_scores=True, **mode)
    assert torch.equal(masks, expected[0])
    torch.testing.assert_close(scores, expected[1])
    assert torch.equal(boxes, expected[2])


# ---- scores and boxes ----


def test_an_empty_mask_has_neither_score_nor_box(implementation: str) -> None:
    input = torch.full((1, 2, 4, 5), -3.0)
    input[0, 1, 2, 3] = 3.0
    masks, scores, boxes = functional.upsample_threshold(input, (8, 10), return_scores=True, mode="nearest")
    assert masks.sum((2, 3)).tolist() == [[0, 4]]
    torch.testing.assert_close(scores, torch.tensor([[0.0, 1 / (1 + math.exp(-3))]]))
    assert boxes.tolist() == [[[0, 0, 0, 0], [6, 4, 8, 6]]]


def test_boxes_cut_out_the_masks(implementation: str) -> None:
    input = make((2, 4, 6, 7), scale=0.5) - 2 + 6 * (make((2, 4, 6, 7), seed=1) > 1.5)
    masks, _, boxes = functional.upsample_threshold(input, (23, 31), return_scores=True)
    for mask, (left, top, right, bottom) in zip(masks.flatten(0, 1), boxes.flatten(0, 1).tolist(), strict=True):
        assert mask[top:bottom, left:right].sum() == mask.sum()
        if mask.any():
            assert all(edge.any() for edge in (mask[top], mask[bottom - 1], mask[:, left], mask[:, right - 1]))
