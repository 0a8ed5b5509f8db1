"""upsample_argmax against plain PyTorch: labels, confidences, grids, errors, memory."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastseg import functional, reference
from fastseg.testing import assert_parity, make
from tests.kernels.poison import fresh_memory_of_nan
from tests.ops.cross_entropy_cases import DTYPES, INFINITY, LABEL_DTYPES, NAN, VIEWS
from tests.ops.upsample_cases import (
    GRIDS,
    LARGE_GRIDS,
    MODES,
    TILES,
    Size,
    peak_growth,
    roundings,
    slow_under_the_interpreter,
    terms_of,
)


def check(input: Tensor, size: Any = None, scale_factor: Any = None, **options: Any) -> Tensor:
    """The labels; asserts that their logits are the largest, and the confidences as near to the truth as torch's."""
    before = input.detach().clone()
    arguments = {"size": size, "scale_factor": scale_factor, **options}
    labels, confidence = functional.upsample_argmax(input, return_confidence=True, **arguments)
    expected, plain = reference.upsample_argmax(input, return_confidence=True, **arguments)
    _, truth = reference.upsample_argmax(input.double(), return_confidence=True, **arguments)
    assert (labels.shape, labels.dtype) == (expected.shape, expected.dtype)
    assert_parity(confidence, plain, truth, terms=terms_of(input, labels.shape[1:], options.get("mode", "bilinear")))
    assert torch.equal(functional.upsample_argmax(input, **arguments), labels)
    assert_largest(input, labels, reference.upsample(input.double(), size, scale_factor, *_grid(options)))
    torch.testing.assert_close(input, before, rtol=0, atol=0, equal_nan=True)
    return labels


def _grid(options: dict[str, Any]) -> tuple[str, bool]:
    return options.get("mode", "bilinear"), options.get("align_corners", False)


def assert_largest(input: Tensor, labels: Tensor, upsampled: Tensor) -> None:
    """Of the upsampled logits, in float64, each label's is the largest, but for what two of them are rounded by."""
    if labels.numel() == 0:
        return
    precision = torch.finfo(torch.float64 if input.dtype == torch.float64 else torch.float32).eps
    bound = 2 * roundings(input, labels.shape[1:]) * precision * input.double().abs().amax()
    chosen = upsampled.gather(1, labels.long().unsqueeze(1)).squeeze(1)
    assert (upsampled.amax(1) - chosen).max() <= bound


# ---- grids, dtypes, layouts ----


@pytest.mark.parametrize(("before", "after"), GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_grids(implementation: str, dtype: torch.dtype, mode: dict[str, Any], before: Size, after: Size) -> None:
    check(make((2, 5, *before), dtype, scale=3.0), after, **mode)


@slow_under_the_interpreter
@pytest.mark.parametrize(("before", "after"), LARGE_GRIDS.values(), ids=LARGE_GRIDS)
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_large_grids(implementation: str, mode: dict[str, Any], before: Size, after: Size) -> None:
    check(make((2, 3, *before), scale=3.0), after, **mode)


@slow_under_the_interpreter
@pytest.mark.parametrize(("shape", "size"), TILES.values(), ids=TILES)
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_several_tiles(isa: str, mode: dict[str, Any], shape: tuple[int, int, int], size: Size) -> None:
    check(make((1, *shape), scale=3.0), size, **mode)


# Sizes on which the factor's grid isn't that of the size it gives, but for 2 and 4.
FACTORS = {
    "1.5": 1.5,
    "0.4": 0.4,
    "2.3": 2.3,
    "2": 2,
    "4": 4.0,
    "pair": (1.5, 2.3),
    "same-rows": (1, 2.3),
    "1.04": 1.04,
}


@pytest.mark.parametrize("factor", FACTORS.values(), ids=FACTORS)
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scale_factors(implementation: str, dtype: torch.dtype, mode: dict[str, Any], factor: Any) -> None:
    check(make((2, 5, 7, 11), dtype, scale=3.0), scale_factor=factor, **mode)


@pytest.mark.parametrize(("mode", "limit"), [("bilinear", 4.0), ("nearest", 2.5)])
def test_a_scale_factors_grid_is_not_its_sizes(implementation: str, mode: str, limit: float) -> None:
    ramp = torch.arange(7.0).view(1, 1, 1, 7)
    input = torch.cat((torch.full_like(ramp, limit), ramp), 1)
    by_factor = functional.upsample_argmax(input, scale_factor=(1, 0.4), mode=mode)
    by_size = functional.upsample_argmax(input, (1, 2), mode=mode)
    assert by_factor.tolist() == [[[0, 0]]]  # the second column is read at 3.25, or at 2
    assert by_size.tolist() == [[[0, 1]]]  # at 4.75, or at 3


def test_sizes_as_numbers_and_pairs() -> None:
    input = make((1, 3, 4, 6))
    square, pair = functional.upsample_argmax(input, 9), functional.upsample_argmax(input, (9, 9))
    assert torch.equal(square, pair)
    number, factors = (functional.upsample_argmax(input, scale_factor=factor) for factor in (1.5, (1.5, 1.5)))
    assert torch.equal(number, factors)
    assert number.shape == (1, 6, 9)


@pytest.mark.parametrize("classes", [1, 2, 3, 4, 5, 8, 9, 19, 21, 32, 33, 150, 171, 256, 257])
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_class_counts(implementation: str, dtype: torch.dtype, layout: str, classes: int) -> None:
    input = make((2, classes, 3, 5), dtype, scale=3.0, layout=layout)
    labels = check(input, (7, 11))
    assert labels.dtype == (torch.uint8 if classes <= 256 else torch.int64)
    check(input, (7, 11), mode="nearest")


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_strided_input(
    implementation: str, dtype: torch.dtype, mode: dict[str, Any], view: Callable[[Tensor], Tensor]
) -> None:
    check(view(make((4, 6, 5, 12), dtype, scale=3.0)), (13, 9), **mode)


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_no_images(implementation: str, mode: dict[str, Any]) -> None:
    assert check(make((0, 4, 5, 6)), (10, 9), **mode).shape == (0, 10, 9)


@pytest.mark.parametrize("dtype", LABEL_DTYPES.values(), ids=LABEL_DTYPES)
def test_label_dtypes(implementation: str, dtype: torch.dtype) -> None:
    for classes in (3, 256):
        assert check(make((1, classes, 3, 4)), (7, 9), dtype=dtype).dtype == dtype


# ---- ties, NaN, infinities ----


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("size", "mode"), [((8, 10), {}), ((16, 20), {}), ((7, 9), {"align_corners": True}),
                                            ((8, 10), {"mode": "nearest"}), ((4, 10), {})],
                         ids=["x2", "x4", "align_corners", "nearest", "columns-alone"])  # fmt: skip
