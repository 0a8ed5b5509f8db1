"""Counts over batches and over processes, which import this file: it needs nothing that is slow to import."""

from pathlib import Path

import pytest
import torch

from fastseg import functional
from fastseg.metrics import ConfusionMatrix, confusion_matrix, scores
from fastseg.testing import make, make_labels
from tests.ranks import run_two_ranks

SIZE = (12, 9)


def batch(seed: int, ignore_index: int = 255) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a smaller size than their labels, of which some are ignored."""
    logits, target = make((2, 5, 6, 7), seed=seed), make_labels((2, *SIZE), 5, seed=seed)
    target[:, : seed + 1] = ignore_index
    return logits, target


def test_batches_add_up_from_logits_and_from_predictions() -> None:
    from_logits, from_predictions = ConfusionMatrix(5, 255), ConfusionMatrix(5, 255)
    expected = torch.zeros(5, 5, dtype=torch.int64)
    for seed in range(3):
        logits, target = batch(seed)
        prediction = functional.upsample_argmax(logits, SIZE)
        from_logits.update_from_logits(logits, target)
        from_predictions.update(prediction, target)
        expected += confusion_matrix(prediction, target, 5, 255)
    assert torch.equal(from_logits.total(), expected)
    assert torch.equal(from_predictions.total(), expected)
    assert from_logits.scores() == scores(expected)
    from_logits.reset()
    assert from_logits.total().count_nonzero() == 0


@pytest.mark.parametrize("options", [{"mode": "nearest"}, {"align_corners": True}], ids=["nearest", "align_corners"])
def test_the_grid_is_passed_on(options: dict) -> None:
    matrix, (logits, target) = ConfusionMatrix(5, 255), batch(0)
    matrix.update_from_logits(logits, target, **options)
    assert torch.equal(matrix.total(), functional.upsample_confusion_matrix(logits, target, 255, **options))


def test_volumes_are_upsampled() -> None:
    matrix, logits, target = ConfusionMatrix(5), make((1, 5, 3, 4, 5)), make_labels((1, 5, 9, 11), 5)
    matrix.update_from_logits(logits, target, mode="trilinear")
    labels = functional.upsample_argmax(logits, (5, 9, 11), mode="trilinear")
    assert torch.equal(matrix.total(), confusion_matrix(labels, target, 5, 255))


def test_a_total_is_not_the_counts_themselves() -> None:
    matrix = ConfusionMatrix(5, 255)
    before = matrix.total()
    matrix.update_from_logits(*batch(0))
    assert before.count_nonzero() == 0


def test_what_does_not_fit_is_refused() -> None:
    logits, target = batch(0)
    with pytest.raises(ValueError, match=r"input: expected \[N, 4, h, w\], got shape \(2, 5, 6, 7\)"):
        ConfusionMatrix(4, 255).update_from_logits(logits, target)
    with pytest.raises(ValueError, match="target: expected the matrix's device meta, got cpu; ConfusionMatrix takes"):
        ConfusionMatrix(5, 255, device="meta").update(target.cpu(), target.cpu())
    with pytest.raises(ValueError, match="target holds the label 255"):
        ConfusionMatrix(5).update(target, target)


def sum_over_ranks(rank: int) -> None:
    """One of two ranks, which see different numbers of batches: both must come to the scores of all batches."""
    alone, shared = ConfusionMatrix(5, 255), ConfusionMatrix(5, 255)
    for seed in range(3):
        logits, target = batch(seed)
        alone.update_from_logits(logits, target)
        if (seed == 0) == (rank == 0):
            shared.update_from_logits(logits, target)
    assert torch.equal(shared.total(), alone.counts)
    assert torch.equal(shared.total(), alone.counts)  # a total does not add itself to the counts
    assert shared.scores() == scores(alone.counts)


def test_ranks_add_up(tmp_path: Path) -> None:
    run_two_ranks(sum_over_ranks, tmp_path)
