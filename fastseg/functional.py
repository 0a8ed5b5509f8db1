"""The stateless operators: what they mean, what they accept, and the checks of their arguments."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastseg import reference
from fastseg._native import log_slow_road
from fastseg.ops import conv_relu_pool2d as _conv_relu_pool2d
from fastseg.ops import conv_relu_pool2d_geometry as _geometry
from fastseg.ops import cross_entropy as _cross_entropy

IntOrPair = int | tuple[int, ...]


def conv_relu_pool2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntOrPair = 1,
    padding: str | IntOrPair = 0,
    dilation: IntOrPair = 1,
    groups: int = 1,
    *,
    pool_size: IntOrPair = 2,
    pool_stride: IntOrPair | None = None,
    pool_padding: IntOrPair = 0,
    ceil_mode: bool = False,
    return_indices: bool = False,
    return_skip: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """Convolution, bias, ReLU and max pooling in one operator: ``max_pool2d(relu(conv2d(input, weight, bias)))``.

    Equals the three torch functions for every argument that they accept; see `torch.nn.functional.conv2d` and
    `torch.nn.functional.max_pool2d` for the formulas of the sizes. Of equal maxima the first in scan order takes the
    gradient, NaN propagates, and a window whose maximum ReLU cut passes no gradient. Where a fused kernel serves the
    call, the full-resolution map is never in memory. Differentiable to any order; second derivatives run as plain
    PyTorch. In half types the maximum is found before the values are rounded, so that among values that round to one
    the indices may differ from torch's.

    Args:
        input: Images ``[N, C, H, W]`` or ``[C, H, W]``; float32, float64, bfloat16 or float16. Read by its strides;
            channels_last in gives channels_last out.
        weight: Kernels ``[K, C / groups, kernel height, kernel width]`` of input's dtype.
        bias: ``[K]`` of input's dtype, or None.
        stride: Step of the convolution, in pixels: one number or (height, width), as all that follow.
        padding: Zeros on each side of the input, in pixels; or "valid" (none), or "same" (the convolution keeps the
            size; needs stride 1).
        dilation: Distance between the kernel's taps, in pixels.
        groups: Blocks of channels that are convolved apart.
        pool_size: Size of the pooling window, in positions of the convolution's output.
        pool_stride: Step of the pooling window; None for ``pool_size``.
        pool_padding: Implicit -inf on each side before pooling; at most half of ``pool_size``.
        ceil_mode: Round the pooled size up instead of down.
        return_indices: Also return the maxima's flat positions in the convolution's output, as max_pool2d does.
        return_skip: Also return the un-pooled ``relu(conv2d(...))``, with a gradient of its own (a U-Net's skip).

    Returns:
        The pooled tensor ``[N, K, PH, PW]`` in input's dtype; then, where asked, the indices (int64, of the same
        shape) and the skip ``[N, K, CH, CW]``, in this order.

    Raises:
        ValueError: Shapes or numbers don't fit; the message names the argument.
        TypeError: A dtype that isn't supported, or dtypes that differ.
    """
    input, weight, bias = _conv_relu_pool2d.cast_for_autocast(input, weight, bias)
    _check_tensors(input, weight, bias, groups)
    if input.ndim == 3:
        results = conv_relu_pool2d(
            input.unsqueeze(0), weight, bias, stride, padding, dilation, groups,
            pool_size=pool_size, pool_stride=pool_stride, pool_padding=pool_padding, ceil_mode=ceil_mode,
            return_indices=return_indices, return_skip=return_skip,
        )  # fmt: skip
        return tuple(r.squeeze(0) for r in results) if isinstance(results, tuple) else results.squeeze(0)

    geometry, (extra_h, extra_w) = _geometry.resolve(
        weight.shape[2:], stride, padding, dilation, groups, pool_size, pool_stride, pool_padding, ceil_mode
    )
    if extra_h or extra_w:
        input = F.pad(input, (0, extra_w, 0, extra_h))
    _geometry.output_shapes(input.shape, weight.shape, geometry)  # refuses sizes that don't fit
    if geometry.pool_size[0] * geometry.pool_size[1] > _geometry.MAX_WINDOW:
        if not torch.compiler.is_compiling():
            log_slow_road("conv_relu_pool2d", f"a pool window of more than {_geometry.MAX_WINDOW} positions")
        return reference.conv_relu_pool2d(
            input, weight, bias, *geometry[:4], pool_size=geometry.pool_size, pool_stride=geometry.pool_stride,
            pool_padding=geometry.pool_padding, ceil_mode=ceil_mode,
            return_indices=return_indices, return_skip=return_skip,
        )  # fmt: skip
    return _conv_relu_pool2d.conv_relu_pool2d(input, weight, bias, geometry, return_indices, return_skip)


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross-entropy between logits and class labels or class probabilities.

    Equals `torch.nn.functional.cross_entropy`; see `torch.nn.CrossEntropyLoss` for the formulas. It reads half and
    bfloat16 logits as they are, in any memory format, computes in float32 (float64 for float64), and keeps two numbers
    a pixel for the backward pass, not the probabilities. Differentiable for ``input`` to any order. Second derivatives
    run as plain PyTorch, as do calls whose target or weight needs a gradient, or whose probabilities alone are float64;
    small float32 logits take torch's own operator, which is faster there (`fastseg.ops.cross_entropy.choose_road`).

    Args:
        input: Logits ``[C]``, ``[N, C]`` or ``[N, C, d1, ...]``; float32, float64, bfloat16 or float16. Never
            written to.
        target: Labels in [0, C), of input's shape without C, as uint8, int16, int32 or int64; or class probabilities,
            floating-point, of input's shape.
        weight: ``[C]``, how much each class counts; any floating-point dtype.
        ignore_index: A label that adds nothing to the loss, its gradient or the mean's divisor. With probabilities it
            must be negative, and has no meaning.
        reduction: "none" for a loss per pixel; "mean" for their sum over the weights of the labels that count (over the
            number of pixels, with probabilities); or "sum".
        label_smoothing: Share of the target, in [0, 1], that is spread evenly over all classes.

    Returns:
        The loss in input's dtype (its promotion with target's, for probabilities; float32 for half dtypes under
        autocast): ``[N, d1, ...]`` for "none", else one number. NaN for the "mean" over no pixel.

    Raises:
        IndexError: On a CPU, a label is neither in [0, C) nor ignore_index. A GPU can't raise one without waiting for
            it, and gives NaN as that pixel's loss and gradient.
        ValueError: Shapes, devices or numbers don't fit; the message names the argument.
        TypeError: A dtype that isn't supported.
    """
    small = not torch.compiler.is_compiling() and _cross_entropy.choose_road(input, target, weight) == "plain"
    if small and 0 <= label_smoothing <= 1:
        try:
            return F.cross_entropy(
                input, target, weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
            )
        except (IndexError, RuntimeError, ValueError):
            pass  # The checks below find what is wrong, too, and name the argument.
    _check_cross_entropy(input, target, weight, ignore_index, reduction, label_smoothing)
    reason = _unsupported(input, target, weight)
    if reason is not None:
        if not torch.compiler.is_compiling():
            log_slow_road("cross_entropy", reason)
        return reference.cross_entropy(input, target, weight, ignore_index, reduction, label_smoothing)

    return _run_cross_entropy(input, target, weight, ignore_index, reduction, label_smoothing)


