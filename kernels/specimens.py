"""Representative calls of every operator's launchers: what is compiled ahead of time, and what plans are tuned on."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fastseg.kernels import (
    conv_relu_pool2d,
    conv_relu_pool2d_backward,
    conv_relu_pool2d_fields,
    cross_entropy,
    relu_pool2d,
)
from fastseg.kernels.specimen import Call, Specimen, describe, fill, make_tensor
from fastseg.kernels.specimens_upsampling import UPSAMPLING
from fastseg.ops.convolution.algorithms import fits_fields
from fastseg.ops.convolution.geometry import Geometry, output_shapes, resolve
from fastseg.ops.cross_entropy import has_few_classes
from fastseg.ops.losses.options import LossOptions

# ---- cross_entropy ----


@dataclasses.dataclass(frozen=True)
class _CrossEntropy:
    """Logits of a size and dtype, and the arguments of the loss; ``target`` of a floating dtype means probabilities."""

    sizes: tuple[int, ...]
    dtype: torch.dtype = torch.bfloat16
    channels_last: bool = False
    target: torch.dtype = torch.int64
    weighted: bool = False
    label_smoothing: float = 0.0
    reduction: str = "mean"
    tuned: bool = False

    def specimens(self) -> Iterator[Specimen]:
        """Its forward and its backward."""
        name = describe(
            "x".join(map(str, self.sizes)), self.dtype, self.channels_last and "channels_last", self.target,
            self.weighted and "weighted", self.label_smoothing and "smoothed", self.reduction,
        )  # fmt: skip
        yield Specimen(f"cross_entropy {name} forward", self.forward, self.tuned)
        yield Specimen(f"cross_entropy {name} backward", self.backward, self.tuned)

    def tensors(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None, Tensor]:
        """Input, target, weight, and what forward fills: loss, statistics where backward needs them, total_weight."""
        input = make_tensor(self.sizes, self.dtype, device, self.channels_last)
        images, classes, *pixels = self.sizes
        accumulation = torch.float64 if self.dtype == torch.float64 else torch.float32
        if self.target.is_floating_point:
            target = make_tensor(self.sizes, self.target, device, self.channels_last).softmax(1)
        else:
            target = torch.randint(classes, (images, *pixels), dtype=self.target, device=device)
        weight = torch.rand(classes, dtype=accumulation, device=device) if self.weighted else None
        total_weight = torch.empty((), dtype=accumulation, device=device)
        loss = total_weight.new_empty((images, *pixels) if self.reduction == "none" else ())
        statistics = None if has_few_classes(input, target) else total_weight.new_empty((2, images, *pixels))
        return input, target, weight, loss, statistics, total_weight

    def forward(self, device: torch.device) -> Call:
        """Prepares the forward call."""
        input, target, weight, *outputs = self.tensors(device)
        options = LossOptions(-100, self.reduction, self.label_smoothing)
        tensors = cross_entropy.ForwardTensors(input, target, weight, *outputs)

        def call() -> tuple[Tensor, ...]:
            cross_entropy.forward(tensors, options)
            return tuple(output for output in outputs if output is not None)

        return call

    def backward(self, device: torch.device) -> Call:
        """Prepares the backward call, by running forward."""
        forward = cross_entropy.ForwardTensors(*self.tensors(device))
        options = LossOptions(-100, self.reduction, self.label_smoothing)
        cross_entropy.forward(forward, options)
        input, target, weight, loss, statistics, total_weight = forward
        tensors = cross_entropy.BackwardTensors(
            torch.ones_like(loss), input, target, weight, statistics, total_weight, torch.empty_like(input)
        )

        def call() -> tuple[Tensor, ...]:
            cross_entropy.backward(tensors, options)
            return (tensors.grad_input,)

        return call


_ADE20K, _CITYSCAPES = (8, 150, 512, 512), (16, 19, 512, 1024)
_CROSS_ENTROPY = [
    # Each bucket's.
    _CrossEntropy(_ADE20K, tuned=True),
    _CrossEntropy(_CITYSCAPES, tuned=True),
    _CrossEntropy((16, 11, 512, 1024), channels_last=True, tuned=True),
    _CrossEntropy(_CITYSCAPES, channels_last=True, tuned=True),
    _CrossEntropy((8, 64, 512, 512), channels_last=True, tuned=True),
    _CrossEntropy((8, 104, 512, 512), channels_last=True, tuned=True),
    _CrossEntropy(_ADE20K, channels_last=True, tuned=True),
    _CrossEntropy((16, 2, 512, 512), channels_last=True, tuned=True),
    _CrossEntropy((16, 4, 512, 512), channels_last=True),
    _CrossEntropy((16, 8, 512, 512), channels_last=True),
    # What else changes the code: other dtypes, numbers of classes, and arguments.
    _CrossEntropy((16, 2, 512, 512), target=torch.uint8),
    _CrossEntropy((4, 257, 256, 256), channels_last=True, reduction="sum"),
    _CrossEntropy((8, 19, 512, 512), torch.float32, weighted=True),
    _CrossEntropy((8, 19, 512, 512), torch.float32, True, torch.uint8, weighted=True, label_smoothing=0.1),
    _CrossEntropy((8, 19, 512, 512), torch.float16, reduction="none", label_smoothing=0.1),
    _CrossEntropy((2, 19, 512, 512), torch.float64, weighted=True, label_smoothing=0.1),
    _CrossEntropy((8, 19, 512, 512), target=torch.float32, weighted=True, label_smoothing=0.1),
    _CrossEntropy((8, 150, 512, 512), torch.float16, True, torch.float16),
    # Sizes: a matrix of logits, pixels that fill no whole vector, a picture of few programs, offsets past 2^31.
    _CrossEntropy((65536, 1000), torch.float32),
    _CrossEntropy((3, 21, 333, 501)),
    _CrossEntropy((3, 21, 333, 501), channels_last=True, reduction="none"),
    _CrossEntropy((1, 19, 4, 4)),
    _CrossEntropy((1, 19, 4, 4), channels_last=True),
    _CrossEntropy((1, 2, 32768, 32768)),
]


# ---- conv_relu_pool2d ----


def _tf32(allowed: bool) -> contextlib.AbstractContextManager[None]:
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=allowed)


def _prepare_with_tf32(allowed: bool, prepare: Callable[[torch.device], Call], device: torch.device) -> Call:
    """Prepares a call, and lets it run, under a setting of TF32."""
    with _tf32(allowed):
        call = prepare(device)

    def call_with_tf32() -> tuple[Tensor, ...]:
        with _tf32(allowed):
            return call()

    return call_with_tf32


@dataclasses.dataclass(frozen=True)
class _Convolution:
    """A convolution that the fused kernels serve, "same" but for its stride, with a bias and a pool."""

    sizes: tuple[int, int, int, int]
    out_channels: int
    dtype: torch.dtype = torch.bfloat16
    channels_last: bool = True
    kernel: int = 3
    stride: int = 1
    dilation: int = 1
    pool: tuple[int, int, int] = (2, 2, 0)  # size, stride, padding
    allow_tf32: bool = True
    tuned: bool = False

    def specimens(self) -> Iterator[Specimen]:
        """Its forward, and the gradients of its weight and its input."""
        name = describe(
            "x".join(map(str, self.sizes)), f"to {self.out_channels}", self.dtype,
            self.channels_last and "channels_last", f"kernel {self.kernel}",
            self.stride > 1 and f"stride {self.stride}", self.dilation > 1 and f"dilation {self.dilation}",
            f"pool {self.pool}", not self.allow_tf32 and "without TF32",
        )  # fmt: skip
        launchers = [self.forward, self.backward_weight, self.backward_input]
        if self.served_by_fields():
            launchers.append(self.forward_fields)
        for launcher in launchers:
            prepare = functools.partial(_prepare_with_tf32, self.allow_tf32, launcher)
            yield Specimen(f"conv_relu_pool2d {name} {launcher.__name__}", prepare, self.tuned)

    def served_by_fields(self) -> bool:
        """Whether the kernel for first layers serves the call."""
        with _tf32(self.allow_tf32):
            geometry, _, (_, weight, *_) = self.tensors(torch.device("meta"))
            return fits_fields(weight, geometry)

    def tensors(self, device: torch.device) -> tuple[Geometry, tuple[int, int], tuple[Tensor, ...]]:
        """The geometry, the convolution's height and width, and input, weight, bias, output and positions."""
        kernel = (self.kernel, self.kernel)
        padding = self.dilation * (self.kernel // 2)
        geometry, _ = resolve(kernel, self.stride, padding, self.dilation, 1, *self.pool, False)
        input = make_tensor(self.sizes, self.dtype, device, self.channels_last)
        weight = make_tensor((self.out_channels, self.sizes[1], *kernel), self.dtype, device, self.channels_last)
        bias = fill(torch.empty(self.out_channels, dtype=self.dtype, device=device))
        pooled, (_, _, height, width) = output_shapes(input.shape, weight.shape, geometry)
        output = make_tensor(pooled, self.dtype, device, self.channels_last)
        positions = torch.empty_like(output, dtype=torch.uint8)
        return geometry, (height, width), conv_relu_pool2d.ForwardTensors(input, weight, bias, output, positions)

    def forward(self, device: torch.device) -> Call:
        """Prepares the forward call of the kernel that serves any."""
        return self._forward(conv_relu_pool2d.forward, device)

    def forward_fields(self, device: torch.device) -> Call:
        """Prepares the forward call of the kernel for first layers."""
        return self._forward(conv_relu_pool2d_fields.forward, device)

    def _forward(self, launcher: Callable[..., None], device: torch.device) -> Call:
        geometry, convolved, tensors = self.tensors(device)
        options = conv_relu_pool2d.options_of(tensors.weight, convolved, geometry)

        def call() -> tuple[Tensor, ...]:
            launcher(tensors, options)
            return tensors.output, tensors.positions

        return call

    def backward_weight(self, device: torch.device) -> Call:
        """Prepares the call for the gradients of weight and bias, by running forward."""
        options, (input, weight, _, output, positions) = self._run_forward(device)
        tensors = conv_relu_pool2d_backward.WeightTensors(fill(torch.empty_like(output)), positions, input, weight)
        return lambda: conv_relu_pool2d_backward.backward_weight(tensors, True, options)

    def backward_input(self, device: torch.device) -> Call:
        """Prepares the call for the gradient of the input, by running forward."""
        options, (input, weight, _, output, positions) = self._run_forward(device)
        grads = (fill(torch.empty_like(output)), torch.empty_like(input))
        tensors = conv_relu_pool2d_backward.InputTensors(grads[0], positions, weight, grads[1])

        def call() -> tuple[Tensor, ...]:
            conv_relu_pool2d_backward.backward_input(tensors, options)
            return (tensors.grad_input,)

        return call

    def _run_forward(self, device: torch.device) -> tuple[conv_relu_pool2d.Options, conv_relu_pool2d.ForwardTensors]:
        geometry, convolved, tensors = self.tensors(device)
        options = conv_relu_pool2d.options_of(tensors.weight, convolved, geometry)
        conv_relu_pool2d.forward(tensors, options)
        return options, tensors


_CONVOLUTIONS = [
    # First levels of networks.
    _Convolution((32, 3, 512, 512), 64, tuned=True),
    _Convolution((32, 3, 512, 512), 64, channels_last=False, tuned=True),
    _Convolution((32, 3, 512, 512), 32, tuned=True),
    _Convolution((32, 3, 512, 512), 16, tuned=True),
    _Convolution((32, 1, 512, 512), 64, tuned=True),
    _Convolution((32, 16, 256, 256), 32, tuned=True),
    _Convolution((32, 3, 512, 512), 64, kernel=7, stride=2, tuned=True),
    _Convolution((16, 3, 512, 512), 32, torch.float32, tuned=True),
    # What else changes the code.
    _Convolution((16, 3, 512, 512), 64, torch.float32, channels_last=False, allow_tf32=False),
    _Convolution((8, 3, 333, 501), 32, torch.float16, channels_last=False, dilation=2),
    _Convolution((8, 4, 512, 512), 8, torch.float16, kernel=1),
]


@dataclasses.dataclass(frozen=True)
class _Pooling:
    """Bias, ReLU and pool of a convolution's output that a library computed."""

    sizes: tuple[int, int, int, int]
    dtype: torch.dtype = torch.bfloat16
    channels_last: bool = True
    pool: tuple[int, int, int] = (2, 2, 0)  # size, stride, padding
    with_skip: bool = False
    tuned: bool = False

    def specimens(self) -> Iterator[Specimen]:
        """Its forward and its backward."""
        name = describe(
            "x".join(map(str, self.sizes)), self.dtype, self.channels_last and "channels_last", f"pool {self.pool}",
            self.with_skip and "skip",
        )  # fmt: skip
        yield Specimen(f"relu_pool2d {name} forward", self.forward, self.tuned)
        yield Specimen(f"relu_pool2d {name} backward", self.backward, self.tuned)

    def tensors(self, device: torch.device) -> tuple[Geometry, relu_pool2d.ForwardTensors]:
        """The geometry, and what forward reads and fills."""
        geometry, _ = resolve((1, 1), 1, 0, 1, 1, *self.pool, False)
        convolved = make_tensor(self.sizes, self.dtype, device, self.channels_last)
        bias = fill(torch.empty(self.sizes[1], dtype=self.dtype, device=device))
        pooled, _ = output_shapes(convolved.shape, (self.sizes[1], self.sizes[1], 1, 1), geometry)
        output = make_tensor(pooled, self.dtype, device, self.channels_last)
        skip = torch.empty_like(convolved) if self.with_skip else None
        positions = torch.empty_like(output, dtype=torch.uint8)
        return geometry, relu_pool2d.ForwardTensors(convolved, bias, output, positions, skip)

    def forward(self, device: torch.device) -> Call:
        """Prepares the forward call."""
        geometry, tensors = self.tensors(device)

        def call() -> tuple[Tensor, ...]:
            relu_pool2d.forward(tensors, geometry)
            return tuple(tensor for tensor in tensors[2:] if tensor is not None)

        return call

    def backward(self, device: torch.device) -> Call:
        """Prepares the backward call, by running forward."""
        geometry, forward = self.tensors(device)
        relu_pool2d.forward(forward, geometry)
        convolved, _, output, positions, skip = forward
        tensors = relu_pool2d.BackwardTensors(
            torch.empty_like(convolved), fill(torch.empty_like(output)), positions, skip,
            None if skip is None else fill(torch.empty_like(skip)),
        )  # fmt: skip

        def call() -> tuple[Tensor, ...]:
            grad_bias = relu_pool2d.backward(tensors, True, geometry)
            return tensors.grad_convolved, grad_bias

        return call


_POOLINGS = [
    # Each bucket's.
    _Pooling((32, 64, 256, 256), tuned=True),
    _Pooling((32, 64, 256, 256), channels_last=False, tuned=True),
    _Pooling((32, 16, 256, 256), tuned=True),
    _Pooling((32, 32, 256, 256), tuned=True),
    _Pooling((32, 128, 128, 128), tuned=True),
    _Pooling((32, 64, 256, 256), pool=(3, 2, 1), tuned=True),  # of a ResNet's stem
    # What else changes the code.
    _Pooling((16, 64, 256, 256), with_skip=True),
    _Pooling((16, 64, 256, 256), torch.float32, channels_last=False, pool=(3, 2, 1), with_skip=True),
    _Pooling((8, 24, 117, 133), torch.float16, pool=(3, 2, 1)),
    _Pooling((4, 64, 128, 128), torch.float64),
]


_CASES: tuple[_CrossEntropy | _Convolution | _Pooling, ...] = (*_CROSS_ENTROPY, *_CONVOLUTIONS, *_POOLINGS)
SPECIMENS: list[Specimen] = [*(specimen for case in _CASES for specimen in case.specimens()), *UPSAMPLING]
