"""What the tests of the upsampling operators share: grids, error bounds, and the comparison with plain PyTorch."""

import importlib
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastseg import _native
from fastseg.testing import make_labels
from tests.ops import cross_entropy_cases

Size = tuple[int, ...]

# Options that choose a grid.
MODES: dict[str, dict[str, Any]] = {
    "bilinear": {},
    "align_corners": {"align_corners": True},
    "nearest": {"mode": "nearest"},
}


VOLUME_MODES: dict[str, dict[str, Any]] = {
    "trilinear": {"mode": "trilinear"},
    "align_corners": {"mode": "trilinear", "align_corners": True},
    "nearest": {"mode": "nearest"},
}


def grid_of(options: dict[str, Any]) -> tuple[str, bool]:
    """Mode and align_corners, as `fastseg.reference.upsample` takes them."""
    return options.get("mode", "bilinear"), options.get("align_corners", False)


# The sizes of input and target, and why each is here.
GRIDS: dict[str, tuple[Size, Size]] = {
    "x2": ((8, 9), (16, 18)),  # torch's nearest has a kernel of its own for it
    "x4": ((6, 5), (24, 20)),  # what segmentation networks do
    "x8": ((3, 2), (24, 16)),
    "non-integer": ((10, 13), (27, 33)),
    "odd": ((7, 11), (29, 31)),
    "up-and-down": ((5, 14), (17, 6)),
    "down": ((13, 17), (5, 7)),  # bilinear skips pixels, whose gradient is zero
    "down-x4": ((16, 12), (4, 3)),
    "rows-alone": ((6, 9), (13, 9)),  # torch copies an axis that keeps its size
    "columns-alone": ((7, 5), (7, 18)),
    "one-more": ((8, 8), (9, 9)),
    "from-one-pixel": ((1, 1), (7, 9)),
    "from-one-row": ((1, 6), (5, 14)),
    "from-one-column": ((6, 1), (14, 5)),
    "to-one-pixel": ((7, 5), (1, 1)),  # align_corners has no distance between corners
    "to-one-row": ((7, 5), (1, 12)),
    "same": ((6, 7), (6, 7)),  # nothing to interpolate
}

# The same of volumes, along whose depth two planes are blended before all else.
VOLUME_GRIDS: dict[str, tuple[Size, Size]] = {
    "x2": ((4, 5, 6), (8, 10, 12)),
    "non-integer": ((3, 4, 7), (5, 7, 11)),
    "up-and-down": ((6, 7, 4), (4, 11, 3)),
    "depth-alone": ((4, 6, 7), (9, 6, 7)),
    "all-but-depth": ((5, 4, 6), (5, 9, 11)),
    "from-one-plane": ((1, 4, 5), (4, 7, 9)),
    "to-one-plane": ((5, 4, 6), (1, 7, 9)),
    "same": ((3, 4, 5), (3, 4, 5)),
}

# Too slow for Triton's interpreter: several vectors, tiles and bands.
LARGE_GRIDS: dict[str, tuple[Size, Size]] = {
    "many-bands": ((33, 41), (131, 165)),
    "many-columns": ((3, 300), (7, 1203)),
    "many-rows": ((300, 3), (1203, 7)),
    "far-down": ((200, 310), (9, 11)),
}

# The smallest [C, h, w] and size of the labels that reach a path of the C++ kernels, which cut a row into tiles of
# 2^15 / C float32 columns, or half as many where they sum gradients; in each several tiles, and no whole last one.
TILES: dict[str, tuple[tuple[int, int, int], Size]] = {
    "up": ((1000, 2, 21), (3, 80)),  # neighbours that lie in two tiles
    "to-the-last-column": ((1000, 2, 9), (2, 33)),  # a last tile of one column, which has no right neighbour
    "down": ((1000, 1, 160), (2, 80)),  # columns that vectors can't permute
    "columns-alone": ((1000, 2, 80), (3, 80)),  # nothing to interpolate along them
}

slow_under_the_interpreter = pytest.mark.skipif(_native.INTERPRETED, reason="too slow under Triton's interpreter")


def check(input: Tensor, target: Tensor, weight: Tensor | None = None, **options: Any) -> list[Tensor]:
    """`cross_entropy_cases.check` of upsample_cross_entropy."""
    size, mode = tuple(target.shape[2 - input.ndim :]), options.get("mode", "bilinear")
    return cross_entropy_cases.check(
        input, target, weight, operator="upsample_cross_entropy", terms=terms_of(input, size, mode), **options
    )


def terms_of(input: Tensor, size: Size, mode: str = "bilinear") -> int:
    """The terms of the sums over classes, and over the pixels that read a pixel of the input, for `assert_parity`."""
    reach = 1 if mode == "nearest" else 2
    pixels = math.prod(math.ceil(reach * max(after / before, 1)) for before, after in _axes(input, size))
    if input.dtype != torch.float64:
        return input.shape[1] + pixels
    # Plain PyTorch is its own truth: what `cross_entropy_cases.terms_of` allows for, and interpolation's roundings.
    return (math.isqrt(cross_entropy_cases.terms_of(input)) + roundings(input, size)) ** 2 + pixels


def roundings(input: Tensor, size: Size) -> int:
    """How far an upsampled logit may be from its true value, in units of the largest logit times the dtype's epsilon.

    Each rounding is half a unit. Along an axis of n pixels, the position (at most n) comes of three: the step, its
    product, and the difference of one half; an error of the position counts twice the largest logit, the most that
    neighbours can differ by. Weights, products and sums of two neighbours are four more.
    """
    return sum(3 * before + 2 for before, after in _axes(input, size) if before != after)


def _axes(input: Tensor, size: Size) -> list[tuple[int, int]]:
    return list(zip(input.shape[2:], size, strict=True))


def labels_for(input: Tensor, size: Size, dtype: torch.dtype = torch.int64, **options: Any) -> Tensor:
    """Labels of the input's images and classes, of another size."""
    return make_labels((input.shape[0], *size), input.shape[1], dtype, **options)


def peak_growth(call: Callable[[], object]) -> int:
    """Bytes by which memory in use grows at most during ``call``."""
    devices = pytest.importorskip("benchmarks.harness.devices", reason="benchmarks/ is part of a checkout alone")
    grown = devices.DEVICES[torch.get_default_device().type].peak_growth(call)
    if grown is None:
        pytest.skip(importlib.import_module("benchmarks.harness.memory").unknown())
    return grown
