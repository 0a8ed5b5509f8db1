"""upsample_mask_argmax's registration: schema, fake, and CPU, GPU and fallback implementations. It has no gradient.

The operator takes what `fastseg.functional.upsample_mask_argmax` has resolved: input ``[N, Q, h, w]``, class
probabilities ``[N, Q, C]`` in the dtype of the arithmetic, the output's size, and for each axis the scale factor where
it was asked for by one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastseg import _triton, reference
from fastseg._native import describe, native
from fastseg._tf32 import matrix_products_take_tf32
from fastseg.ops.registration import register_no_gradient, register_plain
from fastseg.ops.upsampling import upsampling_between

# ---- schema ----

_library = torch.library.Library("fastseg", "FRAGMENT")
_library.define(
    "upsample_mask_argmax(Tensor input, Tensor class_probabilities, SymInt[2] size, float[]? scale_factor, str mode, "
    "bool align_corners, ScalarType dtype) -> Tensor"
)


@torch.library.register_fake("fastseg::upsample_mask_argmax", lib=_library)
def _forward_fake(
    input: Tensor, class_probabilities: Tensor, size: Sequence[int], scale_factor: Sequence[float] | None, mode: str,
    align_corners: bool, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return input.new_empty((input.shape[0], *size), dtype=dtype)


# ---- implementations ----


def _forward_cpu(
    input: Tensor, class_probabilities: Tensor, size: Sequence[int], scale_factor: Sequence[float] | None, mode: str,
    align_corners: bool, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    kernels = native("upsample_mask_argmax")
    if kernels is None:
        return forward_plain(input, class_probabilities, size, scale_factor, mode, align_corners, dtype)
    labels = input.new_empty((input.shape[0], *size), dtype=dtype)
    upsampling = upsampling_between(input.shape[2:], size, mode, align_corners, scale_factor)
    tensors = tuple(map(describe, (input, class_probabilities, labels)))
    kernels.upsample_mask_argmax(tensors, upsampling, torch.get_num_threads())
    return labels


def _forward_triton(
    input: Tensor, class_probabilities: Tensor, size: Sequence[int], scale_factor: Sequence[float] | None, mode: str,
    align_corners: bool, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    kernels = _triton.kernels("upsample_mask_argmax")
    if kernels is None:
        return forward_plain(input, class_probabilities, size, scale_factor, mode, align_corners, dtype)
    labels = input.new_empty((input.shape[0], *size), dtype=dtype)
    upsampling = upsampling_between(input.shape[2:], size, mode, align_corners, scale_factor)
    takes_tf32 = input.dtype in (torch.bfloat16, torch.float16) or (  # which is at least as exact as half types
        input.dtype == torch.float32 and matrix_products_take_tf32()
    )
    kernels.forward((input, class_probabilities, labels), takes_tf32, upsampling)
    return labels


def forward_plain(
    input: Tensor, class_probabilities: Tensor, size: Sequence[int], scale_factor: Sequence[float] | None, mode: str,
    align_corners: bool, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The operator from torch's own, for devices without a kernel."""
    return reference.upsample_mask_argmax(
        input.to(class_probabilities.dtype), class_probabilities, tuple(size) if scale_factor is None else None,
        scale_factor=None if scale_factor is None else tuple(scale_factor), mode=mode, align_corners=align_corners,
        dtype=dtype,
    )  # fmt: skip


_KERNELS = _triton.register(_library, "upsample_mask_argmax", _forward_triton, _forward_cpu)
register_no_gradient(_library, "upsample_mask_argmax", _KERNELS)
register_plain(_library, "upsample_mask_argmax", forward_plain, _forward_fake)


def upsample_mask_argmax(
    input: Tensor, class_probabilities: Tensor, size: Sequence[int], scale_factor: Sequence[float] | None, mode: str,
    align_corners: bool, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The operator; arguments checked by `fastseg.functional.upsample_mask_argmax`."""
    return torch.ops.fastseg.upsample_mask_argmax.default(
        input, class_probabilities, size, scale_factor, mode, align_corners, dtype
    )
