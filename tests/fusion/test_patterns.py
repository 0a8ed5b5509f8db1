"""Patterns of the fusion pass: what becomes of them gives what they gave."""

import pytest
import torch

import fastseg
from fastseg import _bfloat16
from fastseg.testing import assert_parity, values_and_gradients
from tests.fusion import back_end_cases, front_end_cases
from tests.fusion.cases import Case, compiled, operators

CASES = {**front_end_cases.CASES, **back_end_cases.CASES}

# In half types positions stay torch's, and labels and masks are those of logits that torch would have rounded first.
OF_UNROUNDED = ("indices", "prediction", "masks")

# Convolutions that stay in float32, but not in bfloat16 where a CPU emulates it.
OF_FEW_PRODUCTS = ("conv, used before relu", "norm in training", "norm in training, skip used first")


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.strength(1)
def test_the_same_values_and_gradients(name: str, layout: str) -> None:
    case = CASES[name]
    check(case, torch.float32, layout)


@pytest.mark.parametrize("name", [name for name in CASES if not any(word in name for word in OF_UNROUNDED)])
@pytest.mark.parametrize("by_instructions", [False, True])
def test_the_same_in_bfloat16(name: str, by_instructions: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_bfloat16, "cpu_multiplies_bfloat16", lambda: by_instructions)
    case = CASES[name]
    expected = list(case.operators)
    if name.startswith("instance norm"):  # served in float32 and float64
        expected = []
    elif by_instructions:  # convolutions that no pool follows stay
        staying = ("conv2d", "conv_relu_pool2d") if name.startswith("no pool") else ("conv2d",)
        expected = [operator for operator in expected if operator not in staying]
    elif name in OF_FEW_PRODUCTS:
        expected = ["conv2d", *expected]
    check(case._replace(operators=tuple(expected)), torch.bfloat16, "nchw")


def check(case: Case, dtype: torch.dtype, layout: str) -> None:
    tensors = case.tensors(dtype, layout)
    fused = compiled(case.function, fullgraph=True)
    actual = values_and_gradients(fused, tensors)
    plain = values_and_gradients(case.function, tensors)
    truth = values_and_gradients(case.function, tensors, torch.float64)
    assert operators(fastseg.report(fused)) == list(case.operators)
    assert_parity(actual, plain, truth, terms=case.terms)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.strength(1)
def test_the_same_without_gradients(name: str, layout: str) -> None:
    case = CASES[name]
    tensors = [None if tensor is None else tensor.detach() for tensor in case.tensors(torch.float32, layout)]
    fused = compiled(case.function, fullgraph=True)
    with torch.inference_mode():
        actual, plain = (as_list(function(*tensors)) for function in (fused, case.function))
        truth = as_list(case.function(*(t.double() if t.is_floating_point() else t for t in tensors)))
    assert operators(fastseg.report(fused)) == list(case.operators)
    assert [tensor.stride() for tensor in actual] == [tensor.stride() for tensor in plain]
    assert_parity(actual, plain, truth, terms=case.terms)


def as_list(results: object) -> list[torch.Tensor]:
    return list(results) if isinstance(results, tuple) else [results]
