import math

import pytest
import torch

from fastseg import functional
from fastseg.metrics import (
    MaskConfusionMatrix,
    boundary_f1,
    calibration,
    calibration_error,
    confusion_matrix,
    mask_confusion_matrix,
    scores,
)
from fastseg.ops.upsample_confusion_matrix import POISON
from fastseg.testing import make, make_labels
from tests.losses import cases as losses_cases

torchmetrics = losses_cases.original("torchmetrics.functional.classification")

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
        expected = torchmetrics.multiclass_confusion_matrix(prediction, target, num_classes, ignore_index=ignore_index)
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


def test_without_ignore_index_every_pixel_counts() -> None:
    prediction, target = labels(5, 0), labels(5, 1)
    assert torch.equal(confusion_matrix(prediction, target, 5, None), confusion_matrix(prediction, target, 5, 255))
    with pytest.raises(ValueError, match="target holds the label 255"):
        confusion_matrix(prediction, torch.full_like(target, 255), 5, None)


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
    assert result.dice[:2] == (6 / 9, 8 / 11)
    assert math.isnan(result.dice[2])
    assert result.mean_dice == pytest.approx((6 / 9 + 8 / 11) / 2, rel=1e-15)


def test_a_class_predicted_but_absent_scores_zero() -> None:
    result = scores(torch.tensor([[1, 1], [0, 0]]))
    assert result.iou == (0.5, 0.0)
    assert result.dice == (2 / 3, 0.0)


def test_scores_agree_with_torchmetrics() -> None:
    prediction, target = labels(6, 0), labels(6, 1)
    result = scores(confusion_matrix(prediction, target, 6, 255))
    iou = torchmetrics.multiclass_jaccard_index(prediction, target, 6, average="none")
    dice = torchmetrics.multiclass_f1_score(
        prediction, target, 6, average="none"
    )  # of classes, F1 and Dice are the same number
    # torchmetrics computes in float32: one rounding of the quotient
    eps = torch.finfo(torch.float32).eps
    torch.testing.assert_close(torch.tensor([result.iou, result.dice]), torch.stack([iou, dice]), rtol=eps, atol=0)


def test_a_perfect_prediction_scores_one() -> None:
    target = labels(5, 0)
    assert scores(confusion_matrix(target, target, 5, 255)) == (1.0, *[(1.0,) * 5, 1.0] * 2, *[(1.0,) * 5] * 3)


def test_counts_beyond_float32_are_exact() -> None:
    count = 2**24 + 1  # the first integer that float32 can't hold
    assert scores(torch.tensor([[count, 1], [0, 0]])).pixel_accuracy == count / (count + 1)


def test_an_empty_matrix_has_no_scores() -> None:
    result = scores(torch.zeros(3, 3, dtype=torch.int64))
    totals = (result.pixel_accuracy, result.mean_iou, result.mean_dice)
    assert all(math.isnan(value) for value in (*totals, *result.iou, *result.dice))


def test_a_matrix_that_is_not_square_is_refused() -> None:
    with pytest.raises(ValueError, match=r"matrix must be square, but its shape is \(2, 3\)"):
        scores(torch.zeros(2, 3, dtype=torch.int64))


def test_counts_poisoned_by_a_gpu_are_refused() -> None:
    poisoned = torch.full((3, 3), 1000) + POISON
    with pytest.raises(ValueError, match=r"matrix has negative counts: .*labels outside the classes"):
        scores(poisoned)
    many = poisoned + 1000 * torch.full((3, 3), 4000 * 5000)  # images of 20 megapixels in every cell don't hide it
    with pytest.raises(ValueError, match="negative counts"):
        scores(many)


# ---- precision and the like, boundaries, calibration ----


@pytest.mark.parametrize("ignore_index", [255, None])
def test_of_each_class_as_torchmetrics(ignore_index: int | None) -> None:
    prediction, target = labels(5, 0), labels(5, 1)
    if ignore_index is not None:
        target[:, ::3] = ignore_index
    found = scores(confusion_matrix(prediction, target, 5, ignore_index))
    for name in ("precision", "recall", "specificity"):
        function = getattr(torchmetrics, f"multiclass_{name}")
        expected = function(prediction, target, 5, average="none", ignore_index=ignore_index)
        torch.testing.assert_close(torch.tensor(getattr(found, name)), expected.double(), check_dtype=False)
    assert math.isnan(scores(torch.tensor([[3, 0], [1, 0]])).precision[1])
    assert math.isnan(scores(torch.tensor([[3, 1], [0, 0]])).recall[1])
    assert math.isnan(scores(torch.tensor([[3, 1], [0, 0]])).specificity[0])


def boundary_by_hand(labels: torch.Tensor, label: int) -> set[tuple[int, int]]:
    rows, columns = labels.shape
    near = ((0, 1), (1, 0), (0, -1), (-1, 0))
    return {
        (y, x)
        for y in range(rows) for x in range(columns) if labels[y, x] == label
        and any(
            0 <= y + dy < rows and 0 <= x + dx < columns and labels[y + dy, x + dx] not in (label, 255)
            for dy, dx in near
        )
    }  # fmt: skip


