"""upsample_argmax's registration: schema, fake, and CPU, GPU and fallback implementations. It has no gradient.

The operator takes what `fastseg.functional.upsample_argmax` has resolved: input ``[N, C, h, w]``, or of volumes
``[N, C, d, h, w]``, the output's size, and for each axis the scale factor where it was asked for by one. Confidence is
of the labels' shape in input's dtype, or of no images where it isn't asked for.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastseg import _triton, reference
from fastseg._native import describe, native
from fastseg.ops.losses.options import accumulation_dtype
from fastseg.ops.registration import register_no_gradient, register_plain
from fastseg.ops.upsampling import upsampling_between
from fastseg.ops.volumes import slabs

# ---- schema ----

_library = torch.library.Library("fastseg", "FRAGMENT")
_library.define(
    "upsample_argmax(Tensor input, SymInt[] size, float[]? scale_factor, str mode, bool align_corners, "
    "ScalarType dtype, bool with_confidence) -> (Tensor labels, Tensor confidence)"
)


def _allocate_outputs(
    input: Tensor, size: Sequence[int], dtype: torch.dtype, with_confidence: bool
) -> tuple[Tensor, Tensor]:
    labels = input.new_empty((input.shape[0], *size), dtype=dtype)
    return labels, input.new_empty((input.shape[0] if with_confidence else 0, *size))


@torch.library.register_fake("fastseg::upsample_argmax", lib=_library)
def _forward_fake(
    input: Tensor, size: Sequence[int], scale_factor: Sequence[float] | None, mode: str, align_corners: bool,
    dtype: torch.dtype, with_confidence: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _allocate_outputs(input, size, dtype, with_confidence)


# ---- implementations ----


def _forward_cpu(
    input: Tensor, size: Sequence[int], scale_factor: Sequence[float] | None, mode: str, align_corners: bool,
    dtype: torch.dtype, with_confidence: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    kernels = native("upsample_argmax")
    if kernels is None:
        return forward_plain(input, size, scale_factor, mode, align_corners, dtype, with_confidence)
    outputs = _allocate_outputs(input, size, dtype, with_confidence)
    upsampling = upsampling_between(input.shape[2:], size, mode, align_corners, scale_factor)
    kernels.upsample_argmax(tuple(map(describe, (input, *outputs))), upsampling, torch.get_num_threads())
    return outputs


def _forward_triton(
    input: Tensor, size: Sequence[int], scale_factor: Sequence[float] | None, mode: str, align_corners: bool,
    dtype: torch.dtype, with_confidence: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    kernels = _triton.kernels("upsample_argmax")
    if kernels is None:
        return forward_plain(input, size, scale_factor, mode, align_corners, dtype, with_confidence)
    outputs = _allocate_outputs(input, size, dtype, with_confidence)
    upsampling = upsampling_between(input.shape[2:], size, mode, align_corners, scale_factor)
    if input.ndim == 4:
        kernels.forward((input, *outputs), upsampling)
        return outputs
    for slab in slabs(input, size, upsampling):
        labels, confidence = (output[slab.at] if len(output) > 0 else output for output in outputs)
        kernels.forward((slab.logits, labels, confidence), slab.grid)
    return outputs


def forward_plain(
    input: Tensor, size: Sequence[int], scale_factor: Sequence[float] | None, mode: str, align_corners: bool,
    dtype: torch.dtype, with_confidence: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The operator from torch's own, for devices without a kernel."""
    extent = tuple(size) if scale_factor is None else None
    factors = None if scale_factor is None else tuple(scale_factor)
    logits = reference.upsample(input.to(accumulation_dtype(input)), extent, factors, mode, align_corners)
    confidence = logits.softmax(1).amax(1).to(input.dtype) if with_confidence else input.new_empty((0, *size))
    return logits.argmax(1).to(dtype), confidence


_KERNELS = _triton.register(_library, "upsample_argmax", _forward_triton, _forward_cpu)
register_no_gradient(_library, "upsample_argmax", _KERNELS)
register_plain(_library, "upsample_argmax", forward_plain, _forward_fake)


def upsample_argmax(
    input: Tensor, size: Sequence[int], scale_factor: Sequence[float] | None, mode: str, align_corners: bool,
    dtype: torch.dtype, with_confidence: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The operator; arguments checked by `fastseg.functional.upsample_argmax`."""
    return torch.ops.fastseg.upsample_argmax.default(
        input, size, scale_factor, mode, align_corners, dtype, with_confidence
    )
