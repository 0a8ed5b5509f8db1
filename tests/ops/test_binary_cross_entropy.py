"""binary_cross_entropy and upsample_binary_cross_entropy against torch's own, and what they refuse."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastseg import functional, reference
from fastseg.testing import assert_parity, make, make_labels, values_and_gradients
from tests.ops import upsample_cases
from tests.ops.cross_entropy_cases import DTYPES, REDUCTIONS, logits
from tests.ops.upsample_cases import MODES

WEIGHT = torch.tensor([0.5, 2.0, 1.0])


@pytest.mark.parametrize("pos_weight", [None, WEIGHT], ids=["even", "pos_weight"])
@pytest.mark.parametrize("weight", [None, WEIGHT], ids=["unweighted", "weighted"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_equals_torch(reduction: str, weight: Tensor | None, pos_weight: Tensor | None) -> None:
    input, target = logits((2, 3, 5, 6), torch.float64), make((2, 3, 5, 6), torch.float64, seed=1).sigmoid()
    column = [None if each is None else each.double().view(3, 1, 1) for each in (weight, pos_weight)]
    expected = F.binary_cross_entropy_with_logits(input, target, column[0], pos_weight=column[1], reduction=reduction)
    loss = functional.binary_cross_entropy(input, target, weight, pos_weight, reduction=reduction)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(each.square().sum(), input)[0] for each in (loss, expected)))


@pytest.mark.parametrize("ignore_index", [None, 3, -1, 255])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_upsampled(mode: dict[str, Any], dtype: torch.dtype, reduction: str, ignore_index: int | None) -> None:
    input = logits((2, 3, 5, 6), dtype)
    target = make_labels((2, 3, 12, 11), 2, torch.int16, ignore_index=ignore_index)
    options = {"weight": WEIGHT, "pos_weight": WEIGHT, "ignore_index": ignore_index, "reduction": reduction, **mode}

    def call(module: Any) -> Callable[..., Tensor]:
        return lambda *tensors: module.upsample_binary_cross_entropy(*tensors, **options)

    tensors = [input, target]
    loss, gradient = actual = values_and_gradients(call(functional), tensors)
    plain = values_and_gradients(call(reference), tensors)
    truth = values_and_gradients(call(reference), tensors, torch.float64)
    assert_parity(actual, plain, truth, terms=upsample_cases.terms_of(input, (12, 11), mode.get("mode", "bilinear")))
    assert (loss.dtype, gradient.dtype) == (dtype, dtype)


def test_one_class_needs_no_dimension() -> None:
    input, target = logits((2, 1, 5, 6)), make_labels((2, 5, 6), 2, torch.bool)
    losses = [functional.binary_cross_entropy(input, given) for given in (target, target.unsqueeze(1))]
    torch.testing.assert_close(*losses, rtol=0, atol=0)
    target = make_labels((2, 10, 12), 2, torch.uint8)
    losses = [functional.upsample_binary_cross_entropy(input, given) for given in (target, target.unsqueeze(1))]
    torch.testing.assert_close(*losses, rtol=0, atol=0)


def test_gradients_of_the_weights() -> None:
    input, target = logits((2, 3, 4, 5), torch.float64), make_labels((2, 3, 8, 9), 2)
    weights = [WEIGHT.double().requires_grad_() for _ in range(2)]

    def loss(input: Tensor, weight: Tensor, pos_weight: Tensor) -> Tensor:
        return functional.upsample_binary_cross_entropy(input, target, weight, pos_weight)

    assert torch.autograd.gradcheck(loss, (input, *weights))
    assert torch.autograd.gradgradcheck(loss, (input, *weights))


def test_no_value_counts() -> None:
    input, target = logits((2, 3, 4, 5)), torch.full((2, 3, 4, 5), 255)
    assert functional.binary_cross_entropy(input, target, ignore_index=255).isnan()
    assert functional.binary_cross_entropy(input, target, ignore_index=255, reduction="sum") == 0


LOGITS, TARGET = torch.zeros(2, 3, 4, 5), torch.zeros(2, 3, 4, 5)
REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "integer-logits": ({"input": LOGITS.long()}, TypeError, "input: expected float32"),
    "target-shape": ({"target": TARGET[:, :2]}, ValueError, "target: expected labels or a target of shape"),
    "target-dtype": ({"target": TARGET.cfloat()}, TypeError, "target: expected a boolean"),
    "reduction": ({"reduction": "average"}, ValueError, "reduction: expected"),
    "weight": ({"weight": torch.ones(2)}, ValueError, r"weight: expected shape \(3,\), got \(2,\)"),
    "pos_weight": ({"pos_weight": torch.ones(2)}, ValueError, r"pos_weight: expected shape \(3,\), got \(2,\)"),
    "pos_weight-dtype": ({"pos_weight": torch.ones(3).long()}, TypeError, "pos_weight: expected a floating-point"),
}


@pytest.mark.parametrize("operator", ["binary_cross_entropy", "upsample_binary_cross_entropy"])
@pytest.mark.parametrize(("changes", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(changes: dict[str, Any], error: type[Exception], message: str, operator: str) -> None:
    with pytest.raises(error, match=message):
        getattr(functional, operator)(**{"input": LOGITS, "target": TARGET} | changes)
