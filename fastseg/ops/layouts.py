"""How a tensor [N, C, H, W] lies in memory, and tensors that lie alike."""

from __future__ import annotations

import torch
from torch import Tensor

# For operators whose kernels read by strides: Inductor may give them tensors that lie otherwise than eager PyTorch's,
# and needn't copy what its own layouts (channels_last around convolutions) made.
ANY_LAYOUT = (torch.Tag.flexible_layout,)


def is_channels_last(tensor: Tensor) -> bool:
    """Whether a pixel's channels are neighbours; where nothing tells, they aren't."""
    strides, channels = tensor.stride(), tensor.shape[1]
    return strides[1] == 1 and channels > 1 and strides[3] >= channels


def memory_format_of(tensor: Tensor) -> torch.memory_format:
    """channels_last or contiguous."""
    return torch.channels_last if is_channels_last(tensor) else torch.contiguous_format


def empty(like: Tensor, shape: tuple[int, ...], layout: torch.memory_format) -> Tensor:
    """A tensor of ``like``'s dtype and device."""
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout)


def lie_alike(tensor: Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy of a tensor in the strides that ``torch.empty_like(like)`` has; nothing is written in place."""
    return torch.ops.aten.copy(torch.empty_like(like, dtype=dtype), tensor)