def test_ties_take_the_lowest_class(
    implementation: str, size: Size, mode: dict[str, Any], dtype: torch.dtype, layout: str
) -> None:
    # Small integers with weights of at most 1/64: every dtype interpolates them exactly, and many tie.
    input = torch.randint(-1, 2, (2, 21, 4, 5)).to(dtype)
    input = torch.cat((input, input.flip(1)), 1)  # each class twice
    input = input.contiguous(
        memory_format=torch.channels_last if layout == "channels_last" else torch.contiguous_format
    )
    labels = functional.upsample_argmax(input, size, **mode)
    assert torch.equal(labels, reference.upsample_argmax(input.double(), size, **mode))


@pytest.mark.parametrize("value", [0.0, -0.0, 1e4, -1e4, INFINITY, -INFINITY, NAN])
@pytest.mark.parametrize("classes", [3, 21])
def test_constant_logits_take_class_zero(isa: str, classes: int, value: float) -> None:
    input = torch.full((2, classes, 4, 5), value)  # which torch itself rounds differently from class to class
    for mode in MODES.values():
        assert functional.upsample_argmax(input, (8, 10), **mode).count_nonzero() == 0


SPECIAL = {"nan": NAN, "infinity": INFINITY, "negative-infinity": -INFINITY}
EXACT_GRIDS: dict[str, tuple[Size, dict[str, Any]]] = {
    "x2": ((8, 10), {}),
    "align_corners": ((7, 9), {"align_corners": True}),
    "nearest": ((8, 10), {"mode": "nearest"}),
    "rows-alone": ((8, 5), {}),
    "same": ((4, 5), {}),
    "same-align_corners": ((4, 5), {"align_corners": True}),
}


@pytest.mark.usefixtures("plain_upsampling_of_cpus")
@pytest.mark.parametrize(("size", "mode"), EXACT_GRIDS.values(), ids=EXACT_GRIDS)
@pytest.mark.parametrize("value", SPECIAL.values(), ids=SPECIAL)
@pytest.mark.parametrize("classes", [4, 21])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_special_values_as_torch(
    implementation: str, dtype: torch.dtype, classes: int, value: float, size: Size, mode: dict[str, Any]
) -> None:
    input = torch.randint(-8, 9, (2, classes, 4, 5)).to(dtype)
    input[torch.rand(input.shape) < 0.2] = value
    labels, confidence = functional.upsample_argmax(input, size, return_confidence=True, **mode)
    expected, plain = reference.upsample_argmax(input, size, return_confidence=True, **mode)
    _, truth = reference.upsample_argmax(input.double(), size, return_confidence=True, **mode)
    assert torch.equal(labels, expected)
    assert_parity(confidence, plain, truth, terms=classes)


@pytest.mark.parametrize("extent", [{"size": (4, 5)}, {"scale_factor": 1.1}], ids=["size", "scale_factor"])
def test_masked_class_at_full_size(implementation: str, extent: dict[str, Any]) -> None:
    input = make((2, 4, 4, 5))
    input[:, 2] = -INFINITY  # which a neighbour's weight of 0 would make NaN of
    labels, confidence = functional.upsample_argmax(input, **extent, return_confidence=True)
    assert torch.equal(labels.long(), input.argmax(1))
    torch.testing.assert_close(confidence, input.softmax(1).amax(1))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_confidence_is_a_share(implementation: str, dtype: torch.dtype) -> None:
    input = make((2, 21, 4, 5), dtype, scale=30.0)
    _, confidence = functional.upsample_argmax(input, (13, 9), return_confidence=True)
    assert confidence.dtype == dtype
    assert confidence.min() >= 1 / 21 - torch.finfo(dtype).eps
    assert confidence.max() <= 1


