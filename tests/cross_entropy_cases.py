"""What the tests of cross_entropy share: dtypes, input makers and the comparison with plain PyTorch."""

from typing import Any

import torch
from torch import Tensor

from fastseg import functional, reference
from fastseg.testing import assert_parity, make, make_labels, values_and_gradients

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LABEL_DTYPES = {"uint8": torch.uint8, "int16": torch.int16, "int32": torch.int32, "int64": torch.int64}
REDUCTIONS = ("none", "mean", "sum")
INFINITY, NAN = float("inf"), float("nan")
WEIGHTS = {
    "unweighted": None,
    "weighted": torch.tensor([0.5, 2.0, 1.0, 0.25, 3.0]),
    "class-of-weight-0": torch.tensor([0.5, 0.0, 1.0, 0.25, 3.0]),
    "float64-weight": torch.tensor([0.1, 2.0, 1.0, 0.3, 3.0], dtype=torch.float64),
    "bfloat16-weight": torch.tensor([0.5, 2.0, 1.0, 0.25, 3.0], dtype=torch.bfloat16),
}


def check(input: Tensor, target: Tensor, weight: Tensor | None = None, **options: Any) -> list[Tensor]:
    """The loss and its gradient for input; asserts that both are as near to the truth as plain PyTorch's."""
    before = input.detach().clone()
    tensors = [input, target, weight]
    actual = values_and_gradients(functional.cross_entropy, tensors, **options)
    plain = values_and_gradients(reference.cross_entropy, tensors, **options)
    truth = values_and_gradients(reference.cross_entropy, tensors, torch.float64, **options)
    assert_parity(actual, plain, truth, terms=terms_of(input))
    torch.testing.assert_close(input.detach(), before, rtol=0, atol=0, equal_nan=True)
    return actual


def terms_of(input: Tensor) -> int:
    """The terms of the sums over the classes, for `assert_parity`."""
    classes = input.shape[min(1, input.ndim - 1)]
    # In float64, plain PyTorch is its own truth, whose error must be allowed for: sums of C equal shares (smoothing)
    # are rounded in one direction C times; and exp, log, their arguments and products round by up to 8 units.
    return (classes + 8) ** 2 if input.dtype == torch.float64 else classes


def logits(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, **options: Any) -> Tensor:
    return make(shape, dtype, scale=3.0, requires_grad=True, **options)


def labels_for(input: Tensor, dtype: torch.dtype = torch.int64, **options: Any) -> Tensor:
    return make_labels((input.shape[0], *input.shape[2:]), input.shape[1], dtype, **options)


def probabilities_for(input: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return make(input.shape, torch.float64, seed=3, scale=2.0).softmax(min(1, input.ndim - 1)).to(dtype or input.dtype)
