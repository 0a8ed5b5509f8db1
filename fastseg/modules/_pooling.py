"""Layers that convolve and pool: torch.nn.Conv2d's constructor and state_dict, fastseg's operators."""

from __future__ import annotations

from typing import Any, Literal, TypeVar

import torch.nn.functional as F
from torch import Tensor, nn

from fastseg import functional
from fastseg.modules._leaves import leaf_of_traces

IntOrPair = int | tuple[int, int]
Layer = TypeVar("Layer", bound=nn.Conv2d)


def _convolution_arguments(conv: nn.Conv2d) -> dict[str, Any]:
    """The constructor's arguments of ``conv``, for a twin without memory that is to share its parameters."""
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    return {name: getattr(conv, name) for name in names} | {"bias": conv.bias is not None, "device": "meta"}


def _sharing(conv: nn.Conv2d, twin: Layer) -> Layer:
    """The twin, with ``conv``'s parameters and mode."""
    twin.weight, twin.bias = conv.weight, conv.bias
    return twin.train(conv.training)


def _padded(conv: nn.Conv2d, input: Tensor) -> tuple[Tensor, Any]:
    """The input and the padding of ``conv``'s convolution: an input that is padded first needs none of zeros."""
    if conv.padding_mode == "zeros":
        return input, conv.padding
    return F.pad(input, conv._reversed_padding_repeated_twice, mode=conv.padding_mode), 0


class Conv2d(nn.Conv2d):
    """`torch.nn.Conv2d` on `fastseg.functional.conv2d`, which see for the calls that its kernels serve.

    Arguments, parameters and state_dict are those of `torch.nn.Conv2d`.
    """

    @leaf_of_traces
    def forward(self, input: Tensor) -> Tensor:
        """The convolution's output."""
        input, padding = _padded(self, input)
        return functional.conv2d(input, self.weight, self.bias, self.stride, padding, self.dilation, self.groups)

    @classmethod
    def from_torch(cls, conv: nn.Conv2d) -> Conv2d:
        """The layer that does what ``conv`` does, sharing its parameters."""
        return _sharing(conv, cls(**_convolution_arguments(conv)))

    def to_torch(self) -> nn.Conv2d:
        """The `torch.nn.Conv2d` that does what this layer does, sharing its parameters."""
        return _plain(self)


def _plain(layer: nn.Conv2d) -> nn.Conv2d:
    """A layer's convolution alone, in plain PyTorch, sharing its parameters."""
    return _sharing(layer, nn.Conv2d(**_convolution_arguments(layer)))