@pytest.mark.parametrize("tolerance", [0, 1, 3])
def test_boundary_f1_is_that_of_its_definition(tolerance: int) -> None:
    blocks = [make_labels((2, 4, 5), 3, seed=seed).repeat_interleave(4, 1).repeat_interleave(4, 2) for seed in (0, 1)]
    prediction, target = blocks
    target[:, 5:7, 3:9] = 255
    target[1][target[1] == 2] = 0
    prediction[1][prediction[1] == 2] = 0  # a class that is nowhere
    found = boundary_f1(prediction, target, 3, tolerance, 255)
    prediction = prediction.masked_fill(target == 255, 255)
    for image in range(2):
        for label in range(3):
            lines = [boundary_by_hand(labels[image], label) for labels in (prediction, target)]
            shares = [
                sum(any(max(abs(y - v), abs(x - u)) <= tolerance for v, u in other) for y, x in line)
                / max(len(line), 1)
                for line, other in (lines, lines[::-1])
            ]
            expected = 2 * shares[0] * shares[1] / max(sum(shares), 1e-300) if any(lines) else math.nan
            assert found[image, label].item() == pytest.approx(expected, nan_ok=True)
    assert math.isnan(found[1, 2].item())
    with pytest.raises(ValueError, match=r"must be \[N, H, W\]"):
        boundary_f1(prediction[0], target[0], 3, 1)


def test_calibration_error_as_torchmetrics() -> None:
    probabilities, target = make((2, 4, 9, 11), scale=2.0).softmax(1), make_labels((2, 9, 11), 4)
    confidence, prediction = probabilities.max(1)
    expected = torchmetrics.multiclass_calibration_error(probabilities, target, 4, n_bins=15, norm="l1")
    halves = [calibration(confidence[i], prediction[i], target[i]) for i in range(2)]
    assert calibration_error(sum(halves)) == pytest.approx(expected.item(), abs=1e-6)
    target[0] = 255
    assert torch.equal(calibration(confidence, prediction, target, 255), halves[1])
    with pytest.raises(ValueError, match="confidence must be in"):
        calibration(2 * confidence, prediction, target)


# ---- masks ----


def masks_of(seed: int, ignored: float = 0.0) -> torch.Tensor:
    return make_labels((3, 4, 7, 9), 2, torch.uint8, seed=seed, ignore_index=255, ignored=ignored)


@pytest.mark.parametrize("dtype", [torch.bool, *INTEGER_DTYPES], ids=str)
def test_masks_are_counted_as_by_torchmetrics(dtype: torch.dtype) -> None:
    masks, target = masks_of(0), masks_of(1, 0.2).to(torch.int64)
    matrix = mask_confusion_matrix(masks.to(dtype), target, 255)
    assert matrix.dtype == torch.int64
    expected = torchmetrics.multilabel_confusion_matrix(masks.long(), target, 4, ignore_index=255)
    assert torch.equal(matrix, expected)
    assert torch.equal(mask_confusion_matrix(masks, (target == 1).to(dtype)).sum((1, 2)), torch.full((4,), 3 * 7 * 9))


def test_scores_of_masks_agree_with_torchmetrics() -> None:
    masks, target = masks_of(0), masks_of(1)
    target[:, 3] = masks[:, 3] = 0  # a class that is nowhere
    result = scores(mask_confusion_matrix(masks, target))
    eps = torch.finfo(torch.float32).eps
    for name, values in (
        ("jaccard_index", result.iou), ("f1_score", result.dice), ("precision", result.precision),
        ("recall", result.recall), ("specificity", result.specificity),
    ):  # fmt: skip
        expected = getattr(torchmetrics, f"multilabel_{name}")(masks, target, 4, average="none")
        torch.testing.assert_close(torch.tensor(values[:3]), expected[:3], rtol=2 * eps, atol=0)
    assert math.isnan(result.iou[3])
    assert result.specificity[3] == 1
    assert result.pixel_accuracy == pytest.approx((masks == target).float().mean().item())


def test_batches_of_masks_add_up_from_logits_and_from_masks() -> None:
    from_logits, from_masks = MaskConfusionMatrix(4, 0.3, 255), MaskConfusionMatrix(4, ignore_index=255)
    for seed in range(3):
        logits, target = make((3, 4, 3, 4), seed=seed), masks_of(seed, 0.2)
        from_logits.update_from_logits(logits, target, align_corners=True)
        from_masks.update(functional.upsample_threshold(logits, (7, 9), 0.3, align_corners=True), target)
    assert torch.equal(from_logits.total(), from_masks.total())
    assert from_logits.scores() == scores(from_masks.total())
    from_logits.reset()
    assert from_logits.total().count_nonzero() == 0


@pytest.mark.parametrize(
    ("masks", "target", "error", "message"),
    [
        pytest.param(torch.ones(1, 2), torch.ones(1, 2).int(), TypeError, "masks must be integer or bool", id="float"),
        pytest.param(torch.ones(1, 2).int(), torch.ones(2, 2).int(), ValueError, "of one shape", id="shape"),
        pytest.param(torch.tensor([[2]]), torch.tensor([[1]]), ValueError, "masks holds 2, which", id="masks"),
        pytest.param(torch.tensor([[1]]), torch.tensor([[-1]]), ValueError, "target holds -1, which", id="target"),
    ],
)
def test_bad_masks_are_refused(masks: torch.Tensor, target: torch.Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        mask_confusion_matrix(masks, target, 255)


def test_masks_of_another_number_of_classes_are_refused() -> None:
    with pytest.raises(ValueError, match="masks: expected 2 classes, got 4"):
        MaskConfusionMatrix(2).update(masks_of(0), masks_of(1))
