"""What kernels are told of a grid, against the positions that torch itself reads on a CPU."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fastseg import reference
from fastseg.ops.upsampling import upsampling_between
from tests.ops.upsample_cases import MODES

EXTENTS = st.integers(1, 200)
FACTORS = st.floats(0.1, 8)


def positions(before: int, after: int, step: float, mode: str, align_corners: bool) -> np.ndarray:
    """Where the kernels read a column of ``before`` pixels for each of ``after``, as `upsampling` words it."""
    output = np.arange(after, dtype=np.float64)
    if before == after:
        return output
    if mode == "nearest":
        read = np.floor(np.float32(step) * output.astype(np.float32))
    else:
        read = step * output if align_corners else np.maximum(step * (output + 0.5) - 0.5, 0)
    return np.minimum(read, before - 1)


def torchs_positions(
    before: int, after: int | None, factor: float | None, mode: str, align_corners: bool
) -> np.ndarray:
    """The same from torch: a ramp, interpolated, is its own positions."""
    # Of float64 maps on CPUs, some of torch's kernels compute the nearest position in float64, others in float32.
    dtype = torch.float32 if mode == "nearest" else torch.float64
    ramp = torch.arange(before, dtype=dtype, device="cpu").view(1, 1, before, 1)
    size = None if after is None else (after, 1)
    factors = None if factor is None else (factor, 1.0)
    return reference.upsample(ramp, size, factors, mode, align_corners).double().flatten().numpy()


def options_of(mode: dict[str, Any]) -> tuple[str, bool]:
    return mode.get("mode", "bilinear"), mode.get("align_corners", False)


def check(before: int, after: int, factor: float | None, mode: str, align_corners: bool) -> None:
    factors = None if factor is None else (factor, 1.0)
    step, other = upsampling_between((before, 1), (after, 1), mode, align_corners, factors).steps
    assert other == 1.0
    read = positions(before, after, step, mode, align_corners)
    if mode == "bilinear":  # torch takes float64 positions to float32 to find their floor: they may round up to it
        above = np.floor(read.astype(np.float32))
        read = np.where((above > read), above, read)
    expected = torchs_positions(before, None if factor else after, factor, mode, align_corners)
    # Of each number, the step, its product and a difference are rounded; then the two weights of the ramp's values.
    np.testing.assert_allclose(read, expected, rtol=0, atol=0 if mode == "nearest" else 8 * np.spacing(float(before)))


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@settings(max_examples=300, deadline=None, derandomize=True)
@given(before=EXTENTS, after=EXTENTS)
def test_steps_of_sizes(mode: dict[str, Any], before: int, after: int) -> None:
    check(before, after, None, *options_of(mode))


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@settings(max_examples=300, deadline=None, derandomize=True)
@given(before=EXTENTS, factor=FACTORS)
def test_steps_of_scale_factors(mode: dict[str, Any], before: int, factor: float) -> None:
    after = int(before * factor)
    assume(after > 0)
    if mode == MODES["nearest"]:  # where torch's kernels for large maps (not channels_last) don't do as its others do
        assume(after not in (before, 2 * before))
    check(before, after, factor, *options_of(mode))


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("before", [1, 2, 3, 7, 19, 64, 333])
@pytest.mark.parametrize("after", [1, 2, 3, 7, 14, 38, 128, 256, 1000, 1332])
def test_steps_of_usual_sizes(after: int, before: int, mode: dict[str, Any]) -> None:
    check(before, after, None, *options_of(mode))


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("before", [7, 10, 33])
@pytest.mark.parametrize("factor", [0.4, 1.0, 1.04, 1.5, 2.0, 2.01, 2.3, 4.0])
def test_steps_of_usual_scale_factors(factor: float, before: int, mode: dict[str, Any]) -> None:
    check(before, int(before * factor), factor, *options_of(mode))


def test_rows_and_columns_have_steps_of_their_own() -> None:
    assert upsampling_between((8, 9), (16, 3), "bilinear", False).steps == (0.5, 3.0)
    assert upsampling_between((8, 9), (15, 3), "bilinear", True).steps == (0.5, 4.0)
    assert upsampling_between((8, 9), (12, 20), "bilinear", False, (1.5, 2.3)).steps == (1 / 1.5, 1 / 2.3)
