"""Drop-in layers: torch.nn's constructors and state_dict, fastseg's operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastseg import functional

IntOrPair = int | tuple[int, int]


def _convolution_arguments(conv: nn.Conv2d) -> dict[str, Any]:
    """The constructor's arguments of ``conv``, for a twin without memory that is to share its parameters."""
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    return {name: getattr(conv, name) for name in names} | {"bias": conv.bias is not None, "device": "meta"}


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

    operator: ClassVar[Callable[..., Any]] = staticmethod(functional.conv_relu_pool2d)

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

    def forward(self, input: Tensor) -> Any:
        """The pooled output; with it, where asked in the constructor, the indices and the skip."""
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
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
        layer.weight, layer.bias = conv.weight, conv.bias
        return layer.train(conv.training)

    def to_torch(self) -> nn.Sequential:
        """``Sequential(Conv2d, ReLU, MaxPool2d)`` that does what this layer does, sharing its parameters.

        Raises:
            ValueError: The layer returns its skip, which a Sequential can't.
        """
        if self.return_skip:
            raise ValueError("return_skip: a Sequential has one output; build the layer without it first")
        conv = nn.Conv2d(**_convolution_arguments(self))
        conv.weight, conv.bias = self.weight, self.bias
        pool = nn.MaxPool2d(
            self.pool_size, self.pool_stride, self.pool_padding,
            return_indices=self.return_indices, ceil_mode=self.ceil_mode,
        )  # fmt: skip
        return nn.Sequential(conv, nn.ReLU(), pool).train(self.training)

    def extra_repr(self) -> str:
        """The arguments that differ from the defaults, for ``repr(layer)``."""
        parts = [super().extra_repr(), f"pool_size={self.pool_size}"]
        if self.pool_stride != self.pool_size:
            parts.append(f"pool_stride={self.pool_stride}")
        if self.pool_padding not in (0, (0, 0)):
            parts.append(f"pool_padding={self.pool_padding}")
        parts += [f"{name}=True" for name in ("ceil_mode", "return_indices", "return_skip") if getattr(self, name)]
        return ", ".join(parts)


def _named(layer: nn.Module, *names: str) -> str:
    """Arguments of a layer, for its repr."""
    return ", ".join(f"{name}={getattr(layer, name)!r}" for name in names)


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """`torch.nn.CrossEntropyLoss` on `fastseg.functional.cross_entropy`: same constructor, same state_dict.

    See `fastseg.functional.cross_entropy` for the shapes and dtypes; labels need not be int64.
    """

    def forward(self, input: Tensor, target: Tensor, pixel_weight: Tensor | None = None) -> Tensor:
        """The loss between logits ``[N, C, d1, ...]`` and labels ``[N, d1, ...]`` or class probabilities."""
        return functional.cross_entropy(
            input, target, self.weight, self.ignore_index, self.reduction, self.label_smoothing,
            pixel_weight=pixel_weight,
        )  # fmt: skip


class UpsampleCrossEntropyLoss(nn.CrossEntropyLoss):
    """`torch.nn.CrossEntropyLoss` of logits upsampled to the labels' size; its state_dict loads.

    See `fastseg.functional.upsample_cross_entropy` for the shapes and dtypes.

    Args:
        weight: ``[C]``, how much each class counts.
        ignore_index: A label that doesn't count.
        reduction: "none", "mean" or "sum".
        label_smoothing: Share of the target that is spread evenly over all classes.
        mode: "bilinear" or "nearest".
        align_corners: As in `fastseg.functional.upsample_cross_entropy`.
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        *,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        mode: str = "bilinear",
        align_corners: bool = False,
    ) -> None:
        super().__init__(weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing)
        self.mode = mode
        self.align_corners = align_corners

    def forward(self, input: Tensor, target: Tensor, pixel_weight: Tensor | None = None) -> Tensor:
        """The loss between logits ``[N, C, h, w]`` and labels ``[N, H, W]``."""
        return functional.upsample_cross_entropy(
            input, target, self.weight, self.ignore_index, self.reduction, self.label_smoothing,
            mode=self.mode, align_corners=self.align_corners, pixel_weight=pixel_weight,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """The grid, for ``repr(layer)``."""
        return _named(self, "mode", "align_corners")


class UpsampleArgmax(nn.Module):
    """The class of the largest upsampled logit of each pixel: `torch.nn.Upsample` and ``argmax(1)`` in one layer.

    See `fastseg.functional.upsample_argmax` for the shapes and dtypes.

    Args:
        size: The output's (height, width), or one number for both.
        scale_factor: The output's size in input's, instead of ``size``. Without either, each call says its size.
        mode: "bilinear" or "nearest".
        align_corners: As in `fastseg.functional.upsample_cross_entropy`.
        dtype: The labels' dtype; None for uint8 for up to 256 classes, else int64.
        return_confidence: Also return the largest class's softmax value.

    Raises:
        ValueError: Both ``size`` and ``scale_factor`` are given.
    """

    def __init__(
        self,
        size: IntOrPair | None = None,
        scale_factor: float | tuple[float, float] | None = None,
        mode: str = "bilinear",
        align_corners: bool = False,
        *,
        dtype: torch.dtype | None = None,
        return_confidence: bool = False,
    ) -> None:
        super().__init__()
        if size is not None and scale_factor is not None:
            raise ValueError(f"size: expected either it or scale_factor, got {size} and {scale_factor}")
        self.size = size
        self.scale_factor = scale_factor
        self.mode = mode
        self.align_corners = align_corners
        self.dtype = dtype
        self.return_confidence = return_confidence

    def forward(self, input: Tensor, size: IntOrPair | None = None) -> Any:
        """Labels of logits ``[N, C, h, w]``, and the confidence where asked; ``size`` overrides the constructor's."""
        extent = (self.size, self.scale_factor) if size is None else (size, None)
        return functional.upsample_argmax(
            input, *extent, self.mode, self.align_corners, dtype=self.dtype, return_confidence=self.return_confidence
        )

    def extra_repr(self) -> str:
        """The size and the grid, for ``repr(layer)``."""
        return _named(self, "size" if self.scale_factor is None else "scale_factor", "mode", "align_corners")