FLOATING_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _check_tensors(input: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> None:
    if input.ndim not in (3, 4):
        raise ValueError(f"input: expected [N, C, H, W] or [C, H, W], got shape {tuple(input.shape)}")
    if weight.ndim != 4:
        raise ValueError(f"weight: expected [K, C / groups, height, width], got shape {tuple(weight.shape)}")
    if weight.shape[0] == 0:
        raise ValueError(f"weight: expected at least one output channel, got shape {tuple(weight.shape)}")
    if groups < 1 or weight.shape[0] % groups:
        raise ValueError(f"groups: expected a divisor of weight's {weight.shape[0]} output channels, got {groups}")
    if input.shape[-3] != weight.shape[1] * groups:
        raise ValueError(
            f"input: expected {weight.shape[1] * groups} channels (weight {tuple(weight.shape)}, groups {groups}), "
            f"got {input.shape[-3]}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: expected shape ({weight.shape[0]},), got {tuple(bias.shape)}")
    if input.dtype not in FLOATING_DTYPES:
        raise TypeError(f"input: expected float32, float64, bfloat16 or float16, got {input.dtype}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != input.dtype:
            raise TypeError(f"{name}: expected input's dtype {input.dtype}, got {tensor.dtype}")
        if tensor is not None and tensor.device != input.device:
            raise ValueError(f"{name}: expected input's device {input.device}, got {tensor.device}")


LABEL_DTYPES = (torch.uint8, torch.int16, torch.int32, torch.int64)


def _check_cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str, label_smoothing: float
) -> None:
    shape = tuple(input.shape)
    if not shape:
        raise ValueError("input: expected [C], [N, C] or [N, C, d1, ...], got a scalar")
    classes = shape[min(1, len(shape) - 1)]
    if classes == 0:
        raise ValueError(f"input: expected at least one class, got shape {shape}")
    if input.dtype not in FLOATING_DTYPES:
        raise TypeError(f"input: expected float32, float64, bfloat16 or float16, got {input.dtype}")
    if target.device != input.device:
        raise ValueError(f"target: expected input's device {input.device}, got {target.device}")
    if target.is_floating_point():
        _check_probabilities(shape, target, ignore_index)
    else:
        _check_labels(shape, target)
    if weight is not None:
        if weight.ndim != 1 or weight.shape[0] != classes:
            raise ValueError(f"weight: expected shape ({classes},), got {tuple(weight.shape)}")
        if not weight.is_floating_point():
            raise TypeError(f"weight: expected a floating-point dtype, got {weight.dtype}")
        if weight.device != input.device:
            raise ValueError(f"weight: expected input's device {input.device}, got {weight.device}")
    if reduction not in _cross_entropy.REDUCTIONS:
        raise ValueError(f'reduction: expected "none", "mean" or "sum", got {reduction!r}')
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing: expected a number in [0, 1], got {label_smoothing}")


def _run_cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str, label_smoothing: float
) -> Tensor:
    """The operator on checked arguments, brought to the shapes and dtypes that it takes; the loss in torch's dtype."""
    dtype, accumulated = input.dtype, _cross_entropy.accumulation_dtype(input)
    if target.is_floating_point():
        dtype = torch.promote_types(dtype, target.dtype)
        target = target.to(accumulated) if accumulated == torch.float64 else target
    if dtype.itemsize < accumulated.itemsize and _autocasts(input):
        dtype = accumulated
    if weight is not None:
        weight = weight.to(accumulated).contiguous()
    if input.ndim > 1:
        loss = _cross_entropy.cross_entropy(input, target, weight, ignore_index, reduction, label_smoothing)
    else:
        loss = _cross_entropy.cross_entropy(
            input.unsqueeze(0), target.unsqueeze(0), weight, ignore_index, reduction, label_smoothing
        )
        loss = loss.squeeze(0) if reduction == "none" else loss
    return loss if loss.dtype == dtype else loss.to(dtype)


