"""cross_entropy against plain PyTorch: values and gradients, in every combination and on every instruction set."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastseg
from fastseg import _native, functional, reference
from fastseg.testing import assert_parity, make, make_labels, values_and_gradients
from tests.ops.cross_entropy_cases import (
    DTYPES,
    EXAMPLES,
    LABELS,
    REDUCTIONS,
    ROWS,
    VIEWS,
    WEIGHTS,
    check,
    labels_for,
    logits,
    probabilities_for,
    terms_of,
)

pytestmark = pytest.mark.usefixtures("kernels_for_small_logits")

MAP = (3, 7) if _native.INTERPRETED else (9, 32)  # of many classes, which an interpreter takes long for

# ---- shapes, dtypes, layouts ----

# Why each is here.
SHAPES = {
    "single-pixel": (1, 5),
    "classifier": (37, 10),
    "sequence": (3, 7, 11),
    "tiny-images": (19, 4, 2, 3),  # several images in a vector
    "odd-image": (2, 21, 13, 17),
    "whole-vectors": (2, 3, 8, 16),  # read and written in place
    "many-tiles": (2, 3, 45, 67),  # more pixels than a tile holds, and tiles that cross from one image to the next
    "volume": (2, 5, 3, 4, 7),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_labels(implementation: str, reduction: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    input = logits(shape, dtype)
    check(input, labels_for(input, ignore_index=255), ignore_index=255, reduction=reduction)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_probabilities(implementation: str, reduction: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    input = logits(shape, dtype)
    for smoothing, weight in ((0.0, None), (0.2, make((shape[1],), dtype).abs())):
        check(input, probabilities_for(input), weight, reduction=reduction, label_smoothing=smoothing)


@pytest.mark.parametrize("classes", [1, 2, 3, 4, 5, 19, 21, 150, 171, 257])
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_class_counts(implementation: str, dtype: torch.dtype, layout: str, classes: int) -> None:
    input = logits((2, classes, *MAP), dtype, layout=layout)
    check(input, labels_for(input))
    check(input, labels_for(input), label_smoothing=0.1)
    check(input, probabilities_for(input))


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_statistics_are_made_where_they_are_asked_for(implementation: str, reduction: str, layout: str) -> None:
    arguments = (make((2, 5, 7, 9), layout=layout), make_labels((2, 7, 9), 5), None, -100, reduction, 0.1)
    loss, statistics, total_weight = torch.ops.fastseg.cross_entropy(*arguments, True)
    results = torch.ops.fastseg.cross_entropy(*arguments, False)
    assert (statistics.shape, results[1].shape) == ((2, 2, 7, 9), (2, 0, 7, 9))
    assert torch.equal(results[0], loss)
    assert torch.equal(results[2], total_weight)


def test_more_classes_than_a_tile_holds(implementation: str) -> None:
    input = logits((3, 6000, 2))
    check(input, labels_for(input))
    check(input, probabilities_for(input))


OTHER_RANKS = {
    "flattened-pixels": lambda t: t.flatten(2),
    "volume": lambda t: t.unflatten(2, (2, -1))[:, :, :, 1:, 2:-1],
}


@pytest.mark.parametrize("view", [*VIEWS.values(), *OTHER_RANKS.values()], ids=[*VIEWS, *OTHER_RANKS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("target", ["labels", "probabilities"])
def test_strided_input(target: str, dtype: torch.dtype, view: Callable[[Tensor], Tensor]) -> None:
    base = logits((4, 6, 10, 32), dtype)
    seen = view(base)
    given = labels_for(seen) if target == "labels" else view(probabilities_for(base))

    def through_view(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda base, given: function(view(base), given, reduction="none")

    assert_parity(
        values_and_gradients(through_view(functional.cross_entropy), [base, given]),
        values_and_gradients(through_view(reference.cross_entropy), [base, given]),
        values_and_gradients(through_view(reference.cross_entropy), [base, given], torch.float64),
        terms=terms_of(seen),
    )


def test_strided_labels() -> None:
    input = logits((2, 5, 6, 8))
    wide = make_labels((2, 8, 12), 5)
    check(input, wide.transpose(1, 2)[:, ::2])
    check(input, wide[:, :1, :8].expand(2, 6, 8))


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_strides(data: st.DataObject) -> None:
    rank = data.draw(st.integers(2, 5), "rank")
    sizes = data.draw(st.lists(st.integers(1, 9), min_size=rank, max_size=rank), "sizes")
    order = data.draw(st.permutations(range(rank)), "order")
    steps = data.draw(st.lists(st.integers(1, 2), min_size=rank, max_size=rank), "steps")
    dtype = data.draw(st.sampled_from(list(DTYPES.values())), "dtype")
    base = make([size * step for size, step in zip(sizes, steps, strict=True)], dtype)
    input = base[tuple(slice(None, None, step) for step in steps)].permute(order).requires_grad_()
    options = {
        "reduction": data.draw(st.sampled_from(REDUCTIONS), "reduction"),
        "label_smoothing": data.draw(st.sampled_from([0.0, 0.3]), "label_smoothing"),
    }
    check(input, labels_for(input, ignore_index=-100), **options)
    check(input, probabilities_for(input), **options)


def test_offsets_beyond_32_bits() -> None:
    try:
        memory = torch.empty(2**32 + 4096, dtype=torch.uint8)  # address space alone: no page but a few is touched
    except RuntimeError as error:
        pytest.skip(f"this machine refuses 4 GB of address space: {error}")
    far = memory.view(torch.bfloat16).as_strided((2, 3, 64), (2**31, 64, 1))
    values = make(far.shape, torch.bfloat16)
    far.copy_(values)
    target = labels_for(far)
    torch.testing.assert_close(functional.cross_entropy(far, target), functional.cross_entropy(values, target))
    loss = functional.cross_entropy(far.detach().requires_grad_(), target)
    assert loss.requires_grad


def test_more_dimensions_than_the_kernels_take(caplog: pytest.LogCaptureFixture) -> None:
    _native.log_fallback.cache_clear()
    input = logits((2, 3, *[1, 2] * 4))
    check(input, labels_for(input))
    if not _native.INTERPRETED and input.is_cpu:  # the C++ kernels' limit
        assert "at most 8 dimensions" in caplog.text


# ---- the whole grid of options ----


@pytest.mark.parametrize(("label_dtype", "ignored"), LABELS.values(), ids=LABELS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_grid(
    reduction: str, weight: Tensor | None, smoothing: float, label_dtype: torch.dtype, ignored: int | None
) -> None:
    input = logits((2, 5, 6, 7))
    target = labels_for(input, label_dtype, ignore_index=ignored)
    index = {} if ignored is None else {"ignore_index": ignored}
    check(input, target, weight, reduction=reduction, label_smoothing=smoothing, **index)


@pytest.mark.parametrize("input_dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("target_dtype", DTYPES.values(), ids=DTYPES)
def test_probabilities_of_another_dtype(input_dtype: torch.dtype, target_dtype: torch.dtype) -> None:
    input = logits((2, 5, 6, 7), input_dtype)
    loss, _ = check(input, probabilities_for(input, target_dtype), WEIGHTS["weighted"], label_smoothing=0.1)
    assert loss.dtype == torch.promote_types(input_dtype, target_dtype)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_one_dimension(reduction: str, smoothing: float) -> None:
    input = logits((7,))
    options = {"reduction": reduction, "label_smoothing": smoothing}
    check(input, torch.tensor(3), **options)
    check(input, probabilities_for(input), **options)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_one_dimension_ignored(reduction: str, smoothing: float) -> None:
    """As on a CPU: on a GPU, torch's mean over no label is 0 for one dimension, and NaN for more."""
    input, options = logits((7,)), {"reduction": reduction, "label_smoothing": smoothing}
    loss, gradient = values_and_gradients(functional.cross_entropy, [input, torch.tensor(-100)], **options)
    expected, plain = values_and_gradients(
        reference.cross_entropy, [input.cpu(), torch.tensor(-100, device="cpu")], **options
    )
    torch.testing.assert_close(loss.cpu(), expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(gradient.cpu(), plain, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(0, 4), (2, 4, 0, 3), (0, 4, 5, 6)], ids=str)
