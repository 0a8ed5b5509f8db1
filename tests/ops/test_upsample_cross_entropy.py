"""upsample_cross_entropy against plain PyTorch: values and gradients, on every grid and on every instruction set."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastseg import _native, functional, reference
from fastseg.ops import volumes
from fastseg.testing import assert_parity, make, make_labels, values_and_gradients
from tests.ops.cross_entropy_cases import DTYPES, EXAMPLES, LABELS, REDUCTIONS, ROWS, VIEWS, WEIGHTS, logits
from tests.ops.upsample_cases import (
    GRIDS,
    LARGE_GRIDS,
    MODES,
    TILES,
    VOLUME_GRIDS,
    VOLUME_MODES,
    Size,
    check,
    labels_for,
    roundings,
    slow_under_the_interpreter,
    terms_of,
)

pytestmark = pytest.mark.usefixtures("kernels_for_small_logits")  # of equal sizes, which cross_entropy serves

# ---- grids, dtypes, layouts ----


@pytest.mark.parametrize(("before", "after"), GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_grids(implementation: str, dtype: torch.dtype, mode: dict[str, Any], before: Size, after: Size) -> None:
    input = logits((2, 5, *before), dtype)
    for reduction in ("none", "mean"):
        check(input, labels_for(input, after, ignore_index=255), ignore_index=255, reduction=reduction, **mode)


@pytest.mark.usefixtures("plain_upsampling_of_cpus")
@pytest.mark.parametrize(("before", "after"), VOLUME_GRIDS.values(), ids=VOLUME_GRIDS)
@pytest.mark.parametrize("mode", VOLUME_MODES.values(), ids=VOLUME_MODES)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_volumes(
    implementation: str, dtype: torch.dtype, layout: str, mode: dict[str, Any], before: Size, after: Size
) -> None:
    input = logits((2, 5, *before), dtype, layout=layout)
    target, weight = labels_for(input, after, ignore_index=255), make((5,)).abs()
    check(input, target, ignore_index=255, **mode)
    check(input, target, weight, ignore_index=255, reduction="none", label_smoothing=0.1, **mode)


@pytest.mark.usefixtures("plain_upsampling_of_cpus")
@slow_under_the_interpreter
@pytest.mark.parametrize("mode", VOLUME_MODES.values(), ids=VOLUME_MODES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_volumes_of_several_bands_and_tiles(isa: str, reduction: str, mode: dict[str, Any]) -> None:
    for shape, size in (((2, 3, 5, 40, 9), (9, 75, 14)), ((1, 1000, 2, 2, 21), (3, 3, 80))):
        input = logits(shape)
        check(input, labels_for(input, size), reduction=reduction, **mode)


def test_volumes_of_several_slabs(implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    input = logits((2, 5, 3, 3, 4))
    monkeypatch.setattr(volumes, "SLAB_BYTES", 2 * input[0, :, 0].nbytes)
    for reduction in REDUCTIONS:
        check(input, labels_for(input, (7, 5, 6)), reduction=reduction, mode="trilinear")


def test_volumes_without_labels_that_count(implementation: str) -> None:
    input = logits((1, 3, 2, 3, 4))
    target = torch.full((1, 4, 6, 8), -100)
    for smoothing in (0.0, 0.1):
        check(input, target, label_smoothing=smoothing, mode="trilinear")


# torch's gradient of "nearest" on a GPU isn't that of its own values where many positions read one (torch 2.11).
@pytest.mark.usefixtures("plain_upsampling_of_cpus")
@slow_under_the_interpreter
@pytest.mark.parametrize(("before", "after"), LARGE_GRIDS.values(), ids=LARGE_GRIDS)
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_large_grids(implementation: str, dtype: torch.dtype, mode: dict[str, Any], before: Size, after: Size) -> None:
    input = logits((2, 3, *before), dtype)
    check(input, labels_for(input, after, ignore_index=-100), reduction="sum", label_smoothing=0.1, **mode)


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_grid(data: st.DataObject) -> None:
    before, after = (tuple(data.draw(st.integers(1, 13), name) for name in "hw") for _ in range(2))
    mode = data.draw(st.sampled_from(list(MODES.values())), "mode")
    input = logits((2, 3, *before), data.draw(st.sampled_from(list(DTYPES.values())), "dtype"))
    check(input, labels_for(input, after), reduction="none", **mode)


@pytest.mark.parametrize("classes", [1, 2, 3, 4, 5, 8, 9, 19, 21, 32, 33, 150, 171, 257])
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_class_counts(implementation: str, dtype: torch.dtype, layout: str, classes: int) -> None:
    input = logits((2, classes, 3, 5), dtype, layout=layout)
    target = labels_for(input, (7, 11))
    check(input, target, label_smoothing=0.1)
    check(input, target, make((classes,)).abs(), reduction="sum", mode="nearest")


@slow_under_the_interpreter
def test_more_classes_than_a_tile_holds(implementation: str) -> None:
    input = logits((1, 6000, 1, 2))
    check(input, labels_for(input, (2, 3)))


@pytest.mark.parametrize("dice", [False, True], ids=["loss", "dice"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_loss_is_the_same_where_no_gradient_is_wanted(implementation: str, reduction: str, dice: bool) -> None:
    """Then no statistics are kept, but for what Dice's sums read."""
    input = logits((2, 5, 4, 6), torch.bfloat16)
    target = labels_for(input, (9, 13), ignore_index=-100)
    options = {} if dice else {"reduction": reduction}
    operator = functional.upsample_cross_entropy_dice if dice else functional.upsample_cross_entropy
    with torch.no_grad():
        actual = operator(input, target, **options)
    torch.testing.assert_close(actual, operator(input, target, **options).detach())


