"""upsample_cross_entropy beside its values: errors, determinism, memory, retained graphs, higher derivatives."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastseg import _native, functional, reference
from fastseg.testing import assert_parity, make, values_and_gradients
from tests.kernels.poison import fresh_memory_of_nan
from tests.ops.cross_entropy_cases import REDUCTIONS, WEIGHTS, logits
from tests.ops.upsample_cases import MODES, labels_for, peak_growth, slow_under_the_interpreter

# ---- errors ----

OUTSIDE = {
    "too-large": (21, torch.int64),
    "ignore-of-other-data-sets": (255, torch.uint8),
    "negative": (-1, torch.int16),
    "far-negative": (-(2**31), torch.int32),
    "32-bits-look-right": (2**32 + 1, torch.int64),
}


@pytest.fixture
def errors_are_raised() -> None:
    if _native.INTERPRETED or torch.get_default_device().type != "cpu":
        pytest.skip("the Triton kernels run here, which give NaN instead: kernels/test_labels.py")


@pytest.mark.usefixtures("errors_are_raised")
@pytest.mark.parametrize(("label", "dtype"), OUTSIDE.values(), ids=OUTSIDE)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_label_outside_the_classes(
    implementation: str, mode: dict[str, Any], smoothing: float, label: int, dtype: torch.dtype
) -> None:
    input = logits((2, 21, 10, 11))
    target = labels_for(input, (43, 41), dtype)
    target.view(-1)[-3] = label
    said = rf"target: expected classes in \[0, 21\) .*, got {label}$"
    if implementation == "plain":
        said = f"Target {label} is out of bounds"  # torch's own words
    for leaf in (input, input.detach()):
        with pytest.raises(IndexError, match=said):
            functional.upsample_cross_entropy(leaf, target, label_smoothing=smoothing, **mode)


@pytest.mark.usefixtures("errors_are_raised")
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_label_outside_the_classes_in_backward(isa: str, mode: dict[str, Any]) -> None:
    input = logits((1, 3, 4, 5))
    target = labels_for(input, (9, 8))
    loss = functional.upsample_cross_entropy(input, target, torch.ones(3), reduction="none", **mode).sum()
    target.data[0, 7, 2] = 9  # behind autograd's back, which would notice it
    with pytest.raises(IndexError, match=r"target: expected classes in \[0, 3\) .*, got 9$"):
        loss.backward()


@pytest.mark.usefixtures("errors_are_raised")
def test_first_label_outside_is_named_for_any_number_of_threads(threads: Callable[[int], None]) -> None:
    input = torch.zeros(1, 3, 100, 100)
    target = torch.arange(400 * 400).view(1, 400, 400) + 3
    for count in (1, 2, 3):
        threads(count)
        with pytest.raises(IndexError, match=r"got 3$"):
            functional.upsample_cross_entropy(input, target)


X, Y = torch.zeros(2, 4, 3, 5), torch.zeros(2, 6, 7, dtype=torch.int64)
REFUSED: dict[str, tuple[tuple[Tensor, ...], dict[str, Any], type[Exception], str]] = {
    "rank": ((X[0], Y), {}, ValueError, r"input: expected \[N, C, h, w\], got shape \(4, 3, 5\)"),
    "no-rows": ((X[:, :, :0], Y), {}, ValueError, r"input: expected at least one row .*got shape \(2, 4, 0, 5\)"),
    "no-class": ((X[:, :0], Y), {}, ValueError, r"input: expected at least one class, got shape \(2, 0, 3, 5\)"),
    "integer-logits": ((X.long(), Y), {}, TypeError, "input: expected float32.* got torch.int64"),
    "mode": ((X, Y), {"mode": "bicubic"}, ValueError, 'mode: expected "bilinear" or "nearest", got \'bicubic\''),
    "corners": ((X, Y), {"mode": "nearest", "align_corners": True}, ValueError, "align_corners: only mode"),
    "labels-rank": ((X, Y[0]), {}, ValueError, r"target: expected labels \[N, H, W\] .*got shape \(6, 7\)"),
    "labels-no-columns": ((X, Y[..., :0]), {}, ValueError, r"target: expected labels .*got shape \(2, 6, 0\)"),
    "batch": ((X, Y[:1]), {}, ValueError, r"target: expected labels of shape \(2, 6, 7\), got \(1, 6, 7\)"),
    "bool-labels": ((X, Y.bool()), {}, TypeError, "target: expected labels of an integer dtype.*got torch.bool"),
    "float-labels": ((X, Y.float()), {}, ValueError, "target: expected class probabilities.*need an integer dtype"),
    "weight-shape": ((X, Y, torch.ones(3)), {}, ValueError, r"weight: expected shape \(4,\), got \(3,\)"),
    "weight-dtype": ((X, Y, torch.ones(4).long()), {}, TypeError, "weight: expected a floating-point dtype"),
    "reduction": ((X, Y), {"reduction": "average"}, ValueError, "reduction: expected .*got 'average'"),
    "smoothing": ((X, Y), {"label_smoothing": 1.5}, ValueError, r"label_smoothing: expected .*\[0, 1\], got 1.5"),
    "pixel-weight-shape": ((X, Y), {"pixel_weight": X[:, 0]}, ValueError, r"pixel_weight: expected shape \(2, 6, 7\)"),
    "pixel-weight-dtype": ((X, Y), {"pixel_weight": Y}, TypeError, "pixel_weight: expected a floating-point dtype"),
    "device": ((X, Y.to("meta")), {}, ValueError, "target: expected input's device .*, got meta"),
    "weight-device": ((X, Y, torch.ones(4).to("meta")), {}, ValueError, "weight: expected input's device .*, got meta"),
    "pixel-weight-device": ((X, Y), {"pixel_weight": Y.to("meta").float()}, ValueError, "pixel_weight: .*, got meta"),
}


@pytest.mark.parametrize(("arguments", "options", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(arguments: tuple[Tensor, ...], options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        functional.upsample_cross_entropy(*arguments, **options)


# ---- graphs, determinism ----


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_bitwise_equal_for_any_number_of_threads_and_twice(
    isa: str, dtype: torch.dtype, reduction: str, mode: dict[str, Any], layout: str, threads: Callable[[int], None]
) -> None:
    small = (2, 5, 6, 7), (13, 15)  # for the interpreter
    shape, size = small if _native.INTERPRETED else ((2, 21, 33, 30), (97, 130))
    input = logits(shape, dtype, layout=layout)
    target = labels_for(input, size, ignore_index=-100)
    results = []
    for count in (1, 2, 3, 3):
        threads(count)
        results.append(
            values_and_gradients(functional.upsample_cross_entropy, [input, target], reduction=reduction, **mode)
        )
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=0)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize(("before", "after"), [((5, 6), (13, 17)), ((13, 17), (5, 6))], ids=["up", "down"])
def test_fresh_memory_filled_with_nan_changes_nothing(
    implementation: str, before: tuple[int, int], after: tuple[int, int], mode: dict[str, Any], layout: str
) -> None:
    input = logits((2, 5, *before), layout=layout)
    target = labels_for(input, after, ignore_index=-100)
    for reduction in REDUCTIONS:
        expected = values_and_gradients(functional.upsample_cross_entropy, [input, target], reduction=reduction, **mode)
        with fresh_memory_of_nan():
            poisoned = values_and_gradients(
                functional.upsample_cross_entropy, [input, target], reduction=reduction, **mode
            )
        torch.testing.assert_close(poisoned, expected, rtol=0, atol=0)


def test_graph_can_be_retained_and_logits_shared(implementation: str) -> None:
    loss = functional.upsample_cross_entropy
    input = logits((2, 5, 6, 7))
    target, other = labels_for(input, (12, 15)), labels_for(input, (9, 4), seed=1)
    first = loss(input, target)
    once = torch.autograd.grad(first, input, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(first, input), once, rtol=0, atol=0)
    both = torch.autograd.grad(loss(input, target) + loss(input, other), input)[0]
    alone = torch.autograd.grad(loss(input, other), input)[0]
    torch.testing.assert_close(both, once[0] + alone)


def test_changed_logits_are_noticed() -> None:
    input = logits((2, 5, 6, 7)) * 1
    loss = functional.upsample_cross_entropy(input, labels_for(input, (12, 15)))
    input += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


GRADCHECKED: dict[str, dict[str, Any]] = {
    "labels": {},
    "smoothed": {"label_smoothing": 0.2, "reduction": "none"},
    "weighted": {"weight": WEIGHTS["float64-weight"], "ignore_index": 1},
    "sum": {"reduction": "sum", "weight": WEIGHTS["class-of-weight-0"], "label_smoothing": 0.1},
}


@pytest.mark.parametrize("options", GRADCHECKED.values(), ids=GRADCHECKED)
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_gradcheck_to_second_order(implementation: str, mode: dict[str, Any], options: dict[str, Any]) -> None:
    input = logits((1, 5, 2, 3), torch.float64)
    target = labels_for(input, (5, 2))

    def loss(input: Tensor) -> Tensor:
        return functional.upsample_cross_entropy(input, target, **options, **mode)

    assert torch.autograd.gradcheck(loss, input)
    assert torch.autograd.gradgradcheck(loss, input)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_second_derivative_equals_plain(dtype: torch.dtype) -> None:
    input = logits((2, 5, 2, 3), dtype)
    target = labels_for(input, (4, 7))

    def penalty(function: Callable[..., Tensor], leaf: Tensor) -> Tensor:
        (gradient,) = torch.autograd.grad(function(leaf, target), leaf, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), leaf)[0]

    wide = input.detach().double().requires_grad_()
    assert_parity(
        penalty(functional.upsample_cross_entropy, input),
        penalty(reference.upsample_cross_entropy, input),
        penalty(reference.upsample_cross_entropy, wide),
    )


def test_probabilities_take_plain_pytorch_and_the_log_says_why(caplog: pytest.LogCaptureFixture) -> None:
    _native.log_fallback.cache_clear()
    learned = make((2, 5, 12, 14)).softmax(1).requires_grad_()
    weight = torch.rand(5).requires_grad_()
    tensors = [logits((2, 5, 6, 7)), learned, weight]
    actual = values_and_gradients(functional.upsample_cross_entropy, tensors)
    assert len(actual) == 4
    assert_parity(
        actual,
        values_and_gradients(reference.upsample_cross_entropy, tensors),
        values_and_gradients(reference.upsample_cross_entropy, tensors, torch.float64),
        terms=5,
    )
    line = "upsample_cross_entropy runs as plain PyTorch: class probabilities hold the output's size"
    assert caplog.text.count(line) == 1


def test_weight_that_needs_a_gradient_takes_plain_pytorch(caplog: pytest.LogCaptureFixture) -> None:
    _native.log_fallback.cache_clear()
    input, weight = logits((2, 5, 6, 7)), torch.rand(5).requires_grad_()
    with pytest.raises(RuntimeError, match="not differentiable with respect to argument 'weight'"):
        functional.upsample_cross_entropy(input, labels_for(input, (12, 14)), weight)
    assert (
        "upsample_cross_entropy runs as plain PyTorch: another argument than its input needs a gradient" in caplog.text
    )


# ---- memory ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_tensors_that_are_allocated(reduction: str, mode: dict[str, Any], dtype: torch.dtype) -> None:
    if torch.get_default_device().type != "cpu":
        pytest.skip("the profiler counts a CPU's memory; test_peak_memory counts a GPU's")
    input = logits((1, 64, 8, 8), dtype)
    target = labels_for(input, (32, 32))
    with torch.profiler.profile(profile_memory=True) as profile:
        functional.upsample_cross_entropy(input, target, reduction=reduction, **mode).sum().backward()
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in profile.events())
    gradient, wide_gradient, losses = input.nbytes, 4 * input.numel(), 4 * target.numel()
    # Two statistics a pixel, and its loss and what comes in for it, rounded and not. Or, for a reduced loss, the
    # gradient that forward makes instead, and backward scales.
    of_pixels = 2 * losses if reduction == "mean" else 6 * losses
    assert allocated < gradient + max(of_pixels, 2 * wide_gradient) + 4096  # and numbers


@slow_under_the_interpreter
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_peak_memory(layout: str, mode: dict[str, Any]) -> None:
    input = logits((2, 64, 32, 32), layout=layout)
    target = labels_for(input, (512, 512))
    full = target.numel() * input.shape[1] * input.element_size()

    def step() -> None:
        torch.autograd.grad(functional.upsample_cross_entropy(input, target, **mode), input)

    step()  # code and scratch memory that stay
    gradient, statistics = input.nbytes, 2 * target.numel() * 4
    grown = peak_growth(step)
    assert grown < gradient + statistics + full / 20  # and the threads' tiles
