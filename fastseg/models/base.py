"""What every segmentation network here has in common: logits, loss and prediction."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from fastseg import functional
from fastseg.modules import ConvReLUPool2d

UINT8_CLASSES = 256  # the most classes whose labels fit uint8


class SegmentationModel(nn.Module):
    """A network that gives every pixel of an image a class.

    Subclasses define ``forward(input)``: images ``[N, in_channels, H, W]`` to logits ``[N, num_classes, H, W]``.
    ``front_end`` and ``cross_entropy`` are the operators that fastseg fuses; a plain-PyTorch twin replaces both.
    """

    front_end: ClassVar[type[ConvReLUPool2d]] = ConvReLUPool2d
    cross_entropy: ClassVar[Callable[..., Tensor]] = staticmethod(functional.cross_entropy)

    num_classes: int

    def loss(
        self,
        input: Tensor,
        target: Tensor,
        *,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """Mean cross-entropy of the logits of ``input`` against ``target``.

        Args:
            input: Images ``[N, in_channels, H, W]``.
            target: Class indices ``[N, H, W]`` (uint8, int16, int32 or int64).
            weight: A weight for each class, ``[num_classes]``.
            ignore_index: Pixels with this label count neither in the loss nor in its gradient.
            label_smoothing: How much of each target is spread evenly over the classes, from 0 to 1.

        Returns:
            A scalar, in the logits' dtype.
        """
        return self.cross_entropy(
            self(input), target, weight, ignore_index=ignore_index, label_smoothing=label_smoothing
        )

    def predict(self, input: Tensor) -> Tensor:
        """The most likely class of every pixel: ``[N, H, W]``, uint8 for up to 256 classes, else int64."""
        with torch.no_grad():
            labels = self(input).argmax(1)
        return labels.to(torch.uint8) if self.num_classes <= UINT8_CLASSES else labels

    def extra_repr(self) -> str:
        """The number of classes, for ``repr(model)``."""
        return f"num_classes={self.num_classes}"
