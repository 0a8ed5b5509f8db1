"""What the peers that networks are deployed with have in common: a function of images alone, in a memory format."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

INSTALL = "pip install -e '.[test,bench]'"


class OfImages(nn.Module):
    """``function(images, *constants)`` as a module of the images alone.

    In "channels_last" both the images that it takes and the maps that it gives are [N, H, W, C].

    Args:
        function: What to compute, in plain PyTorch.
        constants: Its arguments after the images, in NCHW.
        layout: The memory format.
    """

    def __init__(self, function: Callable[..., Tensor], constants: Sequence[Tensor], layout: str) -> None:
        super().__init__()
        self.function, self.constants, self.permuted = function, tuple(constants), layout == "channels_last"

    def forward(self, images: Tensor) -> Tensor:
        """The function's value."""
        output = self.function(images.permute(0, 3, 1, 2) if self.permuted else images, *self.constants)
        return output.permute(0, 2, 3, 1) if self.permuted and output.ndim == 4 else output

    def lay_out(self, images: Tensor) -> Tensor:
        """Images in NCHW as it takes them."""
        return images.permute(0, 2, 3, 1).contiguous() if self.permuted else images

    def as_nchw(self, output: Tensor) -> Tensor:
        """Its value with the dimensions in the order of NCHW, in the same memory."""
        return output.permute(0, 3, 1, 2) if self.permuted and output.ndim == 4 else output
