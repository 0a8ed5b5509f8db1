"""The Dice losses beside their values: derivatives, memory, threads, compile, autocast, errors."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastseg import _native, functional, reference
from fastseg.testing import assert_parity, values_and_gradients
from tests.kernels.poison import fresh_memory_of_nan
from tests.ops import upsample_cases
from tests.ops.cross_entropy_cases import DTYPES, logits
from tests.ops.dice_cases import COMBINATIONS
from tests.ops.upsample_cases import MODES, Size, labels_for, slow_under_the_interpreter

# ---- derivatives ----


@slow_under_the_interpreter
@pytest.mark.parametrize("combination", COMBINATIONS.values(), ids=COMBINATIONS)
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_gradcheck_to_second_order(mode: dict[str, Any], combination: dict[str, Any]) -> None:
    input = logits((2, 3, 2, 3), torch.float64)
    target = labels_for(input, (4, 5), ignore_index=1)
    options = {"ignore_index": 1, "label_smoothing": 0.1, "weight": torch.tensor([0.5, 2.0, 1.0]), **combination}
    for function in (
        lambda x: functional.upsample_cross_entropy_dice(x, target, **options, **mode),
        lambda x: functional.cross_entropy_dice(x, target[:, :2, :3], **options),
    ):
        assert torch.autograd.gradcheck(function, input)
        assert torch.autograd.gradgradcheck(function, input)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_second_derivative_equals_plain(dtype: torch.dtype) -> None:
    input = logits((2, 5, 3, 4), dtype)
    target = labels_for(input, (6, 7))

    def penalty(function: Callable[..., Tensor], leaf: Tensor) -> Tensor:
        (gradient,) = torch.autograd.grad(function(leaf, target), leaf, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), leaf)[0]

    wide = input.detach().double().requires_grad_()
    assert_parity(
        penalty(functional.upsample_cross_entropy_dice, input),
        penalty(reference.upsample_cross_entropy_dice, input),
        penalty(reference.upsample_cross_entropy_dice, wide),
        terms=upsample_cases.terms_of(input, (6, 7)),
    )


def test_graph_can_be_retained() -> None:
    input = logits((2, 5, 3, 4))
    loss = functional.upsample_cross_entropy_dice(input, labels_for(input, (6, 7)))
    once = torch.autograd.grad(loss, input, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, input), once, rtol=0, atol=0)


# ---- machinery: memory, threads, compile, autocast ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_no_probabilities_in_memory(dtype: torch.dtype) -> None:
    input = logits((1, 64, 8, 8), dtype)
    large = logits((1, 64, 32, 32), dtype)
    target = labels_for(input, (32, 32))
    for function, leaf in (
        (functional.upsample_cross_entropy_dice, input),
        (functional.cross_entropy_dice, large),
    ):
        with torch.profiler.profile(profile_memory=True) as profile:
            function(leaf, target).backward()
        allocated = sum(max(0, event.self_cpu_memory_usage) for event in profile.events())
        statistics, sums = 2 * target.numel() * 4, 3 * 64 * 4
        # The gradient, the statistics, and Dice's few numbers a class, forward and backward.
        assert allocated < leaf.nbytes + statistics + 32 * sums


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_bitwise_equal_for_any_number_of_threads_and_twice(dtype: torch.dtype) -> None:
    input = logits((2, 5, 9, 7), dtype)
    target = labels_for(input, (97, 21), ignore_index=-100)  # several bands of rows an image
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3, 3):
        torch.set_num_threads(threads)
        results.append(values_and_gradients(functional.upsample_cross_entropy_dice, [input, target]))
    torch.set_num_threads(before)
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=0)


@pytest.mark.parametrize("combination", ["default", "nnunet"])
def test_fresh_memory_filled_with_nan_changes_nothing(implementation: str, combination: str) -> None:
    input = logits((2, 5, 6, 7))
    arguments = [input, labels_for(input, (13, 17), ignore_index=-100)]
    options = COMBINATIONS[combination]
    expected = values_and_gradients(functional.upsample_cross_entropy_dice, arguments, **options)
    with fresh_memory_of_nan():
        poisoned = values_and_gradients(functional.upsample_cross_entropy_dice, arguments, **options)
    torch.testing.assert_close(poisoned, expected, rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("combination", ["default", "nnunet", "dice-alone"])
@pytest.mark.parametrize(("name", "size"), [("cross_entropy_dice", (4, 6)), ("upsample_cross_entropy_dice", (9, 11))])
def test_compile(name: str, size: Size, combination: str, backend: str) -> None:
    torch.compiler.reset()
    fused, definition, options = getattr(functional, name), getattr(reference, name), COMBINATIONS[combination]
    input = logits((2, 5, 4, 6))
    arguments = [input, labels_for(input, size)]
    assert_parity(
        values_and_gradients(torch.compile(fused, fullgraph=True, backend=backend), arguments, **options),
        values_and_gradients(definition, arguments, **options),
        values_and_gradients(definition, arguments, torch.float64, **options),
        terms=upsample_cases.terms_of(input, size),
    )


def test_compile_dynamic_sizes_without_recompiling() -> None:
    torch.compiler.reset()
    compiled = torch.compile(functional.upsample_cross_entropy_dice, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for images, before, after in ((2, (6, 8), (13, 15)), (3, (14, 9), (29, 40)), (7, (5, 33), (10, 70))):
            input = logits((images, 5, *before))
            target = labels_for(input, after)
            torch.testing.assert_close(compiled(input, target), functional.upsample_cross_entropy_dice(input, target))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_autocast_gives_the_loss_in_float32(dtype: torch.dtype) -> None:
    input = logits((2, 5, 3, 4), dtype)
    with torch.autocast(input.device.type, torch.bfloat16):
        loss = functional.upsample_cross_entropy_dice(input, labels_for(input, (6, 7)))
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(
        loss.to(dtype), functional.upsample_cross_entropy_dice(input, labels_for(input, (6, 7))), rtol=0, atol=0
    )


# ---- errors ----

X, Y = torch.zeros(2, 4, 3, 3), torch.zeros(2, 6, 6, dtype=torch.int64)
REFUSED = {
    "rank": ((X[0], Y), {}, ValueError, r"input: expected \[N, C, h, w\], got shape \(4, 3, 3\)"),
    "probabilities": ((X, Y[0].float().expand(2, 6, 6)), {}, TypeError, "target: expected labels of an integer dtype"),
    "class-probabilities": ((X, X), {}, ValueError, r"target: expected labels \[N, H, W\]"),
    "batch": ((X, Y[:1]), {}, ValueError, r"target: expected labels of shape \(2, 6, 6\), got \(1, 6, 6\)"),
    "weight": ((X, Y, torch.ones(3)), {}, ValueError, r"weight: expected shape \(4,\), got \(3,\)"),
    "learned-weight": ((X, Y, torch.ones(4, requires_grad=True)), {}, ValueError, "weight: it has no gradient"),
    "smoothing": ((X, Y), {"label_smoothing": -0.1}, ValueError, "label_smoothing: expected .*got -0.1"),
    "mode": ((X, Y), {"mode": "bicubic"}, ValueError, "mode: expected .*got 'bicubic'"),
    "corners": ((X, Y), {"mode": "nearest", "align_corners": True}, ValueError, "align_corners: only mode"),
    "smooth": ((X, Y), {"smooth": -1.0}, ValueError, "smooth: expected a number of at least 0, got -1.0"),
    "ce-weight": ((X, Y), {"ce_weight": -1.0}, ValueError, "ce_weight: expected .* at least 0, got -1.0"),
    "dice-weight": ((X, Y), {"dice_weight": float("nan")}, ValueError, "dice_weight: expected .* got nan"),
    "background": ((X[:, :1], Y), {"include_background": False}, ValueError, "include_background: with one class"),
}


@pytest.mark.parametrize(("arguments", "options", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(arguments: tuple[Tensor, ...], options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        functional.upsample_cross_entropy_dice(*arguments, **options)


REFUSED_AT_FULL_SIZE = {
    "scalar": ((torch.tensor(1.0), torch.tensor(0)), ValueError, "input: expected .*got a scalar"),
    "no-batch": ((X[0, :, 0, 0], Y[0, 0, 0]), ValueError, r"input: expected \[N, C, d1, ...\].*got shape \(4,\)"),
    "no-pixel": ((X[:, :, :0], Y[:, :0, :3]), ValueError, r"at least one pixel, got shape \(2, 4, 0, 3\)"),
    "pixels": ((X, Y), ValueError, r"target: expected labels of shape \(2, 3, 3\), got \(2, 6, 6\)"),
    "class-probabilities": ((X, X), TypeError, "target: expected labels of an integer dtype, got torch.float32"),
    "integer-logits": ((X.long(), Y[:, :3, :3]), TypeError, "input: expected float32.* got torch.int64"),
}


@pytest.mark.parametrize(("arguments", "error", "message"), REFUSED_AT_FULL_SIZE.values(), ids=REFUSED_AT_FULL_SIZE)
def test_refused_at_full_size(arguments: tuple[Tensor, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        functional.cross_entropy_dice(*arguments)


@pytest.mark.parametrize("label", [4, -1, 255])
@pytest.mark.parametrize("options", [{}, {"ce_weight": 0.0}], ids=["default", "dice-alone"])
def test_label_outside_the_classes(options: dict[str, Any], label: int) -> None:
    target = Y.clone()
    target[1, 2, 3] = label
    if _native.INTERPRETED or not X.is_cpu:  # a GPU's kernels, which can't raise
        assert functional.upsample_cross_entropy_dice(X, target, **options).isnan()
        return
    with pytest.raises(IndexError, match=rf"target: expected classes in \[0, 4\) .*, got {label}$"):
        functional.upsample_cross_entropy_dice(X, target, **options)