# ---- beside the values ----


def test_no_gradient(implementation: str) -> None:
    input = make((1, 3, 4, 5), requires_grad=True)
    labels, confidence = functional.upsample_argmax(input, (8, 9), return_confidence=True)
    assert not labels.requires_grad
    assert not confidence.requires_grad


def test_equal_for_any_number_of_threads_and_twice(isa: str, threads: Callable[[int], None]) -> None:
    input = make((2, 21, 13, 10))
    results = []
    for count in (1, 2, 3, 3):
        threads(count)
        results.append(functional.upsample_argmax(input, (41, 33), return_confidence=True))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=0)


def test_fresh_memory_filled_with_nan_changes_nothing(implementation: str) -> None:
    input = make((2, 5, 6, 7))
    expected = functional.upsample_argmax(input, (13, 15), return_confidence=True)
    with fresh_memory_of_nan():
        poisoned = functional.upsample_argmax(input, (13, 15), return_confidence=True)
    torch.testing.assert_close(poisoned, expected, rtol=0, atol=0)


X = torch.zeros(2, 4, 3, 5)
REFUSED: dict[str, tuple[Tensor, dict[str, Any], type[Exception], str]] = {
    "rank": (X[0], {"size": 4}, ValueError, r"input: expected \[N, C, h, w\], got shape \(4, 3, 5\)"),
    "no-columns": (X[..., :0], {"size": 4}, ValueError, r"input: expected at least one row and one column"),
    "no-class": (X[:, :0], {"size": 4}, ValueError, r"input: expected at least one class, got shape \(2, 0, 3, 5\)"),
    "integer-logits": (X.long(), {"size": 4}, TypeError, "input: expected float32.* got torch.int64"),
    "mode": (X, {"size": 4, "mode": "area"}, ValueError, "mode: expected \"bilinear\" or \"nearest\", got 'area'"),
    "corners": (X, {"size": 4, "mode": "nearest", "align_corners": True}, ValueError, "align_corners: only mode"),
    "neither": (X, {}, ValueError, "size: expected either it or scale_factor, got None and None"),
    "both": (X, {"size": 4, "scale_factor": 2}, ValueError, "size: expected either it or scale_factor, got 4 and 2"),
    "triple": (X, {"size": (1, 2, 3)}, ValueError, r"size: expected one number or \(height, width\), got \(1, 2, 3\)"),
    "one-factor": (X, {"scale_factor": (2.0,)}, ValueError, r"scale_factor: expected one number .* got \(2.0,\)"),
    "no-output": (X, {"size": (0, 4)}, ValueError, r"size: expected at least one row .* got 0 x 4 of size \(0, 4\)"),
    "float-size": (X, {"size": 4.0}, ValueError, "size: expected an integer .* got 4.0"),
    "no-size-in-a-pair": (X, {"size": (None, 4)}, ValueError, "size: expected an integer .* got None"),
    "no-factor-in-a-pair": (X, {"scale_factor": (None, 2.0)}, ValueError, "scale_factor: expected finite"),
    "nested-factors": (X, {"scale_factor": [[2.0], [2.0]]}, ValueError, "scale_factor: expected finite"),
    "three-factors": (X, {"scale_factor": [2.0, 2.0, 2.0]}, ValueError, "scale_factor: expected one number"),
    "nan-factor": (X, {"scale_factor": float("nan")}, ValueError, "scale_factor: expected finite .* got nan"),
    "infinite-factor": (X, {"scale_factor": (1.0, float("inf"))}, ValueError, "scale_factor: expected finite"),
    "negative-factor": (X, {"scale_factor": -2.0}, ValueError, "scale_factor: expected finite .* above 0, got -2"),
    "word-factor": (X, {"scale_factor": "2"}, ValueError, "scale_factor: expected finite"),
    "small-factor": (X, {"scale_factor": 0.3}, ValueError, "got 0 x 1 of scale_factor 0.3"),
    "dtype": (X, {"size": 4, "dtype": torch.int8}, TypeError, "dtype: expected uint8.*got torch.int8"),
    "small-dtype": (
        torch.zeros(1, 257, 2, 2), {"size": 4, "dtype": torch.uint8}, ValueError,
        "dtype: torch.uint8 can't hold the labels of 257 classes",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("input", "options", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(input: Tensor, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        functional.upsample_argmax(input, **options)


@slow_under_the_interpreter
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_peak_memory(layout: str, mode: dict[str, Any]) -> None:
    input = make((2, 64, 32, 32), layout=layout)
    full = 2 * 64 * 512 * 512 * input.element_size()

    def predict() -> None:
        functional.upsample_argmax(input, 512, return_confidence=True, **mode)

    predict()  # code and scratch memory that stay
    labels, confidence = full // 64 // 4, full // 64
    grown = peak_growth(predict)
    assert grown < labels + confidence + full / 20  # and the threads' tiles
