"""The focal loss of sigmoids, one class against the rest, of class labels: its sums over pixels, block by block.

Plain PyTorch holds about ten tensors of the logits' size for it. Here a block of logits is read at a time, in forward
and again in backward, whose only tensor of the logits' size is the gradient.

The operator takes logits ``[N, C, h, w]`` and labels ``[N, h, w]``. With p the sigmoid of a class's logit where the
class is the pixel's label, and of minus the logit elsewhere, ``sums`` are ``[3, classes]`` in the accumulation dtype,
over the pixels that aren't ignored: of ``factor * -log(p)`` over the label's own pixels, the same over the others, and
of ``factor`` over all. Statistics, total_weight and overlap are those of `fastseg.ops.upsample_cross_entropy`, without
elements where the overlap isn't asked for.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastseg import reference
from fastseg.ops.layouts import lie_alike
from fastseg.ops.losses import plain
from fastseg.ops.losses.options import IGNORE_NONE, LossOptions, accumulation_dtype
from fastseg.ops.registration import register_gradient, register_plain

# Logits in a block. On a CPU its temporaries stay in the cache (from 2^14 to 2^17 the time falls to two thirds, on one
# core with AVX2, 2026-11-22); elsewhere launches cost more than memory.
CPU_BLOCK = 2**17
DEVICE_BLOCK = 2**22

Block = tuple[slice, ...]


class Focal(NamedTuple):
    """How much a pixel counts, and which classes do.

    Attributes:
        gamma: The exponent of 1 - p.
        threshold: Where given, 1 - p is divided by it, and a pixel whose p is less counts fully.
        first_class: The classes before it don't count.
        ignore_index: The label that doesn't count.
    """

    gamma: float
    threshold: float | None
    first_class: int
    ignore_index: int

    def factor(self, losses: Tensor, others: Tensor) -> Tensor:
        """What multiplies losses -log(p), from them and from ``others``, 1 - p."""
        others = others.clamp_min(torch.finfo(others.dtype).tiny)  # the derivative of a root of zero is infinite
        if self.threshold is None:
            return others.pow(self.gamma)
        return (others / self.threshold).pow(self.gamma).masked_fill((-losses).exp() < self.threshold, 1)


# ---- schemas ----

_OPTIONS = "float gamma, float? threshold, int first_class, SymInt ignore_index, bool with_overlap"
_library = torch.library.Library("fastseg", "FRAGMENT")
_library.define(
    f"focal_sums(Tensor input, Tensor labels, {_OPTIONS})"
    " -> (Tensor sums, Tensor statistics, Tensor total_weight, Tensor overlap)"
)
_library.define(
    "focal_sums_backward(Tensor grad_sums, Tensor grad_overlap, Tensor input, Tensor labels, Tensor statistics, "
    f"Tensor total_weight, {_OPTIONS}) -> Tensor"
)


@torch.library.register_fake("fastseg::focal_sums", lib=_library)
def _forward_fake(
    input: Tensor, labels: Tensor, gamma: float, threshold: float | None, first_class: int, ignore_index: int,
    with_overlap: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    sums = input.new_empty((3, input.shape[1] - first_class), dtype=accumulation_dtype(input))
    if not with_overlap:
        return sums, *_no_overlap(sums, input)
    shape = (input.shape[0], *input.shape[2:])
    return sums, sums.new_empty((2, *shape)), sums.new_empty(()), sums.new_empty((3, *input.shape[:2]))


def _no_overlap(sums: Tensor, input: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics, total_weight and overlap that weren't asked for."""
    return sums.new_empty((2, 0, *input.shape[2:])), sums.new_zeros(()), sums.new_empty((0, *input.shape[:2]))


