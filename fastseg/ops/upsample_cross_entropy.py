"""upsample_cross_entropy's registration: schemas, fakes, CPU, GPU and fallback implementations, and the gradient.

The operator has two forms. With ``upsample_cross_entropy``, forward keeps each pixel's softmax statistics, and backward
makes the probabilities again. ``upsample_cross_entropy_with_gradient`` makes the gradient in the forward pass, and
backward scales it: on a CPU that saves the statistics, and the probabilities' second computation, which is more than
half of both passes' work. Callers ask for the first; `_record_gradient` takes the second where it serves.

The operators take what `fastseg.functional` has resolved: input ``[N, C, h, w]``; class labels ``[N, H, W]`` of an
integer dtype; of volumes, here and below, ``[N, C, d, h, w]`` and ``[N, D, H, W]``; weight ``[C]``, contiguous, of the
accumulation dtype (float64 for float64 input, else float32), which loss, statistics, total_weight, overlap and gradient
have too.

* Statistics ``[2, N, H, W]`` are each pixel's m and log(sum(exp(x - m))), for the backward of the same device alone: on
  GPUs m is the largest logit, on CPUs both are of logits relative to their input pixels' largest. ``[2, 0, H, W]``
  where they aren't asked for.
* ``overlap`` is what soft Dice losses need: of each image and class the sums ``[3, N, C]`` that
  `fastseg.reference.overlap` defines; ``[0, N, C]`` where it isn't asked for.
* ``gradient`` is that of the sum of all pixels' weighted losses, of input's shape and strides.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastseg import _triton, reference
from fastseg._native import INTERPRETED, describe, native
from fastseg.ops.layouts import lie_alike
from fastseg.ops.losses import plain, slabs
from fastseg.ops.losses.options import UPSAMPLE_SCHEMA, LossOptions, accumulation_dtype, no_statistics
from fastseg.ops.registration import register_gradient, register_plain
from fastseg.ops.upsampling import Upsampling, upsampling_between

OVERLAP_SUMS = 3


def upsample_cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions, with_overlap: bool = False
) -> tuple[Tensor, Tensor]:
    """The loss and the overlap; arguments checked by `fastseg.functional`."""
    loss, _, _, overlap = torch.ops.fastseg.upsample_cross_entropy.default(
        input, target, weight, *options, with_overlap, False
    )
    return loss, overlap


def makes_gradient(input: Tensor, reduction: str) -> bool:
    """Whether the forward pass is to make the gradient, from shapes and devices alone.

    A loss for each pixel has incoming gradients that forward can't know.
    """
    return input.is_cpu and not INTERPRETED and reduction != "none"


# ---- schemas ----

_library = torch.library.Library("fastseg", "FRAGMENT")
_library.define(
    f"upsample_cross_entropy(Tensor input, Tensor target, Tensor? weight, {UPSAMPLE_SCHEMA}, bool with_overlap, "
    "bool with_statistics) -> (Tensor loss, Tensor statistics, Tensor total_weight, Tensor overlap)"
)
_library.define(
    "upsample_cross_entropy_backward(Tensor grad_loss, Tensor grad_overlap, Tensor input, Tensor target, "
    f"Tensor? weight, Tensor statistics, Tensor total_weight, {UPSAMPLE_SCHEMA}) -> Tensor"
)
_library.define(
    f"upsample_cross_entropy_with_gradient(Tensor input, Tensor target, Tensor? weight, {UPSAMPLE_SCHEMA})"
    " -> (Tensor loss, Tensor total_weight, Tensor gradient)"
)
_library.define(
    "upsample_cross_entropy_with_gradient_backward(Tensor grad_loss, Tensor input, Tensor target, Tensor? weight, "
    f"Tensor total_weight, Tensor gradient, {UPSAMPLE_SCHEMA}) -> Tensor"
)


def _allocate_outputs(
    input: Tensor, target: Tensor, reduction: str, with_overlap: bool, with_statistics: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, statistics, total_weight and overlap."""
    images, *size = target.shape
    statistics = input.new_empty((2, images if with_statistics else 0, *size), dtype=accumulation_dtype(input))
    total_weight = statistics.new_empty(())
    loss = statistics.new_empty(target.shape if reduction == "none" else ())
    return loss, statistics, total_weight, statistics.new_empty((OVERLAP_SUMS * with_overlap, *input.shape[:2]))