@slow_under_the_interpreter
@pytest.mark.usefixtures("plain_upsampling_of_cpus")
@pytest.mark.parametrize(("shape", "size"), TILES.values(), ids=TILES)
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_several_tiles(isa: str, mode: dict[str, Any], shape: tuple[int, int, int], size: Size) -> None:
    input = logits((1, *shape))
    for reduction in ("none", "sum"):  # a backward pass of its own, and one that comes with the loss
        check(input, labels_for(input, size), reduction=reduction, **mode)


@pytest.mark.parametrize("images", [1, 3, 7])
def test_batches(implementation: str, images: int) -> None:
    input = logits((images, 4, 3, 2))
    check(input, labels_for(input, (5, 9)))


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_strided_input(
    implementation: str, reduction: str, dtype: torch.dtype, mode: dict[str, Any], view: Callable[[Tensor], Tensor]
) -> None:
    base = logits((4, 6, 5, 12), dtype)
    seen, size = view(base), (13, 9)
    target = labels_for(seen, size)

    def through_view(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda base, target: function(view(base), target, reduction=reduction, **mode)

    assert_parity(
        values_and_gradients(through_view(functional.upsample_cross_entropy), [base, target]),
        values_and_gradients(through_view(reference.upsample_cross_entropy), [base, target]),
        values_and_gradients(through_view(reference.upsample_cross_entropy), [base, target], torch.float64),
        terms=terms_of(seen, size, mode.get("mode", "bilinear")),
    )


def test_strided_labels(implementation: str) -> None:
    input = logits((2, 5, 6, 8))
    wide = make_labels((2, 16, 24), 5)
    check(input, wide.transpose(1, 2)[:, ::2])
    check(input, wide[:, :1, ::3].expand(2, 11, 8))


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_strides(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 7), min_size=4, max_size=4), "sizes")
    order = data.draw(st.permutations(range(4)), "order")
    steps = data.draw(st.lists(st.integers(1, 2), min_size=4, max_size=4), "steps")
    dtype = data.draw(st.sampled_from(list(DTYPES.values())), "dtype")
    base = make([size * step for size, step in zip(sizes, steps, strict=True)], dtype)
    input = base[tuple(slice(None, None, step) for step in steps)].permute(order).requires_grad_()
    mode = data.draw(st.sampled_from(list(MODES.values())), "mode")
    check(input, labels_for(input, (5, 11), ignore_index=-100), label_smoothing=0.3, **mode)


