"""upsample_confusion_matrix against the matrix of upsample_argmax's labels, which it must equal exactly."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastseg import _native, functional, metrics
from fastseg.testing import make, make_labels
from tests.ops.cross_entropy_cases import INFINITY, LABEL_DTYPES, NAN, VIEWS
from tests.ops.upsample_cases import (
    GRIDS,
    LARGE_GRIDS,
    MODES,
    TILES,
    VOLUME_GRIDS,
    VOLUME_MODES,
    Size,
    labels_for,
    slow_under_the_interpreter,
)

NOT_A_LABEL = -(2**40)  # for `metrics.confusion_matrix`, which must be given one to ignore


def check(input: Tensor, target: Tensor, ignore_index: int | None = None, **mode: Any) -> Tensor:
    """The matrix; asserts that it is that of upsample_argmax's labels."""
    before = input.clone()
    matrix = functional.upsample_confusion_matrix(input, target, ignore_index, **mode)
    labels = functional.upsample_argmax(input, tuple(target.shape[1:]), dtype=torch.int64, **mode)
    ignored = NOT_A_LABEL if ignore_index is None else ignore_index
    expected = metrics.confusion_matrix(labels, target, input.shape[1], ignored)
    torch.testing.assert_close(matrix, expected, rtol=0, atol=0)
    counted = target.numel() if ignore_index is None else (target.long() != ignore_index).sum()
    assert matrix.sum() == counted
    torch.testing.assert_close(input, before, rtol=0, atol=0, equal_nan=True)
    return matrix


@pytest.mark.parametrize(("before", "after"), GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_grids(implementation: str, dtype: torch.dtype, mode: dict[str, Any], before: Size, after: Size) -> None:
    input = make((2, 5, *before), dtype)
    check(input, labels_for(input, after), **mode)


@pytest.mark.parametrize(("before", "after"), VOLUME_GRIDS.values(), ids=VOLUME_GRIDS)
@pytest.mark.parametrize("mode", VOLUME_MODES.values(), ids=VOLUME_MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_volumes(implementation: str, dtype: torch.dtype, mode: dict[str, Any], before: Size, after: Size) -> None:
    input = make((2, 5, *before), dtype)
    check(input, labels_for(input, after, ignore_index=255), 255, **mode)


@slow_under_the_interpreter
@pytest.mark.parametrize(("before", "after"), LARGE_GRIDS.values(), ids=LARGE_GRIDS)
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_large_grids(implementation: str, mode: dict[str, Any], before: Size, after: Size) -> None:
    input = make((2, 3, *before))
    check(input, labels_for(input, after, ignore_index=255), 255, **mode)


@slow_under_the_interpreter
@pytest.mark.parametrize(("shape", "size"), TILES.values(), ids=TILES)
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_several_tiles(isa: str, mode: dict[str, Any], shape: tuple[int, int, int], size: Size) -> None:
    input = make((1, *shape))
    check(input, labels_for(input, size), **mode)


@pytest.mark.parametrize("classes", [1, 2, 4, 8, 9, 19, 33, 150, 257, 600])
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("label_dtype", LABEL_DTYPES.values(), ids=LABEL_DTYPES)
def test_class_counts(implementation: str, label_dtype: torch.dtype, layout: str, classes: int) -> None:
    input = make((2, classes, 3, 5), layout=layout)
    # uint8 labels among more classes than it could number, too
    target = make_labels((2, 7, 11), min(classes, torch.iinfo(label_dtype).max + 1), label_dtype)
    check(input, target)


IGNORED = {"none": None, "a-class": 3, "255": 255, "-100": -100, "all": 0}


@pytest.mark.parametrize("ignored", IGNORED.values(), ids=IGNORED)
@pytest.mark.parametrize("label_dtype", LABEL_DTYPES.values(), ids=LABEL_DTYPES)
def test_ignored_labels(implementation: str, label_dtype: torch.dtype, ignored: int | None) -> None:
    input = make((2, 5, 4, 6))
    held = None if ignored == -100 and label_dtype == torch.uint8 else ignored  # -100 then ignores nothing
    target = labels_for(input, (9, 11), label_dtype, ignore_index=held)
    if ignored == 0:
        target.zero_()
    matrix = check(input, target, ignored)
    assert matrix.sum() > 0 or ignored == 0


def test_uint8_label_that_minus_100_would_wrap_to(implementation: str) -> None:
    input = make((1, 157, 2, 3))
    matrix = check(input, torch.full((1, 3, 4), 156, dtype=torch.uint8), -100)
    assert matrix[156].sum() == 12


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_strided_input(implementation: str, mode: dict[str, Any], view: Callable[[Tensor], Tensor]) -> None:
    input = view(make((4, 6, 5, 12)))
    check(input, labels_for(input, (13, 9)), **mode)


def test_strided_labels(implementation: str) -> None:
    input = make((2, 5, 6, 8))
    wide = make_labels((2, 16, 24), 5, torch.uint8)
    check(input, wide.transpose(1, 2)[:, ::2])
    check(input, wide[:, :1, ::3].expand(2, 11, 8))


def test_nan_is_predicted_as_by_argmax(implementation: str) -> None:
    input = make((2, 5, 4, 6))
    input[torch.rand(input.shape) < 0.2] = NAN
    check(input, labels_for(input, (8, 12)))


def test_masked_class_at_full_size(implementation: str) -> None:
    input = make((2, 4, 6, 7))
    input[:, 2] = -INFINITY
    matrix = check(input, labels_for(input, (6, 7)))
    assert matrix[:, 2].count_nonzero() == 0


def test_matrices_of_batches_add_up(implementation: str) -> None:
    input = make((5, 4, 6, 7))
    target = labels_for(input, (13, 20), ignore_index=255)
    parts = [functional.upsample_confusion_matrix(input[i : i + 2], target[i : i + 2], 255) for i in (0, 2, 4)]
    assert torch.equal(sum(parts), functional.upsample_confusion_matrix(input, target, 255))


# ---- errors ----


def with_a_label_outside(label: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    input = make((2, 5, 4, 6))
    target = labels_for(input, (9, 11), dtype)
    target[1, 7, 3] = label
    return input, target


def test_scores_refuse_the_counts_of_labels_outside_the_classes() -> None:
    if not _native.INTERPRETED and torch.get_default_device().type == "cpu":
        pytest.skip("the C++ kernels run here, which raise an IndexError")
    matrix = functional.upsample_confusion_matrix(*with_a_label_outside(255, torch.uint8))
    good = functional.upsample_confusion_matrix(*with_a_label_outside(3, torch.uint8))
    with pytest.raises(ValueError, match="matrix"):
        metrics.scores(matrix + 1000 * good)
