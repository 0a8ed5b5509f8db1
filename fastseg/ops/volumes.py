"""Volumes for kernels that know images alone, which those of GPUs are: slabs of planes, upsampled one plane at a time.

An output plane is the upsampling of a weighted sum of two input planes. The sums of a slab of output planes, still of
the input's height and width, are made by torch's own operators; so what is held of the logits is a slab.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastseg.ops.losses.options import accumulation_dtype
from fastseg.ops.upsampling import Upsampling

SLAB_BYTES = 64 << 20  # of a slab's logits: enough for a GPU, little beside its memory


class Slab(NamedTuple):
    """Some output planes of a volume, or all of a batch of images.

    Attributes:
        logits: What is upsampled to them, ``[planes, C, h, w]``.
        at: Where they are in a tensor of the output's pixels, ``[N, D, H, W]``; ``[N, H, W]`` of images.
        grid: From the logits to them.
        blends: What each of the planes is made of; none of images.
    """

    logits: Tensor
    at: Any
    grid: Upsampling
    blends: Sequence[Blend] = ()


class Blend(NamedTuple):
    """The two input planes that an output plane is made of, and how much each counts."""

    first: int
    second: int
    weights: tuple[float, float]


def slabs(input: Tensor, size: Sequence[int], upsampling: Upsampling) -> Iterator[Slab]:
    """The slabs of an output of a size; of images the whole."""
    if input.ndim == 4:
        yield Slab(input, ..., upsampling)
        return
    grid = Upsampling(upsampling.mode, upsampling.align_corners, upsampling.steps[1:])
    plane = accumulation_dtype(input).itemsize * input[0, :, 0].numel() if len(input) else 1
    thickness = max(SLAB_BYTES // plane, 1)
    blends = blends_of(input.shape[2], size[0], upsampling)
    for image, volume in enumerate(input):
        for start in range(0, size[0], thickness):
            planes = slice(start, min(start + thickness, size[0]))
            yield Slab(_blend(volume, blends[planes], upsampling.mode), (image, planes), grid, blends[planes])


def blends_of(depth: int, out_depth: int, upsampling: Upsampling) -> list[Blend]:
    """What each output plane is made of; see `fastseg.ops.upsampling` for the grid."""
    step = upsampling.steps[0]
    if upsampling.mode == "nearest":
        single = torch.tensor(step, dtype=torch.float32, device="cpu") * torch.arange(out_depth, device="cpu")
        nearest = [min(int(source), depth - 1) for source in single]
        return [Blend(plane, plane, (1.0, 0.0)) for plane in nearest]
    if depth == out_depth:
        return [Blend(plane, plane, (1.0, 0.0)) for plane in range(depth)]
    blends = []
    for plane in range(out_depth):
        source = step * plane if upsampling.align_corners else max(step * (plane + 0.5) - 0.5, 0.0)
        first = min(math.floor(source), depth - 1)
        share = min(source - first, 1.0)
        blends.append(Blend(first, min(first + 1, depth - 1), (1 - share, share)))
    return blends


def _blend(volume: Tensor, blends: Sequence[Blend], mode: str) -> Tensor:
    """The planes ``[planes, C, h, w]`` that a volume ``[C, d, h, w]`` is blended to."""
    planes = volume.movedim(1, 0)
    first = planes[[blend.first for blend in blends]]
    if mode == "nearest":
        return first
    dtype = accumulation_dtype(volume)
    second = planes[[blend.second for blend in blends]].to(dtype)
    weights = torch.tensor([blend.weights for blend in blends], dtype=dtype, device=volume.device)
    of_first, of_second = weights.T.view(2, -1, 1, 1, 1)
    return (first.to(dtype) * of_first).addcmul_(second, of_second)


def sum_gradients(
    input: Tensor, size: Sequence[int], upsampling: Upsampling, gradient_of: Callable[[Slab], Tensor]
) -> Tensor:
    """The gradient of volumes' logits, of those of their slabs' logits: plane by plane, always in the same order."""
    gradient = torch.empty_like(input)
    sums = torch.zeros_like(input[:1], dtype=accumulation_dtype(input), memory_format=torch.contiguous_format)
    image = 0
    for slab in slabs(input, size, upsampling):
        if slab.at[0] != image:
            gradient[image] = sums[0]
            sums.zero_()
            image = slab.at[0]
        for of_plane, (first, second, weights) in zip(gradient_of(slab), slab.blends, strict=True):
            sums[0, :, first].add_(of_plane, alpha=weights[0])
            if upsampling.mode != "nearest":
                sums[0, :, second].add_(of_plane, alpha=weights[1])
    if len(input) > 0:
        gradient[image] = sums[0]
    return gradient