@torch.library.register_fake("fastseg::focal_sums_backward", lib=_library)
def _backward_fake(grad_sums: Tensor, grad_overlap: Tensor, input: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(input)


# ---- implementations ----


def _forward(input: Tensor, labels: Tensor, *options: Any) -> tuple[Tensor, ...]:
    *numbers, with_overlap = options
    focal = Focal(*numbers)
    sums = _sum_blocks(input, labels, focal)
    if not with_overlap:
        return sums, *_no_overlap(sums, input)
    _, *rest = torch.ops.fastseg.upsample_cross_entropy.default(
        input, labels, None, *LossOptions(focal.ignore_index, "sum"), True, True
    )
    return sums, *rest


def _backward(
    grad_sums: Tensor, grad_overlap: Tensor, input: Tensor, labels: Tensor, statistics: Tensor, total_weight: Tensor,
    *options: Any,
) -> Tensor:  # fmt: skip
    *numbers, with_overlap = options
    focal = Focal(*numbers)
    if with_overlap:
        saved = (input, labels, None, statistics, total_weight)
        grad_input = torch.ops.fastseg.upsample_cross_entropy_backward.default(
            grad_sums.new_zeros(()), grad_overlap, *saved, *LossOptions(focal.ignore_index, "sum")
        )
    else:
        grad_input = torch.zeros_like(input)
    _add_gradient(grad_input, grad_sums, input, labels, focal)
    return grad_input


def forward_plain(input: Tensor, labels: Tensor, *options: Any) -> tuple[Tensor, ...]:
    """The operator in plain PyTorch, of all pixels at once."""
    *numbers, with_overlap = options
    focal = Focal(*numbers)
    sums = plain_sums(input, labels, focal)
    if not with_overlap:
        return sums, *_no_overlap(sums, input)
    logits = input.to(sums.dtype)
    _, *rest = plain.cross_entropy(logits, labels, None, LossOptions(focal.ignore_index, "sum"))
    return sums, *rest, reference.overlap(logits, labels, focal.ignore_index)


def backward_plain(
    grad_sums: Tensor, grad_overlap: Tensor, input: Tensor, labels: Tensor, statistics: Tensor, total_weight: Tensor,
    *options: Any,
) -> Tensor:  # fmt: skip
    """Its gradient in plain PyTorch."""
    *numbers, with_overlap = options
    focal = Focal(*numbers)
    classes = slice(focal.first_class, input.shape[1])
    hits = _hits(labels, classes, grad_sums.dtype)
    logits, ignored = _without_ignored(input[:, classes].to(grad_sums.dtype), labels, focal)
    gradient = _gradient(grad_sums[:, :, None, None], logits, hits, focal)
    if ignored is not None:
        gradient = gradient.masked_fill(ignored, 0)
    gradient = F.pad(gradient, (0, 0, 0, 0, focal.first_class, 0))
    if with_overlap:
        logits = input.to(grad_sums.dtype)
        gradient = gradient + plain.overlap_backward(grad_overlap, logits, labels, statistics, focal.ignore_index)
    return lie_alike(gradient, input, input.dtype)


def plain_sums(input: Tensor, labels: Tensor, focal: Focal) -> Tensor:
    """The sums in plain PyTorch, of all pixels at once."""
    logits = input[:, focal.first_class :].to(accumulation_dtype(input))
    return _sum_terms(logits, labels, slice(focal.first_class, input.shape[1]), focal)


def _sum_terms(logits: Tensor, labels: Tensor, classes: slice, focal: Focal) -> Tensor:
    """The sums ``[3, classes]`` of the logits ``[N, classes, h, w]`` of some classes and the labels ``[N, h, w]``."""
    hits = _hits(labels, classes, logits.dtype)
    logits, ignored = _without_ignored(logits, labels, focal)
    signed = logits * (2 * hits - 1)
    losses = -F.logsigmoid(signed)
    factors = focal.factor(losses, (-signed).sigmoid())
    if ignored is not None:
        factors = factors * ~ignored
    losses = factors * losses
    own = losses * hits
    return torch.stack([term.sum((0, 2, 3)) for term in (own, losses - own, factors)])


def _hits(labels: Tensor, classes: slice, dtype: torch.dtype) -> Tensor:
    """One where labels ``[N, h, w]`` are each of the classes, zero elsewhere: ``[N, classes, h, w]``.

    Numbers and not booleans: torch's products are several times as fast as its ``where`` and ``masked_fill``.
    """
    numbers = torch.arange(classes.start, classes.stop, device=labels.device).view(-1, 1, 1)
    return (labels.unsqueeze(1) == numbers).to(dtype)


def _without_ignored(logits: Tensor, labels: Tensor, focal: Focal) -> tuple[Tensor, Tensor | None]:
    """The logits with zeros in ignored pixels, and where those are; None where there can be none."""
    if focal.ignore_index == IGNORE_NONE:
        return logits, None
    ignored = reference.is_ignored(labels, focal.ignore_index).unsqueeze(1)
    return logits.masked_fill(ignored, 0), ignored


# ---- block by block ----


def _blocks(tensor: Tensor) -> Iterator[Block]:
    """Slices of ``[N, C, h, w]`` that hold a block's elements each: dimensions are cut from the largest stride on."""
    limit = CPU_BLOCK if tensor.is_cpu else DEVICE_BLOCK
    sizes, count = list(tensor.shape), tensor.numel()
    if count == 0:
        return
    for dim in sorted(range(tensor.ndim), key=tensor.stride, reverse=True):
        if count <= limit:
            break
        count //= sizes[dim]  # of one step along this dimension
        sizes[dim] = max(limit // count, 1)
        count *= sizes[dim]
    steps = (range(0, total, size) for total, size in zip(tensor.shape, sizes, strict=True))
    for corner in itertools.product(*steps):
        bounds = zip(corner, sizes, tensor.shape, strict=True)
        yield tuple(slice(start, min(start + size, total)) for start, size, total in bounds)


def _sum_blocks(input: Tensor, labels: Tensor, focal: Focal) -> Tensor:
    """`plain_sums`, whose temporaries are of a block's size."""
    logits = input[:, focal.first_class :]
    blocks = list(_blocks(logits))
    partials = logits.new_zeros((len(blocks), 3, logits.shape[1]), dtype=accumulation_dtype(input))
    for partial, block in zip(partials, blocks, strict=True):
        classes, pixels = block[1], block[:1] + block[2:]
        numbers = _shifted(classes, focal.first_class)
        partial[:, classes] = _sum_terms(logits[block].to(partial.dtype), labels[pixels], numbers, focal)
    return partials.sum(0)


def _add_gradient(grad_input: Tensor, grad_sums: Tensor, input: Tensor, labels: Tensor, focal: Focal) -> None:
    """Adds the gradient of the sums, block by block."""
    logits, grad_logits = (tensor[:, focal.first_class :] for tensor in (input, grad_input))
    for block in _blocks(logits):
        classes, pixels = block[1], block[:1] + block[2:]
        grads = grad_sums[:, classes, None, None]
        hits = _hits(labels[pixels], _shifted(classes, focal.first_class), grads.dtype)
        block_logits, ignored = _without_ignored(logits[block].to(grads.dtype), labels[pixels], focal)
        gradient = _gradient(grads, block_logits, hits, focal)
        if ignored is not None:
            gradient.masked_fill_(ignored, 0)  # and no product: a mean over no pixel has infinite gradients
        grad_logits[block] += gradient


def _gradient(grad_sums: Tensor, logits: Tensor, hits: Tensor, focal: Focal) -> Tensor:
    """What the sums pass on to logits of pixels that aren't ignored.

    With s the logit or, off the label, minus it: d(-log p)/ds = -(1 - p), and d(1 - p)^gamma/ds = -gamma p (1 -
    p)^gamma, both finite wherever 1 - p is.
    """
    signs = 2 * hits - 1
    signed = logits * signs
    losses, p, others = -F.logsigmoid(signed), signed.sigmoid(), signed.neg_().sigmoid_()
    factors = focal.factor(losses, others)
    slopes = p.mul_(factors).mul_(-focal.gamma)
    if focal.threshold is not None:
        slopes.masked_fill_((-losses).exp() < focal.threshold, 0)
    of_hits, of_others, of_factors = grad_sums
    weights = torch.addcmul(of_others, of_hits - of_others, hits)
    # weights * (slopes * losses - factors * others) + of_factors * slopes, in as few passes as possible
    gradient = losses.mul_(weights).add_(of_factors).mul_(slopes)
    return gradient.addcmul_(factors.mul_(others), weights, value=-1).mul_(signs)


def _shifted(classes: slice, by: int) -> slice:
    return slice(classes.start + by, classes.stop + by)


# ---- registration ----

_KERNELS = {"CPU": _forward, "CUDA": _forward}
for device in _KERNELS:
    _library.impl("focal_sums", _forward, device)
    _library.impl("focal_sums_backward", _backward, device)
register_plain(_library, "focal_sums", forward_plain, _forward_fake)
register_plain(_library, "focal_sums_backward", backward_plain, _backward_fake)


class _FocalSums(torch.autograd.Function):
    """The operator's gradient; forward and backward are both operators, so that compilers can trace them."""

    @staticmethod
    def forward(ctx: Any, call: Any, input: Tensor, labels: Tensor, *options: Any) -> tuple[Tensor, ...]:
        sums, statistics, total_weight, overlap = call(input, labels, *options)
        ctx.save_for_backward(input, labels, statistics, total_weight)
        ctx.options = options
        ctx.mark_non_differentiable(statistics, total_weight, *(() if options[-1] else (overlap,)))
        return sums, statistics, total_weight, overlap

    @staticmethod
    def backward(ctx: Any, grad_sums: Tensor, _: Any, __: Any, grad_overlap: Tensor) -> tuple[Tensor | None, ...]:
        *numbers, with_overlap = ctx.options
        if torch.is_grad_enabled():
            # create_graph=True: this gradient will be differentiated itself, which plain PyTorch can.
            input, labels, _, _ = ctx.saved_tensors
            outputs, grads = [plain_sums(input, labels, Focal(*numbers))], [grad_sums]
            if with_overlap:
                outputs.append(reference.overlap(input.to(grad_sums.dtype), labels, Focal(*numbers).ignore_index))
                grads.append(grad_overlap)
            (grad_input,) = torch.autograd.grad(outputs, input, grads, create_graph=True)
        else:
            grad_input = torch.ops.fastseg.focal_sums_backward.default(
                grad_sums, grad_overlap, *ctx.saved_tensors, *ctx.options
            )
        return None, grad_input, *(None,) * 6


register_gradient(_library, "focal_sums", _KERNELS, _FocalSums.apply, forward_plain, tensors=2, differentiable=1)