class CrossEntropyDiceLoss(nn.Module):
    """The sum of cross-entropy and soft Dice loss; ``weight`` is a buffer, as in `torch.nn.CrossEntropyLoss`.

    See `fastseg.functional.cross_entropy_dice` for the formula, the shapes and the arguments.
    """

    weight: Tensor | None

    def __init__(
        self,
        weight: Tensor | None = None,
        *,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        ce_weight: float = 1.0,
        dice_weight: float = 1.0,
        smooth: float = 1e-5,
        batch_dice: bool = False,
        include_background: bool = True,
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.ce_weight = ce_weight
        self.dice_weight = dice_weight
        self.smooth = smooth
        self.batch_dice = batch_dice
        self.include_background = include_background

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss between logits ``[N, C, d1, ...]`` and labels ``[N, d1, ...]``."""
        return functional.cross_entropy_dice(input, target, **self._options())

    def _options(self) -> dict[str, Any]:
        names = (
            "weight", "ignore_index", "label_smoothing", "ce_weight", "dice_weight", "smooth", "batch_dice",
            "include_background",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names}

    def extra_repr(self) -> str:
        """The combination, for ``repr(layer)``."""
        return _named(self, "ce_weight", "dice_weight", "smooth", "batch_dice", "include_background")


class UpsampleCrossEntropyDiceLoss(CrossEntropyDiceLoss):
    """`CrossEntropyDiceLoss` of logits upsampled to the labels' size.

    See `fastseg.functional.upsample_cross_entropy_dice` for the shapes and dtypes.

    Args:
        weight: ``[C]``, how much each class counts in the cross-entropy.
        mode: "bilinear" or "nearest".
        align_corners: As in `fastseg.functional.upsample_cross_entropy`.
        options: The other arguments of `CrossEntropyDiceLoss`.
    """

    def __init__(
        self, weight: Tensor | None = None, *, mode: str = "bilinear", align_corners: bool = False, **options: Any
    ) -> None:
        super().__init__(weight, **options)
        self.mode = mode
        self.align_corners = align_corners

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss between logits ``[N, C, h, w]`` and labels ``[N, H, W]``."""
        return functional.upsample_cross_entropy_dice(
            input, target, **self._options(), mode=self.mode, align_corners=self.align_corners
        )

    def extra_repr(self) -> str:
        """The grid and the combination, for ``repr(layer)``."""
        return f"{_named(self, 'mode', 'align_corners')}, {super().extra_repr()}"


class FocalLoss(nn.Module):
    """The focal loss of softmax probabilities; ``weight`` is a buffer, as in `torch.nn.CrossEntropyLoss`.

    See `fastseg.functional.focal_loss` for the formula, the shapes and the arguments.
    """

    weight: Tensor | None

    def __init__(
        self,
        weight: Tensor | None = None,
        *,
        ignore_index: int = -100,
        reduction: str = "mean",
        gamma: float = 2.0,
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.gamma = gamma

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss between logits ``[N, C, d1, ...]`` and labels ``[N, d1, ...]``."""
        return functional.focal_loss(input, target, self.weight, self.ignore_index, self.reduction, gamma=self.gamma)

    def extra_repr(self) -> str:
        """The exponent, for ``repr(layer)``."""
        return _named(self, "gamma")


class UpsampleFocalLoss(FocalLoss):
    """`FocalLoss` of logits upsampled to the labels' size.

    See `fastseg.functional.upsample_focal_loss` for the shapes and dtypes.

    Args:
        weight: ``[C]``, the paper's alpha of each class.
        mode: "bilinear" or "nearest".
        align_corners: As in `fastseg.functional.upsample_cross_entropy`.
        options: The other arguments of `FocalLoss`.
    """

    def __init__(
        self, weight: Tensor | None = None, *, mode: str = "bilinear", align_corners: bool = False, **options: Any
    ) -> None:
        super().__init__(weight, **options)
        self.mode = mode
        self.align_corners = align_corners

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss between logits ``[N, C, h, w]`` and labels ``[N, H, W]``."""
        return functional.upsample_focal_loss(
            input, target, self.weight, self.ignore_index, self.reduction,
            gamma=self.gamma, mode=self.mode, align_corners=self.align_corners,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """The grid and the exponent, for ``repr(layer)``."""
        return f"{_named(self, 'mode', 'align_corners')}, {super().extra_repr()}"