def test_offsets_beyond_32_bits() -> None:
    try:
        memory = torch.empty(2**32 + 4096, dtype=torch.uint8)  # address space alone: no page but a few is touched
    except RuntimeError as error:
        pytest.skip(f"this machine refuses 4 GB of address space: {error}")
    far = memory.view(torch.bfloat16).as_strided((2, 3, 4, 5), (2**31, 20, 5, 1))
    near = make(far.shape, torch.bfloat16)
    far.copy_(near)
    target = labels_for(near, (7, 9))
    results = []
    for input in (near, far):
        loss = functional.upsample_cross_entropy(input.requires_grad_(), target)
        results.append((loss, *torch.autograd.grad(loss, input)))
    torch.testing.assert_close(*results, rtol=0, atol=0)


# ---- the whole grid of options ----


@pytest.mark.parametrize(("label_dtype", "ignored"), LABELS.values(), ids=LABELS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_options(
    reduction: str, weight: Tensor | None, smoothing: float, label_dtype: torch.dtype, ignored: int | None
) -> None:
    input = logits((2, 5, 4, 3))
    target = labels_for(input, (7, 8), label_dtype, ignore_index=ignored)
    index = {} if ignored is None else {"ignore_index": ignored}
    check(input, target, weight, reduction=reduction, label_smoothing=smoothing, **index)


def test_uint8_label_that_minus_100_would_wrap_to(implementation: str) -> None:
    input = logits((1, 157, 2, 3))
    target = torch.full((1, 3, 4), 156, dtype=torch.uint8)
    loss, gradient = check(input, target)
    assert loss.isfinite()
    assert gradient.count_nonzero() == input.numel()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_probabilities(dtype: torch.dtype) -> None:
    input = logits((2, 5, 3, 4), dtype)
    check(input, make((2, 5, 6, 7), dtype, seed=3).softmax(1), WEIGHTS["weighted"], label_smoothing=0.1)


# ---- hard values ----


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("valid", [0, 1], ids=["all-ignored", "one-valid-pixel"])
def test_hardly_any_label(implementation: str, valid: int, reduction: str, smoothing: float) -> None:
    input = logits((2, 5, 6, 7))
    target = torch.full((2, 12, 14), -100)
    target[1, 2, 3 : 3 + valid] = 4
    loss, gradient = check(input, target, reduction=reduction, label_smoothing=smoothing)
    assert loss.isnan().any() == (valid == 0 and reduction == "mean")
    assert gradient.count_nonzero() == 4 * valid * input.shape[1]  # the pixels that it was interpolated from


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_labels_of_weight_zero_alone(implementation: str, reduction: str, smoothing: float) -> None:
    input = logits((2, 5, 3, 4))
    weight = torch.tensor([0.0, 1.0, 2.0, 1.0, 1.0])
    target = make_labels((2, 6, 7), 1, ignore_index=-100)
    check(input, target, weight, reduction=reduction, label_smoothing=smoothing)


# Steps that are exact, so that weights which are zero are zero in every dtype: zero times infinity is NaN.
EXACT_GRIDS = {
    "x2": ((6, 6), {}),
    "rows-alone": ((6, 3), {}),
    "align_corners": ((5, 5), {"align_corners": True}),
    "nearest": ((6, 6), {"mode": "nearest"}),
}


HARD_OPTIONS: dict[str, tuple[str, float, Tensor | None]] = {
    "none": ("none", 0.0, None),
    "none-smoothed-weighted": ("none", 0.1, torch.tensor([1.0, 0.0, 2.0, 0.5])),
    "sum-smoothed": ("sum", 0.1, None),
    "sum-weighted": ("sum", 0.0, torch.tensor([1.0, 0.0, 2.0, 0.5])),
}


@pytest.mark.usefixtures("plain_upsampling_of_cpus")
@pytest.mark.parametrize(("size", "mode"), EXACT_GRIDS.values(), ids=EXACT_GRIDS)
@pytest.mark.parametrize(("reduction", "smoothing", "weight"), HARD_OPTIONS.values(), ids=HARD_OPTIONS)
@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_hard_rows(
    implementation: str, row: list[float], reduction: str, smoothing: float, weight: Tensor | None, size: Size,
    mode: dict[str, Any],
) -> None:  # fmt: skip
    input = torch.randn(3, 4, 3, 3)  # one ordinary image, one hard in the middle, one in a corner
    input[1, :, 1, 1] = input[2, :, 2, 2] = torch.tensor(row)
    input.requires_grad_()
    target = labels_for(input, size, ignore_index=-100)
    options = {"reduction": reduction, "label_smoothing": smoothing, **mode}
    if reduction == "none":
        check(input, target, weight, **options)
        return
    (loss, gradient), (plain_loss, plain), (_, truth) = (
        values_and_gradients(function, [input, target, weight], dtype, **options)
        for function, dtype in (
            (functional.upsample_cross_entropy, None),
            (reference.upsample_cross_entropy, None),
            (reference.upsample_cross_entropy, torch.float64),
        )
    )
    assert_parity(gradient, plain, truth, terms=terms_of(input, size, mode.get("mode", "bilinear")))
    # A sum of large logits, whose roundings may cancel for plain PyTorch by luck: as far off as they are in all.
    rounding = roundings(input, size) * torch.finfo(torch.float32).eps
    torch.testing.assert_close(loss, plain_loss, rtol=rounding, atol=rounding * max(map(abs, row)), equal_nan=True)


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("lead", [20.0, 120.0, 3000.0])  # half of it: exponentials that float32 holds, barely, or not
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_neighbours_sure_of_different_classes(
    implementation: str, dtype: torch.dtype, lead: float, reduction: str, smoothing: float, mode: dict[str, Any]
) -> None:
    """Between them no class comes near the neighbours' largest logits."""
    sure = make_labels((2, 5, 6), 7)
    input = (logits((2, 7, 5, 6), dtype) + lead * F.one_hot(sure, 7).movedim(-1, 1)).detach().requires_grad_()
    check(input, labels_for(input, (20, 24)), reduction=reduction, label_smoothing=smoothing, **mode)


@slow_under_the_interpreter
def test_mean_of_many_pixels_keeps_its_digits() -> None:
    input = logits((1, 2, 250, 250))
    target = labels_for(input, (1000, 1000))
    truth = reference.upsample_cross_entropy(input.double(), target)
    # One rounding of the result and a few for each pixel's loss, which don't accumulate.
    torch.testing.assert_close(functional.upsample_cross_entropy(input, target).double(), truth, rtol=2e-7, atol=0)


# ---- beside the values ----


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_label_outside_the_classes_in_backward(isa: str, mode: dict[str, Any]) -> None:
    if _native.INTERPRETED or torch.get_default_device().type != "cpu":
        pytest.skip("the Triton kernels run here, which give NaN instead: kernels/test_labels.py")
    input = logits((1, 3, 4, 5))
    target = labels_for(input, (9, 8))
    loss = functional.upsample_cross_entropy(input, target, torch.ones(3), reduction="none", **mode).sum()
    target.data[0, 7, 2] = 9  # behind autograd's back, which would notice it
    with pytest.raises(IndexError, match=r"target: expected classes in \[0, 3\) .*, got 9$"):
        loss.backward()


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
