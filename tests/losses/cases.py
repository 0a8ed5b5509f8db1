"""What the tests of the drop-in losses share: the originals, dtypes, shapes, and the comparison of the two."""

import copy
import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastseg._torchvision import prepare_torchvision
from fastseg.testing import assert_parity, make, make_labels, values_and_gradients
from tests.ops import cross_entropy_cases

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
SHAPES = {"image": (2, 5, 9, 13), "volume": (2, 5, 3, 4, 7)}
IGNORED = 255


def original(name: str) -> Any:
    """A module of another library; a skip where that isn't installed."""
    prepare_torchvision()
    return pytest.importorskip(name, reason=f"{name.partition('.')[0]} isn't installed")


def logits(shape: tuple[int, ...] = SHAPES["image"], dtype: torch.dtype = torch.float32, **options: Any) -> Tensor:
    return make(shape, dtype, scale=2.0, requires_grad=True, **options)


def probabilities(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Each in (0.02, 0.98), as inputs: no clamp of any loss touches them, nor what they are rounded to."""
    return (make(shape, torch.float64).sigmoid() * 0.96 + 0.02).to(dtype).requires_grad_()


def labels_for(input: Tensor, **options: Any) -> Tensor:
    return make_labels((input.shape[0], *input.shape[2:]), input.shape[1], **options)


def maps_for(input: Tensor, soft: bool) -> Tensor:
    """A target for each value of input, of zeros and ones or in between."""
    values = make(input.shape, torch.float64, seed=5).sigmoid()
    return (values if soft else values.round()).to(input.dtype)


def check(ours: nn.Module, theirs: nn.Module, input: Tensor, target: Tensor) -> list[Tensor]:
    """Asserts that our loss and gradient are as near to the truth, theirs in float64, as theirs are; gives ours."""
    before = input.detach().clone()
    actual = values_and_gradients(ours, [input, target])
    plain = values_and_gradients(copy.deepcopy(theirs).to(input.dtype), [input, target])
    truth = values_and_gradients(copy.deepcopy(theirs).double(), [input, target], torch.float64)
    pixels = math.prod((input.shape[0], *input.shape[2:]))
    assert_parity(actual, plain, truth, terms=cross_entropy_cases.terms_of(input) + pixels)
    torch.testing.assert_close(input.detach(), before, rtol=0, atol=0)
    return actual


def signature(function: Callable[..., Any]) -> list[tuple[str, Any, Any]]:
    """Names, kinds and defaults of a function's parameters."""
    return [(each.name, each.kind, each.default) for each in inspect.signature(function).parameters.values()]
