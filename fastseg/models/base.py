"""What every segmentation network here has in common: logits, loss and prediction."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastseg import functional
from fastseg.modules import ConvReLUPool2d
from fastseg.modules._leaves import leaf_of_traces


class PixelClassifier(nn.Conv2d):
    """A 1x1 convolution that gives every pixel's logits.

    On a CPU, NCHW, it is computed as the matrix product that it is: oneDNN's convolution writes a layout of its own and
    copies it, so that the largest map of an evaluation is in memory twice (measured with torch 2.13).

    Args:
        in_channels: Channels of the features.
        num_classes: Classes to tell apart.
    """

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__(in_channels, num_classes, 1)

    @leaf_of_traces
    def forward(self, input: Tensor) -> Tensor:
        """Logits ``[N, num_classes, H, W]`` of features ``[N, in_channels, H, W]``."""
        if not (input.is_cpu and input.is_contiguous()):
            return super().forward(input)
        assert self.bias is not None
        weight = self.weight.flatten(1).expand(input.shape[0], -1, -1)  # [N, num_classes, in_channels]
        logits = torch.baddbmm(self.bias.unsqueeze(1), weight, input.flatten(2))
        return logits.unflatten(2, input.shape[2:])


class SegmentationModel(nn.Module, ABC):
    """A network that gives every pixel of an image a class.

    Subclasses define ``logits(input)`` at the resolution that the network works at. Upsampled bilinearly
    (``align_corners=False``) they are the logits of the pixels: ``forward`` returns these, ``loss`` and ``predict``
    never hold them.

    ``front_end`` and the ``upsample_...`` attributes are the operators that fastseg fuses; a plain-PyTorch twin
    replaces them.
    """

    front_end: ClassVar[type[ConvReLUPool2d]] = ConvReLUPool2d
    upsample_cross_entropy: ClassVar[Callable[..., Tensor]] = staticmethod(functional.upsample_cross_entropy)
    upsample_argmax: ClassVar[Callable[..., Any]] = staticmethod(functional.upsample_argmax)
    upsample_confusion_matrix: ClassVar[Callable[..., Tensor]] = staticmethod(functional.upsample_confusion_matrix)

    num_classes: int

    @abstractmethod
    def logits(self, input: Tensor) -> Tensor:
        """Logits at the network's own resolution, ``[N, num_classes, h, w]``, of images ``[N, in_channels, H, W]``."""

    def forward(self, input: Tensor) -> Tensor:
        """Logits ``[N, num_classes, H, W]`` of images ``[N, in_channels, H, W]``."""
        return F.interpolate(self.logits(input), size=input.shape[-2:], mode="bilinear", align_corners=False)

    def loss(
        self,
        input: Tensor,
        target: Tensor,
        *,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """Mean cross-entropy against ``target`` of the logits of ``input``, upsampled to the size of ``target``.

        Args:
            input: Images ``[N, in_channels, H, W]``.
            target: Class indices ``[N, H, W]`` of any integer dtype.
            weight: A weight for each class, ``[num_classes]``.
            ignore_index: Pixels with this label count neither in the loss nor in its gradient.
            label_smoothing: How much of each target is spread evenly over the classes, from 0 to 1.

        Returns:
            A scalar, in the logits' dtype.
        """
        return self.upsample_cross_entropy(
            self.logits(input), target, weight, ignore_index=ignore_index, label_smoothing=label_smoothing
        )

    @overload
    def predict(
        self, input: Tensor, size: tuple[int, int] | None = None, *, return_confidence: Literal[False] = False
    ) -> Tensor: ...

    @overload
    def predict(
        self, input: Tensor, size: tuple[int, int] | None = None, *, return_confidence: Literal[True]
    ) -> tuple[Tensor, Tensor]: ...

    def predict(
        self, input: Tensor, size: tuple[int, int] | None = None, *, return_confidence: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The most likely class of every pixel.

        Args:
            input: Images ``[N, in_channels, H, W]``.
            size: The masks' (height, width), to which the network's own logits are upsampled; None for that of
                ``input``.
            return_confidence: Also return the softmax value of the most likely class.

        Returns:
            Masks ``[N, H, W]``, uint8 for up to 256 classes, else int64; where asked also the confidence ``[N, H, W]``
            in the logits' dtype.
        """
        with torch.no_grad():
            logits = self.logits(input)
        return self.upsample_argmax(logits, size or input.shape[-2:], return_confidence=return_confidence)

    def extra_repr(self) -> str:
        """The number of classes, for ``repr(model)``."""
        return f"num_classes={self.num_classes}"