def test_no_pixels(implementation: str, shape: tuple[int, ...], smoothing: float, reduction: str) -> None:
    input = logits(shape)
    check(input, labels_for(input), reduction=reduction, label_smoothing=smoothing)
    check(input, probabilities_for(input), reduction=reduction, label_smoothing=smoothing)


# ---- hard values ----


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("valid", [0, 1], ids=["all-ignored", "one-valid-pixel"])
def test_hardly_any_label(implementation: str, valid: int, reduction: str, smoothing: float) -> None:
    input = logits((2, 5, 6, 7))
    target = torch.full((2, 6, 7), -100)
    target[1, 2, 3 : 3 + valid] = 4
    loss, gradient = check(input, target, reduction=reduction, label_smoothing=smoothing)
    assert loss.isnan().any() == (valid == 0 and reduction == "mean")
    assert gradient.count_nonzero() == valid * input.shape[1]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_labels_of_weight_zero_alone(implementation: str, reduction: str, smoothing: float) -> None:
    input = logits((2, 5, 6, 7))
    weight = torch.tensor([0.0, 1.0, 2.0, 1.0, 1.0])
    target = make_labels((2, 6, 7), 1, ignore_index=-100)
    check(input, target, weight, reduction=reduction, label_smoothing=smoothing)


@pytest.mark.parametrize("weight", [None, torch.tensor([1.0, 0.0, 2.0, 0.5])], ids=["unweighted", "weighted"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_hard_rows(
    implementation: str, row: list[float], reduction: str, smoothing: float, weight: Tensor | None
) -> None:
    options = {"reduction": reduction, "label_smoothing": smoothing}
    # One pixel a label and an ignored one, between ordinary pixels that must stay ordinary without a reduction.
    input = torch.randn(7, 4)
    input[1:-1] = torch.tensor(row)
    input.requires_grad_()
    check(input, torch.tensor([0, 0, 1, 2, 3, -100, 1]), weight, **options)
    check(input, torch.eye(4)[[0, 0, 1, 2, 3, 1, 1]], weight, **options)
    check(input, probabilities_for(input), weight, **options)


# Where many classes are neighbours in memory, vectors run along them. 75 + 64 classes fill no vector's last lanes.
@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_hard_rows_of_many_classes(implementation: str, smoothing: float, row: list[float]) -> None:
    input = torch.randn(6, 139)
    input[1:-1, 71:75] = torch.tensor(row)
    input[3, 128:132] = input[3, 71:75]
    input.requires_grad_()
    check(
        input, torch.tensor([0, 71, 72, 138, -100, 1]), make((139,)).abs(), reduction="none", label_smoothing=smoothing
    )


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("weighted", [False, True], ids=["unweighted", "weighted"])
def test_views_of_many_classes(
    implementation: str, weighted: bool, dtype: torch.dtype, view: Callable[[Tensor], Tensor]
) -> None:
    shape = (2, 139, 2, 20) if _native.INTERPRETED else (2, 139, 6, 139)
    input = view(logits(shape, dtype, layout="channels_last").detach()).requires_grad_()
    weight = make((input.shape[1],), dtype).abs() if weighted else None
    check(input, labels_for(input, ignore_index=3), weight, ignore_index=3, label_smoothing=0.2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gradient_does_not_depend_on_the_layout(isa: str, dtype: torch.dtype) -> None:
    input = logits((2, 13, 7, 9), dtype)  # so few that the forward pass is the same
    gradients = []
    for layout in (torch.contiguous_format, torch.channels_last):
        leaf = input.detach().to(memory_format=layout).requires_grad_()
        loss = functional.cross_entropy(leaf, labels_for(input), label_smoothing=0.1)
        gradients.extend(torch.autograd.grad(loss, leaf))
    # Triton has a kernel for each layout, which add in different orders. A gradient is a difference of two numbers of
    # up to one over the pixels, which 13 exponentials and 8 operations more round (`cross_entropy_cases.terms_of`).
    rounding = (13 + 8) * torch.finfo(dtype).eps / (2 * 7 * 9) if isa.startswith("triton") else 0
    torch.testing.assert_close(*gradients, rtol=0, atol=rounding)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_probability_near_one(dtype: torch.dtype) -> None:
    margins = torch.linspace(4, 40, 73, dtype=torch.float64)
    input = torch.stack((margins, torch.zeros_like(margins)), 1).to(dtype).requires_grad_()
    target = torch.zeros(73, dtype=torch.int64)
    loss, gradient = check(input, target, reduction="sum")
    truth = -torch.sigmoid(-input.detach().double()[:, 0])  # of the true class: p - 1
    incoming = make((), torch.float32, seed=7).to(loss.dtype).double()  # that of values_and_gradients
    # p is rounded in float32 before 1 is subtracted, and the result in the logits' dtype. A GPU's exponential is off by
    # up to 2^-22 (PTX ISA, ex2.approx).
    bound = torch.finfo(torch.float32).eps + torch.finfo(dtype).eps * truth.abs() + 2.0**-22 * input.is_cuda
    bound += torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps / incoming.abs()  # float16's subnormals
    assert ((gradient[:, 0].double() / incoming - truth).abs() <= bound).all()


def test_mean_of_many_pixels_keeps_its_digits() -> None:
    side = 300 if _native.INTERPRETED else 1500  # interpreted, the larger ones take half a minute
    input = logits((1, 2, side, side))
    target = labels_for(input)
    truth = reference.cross_entropy(input.double(), target)
    # One rounding of the result and a few for each pixel's loss, which don't accumulate.
    torch.testing.assert_close(functional.cross_entropy(input, target).double(), truth, rtol=2e-7, atol=0)


# ---- the layer ----


def test_layer_equals_torch_and_loads_its_state() -> None:
    plain = torch.nn.CrossEntropyLoss(torch.rand(5), ignore_index=2, reduction="sum", label_smoothing=0.1)
    layer = fastseg.CrossEntropyLoss(torch.rand(5), ignore_index=2, reduction="sum", label_smoothing=0.1)
    layer.load_state_dict(plain.state_dict())
    input = logits((2, 5, 6, 7))
    target = labels_for(input)
    actual, expected = (values_and_gradients(module, [input, target]) for module in (layer, plain))
    truth = values_and_gradients(plain.double(), [input, target], torch.float64)
    assert_parity(actual, expected, truth, terms=5)
    assert isinstance(layer, torch.nn.CrossEntropyLoss)
