"""What is made of weights, kept from call to call where they are likely to come again: in predictions.

These are Winograd's transformed weights, and weights in oneDNN's own order. A call reads the weights to see whether
what is kept is still theirs, which costs a fraction of making it: changes in place, state_dicts that are loaded and
what goes past version counters (``weight.data``) are all seen. Of weights that a user has `freeze`d it looks at the
version counter and the address alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from fastseg._native import describe
from fastseg.ops.layouts import is_channels_last

_HEADER_BYTES = 64  # zeroed, they are no weight's

# The memory of each weight, as long as that lives.
_kept: WeakIdKeyDictionary = WeakIdKeyDictionary()
_frozen: WeakIdKeyDictionary = WeakIdKeyDictionary()
_NO_MEMORY = torch.empty(0, dtype=torch.uint8, device="cpu")


def freeze(weights: Iterable[Tensor]) -> None:
    """Notes that weights don't change, but for what their version counters tell."""
    for weight in weights:
        _frozen[weight] = True


def stamp_of(weight: Tensor) -> int:
    """A number that stands for a frozen weight's values; 0 for others, whose values are read."""
    if not _frozen or weight not in _frozen or weight.is_inference():  # the last has no version counter
        return 0
    return (hash((weight.data_ptr(), weight._version)) & (2**63 - 1)) | 1


def _known(table: WeakIdKeyDictionary, weight: Tensor, nothing: Any) -> Any:
    """What a table holds of a weight; None at first, or where it is strided.

    A weight's first call leaves ``nothing``, no more than that it was there: many are made for one call alone.
    """
    if not (weight.is_contiguous() or is_channels_last(weight)):
        return None
    known = table.get(weight)
    if known is None:
        table[weight] = nothing
    return known


def memory_for(kernels: Any, weight: Tensor) -> Tensor | None:
    """Where the transformed weights stay, uint8; None where they aren't kept: at first, or strided."""
    memory: Tensor | None = _known(_kept, weight, _NO_MEMORY)
    if memory is not None and memory.numel() == 0:
        memory = torch.empty(kernels.winograd_kept_bytes(describe(weight)), dtype=torch.uint8)
        memory[:_HEADER_BYTES] = 0
        _kept[weight] = memory
    return memory


class _Packed(NamedTuple):
    """A weight in oneDNN's order, and what it was made for."""

    made_for: tuple[Any, ...] = ()
    weight: Tensor | None = None

    @property
    def bytes(self) -> int:
        """Its memory."""
        return 0 if self.weight is None else torch.ops.mkldnn._nbytes(self.weight)


_packed: WeakIdKeyDictionary = WeakIdKeyDictionary()  # as `_kept`


def packed_weight(
    kernels: Any, weight: Tensor, scale: Tensor | None, call: tuple[Any, ...], pack: Callable[[], Tensor]
) -> Tensor | None:
    """What ``pack`` makes of weight and scale for calls like this one; None where it isn't kept, as `memory_for`."""
    known: _Packed | None = _known(_packed, weight, _Packed())
    if known is None:
        return None
    described = describe(weight), describe(scale)
    fingerprint = kernels.weights_fingerprint(described, stamp_of(weight), torch.get_num_threads())
    made_for = (fingerprint, weight.shape, *call)
    if known.made_for != made_for:
        known = _packed[weight] = _Packed(made_for, pack())
    return known.weight


def kept_bytes(weights: Iterable[Tensor] | None = None) -> int:
    """How much memory what is kept of these weights takes; of None: of all."""
    if weights is None:
        return sum(map(Tensor.numel, _kept.values())) + sum(packed.bytes for packed in _packed.values())
    return sum(
        (0 if (memory := _kept.get(weight)) is None else memory.numel()) + _packed.get(weight, _Packed()).bytes
        for weight in weights
    )
