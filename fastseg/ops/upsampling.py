"""The grids of `torch.nn.functional.interpolate`: what the upsampling operators' kernels are told of them.

For the output's position o along an axis, the kernels read the input at

* o, where the axis keeps its size;
* "bilinear" and "trilinear": ``x = max(step * (o + 1/2) - 1/2, 0)``, with align_corners ``x = step * o``: at floor(x)
  and at its next neighbour, where there is one, with the weights 1 - (x - floor(x)) and x - floor(x);
* "nearest": ``floor(step * o)``, the product in float32;

and no farther than at the input's last position.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

# Of images and of volumes: by how many dimensions an image has.
MODES = {2: ("nearest", "bilinear"), 3: ("nearest", "trilinear")}


class Upsampling(NamedTuple):
    """What the C++ bindings and the Triton launchers are told of a grid, and read by name.

    Attributes:
        mode: "nearest", "bilinear" or "trilinear".
        align_corners: As in `torch.nn.functional.interpolate`.
        steps: How far apart neighbouring output positions are in the input, for (height, width) or (depth, height,
            width).
    """

    mode: str
    align_corners: bool
    steps: tuple[float, ...]


def grid_between(
    input_size: Sequence[int], output_size: Sequence[int], mode: str, align_corners: bool
) -> tuple[str, bool]:
    """Mode and align_corners as the operators take them: "nearest", which copies, where all axes stay.

    The other mode would count a neighbour 0 times, which makes NaN of infinity.
    """
    return ("nearest", False) if tuple(input_size) == tuple(output_size) else (mode, align_corners)


def upsampling_between(
    input_size: Sequence[int], output_size: Sequence[int], mode: str, align_corners: bool,
    scale_factor: Sequence[float] | None = None,
) -> Upsampling:  # fmt: skip
    """The grid from the input's ([depth,] height, width) to the output's, which scale factors may have given."""
    factors = [None] * len(input_size) if scale_factor is None else scale_factor
    steps = [
        _step(before, after, mode, align_corners, factor)
        for before, after, factor in zip(input_size, output_size, factors, strict=True)
    ]
    return Upsampling(mode, align_corners, tuple(steps))


def _step(before: int, after: int, mode: str, align_corners: bool, factor: float | None) -> float:
    if before == after:  # torch copies then, whatever the factor
        return 1.0
    if align_corners:
        return (before - 1) / (after - 1) if after > 1 else 0.0
    if factor is None or (mode == "nearest" and after == 2 * before):  # torch repeats every position then
        return before / after
    return 1 / factor
