"""upsample_threshold's registration: schema, fake, and CPU, GPU and fallback implementations. It has no gradient.

The operator takes what `fastseg.functional.upsample_threshold` has resolved: input ``[N, C, h, w]``, the output's size,
and for each axis the scale factor where it was asked for by one. Scores are ``[N, C]`` in input's dtype and boxes
``[N, C, 4]`` in int64, or ``[0, C]`` and ``[0, C, 4]`` where they aren't asked for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastseg import _triton, reference
from fastseg._native import describe, native
from fastseg.ops.losses.options import accumulation_dtype
from fastseg.ops.registration import register_no_gradient, register_plain
from fastseg.ops.upsampling import upsampling_between

# ---- schema ----

_library = torch.library.Library("fastseg", "FRAGMENT")
_library.define(
    "upsample_threshold(Tensor input, SymInt[2] size, float[]? scale_factor, float threshold, str mode, "
    "bool align_corners, bool with_scores) -> (Tensor masks, Tensor scores, Tensor boxes)"
)


def _allocate_outputs(input: Tensor, size: Sequence[int], with_scores: bool) -> tuple[Tensor, Tensor, Tensor]:
    images, classes = input.shape[:2]
    of_masks = (images if with_scores else 0, classes)
    return (
        input.new_empty((images, classes, *size), dtype=torch.uint8),
        input.new_empty(of_masks),
        input.new_empty((*of_masks, 4), dtype=torch.int64),
    )


@torch.library.register_fake("fastseg::upsample_threshold", lib=_library)
def _forward_fake(
    input: Tensor, size: Sequence[int], scale_factor: Sequence[float] | None, threshold: float, mode: str,
    align_corners: bool, with_scores: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _allocate_outputs(input, size, with_scores)


# ---- implementations ----


def _logit(probability: float) -> float:
    if probability in (0, 1):
        return math.inf if probability else -math.inf
    return math.log(probability / (1 - probability))


def _forward_cpu(
    input: Tensor, size: Sequence[int], scale_factor: Sequence[float] | None, threshold: float, mode: str,
    align_corners: bool, with_scores: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    kernels = native("upsample_threshold")
    if kernels is None:
        return forward_plain(input, size, scale_factor, threshold, mode, align_corners, with_scores)
    outputs = _allocate_outputs(input, size, with_scores)
    upsampling = upsampling_between(input.shape[2:], size, mode, align_corners, scale_factor)
    tensors = tuple(map(describe, (input, *outputs)))
    kernels.upsample_threshold(tensors, _logit(threshold), upsampling, torch.get_num_threads())
    return outputs


def _forward_triton(
    input: Tensor, size: Sequence[int], scale_factor: Sequence[float] | None, threshold: float, mode: str,
    align_corners: bool, with_scores: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    kernels = _triton.kernels("upsample_threshold")
    if kernels is None:
        return forward_plain(input, size, scale_factor, threshold, mode, align_corners, with_scores)
    outputs = _allocate_outputs(input, size, with_scores)
    upsampling = upsampling_between(input.shape[2:], size, mode, align_corners, scale_factor)
    kernels.forward((input, *outputs), _logit(threshold), upsampling)
    return outputs


def forward_plain(
    input: Tensor, size: Sequence[int], scale_factor: Sequence[float] | None, threshold: float, mode: str,
    align_corners: bool, with_scores: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The operator from torch's own, for devices without a kernel."""
    masks, scores, boxes = reference.upsample_threshold(
        input.to(accumulation_dtype(input)), tuple(size) if scale_factor is None else None, threshold,
        scale_factor=None if scale_factor is None else tuple(scale_factor), mode=mode, align_corners=align_corners,
        return_scores=True,
    )  # fmt: skip
    asked = slice(None if with_scores else 0)
    return masks, scores[asked].to(input.dtype), boxes[asked]


_KERNELS = _triton.register(_library, "upsample_threshold", _forward_triton, _forward_cpu)
register_no_gradient(_library, "upsample_threshold", _KERNELS)
register_plain(_library, "upsample_threshold", forward_plain, _forward_fake)


def upsample_threshold(
    input: Tensor, size: Sequence[int], scale_factor: Sequence[float] | None, threshold: float, mode: str,
    align_corners: bool, with_scores: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The operator; arguments checked by `fastseg.functional.upsample_threshold`."""
    return torch.ops.fastseg.upsample_threshold.default(
        input, size, scale_factor, threshold, mode, align_corners, with_scores
    )
