"""cross_entropy beside its values: errors, determinism, memory, retained graphs, higher derivatives."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastseg import _native, functional, reference
from fastseg.ops import cross_entropy as operator
from fastseg.testing import assert_parity, make, make_labels, values_and_gradients
from tests.kernels.poison import fresh_memory_of_nan
from tests.ops.cross_entropy_cases import (
    REDUCTIONS,
    WEIGHTS,
    check,
    labels_for,
    logits,
    probabilities_for,
)

pytestmark = pytest.mark.usefixtures("kernels_for_small_logits")

# ---- errors ----

OUTSIDE = {
    "too-large": (21, torch.int64),
    "ignore-of-other-data-sets": (255, torch.uint8),
    "negative": (-1, torch.int16),
    "far-negative": (-(2**31), torch.int32),
    "32-bits-look-right": (2**32 + 1, torch.int64),
}


@pytest.mark.parametrize(("label", "dtype"), OUTSIDE.values(), ids=OUTSIDE)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(2, 21, 90, 90), (50, 21)], ids=["images", "rows"])
def test_label_outside_the_classes(shape: tuple[int, ...], smoothing: float, label: int, dtype: torch.dtype) -> None:
    input = logits(shape)
    target = labels_for(input, dtype)
    target.view(-1)[-3] = label
    for leaf in (input, input.detach()):
        with pytest.raises(IndexError, match=rf"target: expected classes in \[0, 21\) .*, got {label}$"):
            functional.cross_entropy(leaf, target, label_smoothing=smoothing)


def test_first_label_outside_is_named_for_any_number_of_threads() -> None:
    input = torch.zeros(1, 3, 400, 400)
    target = torch.arange(400 * 400).view(1, 400, 400) + 3
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        with pytest.raises(IndexError, match=r"got 3$"):
            functional.cross_entropy(input, target)
    torch.set_num_threads(before)


X, Y = torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64)
REFUSED = {
    "scalar": ((torch.tensor(1.0), torch.tensor(0)), {}, ValueError, "input: expected .*got a scalar"),
    "integer-logits": ((X.long(), Y), {}, TypeError, "input: expected float32.* got torch.int64"),
    "complex-logits": ((X.cfloat(), Y), {}, TypeError, "input: expected float32.* got torch.complex64"),
    "no-class": ((torch.zeros(3, 0), Y), {}, ValueError, r"input: expected at least one class, got shape \(3, 0\)"),
    "batch": ((X, Y[:2]), {}, ValueError, r"target: expected labels of shape \(3,\), got \(2,\)"),
    "pixels": ((torch.zeros(3, 4, 5), torch.zeros(3, 4).long()), {}, ValueError, r"of shape \(3, 5\), got \(3, 4\)"),
    "float-labels": ((X, Y.float()), {}, ValueError, "target: expected class probabilities.*need an integer dtype"),
    "integer-probabilities": ((X, X.long()), {}, ValueError, r"target: expected labels of shape \(3,\), got \(3, 4\)"),
    "bool-labels": ((X, Y.bool()), {}, TypeError, "target: expected labels of an integer dtype.*got torch.bool"),
    "label-in-brackets": ((X[0], Y[:1]), {}, ValueError, r"target: expected labels of shape \(\), got \(1,\)"),
    "weight-shape": ((X, Y, torch.ones(3)), {}, ValueError, r"weight: expected shape \(4,\), got \(3,\)"),
    "weight-rank": ((X, Y, torch.ones(1, 4)), {}, ValueError, r"weight: expected shape \(4,\), got \(1, 4\)"),
    "weight-dtype": ((X, Y, torch.ones(4).long()), {}, TypeError, "weight: expected a floating-point dtype"),
    "reduction": ((X, Y), {"reduction": "average"}, ValueError, "reduction: expected .*got 'average'"),
    "smoothing": ((X, Y), {"label_smoothing": 1.5}, ValueError, r"label_smoothing: expected .*\[0, 1\], got 1.5"),
    "ignored-probabilities": ((X, X), {"ignore_index": 1}, ValueError, "ignore_index: class probabilities .*got 1"),
    "device": ((X, Y.to("meta")), {}, ValueError, "target: expected input's device cpu, got meta"),
}


@pytest.mark.parametrize("largest_plain", [0, operator.PLAIN_MAX_LOGITS], ids=["kernel", "plain"])
@pytest.mark.parametrize(("arguments", "options", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(
    arguments: tuple[Tensor, ...], options: dict, error: type[Exception], message: str, largest_plain: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(operator, "PLAIN_MAX_LOGITS", largest_plain)  # the choice must not show
    with pytest.raises(error, match=message):
        functional.cross_entropy(*arguments, **options)


# ---- small logits ----

ALGORITHMS = {
    "small": (make((64, 10)), make_labels((64,), 10), None, "plain"),
    "largest-small": (torch.zeros(16, 2048), torch.zeros(16).long(), torch.ones(2048), "plain"),
    "large": (torch.zeros(16, 2049), torch.zeros(16).long(), None, "kernel"),
    "bfloat16": (make((64, 10), torch.bfloat16), make_labels((64,), 10), None, "kernel"),
    "uint8-labels": (make((64, 10)), make_labels((64,), 10, torch.uint8), None, "kernel"),
    "probabilities": (make((64, 10)), make((64, 10)).softmax(1), None, "kernel"),
    "float64-weight": (make((64, 10)), make_labels((64,), 10), torch.ones(10).double(), "kernel"),
    "no-pixels": (make((0, 10)), make_labels((0,), 10), None, "kernel"),
}


@pytest.mark.parametrize(("input", "target", "weight", "algorithm"), ALGORITHMS.values(), ids=ALGORITHMS)
def test_small_logits_take_torchs_own_operator(
    input: Tensor, target: Tensor, weight: Tensor | None, algorithm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    assert operator.choose_algorithm(input, target, weight) == algorithm
    check(input.clone().requires_grad_(), target, weight, label_smoothing=0.1)


def test_label_outside_the_classes_of_small_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    with pytest.raises(IndexError, match=r"target: expected classes in \[0, 4\) .*, got 9$"):
        functional.cross_entropy(X, torch.tensor([0, 9, 1]))


# ---- graphs, memory, determinism ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_bitwise_equal_for_any_number_of_threads_and_twice(dtype: torch.dtype) -> None:
    input = logits((2, 21, 97, 130), dtype)  # float64: float32's terms, added in float64, hide their order
    target, probabilities = labels_for(input, ignore_index=-100), probabilities_for(input)
    before = torch.get_num_threads()
    for arguments, reduction in itertools.product(([input, target], [input, probabilities]), REDUCTIONS):
        results = []
        for threads in (1, 2, 3, 3):
            torch.set_num_threads(threads)
            results.append(values_and_gradients(functional.cross_entropy, arguments, reduction=reduction))
        for other in results[1:]:
            torch.testing.assert_close(other, results[0], rtol=0, atol=0)
    torch.set_num_threads(before)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_fresh_memory_filled_with_nan_changes_nothing(implementation: str, reduction: str, layout: str) -> None:
    input = logits((2, 5, 13, 17), layout=layout)
    target = labels_for(input, ignore_index=-100)
    expected = values_and_gradients(functional.cross_entropy, [input, target], reduction=reduction)
    with fresh_memory_of_nan():
        poisoned = values_and_gradients(functional.cross_entropy, [input, target], reduction=reduction)
    torch.testing.assert_close(poisoned, expected, rtol=0, atol=0)


def test_graph_can_be_retained_and_logits_shared() -> None:
    input = logits((2, 5, 6, 7))
    target, other = labels_for(input), labels_for(input, seed=1)
    first, second = functional.cross_entropy(input, target), functional.cross_entropy(input, other)
    once = torch.autograd.grad(first, input, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(first, input), once, rtol=0, atol=0)
    (first, second) = functional.cross_entropy(input, target), functional.cross_entropy(input, other)
    both = torch.autograd.grad(first + second, input)[0]
    alone = torch.autograd.grad(functional.cross_entropy(input, other), input)[0]
    torch.testing.assert_close(both, once[0] + alone)


def test_changed_logits_are_noticed() -> None:
    input = logits((2, 5, 6, 7)) * 1
    loss = functional.cross_entropy(input, labels_for(input))
    input += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


GRADCHECKED = {
    "labels": {},
    "smoothed": {"label_smoothing": 0.2, "reduction": "none"},
    "weighted": {"weight": WEIGHTS["float64-weight"], "ignore_index": 1},
    "sum": {"reduction": "sum", "weight": WEIGHTS["class-of-weight-0"], "label_smoothing": 0.1},
}


@pytest.mark.parametrize("options", GRADCHECKED.values(), ids=GRADCHECKED)
@pytest.mark.parametrize("target", ["labels", "probabilities"])
def test_gradcheck_to_second_order(target: str, options: dict) -> None:
    input = logits((2, 5, 2, 3), torch.float64)
    if target == "probabilities":
        given, options = probabilities_for(input), {**options, "ignore_index": -100}
    else:
        given = labels_for(input)
    assert torch.autograd.gradcheck(lambda x: functional.cross_entropy(x, given, **options), input)
    assert torch.autograd.gradgradcheck(lambda x: functional.cross_entropy(x, given, **options), input)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_second_derivative_equals_plain(dtype: torch.dtype) -> None:
    input, target = logits((3, 5), dtype), make_labels((3,), 5)

    def penalty(function: Callable[..., Tensor], leaf: Tensor) -> Tensor:
        (gradient,) = torch.autograd.grad(function(leaf, target), leaf, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), leaf)[0]

    wide = input.detach().double().requires_grad_()
    assert_parity(
        penalty(functional.cross_entropy, input),
        penalty(reference.cross_entropy, input),
        penalty(reference.cross_entropy, wide),
    )


@pytest.mark.parametrize("learned", ["target", "weight"])
def test_gradient_of_target_or_weight_takes_plain_pytorch(learned: str, caplog: pytest.LogCaptureFixture) -> None:
    _native.log_fallback.cache_clear()
    input = logits((2, 5, 6, 7))
    target, weight = probabilities_for(input), torch.rand(5)
    (target if learned == "target" else weight).requires_grad_()
    actual = values_and_gradients(functional.cross_entropy, [input, target, weight])
    assert len(actual) == 3
    torch.testing.assert_close(actual, values_and_gradients(reference.cross_entropy, [input, target, weight]))
    assert "another argument than its input needs a gradient" in caplog.text
