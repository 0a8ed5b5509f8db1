"""What the patterns that begin with interpolate share: which of its calls the upsampling operators serve."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fastseg.functional._checks import FLOATING_DTYPES
from fastseg.fusion.calls import Call, number_of, tensor_of
from fastseg.fusion.pattern import Unfit, demand
from fastseg.ops.upsampling import MODES

ARGUMENTS = ("size", "scale_factor", "mode", "align_corners", "recompute_scale_factor")
_AFTER = ("cast", "contiguous", "permute", "transpose", "flatten", "reshape")

# The dimensions of [N, C, H, W], or [N, C, D, H, W], in each of a value's.
Dims = list[tuple[int, ...]]


@dataclass(frozen=True)
class Upsampled:
    """Upsampled logits.

    Attributes:
        interpolate: The call that upsamples them.
        nodes: It, and the calls after it that change their dtype or lay them out as rows.
        logits: What is known of the logits before.
        dtype: The wider dtype that they are converted to, or None.
        rows: Whether they are rows [N * H * W, C], or [N * D * H * W, C].
    """

    interpolate: Call
    nodes: list[fx.Node]
    logits: Tensor
    dtype: torch.dtype | None
    rows: bool

    @property
    def arguments(self) -> dict[str, Any]:
        """What `before` takes, and the grid."""
        return {
            "input": self.interpolate["input"],
            "dtype": self.dtype,
            **{name: self.interpolate[name] for name in ARGUMENTS},
        }


def before(
    input: Tensor, dtype: torch.dtype | None, size: Any, scale_factor: Any, mode: str, align_corners: bool | None,
    recompute_scale_factor: bool | None,
) -> tuple[Tensor, dict[str, Any]]:  # fmt: skip
    """The logits and the grid, as the operators that resize take them."""
    if dtype is not None:
        input = input.to(dtype)
    if recompute_scale_factor:
        size, scale_factor = output_size(input, None, scale_factor), None
    grid = {"size": size, "scale_factor": scale_factor, "mode": mode, "align_corners": bool(align_corners)}
    return input, grid


def upsampled(call: Call | None, volumes: bool = False) -> Upsampled:
    """The upsampled logits that a call gives; `Unfit` where it gives none, or the operators have no such grid.

    A conversion is done to the small logits instead, and what they are converted to isn't rounded in between.
    """
    after: list[Call] = []
    while call is not None and call.operation in _AFTER:
        after.insert(0, call)
        call = call.source()
    if call is None or call.operation != "interpolate":
        raise Unfit
    logits, last = tensor_of(call["input"]), tensor_of(after[-1].node if after else call.node)
    if logits is None or last is None:
        raise Unfit
    known = logits.ndim == 4 or (volumes and logits.ndim == 5)
    demand(known, f"interpolate: logits of {logits.ndim} dimensions, not [N, C, h, w]")
    as_map: Dims = [(dim,) for dim in range(logits.ndim)]
    as_rows: Dims = [(0, *range(2, logits.ndim)), (1,)]
    dims = as_map
    for layout in after:
        dims = laid_out(layout, dims) if dims else dims
    known = dims in (as_map, as_rows)
    demand(known, "interpolate: what it gives is laid out neither as a map nor as rows [N * H * W, C]")
    _demand_grid(call, logits.ndim - 2)
    demand(logits.dtype in FLOATING_DTYPES, f"interpolate: logits in {logits.dtype}")
    dtype = None if last.dtype == logits.dtype else last.dtype
    return Upsampled(call, [call.node, *(c.node for c in after)], logits, dtype, dims == as_rows)


def laid_out(call: Call, dims: Dims) -> Dims:
    """Which dimensions a value's are made of, after a call; none where they can't be told."""
    before, after = tensor_of(call["input"]), tensor_of(call.node)
    if before is None or after is None:
        raise Unfit
    if call.operation == "cast":
        wider = after.dtype in FLOATING_DTYPES and torch.promote_types(before.dtype, after.dtype) == after.dtype
        demand(wider, f"interpolate: what it gives is converted to {after.dtype}")
        demand(before.device == after.device, f"interpolate: what it gives is moved to {after.device}")
        return dims
    demand(before.dtype == after.dtype)
    if call.operation == "permute":
        order = call["dims"][0] if isinstance(call["dims"][0], Sequence) else call["dims"]
        return [dims[at] for at in order]
    if call.operation == "transpose":
        swapped = list(dims)
        swapped[call["dim0"]], swapped[call["dim1"]] = dims[call["dim1"]], dims[call["dim0"]]
        return swapped
    if before.ndim == after.ndim:
        return dims if before.shape == after.shape else []
    # The dimensions at either end that a reshape keeps; those between become one.
    merged = before.ndim - after.ndim + 1
    for first in range(after.ndim):
        rest = first + merged
        if after.shape[:first] == before.shape[:first] and after.shape[first + 1 :] == before.shape[rest:]:
            return [*dims[:first], tuple(dim for group in dims[first:rest] for dim in group), *dims[rest:]]
    return []


def _demand_grid(call: Call, axes: int) -> None:
    demand(call["mode"] in MODES[axes], f"interpolate: mode {call['mode']!r}")
    demand(not call["antialias"], "interpolate: antialias")
    computed = any(isinstance(factor, fx.Node) for factor in factors(number_of(call["scale_factor"]), axes))
    demand(not computed, "interpolate: scale_factor is computed while the model runs")


def factors(scale_factor: Any, axes: int) -> tuple[float, ...]:
    """A scale factor for each axis of an image."""
    return tuple(scale_factor) if isinstance(scale_factor, (tuple, list)) else (scale_factor,) * axes


def output_size(input: Tensor, size: Any, scale_factor: Any) -> tuple[int, ...]:
    """The size that interpolate gives."""
    if size is not None:
        return tuple(size) if isinstance(size, (tuple, list)) else (size,) * (input.ndim - 2)
    by_axis = factors(scale_factor, input.ndim - 2)
    return tuple(math.floor(n * f) for n, f in zip(input.shape[2:], by_axis, strict=True))


def grid_of_size(up: Upsampled) -> dict[str, Any]:
    """The grid, of an operator that takes the size from its target; `Unfit` where the size doesn't say it."""
    call = up.interpolate
    factor, corners = number_of(call["scale_factor"]), call["align_corners"]
    demand(
        _is_grid_of_size(up.logits, factor, corners, call["recompute_scale_factor"]),
        f"interpolate: the grid of scale_factor {factor} isn't that of the size which it gives",
    )
    return {"mode": call["mode"], "align_corners": bool(corners)}


def _is_grid_of_size(input: Tensor, scale_factor: Any, align_corners: Any, recompute_scale_factor: Any) -> bool:
    """Whether the grid of a scale factor is that of the size which it gives, so that the size alone says it."""
    if scale_factor is None or align_corners or recompute_scale_factor:
        return True
    by_axis = factors(scale_factor, input.ndim - 2)
    if all(float(factor).is_integer() for factor in by_axis):
        return True
    extents = input.shape[2:]
    known = all(isinstance(extent, int) for extent in extents)
    return known and all((n * f).is_integer() for n, f in zip(extents, by_axis, strict=True))
