"""upsample_mask_argmax against plain PyTorch and against transformers' semantic inference."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastseg import functional, reference
from fastseg._native import INTERPRETED
from fastseg.testing import TF32_EPS, make
from tests.losses import cases as losses_cases
from tests.ops.cross_entropy_cases import DTYPES, INFINITY, LABEL_DTYPES, NAN
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


def probabilities_of(input: Tensor, classes: int) -> Tensor:
    shape = (*input.shape[:2], classes + 1)
    return make(shape, input.dtype, seed=3, scale=2.0).softmax(2)[..., :-1]  # without "no object"


def check(input: Tensor, probabilities: Tensor, size: Any, **options: Any) -> Tensor:
    """The labels; asserts that of the true sums each label's is the largest, but for rounding."""
    labels = functional.upsample_mask_argmax(input, probabilities, size, **options)
    assert labels.dtype == options.get("dtype", reference.label_dtype(probabilities.shape[2]))
    masks = reference.upsample(input.double(), size, None, *grid_of(options)).sigmoid()
    sums = torch.einsum("nqc,nqhw->nchw", probabilities.double(), masks)
    assert labels.shape == sums[:, 0].shape
    if labels.numel() == 0:
        return labels
    missing = sums.amax(1) - sums.gather(1, labels.long().unsqueeze(1)).squeeze(1)
    # Of a mask: what its logit may be off by, times the sigmoid's largest slope, and its own roundings; TF32's as well.
    precision = torch.finfo(torch.float64 if input.dtype == torch.float64 else torch.float32).eps
    slope, products = 0.25, input.shape[1] ** 0.5
    of_mask = precision * (slope * roundings(input, labels.shape[1:]) * input.double().abs().amax() + 4 + products)
    if input.is_cuda and input.dtype in (torch.bfloat16, torch.float16):
        of_mask += TF32_EPS
    assert missing.max() <= 2 * of_mask * probabilities.double().sum(1).amax()
    return labels


# ---- grids, dtypes, layouts ----


@pytest.mark.parametrize(("before", "after"), GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_grids(implementation: str, dtype: torch.dtype, mode: dict[str, Any], before: Size, after: Size) -> None:
    input = make((2, 7, *before), dtype, scale=3.0)
    check(input, probabilities_of(input, 5), after, **mode)


@slow_under_the_interpreter
@pytest.mark.parametrize(("before", "after"), LARGE_GRIDS.values(), ids=LARGE_GRIDS)
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_large_grids(implementation: str, mode: dict[str, Any], before: Size, after: Size) -> None:
    input = make((2, 3, *before), scale=3.0)
    check(input, probabilities_of(input, 4), after, **mode)


@slow_under_the_interpreter
@pytest.mark.parametrize(("shape", "size"), TILES.values(), ids=TILES)
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_several_tiles(isa: str, mode: dict[str, Any], shape: tuple[int, int, int], size: Size) -> None:
    input = make((1, *shape))
    check(input, probabilities_of(input, 11), size, **mode)


@pytest.mark.parametrize("queries", [1, 2, 16, 17, 100, 129])
@pytest.mark.parametrize("classes", [1, 2, 5, 10, 11, 21, 150, 257, 300])
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_queries_and_classes(implementation: str, dtype: torch.dtype, layout: str, classes: int, queries: int) -> None:
    input = make((2, queries, 3, 5), dtype, layout=layout, scale=3.0)
    check(input, probabilities_of(input, classes), (7, 11))


@pytest.mark.parametrize("dtype", LABEL_DTYPES.values(), ids=LABEL_DTYPES)
def test_label_dtypes(implementation: str, dtype: torch.dtype) -> None:
    input = make((2, 7, 4, 5), scale=3.0)
    check(input, probabilities_of(input, 200), (9, 13), dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_probabilities_of_any_dtype_and_strides(implementation: str, dtype: torch.dtype) -> None:
    input = make((3, 7, 4, 5), scale=3.0)
    probabilities = make((5, 14, 3), seed=3).softmax(0).to(dtype)
    check(input, probabilities.permute(2, 1, 0)[:, ::2], (9, 13))
    check(input, probabilities[:1, :7].expand(3, 7, 3), (9, 13))


# ---- ties and values that aren't finite ----


def test_ties_take_the_lowest_class(implementation: str) -> None:
    input = make((2, 7, 4, 5), scale=3.0)
    probabilities = probabilities_of(input, 8)
    if INTERPRETED:  # NumPy adds in an order that depends on a class's place: of one query each
        probabilities = probabilities * (torch.arange(7)[:, None] == torch.arange(8) % 7)
    twice = torch.cat((probabilities, probabilities, probabilities.flip(2)), 2)  # in several blocks of classes
    labels = check(input, twice, (9, 13))
    assert labels.max() < 8
    assert torch.equal(labels, check(input, probabilities, (9, 13)))
    assert functional.upsample_mask_argmax(input, torch.zeros(2, 7, 23), (9, 13)).count_nonzero() == 0


def test_nan_wins_as_in_torch(implementation: str) -> None:
    input = make((2, 7, 4, 5), scale=3.0)
    probabilities = probabilities_of(input, 23)
    probabilities[0, 3, [12, 20]] = NAN
    input[1, 2, 1, 1] = NAN
    labels = functional.upsample_mask_argmax(input, probabilities, (9, 13))
    expected = reference.upsample_mask_argmax(input, probabilities, (9, 13))
    assert (labels[0] == 12).all()
    assert torch.equal(labels, expected)


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_infinite_logits_as_torch(implementation: str, mode: dict[str, Any]) -> None:
    input = make((2, 7, 4, 5), scale=3.0)
    input[:, 1:3], input[:, 4] = INFINITY, -INFINITY
    probabilities = probabilities_of(input, 23)
    labels = functional.upsample_mask_argmax(input, probabilities, (4, 5), **mode)
    assert torch.equal(labels, reference.upsample_mask_argmax(input, probabilities, (4, 5), **mode))


def test_logits_far_from_zero(implementation: str) -> None:
    input = make((1, 4, 3, 4)) - 60  # every mask is 1e-26, of which the largest counts all the same
    probabilities = torch.eye(4).view(1, 4, 4)
    labels = functional.upsample_mask_argmax(input, probabilities, (6, 8), mode="nearest")
    assert torch.equal(labels, functional.upsample_argmax(input, (6, 8), mode="nearest"))


# ---- transformers ----


@pytest.mark.parametrize("network", [pytest.param("mask2former", marks=slow_under_the_interpreter), "maskformer"])
def test_semantic_inference_of_transformers(network: str) -> None:
    transformers = losses_cases.original(f"transformers.models.{network}.image_processing_{network}")
    processor = {"mask2former": "Mask2FormerImageProcessor", "maskformer": "MaskFormerImageProcessor"}[network]
    masks, classes = make((2, 20, 24, 20), scale=3.0), make((2, 20, 12), seed=1, scale=2.0)
    outputs = SimpleNamespace(masks_queries_logits=masks, class_queries_logits=classes)
    theirs = getattr(transformers, processor)().post_process_semantic_segmentation(outputs)
    size = {"mask2former": (384, 384), "maskformer": (24, 20)}[network]  # maskformer's adds masks of their own size
    labels = functional.upsample_mask_argmax(masks, classes.softmax(2)[..., :-1], size)
    wrong = (labels != torch.stack(theirs)).float().mean()
    assert wrong < 1e-5  # where rounding decides
