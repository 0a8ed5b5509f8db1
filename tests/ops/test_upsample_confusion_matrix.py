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
    Size,
    labels_for,
    peak_growth,
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


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_no_images(implementation: str, mode: dict[str, Any]) -> None:
    assert check(make((0, 4, 5, 6)), torch.zeros(0, 10, 9, dtype=torch.uint8), **mode).count_nonzero() == 0


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


def test_no_gradient() -> None:
    input = make((1, 3, 4, 5), requires_grad=True)
    matrix = functional.upsample_confusion_matrix(input, labels_for(input, (8, 9)))
    assert matrix.dtype == torch.int64
    assert not matrix.requires_grad


@slow_under_the_interpreter
def test_equal_for_any_number_of_threads(isa: str, threads: Callable[[int], None]) -> None:
    input = make((2, 21, 33, 40))
    target = labels_for(input, (131, 165))
    matrices = []
    for count in (1, 2, 3):
        threads(count)
        matrices.append(functional.upsample_confusion_matrix(input, target))
    assert torch.equal(matrices[0], matrices[1])
    assert torch.equal(matrices[0], matrices[2])


# ---- errors ----

OUTSIDE = {
    "too-large": (5, torch.int64),
    "ignore-of-other-data-sets": (255, torch.uint8),
    "negative": (-1, torch.int16),
    "far-negative": (-(2**31), torch.int32),
    "32-bits-look-right": (2**32 + 1, torch.int64),
}
parametrize_outside = pytest.mark.parametrize(("label", "dtype"), OUTSIDE.values(), ids=OUTSIDE)
parametrize_ignored = pytest.mark.parametrize("ignored", [None, 3, -100], ids=["none-ignored", "a-class", "-100"])


def with_a_label_outside(label: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    input = make((2, 5, 4, 6))
    target = labels_for(input, (9, 11), dtype)
    target[1, 7, 3] = label
    return input, target


@parametrize_outside
@parametrize_ignored
def test_label_outside_the_classes(implementation: str, ignored: int | None, label: int, dtype: torch.dtype) -> None:
    arguments = with_a_label_outside(label, dtype)
    if _native.INTERPRETED or torch.get_default_device().type != "cpu":
        assert (functional.upsample_confusion_matrix(*arguments, ignored) < 0).all()
        return
    or_ignored = "" if ignored is None else rf" or ignore_index \({ignored}\)"
    with pytest.raises(IndexError, match=rf"^target: expected classes in \[0, 5\){or_ignored}, got {label}$"):
        functional.upsample_confusion_matrix(*arguments, ignored)


def test_scores_refuse_the_counts_of_labels_outside_the_classes() -> None:
    if not _native.INTERPRETED and torch.get_default_device().type == "cpu":
        pytest.skip("the C++ kernels run here, which raise an IndexError")
    matrix = functional.upsample_confusion_matrix(*with_a_label_outside(255, torch.uint8))
    good = functional.upsample_confusion_matrix(*with_a_label_outside(3, torch.uint8))
    with pytest.raises(ValueError, match="matrix"):
        metrics.scores(matrix + 1000 * good)


X, Y = torch.zeros(2, 4, 3, 5), torch.zeros(2, 6, 7, dtype=torch.int64)
REFUSED: dict[str, tuple[tuple[Tensor, Tensor], dict[str, Any], type[Exception], str]] = {
    "rank": ((X[0], Y), {}, ValueError, r"input: expected \[N, C, h, w\], got shape \(4, 3, 5\)"),
    "integer-logits": ((X.long(), Y), {}, TypeError, "input: expected float32.* got torch.int64"),
    "mode": ((X, Y), {"mode": "area"}, ValueError, 'mode: expected "bilinear" or "nearest", got \'area\''),
    "corners": ((X, Y), {"mode": "nearest", "align_corners": True}, ValueError, "align_corners: only mode"),
    "labels-rank": ((X, Y[0]), {}, ValueError, r"target: expected labels \[N, H, W\] .*got shape \(6, 7\)"),
    "no-columns": ((X, Y[..., :0]), {}, ValueError, r"target: expected labels .*got shape \(2, 6, 0\)"),
    "batch": ((X, Y[:1]), {}, ValueError, r"target: expected labels of shape \(2, 6, 7\), got \(1, 6, 7\)"),
    "float-labels": ((X, Y.float()), {}, TypeError, "target: expected labels of an integer dtype.*got torch.float32"),
    "bool-labels": ((X, Y.bool()), {}, TypeError, "target: expected labels of an integer dtype.*got torch.bool"),
    "device": ((X, Y.to("meta")), {}, ValueError, "target: expected input's device .*, got meta"),
}


@pytest.mark.parametrize(("arguments", "options", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(
    arguments: tuple[Tensor, Tensor], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        functional.upsample_confusion_matrix(*arguments, **options)


# ---- memory ----


@slow_under_the_interpreter
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_peak_memory(layout: str, mode: dict[str, Any]) -> None:
    input = make((2, 64, 32, 32), layout=layout)
    target = labels_for(input, (512, 512), torch.uint8)
    full = target.numel() * input.shape[1] * input.element_size()

    def count() -> None:
        functional.upsample_confusion_matrix(input, target, **mode)

    count()  # code and scratch memory that stay
    grown = peak_growth(count)
    assert grown < full / 20  # the threads' tiles and counts
