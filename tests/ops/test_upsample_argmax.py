"""upsample_argmax against plain PyTorch: labels, confidences, grids, errors, memory."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fastseg import functional, reference
from fastseg.ops import volumes
from fastseg.testing import assert_parity, make
from tests.ops.cross_entropy_cases import DTYPES, INFINITY, LABEL_DTYPES, NAN
from tests.ops.upsample_cases import (
    GRIDS,
    LARGE_GRIDS,
    MODES,
    TILES,
    VOLUME_GRIDS,
    VOLUME_MODES,
    Size,
    grid_of,
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
    assert_largest(input, labels, reference.upsample(input.double(), size, scale_factor, *grid_of(options)))
    torch.testing.assert_close(input, before, rtol=0, atol=0, equal_nan=True)
    return labels


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


@pytest.mark.parametrize("dtype", LABEL_DTYPES.values(), ids=LABEL_DTYPES)
def test_label_dtypes(implementation: str, dtype: torch.dtype) -> None:
    for classes in (3, 256):
        assert check(make((1, classes, 3, 4)), (7, 9), dtype=dtype).dtype == dtype


# ---- volumes ----


@pytest.mark.parametrize(("before", "after"), VOLUME_GRIDS.values(), ids=VOLUME_GRIDS)
@pytest.mark.parametrize("mode", VOLUME_MODES.values(), ids=VOLUME_MODES)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_volumes(
    implementation: str, dtype: torch.dtype, layout: str, mode: dict[str, Any], before: Size, after: Size
) -> None:
    check(make((2, 5, *before), dtype, scale=3.0, layout=layout), after, **mode)


@pytest.mark.parametrize("factor", [1.5, 0.4, 2, (1, 2.3, 1.5), (2.3, 1, 1)], ids=str)
@pytest.mark.parametrize("mode", VOLUME_MODES.values(), ids=VOLUME_MODES)
def test_scale_factors_of_volumes(implementation: str, mode: dict[str, Any], factor: Any) -> None:
    check(make((1, 5, 5, 7, 6), scale=3.0), scale_factor=factor, **mode)


@slow_under_the_interpreter
@pytest.mark.parametrize("mode", VOLUME_MODES.values(), ids=VOLUME_MODES)
def test_volumes_of_several_bands_and_tiles(isa: str, mode: dict[str, Any]) -> None:
    check(make((2, 3, 5, 40, 9), scale=3.0), (9, 75, 14), **mode)
    check(make((1, 1000, 2, 2, 21), scale=3.0), (3, 3, 80), **mode)


def test_volumes_of_several_slabs(implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    input, options = make((2, 5, 4, 5, 6)), {"mode": "trilinear", "return_confidence": True}
    whole = functional.upsample_argmax(input, (9, 10, 12), **options)
    monkeypatch.setattr(volumes, "SLAB_BYTES", 2 * input[0, :, 0].nbytes)
    torch.testing.assert_close(functional.upsample_argmax(input, (9, 10, 12), **options), whole, rtol=0, atol=0)


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


@pytest.mark.parametrize("classes", [40, 33])
def test_ties_of_many_classes(implementation: str, classes: int) -> None:
    """Which a GPU compares in pairs; the last of an odd number with itself."""
    input = torch.randint(0, 6, (2, classes, 4, 5)).float()
    input[0, -1, 1] = 9
    assert torch.equal(functional.upsample_argmax(input, (8, 10)), reference.upsample_argmax(input, (8, 10)))


@pytest.mark.parametrize("value", [0.0, -0.0, 1e4, -1e4, INFINITY, -INFINITY, NAN])
@pytest.mark.parametrize("classes", [3, 21])
def test_constant_logits_take_class_zero(isa: str, classes: int, value: float) -> None:
    input = torch.full((2, classes, 4, 5), value)  # which torch itself rounds differently from class to class
    for mode in MODES.values():
        assert functional.upsample_argmax(input, (8, 10), **mode).count_nonzero() == 0
    for mode in VOLUME_MODES.values():
        assert functional.upsample_argmax(input[:, :, None], (3, 8, 10), **mode).count_nonzero() == 0


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


@pytest.mark.parametrize("size", [(6, 8, 10), (3, 8, 10), (6, 4, 5)], ids=["x2", "all-but-depth", "depth-alone"])
@pytest.mark.parametrize("mode", ["trilinear", "nearest"])
@pytest.mark.parametrize("value", SPECIAL.values(), ids=SPECIAL)
@pytest.mark.usefixtures("plain_upsampling_of_cpus")
def test_special_values_of_volumes_as_torch(implementation: str, value: float, mode: str, size: Size) -> None:
    input = torch.randint(-8, 9, (2, 4, 3, 4, 5)).float()
    input[torch.rand(input.shape) < 0.1] = value
    labels = functional.upsample_argmax(input, size, mode=mode)
    assert torch.equal(labels, reference.upsample_argmax(input, size, mode=mode))


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
