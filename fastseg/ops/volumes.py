"""Volumes for kernels that know images alone, which those of GPUs are: slabs of planes, upsampled one plane at a time.

An output plane is the upsampling of a weighted sum of two input planes. The sums of a slab of output planes, still of
the input's height and width, are made by torch's own operators; so what is held of the logits is a slab.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastseg.ops.losses.options import accumulation_dtype
from fastseg.ops.upsampling import Upsampling

SLAB_BYTES = 64 << 20  # of a slab's logits: enough for a GPU, little beside its memory


class Slab(NamedTuple):
    """Some output planes of a volume.

    Attributes:
        logits: What is upsampled to them, ``[planes, C, h, w]``.
        at: Where they are in a tensor of the output's pixels, ``[N, D, H, W]``.
        grid: From the logits to them.
    """

    logits: Tensor
    at: tuple[int, slice]
    grid: Upsampling


class Blend(NamedTuple):
    """The two input planes that an output plane is made of, and how much each counts."""

    first: int
    second: int
    weights: tuple[float, float]


def slabs(input: Tensor, size: Sequence[int], upsampling: Upsampling) -> Iterator[Slab]:
    """The slabs of an output of a size."""
    grid = Upsampling(upsampling.mode, upsampling.align_corners, upsampling.steps[1:])
    plane = accumulation_dtype(input).itemsize * input[0, :, 0].numel() if len(input) else 1
    thickness = max(SLAB_BYTES // plane, 1)
    located = _locate(input.shape[2], size[0], upsampling, input.device)
    for image, volume in enumerate(input):
        for start in range(0, size[0], thickness):
            planes = slice(start, min(start + thickness, size[0]))
            of_slab = (located[0][planes], located[1][planes], located[2][planes])
            yield Slab(_blend(volume, of_slab, upsampling.mode), (image, planes), grid)


def blends_of(depth: int, out_depth: int, upsampling: Upsampling) -> list[Blend]:
    """What each output plane is made of; see `fastseg.ops.upsampling` for the grid."""
    first, second, shares = _locate(depth, out_depth, upsampling, torch.device("cpu"))
    return [
        Blend(near, far, (1 - share, share))
        for near, far, share in zip(first.tolist(), second.tolist(), shares.tolist(), strict=True)
    ]


def _locate(depth: int, out_depth: int, upsampling: Upsampling, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The two input planes of each output plane, and the second's weight, in float64.

    They are made where they are needed: a copy to a GPU would wait for it.
    """
    step, mode = upsampling.steps[0], upsampling.mode
    planes = torch.arange(out_depth, device=device)
    if depth == out_depth or mode == "nearest":
        # In single precision, as torch does for every dtype.
        first = planes if depth == out_depth else (planes.float() * step).long().clamp(max=depth - 1)
        return first, first, planes.double() * 0
    source = planes.double() * step if upsampling.align_corners else (planes.double() + 0.5) * step - 0.5
    source = source.clamp(min=0)
    first = source.long().clamp(max=depth - 1)
    return first, (first + 1).clamp(max=depth - 1), (source - first).clamp(max=1)


def _blend(volume: Tensor, located: tuple[Tensor, Tensor, Tensor], mode: str) -> Tensor:
    """The planes ``[planes, C, h, w]`` that a volume ``[C, d, h, w]`` is blended to."""
    first, second, shares = located
    planes = volume.movedim(1, 0)
    near = planes.index_select(0, first)
    if mode == "nearest":
        return near
    dtype = accumulation_dtype(volume)
    far, shares = planes.index_select(0, second).to(dtype), shares.view(-1, 1, 1, 1)
    return (near.to(dtype) * (1 - shares).to(dtype)).addcmul_(far, shares.to(dtype))


def sum_gradients(
    input: Tensor, size: Sequence[int], upsampling: Upsampling, gradient_of: Callable[[Slab], Tensor]
) -> Tensor:
    """The gradient of volumes' logits, of those of their slabs' logits: plane by plane, always in the same order."""
    gradient = torch.empty_like(input)
    sums = torch.zeros_like(input[:1], dtype=accumulation_dtype(input), memory_format=torch.contiguous_format)
    blends = blends_of(input.shape[2], size[0], upsampling)
    image = 0
    for slab in slabs(input, size, upsampling):
        of_image, planes = slab.at
        if of_image != image:
            gradient[image] = sums[0]
            sums.zero_()
            image = of_image
        for of_plane, (first, second, weights) in zip(gradient_of(slab), blends[planes], strict=True):
            sums[0, :, first].add_(of_plane, alpha=weights[0])
            if upsampling.mode != "nearest":
                sums[0, :, second].add_(of_plane, alpha=weights[1])
    if len(input) > 0:
        gradient[image] = sums[0]
    return gradient
