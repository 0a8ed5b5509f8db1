"""Winograd's transformed weights, kept from call to call where the weights are likely to come again: in predictions.

A call reads the weights to see whether what is kept is still theirs, which costs a fraction of the transform: changes
in place, state_dicts that are loaded and what goes past version counters (``weight.data``) are all seen.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from fastseg._native import describe
from fastseg.ops.layouts import is_channels_last

_HEADER_BYTES = 64  # zeroed, they are no weight's

# The memory of each weight, as long as that lives. A weight's first call leaves no more than that it was there: many
# are made for one call alone.
_kept: WeakIdKeyDictionary = WeakIdKeyDictionary()


def memory_for(kernels: Any, weight: Tensor) -> Tensor | None:
    """Where the transformed weights stay, uint8; None where they aren't kept: at first, or strided."""
    if not (weight.is_contiguous() or is_channels_last(weight)):
        return None
    memory = _kept.get(weight)
    if memory is None:
        _kept[weight] = torch.empty(0, dtype=torch.uint8)
        return None
    if memory.numel() == 0:
        memory = torch.empty(kernels.winograd_kept_bytes(describe(weight)), dtype=torch.uint8)
        memory[:_HEADER_BYTES] = 0
        _kept[weight] = memory
    return memory


def kept_bytes(weights: Iterable[Tensor] | None = None) -> int:
    """How much memory the transformed weights take that are kept of these weights; of None: of all."""
    memories = _kept.values() if weights is None else map(_kept.get, weights)
    return sum(memory.numel() for memory in memories if memory is not None)
