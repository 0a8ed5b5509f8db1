"""upsample_confusion_matrix's registration: schema, fake, and CPU, GPU and fallback implementations.

The operator takes what `fastseg.functional.upsample_confusion_matrix` has resolved: input ``[N, C, h, w]``, and labels
``[N, H, W]`` of an integer dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastseg import _triton, reference
from fastseg._native import describe, log_missing_kernel, native
from fastseg.ops.cross_entropy import accumulation_dtype
from fastseg.ops.upsampling import MODES, steps

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
    grid = (align_corners, *steps(input.shape[2:], target.shape[1:], mode, align_corners))
    kernels.upsample_confusion_matrix(
        describe(input), describe(target), describe(matrix), ignore_index, MODES.index(mode), *grid,
        torch.get_num_threads(),
    )  # fmt: skip
    return matrix


def _forward_triton(
    input: Tensor, target: Tensor, ignore_index: int | None, mode: str, align_corners: bool
) -> Tensor:  # fmt: skip
    kernels = _triton.kernels("upsample_confusion_matrix")
    if kernels is None:
        return forward_plain(input, target, ignore_index, mode, align_corners)
    classes = input.shape[1]
    counts = input.new_zeros(classes**2 + 1, dtype=torch.int64)  # the last: labels outside the classes
    grid = (mode, align_corners, steps(input.shape[2:], target.shape[1:], mode, align_corners))
    kernels.forward((input, target, counts), kernels.Options(ignore_index, *grid))
    return _poisoned(counts[:-1].view(classes, classes), counts[-1] > 0)


def _poisoned(matrix: Tensor, invalid: Tensor) -> Tensor:
    return matrix + invalid * POISON


def forward_plain(
    input: Tensor, target: Tensor, ignore_index: int | None, mode: str, align_corners: bool
) -> Tensor:  # fmt: skip
    """The operator from torch's own, for devices without a kernel."""
    log_missing_kernel("upsample_confusion_matrix", input)
    classes = input.shape[1]
    target = target.long()  # torch compares uint8 with a number as uint8, to which it wraps 257 classes
    outside = (target < 0) | (target >= classes)
    if ignore_index is not None:
        outside &= ~reference.is_ignored(target, ignore_index)
    if input.is_cpu and outside.any():
        or_ignored = "" if ignore_index is None else f" or ignore_index ({ignore_index})"
        first = target[outside][0].item()
        raise IndexError(f"target: expected classes in [0, {classes}){or_ignored}, got {first}")
    # A label outside the classes: counted as some class, and then as nothing.
    labels = target.masked_fill(outside, 0)
    logits = input.to(accumulation_dtype(input))
    matrix = reference.upsample_confusion_matrix(logits, labels, ignore_index, mode=mode, align_corners=align_corners)
    return _poisoned(matrix, outside.any())


_triton.register(_library, "upsample_confusion_matrix", _forward_triton, _forward_cpu)
_library.impl("upsample_confusion_matrix", forward_plain, "CompositeExplicitAutograd")


def upsample_confusion_matrix(
    input: Tensor, target: Tensor, ignore_index: int | None, mode: str, align_corners: bool
) -> Tensor:
    """The operator; arguments checked by `fastseg.functional.upsample_confusion_matrix`."""
    return torch.ops.fastseg.upsample_confusion_matrix.default(
        input.detach(), target, ignore_index, mode, align_corners
    )
