import math

import pytest
import torch
from torchmetrics.functional.classification import multiclass_confusion_matrix, multiclass_jaccard_index

from fastseg.metrics import confusion_matrix, scores

INTEGER_DTYPES = [torch.uint8, torch.int16, torch.int32, torch.int64]


def labels(num_classes: int, seed: int, shape: tuple[int, ...] = (2, 13, 17)) -> torch.Tensor:
    return torch.randint(num_classes, shape, generator=torch.Generator().manual_seed(seed))


def brute_force(prediction: torch.Tensor, target: torch.Tensor, num_classes: int, ignore_index: int) -> torch.Tensor:
    matrix = torch.zeros(num_classes, num_classes, dtype=torch.int64)
    for predicted, true in zip(prediction.flatten().tolist(), target.flatten().tolist(), strict=True):
        if true != ignore_index:
            matrix[true, predicted] += 1
    return matrix


@pytest.mark.parametrize("num_classes", [1, 2, 3, 19, 200])
@pytest.mark.parametrize(
    "ignore_index",
    [
        pytest.param(255, id="above-the-classes"),
        pytest.param(0, id="a-class"),
        pytest.param(-100, id="negative"),
    ],
)
def test_every_counted_pixel_lands_in_its_cell(num_classes: int, ignore_index: int) -> None:
    prediction, target = labels(num_classes, 0), labels(num_classes, 1)
    target[:, ::3] = ignore_index
    matrix = confusion_matrix(prediction, target, num_classes, ignore_index)
    assert matrix.dtype == torch.int64
    assert torch.equal(matrix, brute_force(prediction, target, num_classes, ignore_index))
    if num_classes > 1:  # torchmetrics needs two classes
        expected = multiclass_confusion_matrix(prediction, target, num_classes, ignore_index=ignore_index)
        assert torch.equal(matrix, expected)


@pytest.mark.parametrize("prediction_dtype", INTEGER_DTYPES, ids=str)
@pytest.mark.parametrize("target_dtype", INTEGER_DTYPES, ids=str)
def test_every_integer_type_counts_alike(prediction_dtype: torch.dtype, target_dtype: torch.dtype) -> None:
    # 200 classes: row * num_classes does not fit into the small types
    prediction, target = labels(120, 0), labels(120, 1)
    matrix = confusion_matrix(prediction.to(prediction_dtype), target.to(target_dtype), 200, 255)
    assert torch.equal(matrix, confusion_matrix(prediction, target, 200, 255))


def test_a_prediction_under_an_ignored_pixel_may_be_anything() -> None:
    prediction = torch.tensor([0, 250, 1], dtype=torch.uint8)
    target = torch.tensor([0, 255, 0], dtype=torch.uint8)
    assert confusion_matrix(prediction, target, 2, 255).tolist() == [[1, 1], [0, 0]]


def test_rows_are_the_truth() -> None:
    assert confusion_matrix(torch.tensor([1]), torch.tensor([0]), 2, 255).tolist() == [[0, 1], [0, 0]]


def test_matrices_of_parts_add_up() -> None:
    prediction, target = labels(5, 0), labels(5, 1)
    parts = [confusion_matrix(p, t, 5, 255) for p, t in zip(prediction, target, strict=True)]
    assert torch.equal(sum(parts), confusion_matrix(prediction, target, 5, 255))


def test_strided_and_empty_inputs_count_too() -> None:
    prediction, target = labels(4, 0).transpose(1, 2), labels(4, 1).transpose(1, 2)
    matrix = confusion_matrix(prediction, target, 4, 255)
    assert torch.equal(matrix, confusion_matrix(prediction.contiguous(), target.contiguous(), 4, 255))
    assert torch.equal(confusion_matrix(prediction[:0], target[:0], 4, 255), torch.zeros(4, 4, dtype=torch.int64))


@pytest.mark.parametrize(
    ("prediction", "target", "error", "message"),
    [
        pytest.param(torch.tensor([0]), torch.tensor([0, 1]), ValueError, r"same shape.*\(1,\) and \(2,\)", id="shape"),
        pytest.param(
            torch.tensor([0]), torch.tensor([3]), ValueError, "target holds the label 3, outside .* 0..2", id="target"
        ),
        pytest.param(torch.tensor([0]), torch.tensor([-1]), ValueError, "target holds the label -1", id="negative"),
        pytest.param(torch.tensor([4]), torch.tensor([0]), ValueError, "prediction holds the label 4", id="prediction"),
        pytest.param(torch.tensor([0.0]), torch.tensor([0]), TypeError, "prediction must be integer", id="float"),
    ],
)
def test_bad_labels_are_refused(
    prediction: torch.Tensor, target: torch.Tensor, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        confusion_matrix(prediction, target, 3, 255)


def test_scores_of_a_matrix_computed_by_hand() -> None:
    result = scores(torch.tensor([[3, 1, 0], [2, 4, 0], [0, 0, 0]]))
    assert result.pixel_accuracy == 7 / 10
    assert result.iou[:2] == (3 / 6, 4 / 7)
    assert math.isnan(result.iou[2])  # in neither truth nor prediction
    assert result.mean_iou == pytest.approx((3 / 6 + 4 / 7) / 2, rel=1e-15)


def test_a_class_predicted_but_absent_scores_zero() -> None:
    assert scores(torch.tensor([[1, 1], [0, 0]])).iou == (0.5, 0.0)


def test_scores_agree_with_torchmetrics() -> None:
    prediction, target = labels(6, 0), labels(6, 1)
    result = scores(confusion_matrix(prediction, target, 6, 255))
    expected = multiclass_jaccard_index(prediction, target, 6, average="none")
    # torchmetrics computes in float32: one rounding of the quotient
    assert torch.allclose(torch.tensor(result.iou), expected, rtol=torch.finfo(torch.float32).eps, atol=0)


def test_a_perfect_prediction_scores_one() -> None:
    target = labels(5, 0)
    assert scores(confusion_matrix(target, target, 5, 255)) == (1.0, (1.0,) * 5, 1.0)


def test_counts_beyond_float32_are_exact() -> None:
    count = 2**24 + 1  # the first integer that float32 can't hold
    assert scores(torch.tensor([[count, 1], [0, 0]])).pixel_accuracy == count / (count + 1)


def test_an_empty_matrix_has_no_scores() -> None:
    result = scores(torch.zeros(3, 3, dtype=torch.int64))
    assert all(math.isnan(value) for value in (result.pixel_accuracy, result.mean_iou, *result.iou))


def test_a_matrix_that_is_not_square_is_refused() -> None:
    with pytest.raises(ValueError, match=r"matrix must be square, but its shape is \(2, 3\)"):
        scores(torch.zeros(2, 3, dtype=torch.int64))