class ConvReLUPool2d(nn.Conv2d):
    """`torch.nn.Conv2d`, ReLU and `torch.nn.MaxPool2d` in one layer.

    The parameters are those of `torch.nn.Conv2d`, ``weight`` and ``bias``: its state_dict loads, and everything that
    looks for an `nn.Conv2d` (weight initialisation, optimizers) finds one. See `fastseg.functional.conv_relu_pool2d`
    for the formula, the shapes and the pooling arguments, `torch.nn.Conv2d` for the others.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Size of the convolution's kernel, in pixels.
        stride: Step of the convolution, in pixels.
        padding: Padding on each side, in pixels, or "same" or "valid".
        dilation: Distance between the kernel's taps, in pixels.
        groups: Blocks of channels that are convolved apart.
        bias: Whether the convolution has a bias.
        padding_mode: "zeros", or "reflect", "replicate" or "circular", for which the input is padded first.
        device: Where the parameters live.
        dtype: The parameters' dtype.
        pool_size: Size of the pooling window.
        pool_stride: Step of the pooling window; None for ``pool_size``.
        pool_padding: Implicit -inf on each side before pooling.
        ceil_mode: Round the pooled size up instead of down.
        return_indices: Also return the maxima's positions.
        return_skip: Also return the un-pooled output of the ReLU.
    """

    @staticmethod
    def operator(*args: Any, **options: Any) -> Any:
        """What computes the layer; looked up at each call, since symbolic traces replace it in its module."""
        return functional.conv_relu_pool2d(*args, **options)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: IntOrPair,
        stride: IntOrPair = 1,
        padding: str | IntOrPair = 0,
        dilation: IntOrPair = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device: Any = None,
        dtype: Any = None,
        *,
        pool_size: IntOrPair = 2,
        pool_stride: IntOrPair | None = None,
        pool_padding: IntOrPair = 0,
        ceil_mode: bool = False,
        return_indices: bool = False,
        return_skip: bool = False,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        )
        self.pool_size = pool_size
        self.pool_stride = pool_size if pool_stride is None else pool_stride
        self.pool_padding = pool_padding
        self.ceil_mode = ceil_mode
        self.return_indices = return_indices
        self.return_skip = return_skip

    @leaf_of_traces
    def forward(self, input: Tensor) -> Any:
        """The pooled output; with it, where asked in the constructor, the indices and the skip."""
        input, padding = _padded(self, input)
        return self.operator(
            input,
            self.weight,
            self.bias,
            self.stride,
            padding,
            self.dilation,
            self.groups,
            pool_size=self.pool_size,
            pool_stride=self.pool_stride,
            pool_padding=self.pool_padding,
            ceil_mode=self.ceil_mode,
            return_indices=self.return_indices,
            return_skip=self.return_skip,
        )

    @classmethod
    def from_torch(cls, conv: nn.Conv2d, pool: nn.MaxPool2d, *, return_skip: bool = False) -> ConvReLUPool2d:
        """The layer that does what ``pool(relu(conv(input)))`` does, sharing conv's parameters.

        Raises:
            ValueError: The pool is dilated, which the fused operator does not support.
        """
        if pool.dilation not in (1, (1, 1)):
            raise ValueError(f"pool: expected dilation 1, got {pool.dilation}; keep the three layers for it")
        layer = cls(
            **_convolution_arguments(conv),
            pool_size=pool.kernel_size,
            pool_stride=pool.stride,
            pool_padding=pool.padding,
            ceil_mode=pool.ceil_mode,
            return_indices=pool.return_indices,
            return_skip=return_skip,
        )
        return _sharing(conv, layer)

    def to_torch(self) -> nn.Sequential:
        """``Sequential(Conv2d, ReLU, MaxPool2d)`` that does what this layer does, sharing its parameters.

        Raises:
            ValueError: The layer returns its skip, which a Sequential can't.
        """
        if self.return_skip:
            raise ValueError("return_skip: a Sequential has one output; build the layer without it first")
        pool = nn.MaxPool2d(
            self.pool_size, self.pool_stride, self.pool_padding,
            return_indices=self.return_indices, ceil_mode=self.ceil_mode,
        )  # fmt: skip
        return nn.Sequential(_plain(self), nn.ReLU(), pool).train(self.training)

    def extra_repr(self) -> str:
        """The arguments that differ from the defaults, for ``repr(layer)``."""
        return f"{super().extra_repr()}, {_pooling(self)}"


class ReLUPool2d(nn.Module):
    """ReLU and `torch.nn.MaxPool2d` in one layer, without parameters: see `fastseg.functional.relu_pool2d`.

    Args:
        pool_size: Size of the pooling window.
        pool_stride: Step of the pooling window; None for ``pool_size``.
        pool_padding: Implicit -inf on each side before pooling.
        ceil_mode: Round the pooled size up instead of down.
        return_indices: Also return the maxima's positions.
        return_skip: Also return the un-pooled output of the ReLU.
    """

    def __init__(
        self,
        pool_size: IntOrPair = 2,
        pool_stride: IntOrPair | None = None,
        pool_padding: IntOrPair = 0,
        ceil_mode: bool = False,
        *,
        return_indices: bool = False,
        return_skip: bool = False,
    ) -> None:
        super().__init__()
        self.pool_size = pool_size
        self.pool_stride = pool_size if pool_stride is None else pool_stride
        self.pool_padding = pool_padding
        self.ceil_mode = ceil_mode
        self.return_indices = return_indices
        self.return_skip = return_skip

    @leaf_of_traces
    def forward(self, input: Tensor) -> Any:
        """The pooled map; with it, where asked in the constructor, the indices and the skip."""
        return functional.relu_pool2d(
            input, self.pool_size, self.pool_stride, self.pool_padding, self.ceil_mode,
            return_indices=self.return_indices, return_skip=self.return_skip,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """The arguments that differ from the defaults, for ``repr(layer)``."""
        return _pooling(self)


def _pooling(layer: ConvReLUPool2d | ReLUPool2d) -> str:
    """The size of a layer's window, and its other arguments where they differ from the defaults."""
    parts = [f"pool_size={layer.pool_size}"]
    if layer.pool_stride != layer.pool_size:
        parts.append(f"pool_stride={layer.pool_stride}")
    if layer.pool_padding not in (0, (0, 0)):
        parts.append(f"pool_padding={layer.pool_padding}")
    parts += [f"{name}=True" for name in ("ceil_mode", "return_indices", "return_skip") if getattr(layer, name)]
    return ", ".join(parts)
