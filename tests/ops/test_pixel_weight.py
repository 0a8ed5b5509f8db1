"""pixel_weight of cross_entropy and upsample_cross_entropy: against a formula by hand, and against plain PyTorch."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from fastseg import functional, reference
from fastseg.testing import assert_parity, make, values_and_gradients
from tests.ops.cross_entropy_cases import DTYPES, LABELS, NAN, REDUCTIONS, WEIGHTS, logits, probabilities_for
from tests.ops.upsample_cases import MODES, Size, labels_for, terms_of

pytestmark = pytest.mark.usefixtures("kernels_for_small_logits")

SIZE = (4, 7)  # of the pixels
OPERATORS: dict[str, tuple[str, Size, dict[str, Any]]] = {
    "cross_entropy": ("cross_entropy", SIZE, {}),
    **{f"upsample_cross_entropy-{name}": ("upsample_cross_entropy", (3, 5), mode) for name, mode in MODES.items()},
}
parametrize_operators = pytest.mark.parametrize(("operator", "shape", "mode"), OPERATORS.values(), ids=OPERATORS)


def weights_of_pixels(dtype: torch.dtype = torch.float32) -> Tensor:
    return make((2, *SIZE), torch.float32, seed=5).abs().to(dtype)


def by_hand(
    operator: str, input: Tensor, target: Tensor, weight: Tensor | None, pixel_weight: Tensor,
    ignore_index: int, reduction: str, label_smoothing: float, **mode: Any,
) -> Tensor:  # fmt: skip
    """The formula of the documentation, pixel by pixel."""
    if operator == "upsample_cross_entropy":
        input = reference.upsample(input, SIZE, None, mode.get("mode", "bilinear"), mode.get("align_corners", False))
    log_p, classes = input.log_softmax(1), input.shape[1]
    weight = torch.ones(classes) if weight is None else weight
    losses, weights = torch.zeros(target.shape, dtype=input.dtype), torch.zeros((), dtype=input.dtype)
    for pixel in (target.long() != ignore_index).nonzero():
        n, y, x = pixel.tolist()
        share = torch.full((classes,), label_smoothing / classes, dtype=input.dtype)
        share[target[n, y, x].long()] += 1 - label_smoothing
        losses[n, y, x] = -(weight.double() * share * log_p[n, :, y, x]).sum() * pixel_weight[n, y, x]
        weights = weights + pixel_weight[n, y, x] * weight[target[n, y, x].long()]
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / weights


@parametrize_operators
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weight", ["unweighted", "float64-weight", "class-of-weight-0"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_formula(
    reduction: str, weight: str, smoothing: float, operator: str, shape: Size, mode: dict[str, Any]
) -> None:
    input = logits((2, 5, *shape), torch.float64)
    target = labels_for(input, SIZE, ignore_index=255)
    pixel_weight = weights_of_pixels(torch.float64).requires_grad_()
    options = {"ignore_index": 255, "reduction": reduction, "label_smoothing": smoothing, **mode}

    def run(function: Callable[..., Tensor]) -> list[Tensor]:
        def call(input: Tensor, pixel_weight: Tensor) -> Tensor:
            return function(input, target, WEIGHTS[weight], pixel_weight=pixel_weight, **options)

        return values_and_gradients(call, [input, pixel_weight])

    torch.testing.assert_close(run(getattr(functional, operator)), run(partial(by_hand, operator)))


def check(
    operator: str, input: Tensor, target: Tensor, weight: Tensor | None, pixel_weight: Tensor, **options: Any
) -> list[Tensor]:
    """The loss and its gradients for input and pixel_weight, compared with plain PyTorch's."""

    def through(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(input: Tensor, target: Tensor, weight: Tensor | None, pixel_weight: Tensor) -> Tensor:
            return function(input, target, weight, pixel_weight=pixel_weight, **options)

        return call

    tensors = [input, target, weight, pixel_weight]
    actual = values_and_gradients(through(getattr(functional, operator)), tensors)
    plain = values_and_gradients(through(getattr(reference, operator)), tensors)
    truth = values_and_gradients(through(getattr(reference, operator)), tensors, torch.float64)
    # The mean's two sums, and their quotient, are over all pixels.
    terms = terms_of(input, SIZE, options.get("mode", "bilinear")) + target.numel()
    assert_parity(actual, plain, truth, terms=terms)
    return actual


@parametrize_operators
@pytest.mark.parametrize(("label_dtype", "ignored"), LABELS.values(), ids=LABELS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_labels(
    reduction: str, label_dtype: torch.dtype, ignored: int | None, operator: str, shape: Size, mode: dict[str, Any]
) -> None:
    input = logits((2, 5, *shape))
    target = labels_for(input, SIZE, label_dtype, ignore_index=ignored)
    index = {} if ignored is None else {"ignore_index": ignored}
    pixel_weight = weights_of_pixels().requires_grad_()
    check(operator, input, target, WEIGHTS["weighted"], pixel_weight, reduction=reduction, **index, **mode)


@parametrize_operators
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("weight_dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("learned", [False, True], ids=["given", "learned"])
def test_dtypes(
    learned: bool, weight_dtype: torch.dtype, dtype: torch.dtype, operator: str, shape: Size, mode: dict[str, Any]
) -> None:
    input = logits((2, 5, *shape), dtype)
    pixel_weight = weights_of_pixels(weight_dtype).requires_grad_(learned)
    loss, *_ = check(operator, input, labels_for(input, SIZE), None, pixel_weight, label_smoothing=0.1, **mode)
    assert loss.dtype == dtype


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("operator", ["cross_entropy", "upsample_cross_entropy"])
def test_probabilities(operator: str, smoothing: float, reduction: str) -> None:
    input = logits((2, 5, *(SIZE if operator == "cross_entropy" else (3, 5))))
    target = probabilities_for(make((2, 5, *SIZE)))
    weight = WEIGHTS["weighted"]
    pixel_weight = weights_of_pixels().requires_grad_()
    loss = check(operator, input, target, weight, pixel_weight, reduction=reduction, label_smoothing=smoothing)[0]
    if operator == "cross_entropy":
        share = (target * (1 - smoothing) + smoothing / 5) * weight.view(-1, 1, 1)
        losses = -(share * input.log_softmax(1)).sum(1) * pixel_weight
        expected = {"none": losses, "sum": losses.sum(), "mean": losses.sum() / pixel_weight.sum()}[reduction]
        torch.testing.assert_close(loss, expected.detach())


@parametrize_operators
@pytest.mark.parametrize("weight", ["unweighted", "weighted"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_ones_change_nothing(reduction: str, weight: str, operator: str, shape: Size, mode: dict[str, Any]) -> None:
    input = logits((2, 5, *shape))
    target, function = labels_for(input, SIZE, ignore_index=3), getattr(functional, operator)
    options = {"weight": WEIGHTS[weight], "ignore_index": 3, "reduction": reduction, "label_smoothing": 0.1, **mode}
    ones = torch.ones(target.shape)
    weighed = values_and_gradients(function, [input, target], pixel_weight=ones, **options)
    torch.testing.assert_close(weighed, values_and_gradients(function, [input, target], **options))


@parametrize_operators
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_weight_zero_is_ignored(reduction: str, operator: str, shape: Size, mode: dict[str, Any]) -> None:
    input = logits((2, 5, *shape))
    target, function = labels_for(input, SIZE), getattr(functional, operator)
    left_out = torch.rand(target.shape) < 0.4
    options = {"weight": WEIGHTS["weighted"], "reduction": reduction, **mode}
    weighed = values_and_gradients(function, [input, target], pixel_weight=(~left_out).float(), **options)
    ignored = values_and_gradients(function, [input, target.masked_fill(left_out, -100)], **options)
    torch.testing.assert_close(weighed, ignored)


@parametrize_operators
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_nan_under_ignored_pixels_does_nothing(
    implementation: str, reduction: str, operator: str, shape: Size, mode: dict[str, Any]
) -> None:
    input = logits((2, 5, *shape))
    target, function = labels_for(input, SIZE, ignore_index=-100), getattr(functional, operator)
    options = {"weight": WEIGHTS["weighted"], "reduction": reduction, **mode}
    given = weights_of_pixels().requires_grad_()
    holes = given.detach().masked_fill(target == -100, NAN).requires_grad_()

    def run(pixel_weight: Tensor) -> list[Tensor]:
        return values_and_gradients(
            lambda input, pixel_weight: function(input, target, pixel_weight=pixel_weight, **options),
            [input, pixel_weight],
        )

    actual, expected = run(holes), run(given)
    assert all(tensor.isfinite().all() for tensor in expected)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@parametrize_operators
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_uint8_label_that_minus_100_would_wrap_to(
    implementation: str, reduction: str, operator: str, shape: Size, mode: dict[str, Any]
) -> None:
    input = logits((2, 157, *shape))
    target = torch.full((2, *SIZE), 156, dtype=torch.uint8)
    loss, gradient = check(operator, input, target, None, weights_of_pixels(), reduction=reduction, **mode)
    assert (loss > 0).all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("operator", ["cross_entropy", "upsample_cross_entropy"])
def test_second_derivatives(operator: str) -> None:
    input = logits((1, 3, 2, 2), torch.float64)
    size = (2, 2) if operator == "cross_entropy" else (3, 4)
    target = labels_for(input, size)
    pixel_weight = make((1, *size), torch.float64, seed=5).abs().requires_grad_()

    def loss(input: Tensor, pixel_weight: Tensor) -> Tensor:
        return getattr(functional, operator)(input, target, pixel_weight=pixel_weight)

    assert torch.autograd.gradcheck(loss, (input, pixel_weight))
    assert torch.autograd.gradgradcheck(loss, (input, pixel_weight))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_one_dimension(reduction: str) -> None:
    input, pixel_weight = logits((7,)), torch.tensor(2.5, requires_grad=True)
    options = {"reduction": reduction, "label_smoothing": 0.1}
    loss = functional.cross_entropy(input, torch.tensor(3), pixel_weight=pixel_weight, **options)
    once = functional.cross_entropy(input, torch.tensor(3), **options)
    torch.testing.assert_close(loss, once if reduction == "mean" else 2.5 * once)


REFUSED = {
    "shape": (torch.ones(2, 7, 4), ValueError, r"pixel_weight: expected shape \(2, 4, 7\), got \(2, 7, 4\)"),
    "integers": (
        torch.ones(2, 4, 7).int(),
        TypeError,
        "pixel_weight: expected a floating-point dtype, got torch.int32",
    ),
    "device": (torch.ones(2, 4, 7, device="meta"), ValueError, "pixel_weight: expected input's device .*, got meta"),
}


@parametrize_operators
@pytest.mark.parametrize(("pixel_weight", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(
    pixel_weight: Tensor, error: type[Exception], message: str, operator: str, shape: Size, mode: dict[str, Any]
) -> None:
    input = logits((2, 5, *shape))
    with pytest.raises(error, match=message):
        getattr(functional, operator)(input, labels_for(input, SIZE), pixel_weight=pixel_weight, **mode)


@parametrize_operators
def test_compiled(operator: str, shape: Size, mode: dict[str, Any]) -> None:
    torch.compiler.reset()
    input = logits((2, 5, *shape))
    arguments = [input, labels_for(input, SIZE, ignore_index=3)]
    options = {"ignore_index": 3, "pixel_weight": weights_of_pixels(), **mode}
    function = getattr(functional, operator)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    actual, expected = (values_and_gradients(call, arguments, **options) for call in (compiled, function))
    torch.testing.assert_close(actual, expected)
