"""upsample_confusion_matrix's registration: schema, fake, and CPU, GPU and fallback implementations.

The operator takes what `fastseg.functional.upsample_confusion_matrix` has resolved: input ``[N, C, h, w]``, and labels
``[N, H, W]`` of an integer dtype; of volumes ``[N, C, d, h, w]`` and ``[N, D, H, W]``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastseg import _triton, reference
from fastseg._native import describe, native
from fastseg.ops.losses.options import IGNORE_NONE, accumulation_dtype
from fastseg.ops.registration import register_no_gradient, register_plain
from fastseg.ops.upsampling import upsampling_between
from fastseg.ops.volumes import slabs

# What a GPU, which can't raise an error without waiting, adds to every count for labels outside the classes: more than
# there are pixels, so that a sum over many batches shows it.
POISON = -(2**40)

# ---- schema ----

_library = torch.library.Library("fastseg", "FRAGMENT")
_library.define(
    "upsample_confusion_matrix(Tensor input, Tensor target, SymInt? ignore_index, str mode, bool align_corners)"
    " -> Tensor"
)


@torch.library.register_fake("fastseg::upsample_confusion_matrix", lib=_library)
def _forward_fake(
    input: Tensor, target: Tensor, ignore_index: int | None, mode: str, align_corners: bool
) -> Tensor:  # fmt: skip
    classes = input.shape[1]
    return input.new_empty((classes, classes), dtype=torch.int64)


# ---- implementations ----


def _forward_cpu(
    input: Tensor, target: Tensor, ignore_index: int | None, mode: str, align_corners: bool
) -> Tensor:  # fmt: skip
    kernels = native("upsample_confusion_matrix")
    if kernels is None:
        return forward_plain(input, target, ignore_index, mode, align_corners)
    classes = input.shape[1]
    matrix = input.new_empty((classes, classes), dtype=torch.int64)
    tensors = tuple(map(describe, (input, target, matrix)))
    upsampling = upsampling_between(input.shape[2:], target.shape[1:], mode, align_corners)
    ignored = IGNORE_NONE if ignore_index is None else ignore_index
    kernels.upsample_confusion_matrix(tensors, ignored, upsampling, torch.get_num_threads())
    return matrix


def _forward_triton(
    input: Tensor, target: Tensor, ignore_index: int | None, mode: str, align_corners: bool
) -> Tensor:  # fmt: skip
    kernels = _triton.kernels("upsample_confusion_matrix")
    if kernels is None:
        return forward_plain(input, target, ignore_index, mode, align_corners)
    classes = input.shape[1]
    counts = input.new_zeros(classes**2 + 1, dtype=torch.int64)  # the last: labels outside the classes
    upsampling = upsampling_between(input.shape[2:], target.shape[1:], mode, align_corners)
    if input.ndim == 4:
        kernels.forward((input, target, counts), ignore_index, upsampling)
    else:
        for slab in slabs(input, target.shape[1:], upsampling):
            kernels.forward((slab.logits, target[slab.at], counts), ignore_index, slab.grid)
    return _poisoned(counts[:-1].view(classes, classes), counts[-1] > 0)


def _poisoned(matrix: Tensor, invalid: Tensor) -> Tensor:
    return matrix + invalid * POISON


def forward_plain(
    input: Tensor, target: Tensor, ignore_index: int | None, mode: str, align_corners: bool
) -> Tensor:  # fmt: skip
    """The operator from torch's own, for devices without a kernel."""
    outside = _outside(input, target, ignore_index)
    if input.is_cpu and outside.any():
        or_ignored = "" if ignore_index is None else f" or ignore_index ({ignore_index})"
        first = target[outside][0].item()
        raise IndexError(f"target: expected classes in [0, {input.shape[1]}){or_ignored}, got {first}")
    return _count_plain(input, target, ignore_index, mode, align_corners)


def _outside(input: Tensor, target: Tensor, ignore_index: int | None) -> Tensor:
    """Where the labels are neither classes nor ignored."""
    target = target.long()  # torch compares uint8 with a number as uint8, to which it wraps 257 classes
    outside = (target < 0) | (target >= input.shape[1])
    return outside if ignore_index is None else outside & ~reference.is_ignored(target, ignore_index)


def _count_plain(
    input: Tensor, target: Tensor, ignore_index: int | None, mode: str, align_corners: bool
) -> Tensor:  # fmt: skip
    """The operator on any device: labels outside the classes raise no error, which compilers couldn't trace."""
    classes, outside = input.shape[1], _outside(input, target, ignore_index)
    logits = input.to(accumulation_dtype(input))
    prediction = reference.upsample(logits, target.shape[1:], None, mode, align_corners).argmax(1)
    uncounted = outside if ignore_index is None else outside | reference.is_ignored(target, ignore_index)
    pairs = (target.long() * classes + prediction).masked_fill(uncounted, classes**2).flatten()
    counts = input.new_zeros(classes**2 + 1, dtype=torch.int64).scatter_add(0, pairs, torch.ones_like(pairs))
    return _poisoned(counts[:-1].view(classes, classes), outside.any())


_KERNELS = _triton.register(_library, "upsample_confusion_matrix", _forward_triton, _forward_cpu)
register_no_gradient(_library, "upsample_confusion_matrix", _KERNELS)
register_plain(_library, "upsample_confusion_matrix", _count_plain, _forward_fake, other_devices=forward_plain)


def upsample_confusion_matrix(
    input: Tensor, target: Tensor, ignore_index: int | None, mode: str, align_corners: bool
) -> Tensor:
    """The operator; arguments checked by `fastseg.functional.upsample_confusion_matrix`."""
    return torch.ops.fastseg.upsample_confusion_matrix.default(input, target, ignore_index, mode, align_corners)
