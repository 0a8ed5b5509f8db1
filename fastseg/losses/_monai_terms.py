"""What MONAI's losses share: checks, the weights of classes, and which pixels count."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastseg.losses._sums import as_integers, check_scores, log_plain, one_hot

Weight = Sequence[float] | float | Tensor


def read_reduction(reduction: str, known: tuple[str, ...]) -> str:
    """The reduction's name; MONAI's enumerations are strings."""
    for name in known:
        if reduction == name:
            return name
    raise ValueError(f"reduction: expected one of {', '.join(known)}, got {reduction!r}")


def check_target(input: Tensor, target: Tensor, to_onehot_y: bool, min_dims: int = 3) -> None:
    """Refuses a target that is neither labels to be converted nor of input's shape."""
    check_scores("input", input, min_dims)
    channels = target.shape[1] if target.ndim > 1 else None
    pixels = target.ndim == input.ndim and target.shape[2:] == input.shape[2:] and target.shape[0] == input.shape[0]
    labels = to_onehot_y and input.shape[1] > 1
    if not pixels or channels != (1 if labels else input.shape[1]):
        wanted = (input.shape[0], 1 if labels else input.shape[1], *input.shape[2:])
        hint = "" if labels or channels != 1 else "; labels need to_onehot_y=True"
        raise ValueError(f"target: expected shape {wanted}, got {tuple(target.shape)}{hint}")
    if target.device != input.device:
        raise ValueError(f"target: expected input's device {input.device}, got {target.device}")


def warn_of_one_channel(loss: Any, channels: int) -> None:
    """Says which of a loss's arguments have no meaning for one channel, as MONAI does."""
    if channels == 1:
        for name in ("softmax", "to_onehot_y"):
            if getattr(loss, name, False):
                warnings.warn(f"{name}=True: ignored for an input of one channel", stacklevel=3)
        if not loss.include_background:
            warnings.warn("include_background=False: ignored for an input of one channel", stacklevel=3)


class Loss(nn.Module):
    """A loss of MONAI's. `torch.jit.script`, which can't compile what calls fastseg's operators, gets the original."""

    _arguments: tuple[tuple[Any, ...], dict[str, Any]]

    def __new__(cls, *args: Any, **kwargs: Any) -> Loss:
        """Keeps what the original is made of."""
        loss = super().__new__(cls)
        loss._arguments = args, kwargs
        return loss

    def __prepare_scriptable__(self) -> nn.Module:
        """MONAI's own loss, with the same arguments and weights; torch.jit.script asks for it."""
        args, kwargs = self._arguments
        original: nn.Module = getattr(importlib.import_module("monai.losses"), type(self).__name__)(*args, **kwargs)
        log_plain(f"monai.{type(self).__name__}", "torch.jit.script gets the original")
        original.load_state_dict(self.state_dict())
        return original.to(next(self.buffers(), torch.empty(0)).device)


class ClassWeight(Loss):
    """A term with MONAI's buffer ``class_weight``: a number for each class that counts, or one for all, or None."""

    class_weight: Tensor | None

    def __init__(self, weight: Weight | None) -> None:
        super().__init__()
        self.register_buffer("class_weight", None if weight is None else torch.as_tensor(weight))
        if self.class_weight is not None and (self.class_weight < 0).any():
            raise ValueError(f"weight: expected numbers of at least 0, got {weight}")

    def weights(self, classes: int, like: Tensor) -> Tensor | None:
        """The weights of as many classes, ``[classes]`` or a number, as ``like``."""
        weight = self.class_weight
        if weight is not None and weight.ndim > 0 and weight.shape != (classes,):
            raise ValueError(
                f"weight: expected a number for each of the {classes} classes that count, got shape "
                f"{tuple(weight.shape)}; with include_background=False class 0 has none"
            )
        return None if weight is None else weight.to(like)


def ignores_a_channel(target: Tensor, ignore_index: int | None) -> bool:
    """Whether ``ignore_index`` is one of the classes that the target has a channel for."""
    return ignore_index is not None and target.shape[1] > 1 and 0 <= ignore_index < target.shape[1]


def counted_pixels(target: Tensor, ignore_index: int | None) -> Tensor | None:
    """One where a pixel counts, zero elsewhere: ``[N, 1, d1, ...]``; None where all do."""
    if ignore_index is None:
        return None
    if target.shape[1] == 1:
        return (target != ignore_index).to(torch.float32)
    if ignores_a_channel(target, ignore_index):
        return 1 - target[:, ignore_index : ignore_index + 1]
    return (target.sum(1, keepdim=True) > 0).to(torch.float32)


def labels_of(loss: Any, input: Tensor, target: Tensor) -> Tensor | None:
    """The labels ``[N, d1, ...]`` that a loss converts; None where the target has a channel for each class."""
    return as_integers(target[:, 0]) if loss.to_onehot_y and input.shape[1] > 1 else None


def one_hot_counted(labels: Tensor, counted: Tensor | None, classes: int) -> Tensor:
    """Labels as MONAI's float32 channels; what is no class is class 0 where it doesn't count."""
    inside = labels if counted is None else labels.masked_fill(counted[:, 0] == 0, 0)
    return one_hot("target", inside, classes, torch.float32)
