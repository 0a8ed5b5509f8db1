"""What the tests of cross_entropy share: dtypes, input makers and the comparison with plain PyTorch."""

import itertools
from typing import Any

import torch
from torch import Tensor

from fastseg import _native, functional, reference
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

IGNORED = {"none-ignored": None, "ignore-a-class": 3, "ignore-255": 255, "ignore-100": -100}
LABELS = {  # a label dtype and what is ignored, but for uint8, which has no -100
    f"{dtype}-{name}": (LABEL_DTYPES[dtype], index)
    for dtype, (name, index) in itertools.product(LABEL_DTYPES, IGNORED.items())
    if (dtype, index) != ("uint8", -100)
}

# Of hypothesis: fewer where each is interpreted, or waits for kernels of its own to be compiled.
EXAMPLES = 2 if _native.INTERPRETED else 6 if torch.get_default_device().type == "cuda" else 60

# Layouts of logits [N, C, h, w].
VIEWS = {
    "sliced-batch": lambda t: t[::2],
    "sliced-classes": lambda t: t[:, 1:4],
    "sliced-columns": lambda t: t[..., 3:-2],
    "strided": lambda t: t[:, :, ::2, 1::3],
    "transposed": lambda t: t.transpose(2, 3),
    "classes-last": lambda t: t.permute(0, 3, 1, 2),  # (N, L, C) -> (N, C, L), with two dimensions for L
    "batch-last": lambda t: t.permute(2, 1, 3, 0),
    "expanded-batch": lambda t: t[:1].expand(3, -1, -1, -1),
    "expanded-pixels": lambda t: t[..., :1].expand(-1, -1, -1, 9),
}

# Gradients that come in for losses [N, H, W].
INCOMING = {
    "expanded": lambda loss: torch.ones((), dtype=loss.dtype).expand_as(loss),
    "transposed": lambda loss: make(loss.shape, loss.dtype).transpose(1, 2).contiguous().transpose(1, 2),
    "from-cat": lambda loss: make((loss.shape[0], 2 * loss.shape[1], loss.shape[2]), loss.dtype)[:, loss.shape[1] :],
}

# A row of logits each.
ROWS = {
    "all-1e4": [1e4, 1e4, 1e4, 1e4],
    "all--1e4": [-1e4, -1e4, -1e4, -1e4],
    "near-1e4": [1e4, 9999.0, 9998.0, 1e4],
    "gap-of-1e4": [0.0, 1e4, 1.0, -1e4],
    "underflow": [0.0, -80.0, -95.0, -104.0],
    "one-infinity": [0.0, INFINITY, 1.0, 2.0],
    "two-infinities": [INFINITY, INFINITY, 1.0, 2.0],
    "one-negative-infinity": [0.0, -INFINITY, 1.0, 2.0],
    "all-but-one-negative-infinity": [-INFINITY, -INFINITY, 1.0, -INFINITY],
    "all-negative-infinity": [-INFINITY] * 4,
    "both-infinities": [INFINITY, -INFINITY, 0.0, 1.0],
    "nan": [0.0, NAN, 1.0, 2.0],
    "nan-and-infinity": [INFINITY, NAN, 1.0, -INFINITY],
}


def check(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    operator: str = "cross_entropy",
    terms: int | None = None,
    **options: Any,
) -> list[Tensor]:
    """The loss and its gradient for input; asserts that both are as near to the truth as plain PyTorch's."""
    before = input.detach().clone()
    tensors = [input, target, weight]
    fused, definition = getattr(functional, operator), getattr(reference, operator)
    actual = values_and_gradients(fused, tensors, **options)
    plain = values_and_gradients(definition, tensors, **options)
    truth = values_and_gradients(definition, tensors, torch.float64, **options)
    assert_parity(actual, plain, truth, terms=terms or terms_of(input))
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
