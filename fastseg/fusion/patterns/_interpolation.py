"""What the patterns that begin with interpolate share: which of its calls the upsampling operators serve."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, fx

from fastseg.functional._checks import FLOATING_DTYPES
from fastseg.fusion.calls import Call, number_of
from fastseg.fusion.pattern import demand, demand_free
from fastseg.ops.upsampling import MODES

ARGUMENTS = ("size", "scale_factor", "mode", "align_corners", "recompute_scale_factor")


def demand_grid(call: Call) -> None:
    """Raises `Unfit` where the operators have no such grid, whatever the input is."""
    demand_free(call)
    demand(call["mode"] in MODES, f"interpolate: mode {call['mode']!r}")
    demand(not call["antialias"], "interpolate: antialias")
    computed = any(isinstance(factor, fx.Node) for factor in factors(number_of(call["scale_factor"])))
    demand(not computed, "interpolate: scale_factor is computed while the model runs")


def why_not(input: Tensor) -> str | None:
    """Why the operators don't serve logits, or None."""
    if input.ndim != 4:
        return f"interpolate: logits of {input.ndim} dimensions, not [N, C, h, w]"
    return None if input.dtype in FLOATING_DTYPES else f"interpolate: logits in {input.dtype}"


def factors(scale_factor: Any) -> tuple[float, float]:
    """A scale factor for (height, width)."""
    pair = tuple(scale_factor) if isinstance(scale_factor, (tuple, list)) else (scale_factor, scale_factor)
    return pair[0], pair[-1]


def output_size(input: Tensor, size: Any, scale_factor: Any) -> tuple[int, ...]:
    """The size that interpolate gives."""
    if size is not None:
        return tuple(size) if isinstance(size, (tuple, list)) else (size, size)
    return tuple(math.floor(n * f) for n, f in zip(input.shape[2:], factors(scale_factor), strict=True))


def is_grid_of_size(input: Tensor, scale_factor: Any, align_corners: Any, recompute_scale_factor: Any) -> bool:
    """Whether the grid of a scale factor is that of the size which it gives, so that the size alone says it."""
    if scale_factor is None or align_corners or recompute_scale_factor:
        return True
    if all(float(factor).is_integer() for factor in factors(scale_factor)):
        return True
    extents = input.shape[2:]
    known = all(isinstance(extent, int) for extent in extents)
    return known and all((n * f).is_integer() for n, f in zip(extents, factors(scale_factor), strict=True))