def _allocate_outputs_with_gradient(input: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, total_weight and gradient."""
    dtype = accumulation_dtype(input)
    return input.new_empty((), dtype=dtype), input.new_empty((), dtype=dtype), torch.empty_like(input, dtype=dtype)


@torch.library.register_fake("fastseg::upsample_cross_entropy", lib=_library)
def _forward_fake(input: Tensor, target: Tensor, weight: Tensor | None, *options: Any) -> tuple[Tensor, ...]:
    _, reduction, *_, with_overlap, with_statistics = options
    return _allocate_outputs(input, target, reduction, with_overlap, with_statistics)


@torch.library.register_fake("fastseg::upsample_cross_entropy_backward", lib=_library)
def _backward_fake(grad_loss: Tensor, grad_overlap: Tensor, input: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(input)


@torch.library.register_fake("fastseg::upsample_cross_entropy_with_gradient", lib=_library)
def _with_gradient_fake(input: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _allocate_outputs_with_gradient(input)


@torch.library.register_fake("fastseg::upsample_cross_entropy_with_gradient_backward", lib=_library)
def _with_gradient_backward_fake(grad_loss: Tensor, input: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(input)


# ---- implementations ----


def _upsampling(input: Tensor, target: Tensor, options: LossOptions) -> Upsampling:
    return upsampling_between(input.shape[2:], target.shape[1:], options.mode, options.align_corners)


def _forward_cpu(input: Tensor, target: Tensor, weight: Tensor | None, *options: Any) -> tuple[Tensor, ...]:
    kernels = native("upsample_cross_entropy")
    if kernels is None:
        return forward_plain(input, target, weight, *options)
    *numbers, with_overlap, with_statistics = options
    loss_options = LossOptions(*numbers)
    outputs = _allocate_outputs(input, target, loss_options.reduction, with_overlap, with_statistics)
    tensors = (*map(describe, (input, target, weight, *outputs)), None)
    upsampling = _upsampling(input, target, loss_options)
    kernels.upsample_cross_entropy_forward(tensors, loss_options, upsampling, torch.get_num_threads())
    return outputs


def _backward_cpu(
    grad_loss: Tensor, grad_overlap: Tensor, input: Tensor, target: Tensor, weight: Tensor | None, statistics: Tensor,
    total_weight: Tensor, *options: Any,
) -> Tensor:  # fmt: skip
    tensors = (grad_loss, grad_overlap, input, target, weight, statistics, total_weight)
    kernels = native("upsample_cross_entropy")
    if kernels is None:
        return backward_plain(*tensors, *options)
    loss_options, grad_input = LossOptions(*options), torch.empty_like(input)
    described, upsampling = tuple(map(describe, (*tensors, grad_input))), _upsampling(input, target, loss_options)
    kernels.upsample_cross_entropy_backward(described, loss_options, upsampling, torch.get_num_threads())
    return grad_input


def _with_gradient_cpu(
    input: Tensor, target: Tensor, weight: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    kernels, loss_options = native("upsample_cross_entropy"), LossOptions(*options)
    if kernels is None:
        return with_gradient_plain(input, target, weight, *options)
    loss, total_weight, gradient = outputs = _allocate_outputs_with_gradient(input)
    tensors = (input, target, weight, loss, None, total_weight, None, gradient)
    described, upsampling = tuple(map(describe, tensors)), _upsampling(input, target, loss_options)
    kernels.upsample_cross_entropy_forward(described, loss_options, upsampling, torch.get_num_threads())
    return outputs


def _with_gradient_backward(
    grad_loss: Tensor, input: Tensor, target: Tensor, weight: Tensor | None, total_weight: Tensor, gradient: Tensor,
    *options: Any,
) -> Tensor:  # fmt: skip
    reduction = LossOptions(*options).reduction
    if reduction == "mean" and input.is_cpu and total_weight == 0:
        # A mean over nothing: torch tells ignored pixels, whose gradient is zero, from those of no weight, where it is
        # NaN, which the sum's gradient doesn't.
        _, statistics, _, no_overlap = torch.ops.fastseg.upsample_cross_entropy(
            input, target, weight, *options, False, True
        )
        saved = (input, target, weight, statistics, total_weight)
        return torch.ops.fastseg.upsample_cross_entropy_backward(grad_loss, no_overlap, *saved, *options)
    scale = grad_loss / total_weight if reduction == "mean" else grad_loss
    return (gradient * scale).to(input.dtype)  # of gradient's strides, which are dense


def _forward_triton(input: Tensor, target: Tensor, weight: Tensor | None, *options: Any) -> tuple[Tensor, ...]:
    kernels = _triton.kernels("upsample_cross_entropy")
    if kernels is None:
        return forward_plain(input, target, weight, *options)
    *numbers, with_overlap, with_statistics = options
    loss_options = LossOptions(*numbers)
    outputs = _allocate_outputs(input, target, loss_options.reduction, with_overlap, with_statistics)
    tensors, upsampling = (input, target, weight, *outputs), _upsampling(input, target, loss_options)
    if input.ndim == 5:
        slabs.forward(kernels, tensors, loss_options, upsampling)
    else:
        kernels.forward(kernels.ForwardTensors(*tensors), loss_options, upsampling)
    return outputs


def _backward_triton(
    grad_loss: Tensor, grad_overlap: Tensor, input: Tensor, target: Tensor, weight: Tensor | None, statistics: Tensor,
    total_weight: Tensor, *options: Any,
) -> Tensor:  # fmt: skip
    tensors = (grad_loss, grad_overlap, input, target, weight, statistics, total_weight)
    kernels = _triton.kernels("upsample_cross_entropy")
    if kernels is None:
        return backward_plain(*tensors, *options)
    loss_options = LossOptions(*options)
    upsampling = _upsampling(input, target, loss_options)
    if input.ndim == 5:
        return slabs.backward(kernels, tensors, loss_options, upsampling)
    grad_input = torch.empty_like(input)
    kernels.backward(kernels.BackwardTensors(*tensors, grad_input), loss_options, upsampling)
    return grad_input


def forward_plain(input: Tensor, target: Tensor, weight: Tensor | None, *options: Any) -> tuple[Tensor, ...]:
    """The operator from torch's own, for devices without a kernel."""
    *numbers, with_overlap, with_statistics = options
    loss_options = LossOptions(*numbers)
    logits = _upsample_plain(input.to(accumulation_dtype(input)), target, loss_options)
    loss, statistics, total_weight = plain.cross_entropy(logits, target, weight, loss_options)
    overlap = loss.new_empty((0, *input.shape[:2]))
    if with_overlap:
        overlap = reference.overlap(logits, target, loss_options.ignore_index)
    return loss, statistics if with_statistics else no_statistics(loss, target.shape[1:]), total_weight, overlap


def _upsample_plain(input: Tensor, target: Tensor, options: LossOptions) -> Tensor:
    return reference.upsample(input, target.shape[1:], None, options.mode, options.align_corners)


def backward_plain(
    grad_loss: Tensor, grad_overlap: Tensor, input: Tensor, target: Tensor, weight: Tensor | None, statistics: Tensor,
    total_weight: Tensor, *options: Any,
) -> Tensor:  # fmt: skip
    """Its gradient from torch's own operators."""
    loss_options = LossOptions(*options)
    logits = _upsample_plain(input.to(statistics.dtype), target, loss_options)
    saved = (logits, target, weight, statistics, total_weight)
    grad_logits = plain.cross_entropy_backward(grad_loss, saved, loss_options)
    if len(grad_overlap) > 0:
        of_overlap = plain.overlap_backward(grad_overlap, logits, target, statistics, loss_options.ignore_index)
        grad_logits = grad_logits + of_overlap
    corners = () if loss_options.mode == "nearest" else (loss_options.align_corners,)
    gradient = getattr(torch.ops.aten, f"upsample_{loss_options.mode}{input.ndim - 2}d_backward")
    grad_input = gradient(grad_logits, list(target.shape[1:]), list(input.shape), *corners)
    return lie_alike(grad_input, input, input.dtype)


def with_gradient_plain(
    input: Tensor, target: Tensor, weight: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The form with the gradient from torch's own operators."""
    ignore_index, _, *rest = options
    wide = input.to(accumulation_dtype(input))
    loss, statistics, total_weight, no_overlap = forward_plain(wide, target, weight, *options, False, True)
    saved = (wide, target, weight, statistics, total_weight)
    gradient = backward_plain(torch.ones_like(loss), no_overlap, *saved, ignore_index, "sum", *rest)
    return loss, total_weight, lie_alike(gradient, input, gradient.dtype)


def with_gradient_backward_plain(
    grad_loss: Tensor, input: Tensor, target: Tensor, weight: Tensor | None, total_weight: Tensor, gradient: Tensor,
    *options: Any,
) -> Tensor:  # fmt: skip
    """Its gradient from torch's own operators, without a look at total_weight."""
    _, statistics, _, no_overlap = forward_plain(input, target, weight, *options, False, True)
    return backward_plain(grad_loss, no_overlap, input, target, weight, statistics, total_weight, *options)


_KERNELS = _triton.register(_library, "upsample_cross_entropy", _forward_triton, _forward_cpu)
_triton.register(_library, "upsample_cross_entropy_backward", _backward_triton, _backward_cpu)
register_plain(_library, "upsample_cross_entropy", forward_plain, _forward_fake)
register_plain(_library, "upsample_cross_entropy_backward", backward_plain, _backward_fake)

_WITH_GRADIENT_KERNELS = _triton.register(
    _library, "upsample_cross_entropy_with_gradient", with_gradient_plain, _with_gradient_cpu
)
_triton.register(
    _library, "upsample_cross_entropy_with_gradient_backward", _with_gradient_backward, _with_gradient_backward
)
register_plain(_library, "upsample_cross_entropy_with_gradient", with_gradient_plain, _with_gradient_fake)
register_plain(
    _library, "upsample_cross_entropy_with_gradient_backward", with_gradient_backward_plain,
    _with_gradient_backward_fake,
)  # fmt: skip


# ---- gradients: of both forms, forward and backward are operators, so that compilers can trace them ----


class _TwoPass(torch.autograd.Function):
    """Gradient of the form whose backward pass makes the probabilities again."""

    @staticmethod
    def forward(
        ctx: Any, call: Any, input: Tensor, target: Tensor, weight: Tensor | None, *options: Any
    ) -> tuple[Tensor, ...]:
        *numbers, with_overlap, with_statistics = options
        loss, statistics, total_weight, overlap = call(input, target, weight, *numbers, with_overlap, True)
        ctx.save_for_backward(input, target, weight, statistics, total_weight)
        ctx.options = LossOptions(*numbers)
        ctx.set_materialize_grads(False)
        statistics = statistics if with_statistics else no_statistics(loss, target.shape[1:])
        ctx.mark_non_differentiable(statistics, total_weight, *(() if with_overlap else (overlap,)))
        return loss, statistics, total_weight, overlap

    @staticmethod
    def backward(
        ctx: Any, grad_loss: Tensor | None, _: Any, __: Any, grad_overlap: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: a checkpoint without re-entering lets nothing be unpacked twice
        input, target, _, statistics, _ = saved
        if grad_loss is None:
            if grad_overlap is None:
                return (None,) * 11
            grad_loss = statistics.new_zeros(target.shape if ctx.options.reduction == "none" else ())
        if grad_overlap is None:
            grad_overlap = statistics.new_empty((0, *input.shape[:2]))
        if torch.is_grad_enabled():
            grad_input = _differentiable_gradient(grad_loss, grad_overlap, saved[:3], ctx.options)
        else:
            grad_input = torch.ops.fastseg.upsample_cross_entropy_backward.default(
                grad_loss, grad_overlap, *saved, *ctx.options
            )
        return None, grad_input, *(None,) * 9


class _WithGradient(torch.autograd.Function):
    """Gradient of the form whose forward pass makes it."""

    @staticmethod
    def forward(
        ctx: Any, call: Any, input: Tensor, target: Tensor, weight: Tensor | None, *options: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        loss, total_weight, gradient = call(input, target, weight, *options)
        ctx.save_for_backward(input, target, weight, total_weight, gradient)
        ctx.options = LossOptions(*options)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(total_weight, gradient)
        return loss, total_weight, gradient

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad_loss is None:
            return (None,) * 9
        if torch.is_grad_enabled():
            grad_input = _differentiable_gradient(grad_loss, None, ctx.saved_tensors[:3], ctx.options)
        else:
            grad_input = torch.ops.fastseg.upsample_cross_entropy_with_gradient_backward.default(
                grad_loss, *ctx.saved_tensors, *ctx.options
            )
        return None, grad_input, *(None,) * 7


def _differentiable_gradient(
    grad_loss: Tensor, grad_overlap: Tensor | None, tensors: tuple[Tensor, Tensor, Tensor | None], options: LossOptions
) -> Tensor:
    """The gradient for input where it will be differentiated itself (create_graph=True), which plain PyTorch can.

    ``grad_overlap`` is None or empty for none.
    """
    input, target, weight = tensors
    logits = _upsample_plain(input.to(grad_loss.dtype), target, options)
    outputs = [reference.cross_entropy(logits, target, weight, *options[:3])]
    grads = [grad_loss]
    if grad_overlap is not None and len(grad_overlap) > 0:
        outputs.append(reference.overlap(logits, target, options.ignore_index))
        grads.append(grad_overlap)
    return torch.autograd.grad(outputs, input, grads, create_graph=True)[0]


def _record_gradient(call: Any, input: Tensor, target: Tensor, weight: Tensor | None, *options: Any) -> Any:
    """Calls the operator, in the form that serves, and records its gradient."""
    *numbers, with_overlap, with_statistics = options
    if with_overlap or with_statistics or not makes_gradient(input, LossOptions(*numbers).reduction):
        return _TwoPass.apply(call, input, target, weight, *options)
    tensors = (input, target, weight)
    if call is _KERNELS["CPU"]:
        loss, total_weight, _ = _WithGradient.apply(_WITH_GRADIENT_KERNELS["CPU"], *tensors, *numbers)
    else:
        overload = torch.ops.fastseg.upsample_cross_entropy_with_gradient.default
        loss, total_weight, _ = overload(*tensors, *numbers)
    return loss, no_statistics(loss, target.shape[1:]), total_weight, loss.new_empty((0, *input.shape[:2]))


register_gradient(
    _library, "upsample_cross_entropy", _KERNELS, _record_gradient, forward_plain, tensors=3, differentiable=1
)
register_gradient(
    _library, "upsample_cross_entropy_with_gradient", _WITH_GRADIENT_KERNELS, _WithGradient.apply,
    with_gradient_plain, tensors=3, differentiable=1,
)  # fmt: skip