def _autocasts(input: Tensor) -> bool:
    device = input.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _unsupported(input: Tensor, target: Tensor, weight: Tensor | None) -> str | None:
    """Why plain PyTorch serves a call of cross_entropy, or None."""
    if torch.is_grad_enabled() and (target.requires_grad or (weight is not None and weight.requires_grad)):
        return "target or weight needs a gradient"
    if target.dtype == torch.float64 and input.dtype != torch.float64:
        return "float64 probabilities for logits of less precision"
    return None


def _check_probabilities(shape: tuple[int, ...], target: Tensor, ignore_index: int) -> None:
    if target.shape != shape:
        raise ValueError(
            f"target: expected class probabilities of input's shape {shape}, got {tuple(target.shape)} in "
            f"{target.dtype}; class labels need an integer dtype"
        )
    if target.dtype not in FLOATING_DTYPES:
        raise TypeError(f"target: expected float32, float64, bfloat16 or float16, got {target.dtype}")
    if ignore_index >= 0:
        raise ValueError(f"ignore_index: class probabilities have no label to ignore, got {ignore_index}")


def _check_labels(shape: tuple[int, ...], target: Tensor) -> None:
    if target.dtype not in LABEL_DTYPES:
        raise TypeError(f"target: expected uint8, int16, int32 or int64 labels, got {target.dtype}")
    expected = (*shape[:1], *shape[2:]) if len(shape) > 1 else ()
    if target.shape != expected:
        raise ValueError(f"target: expected labels of shape {expected}, got {tuple(target.shape)} in {target.dtype}")
