"""What the tests of the fusion pass share: a call that it finds, compiling one, and what was put in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastseg

CLASSES = 5
PIXELS = 2 * 24 * 32  # of the calls' labels


def compiled(function: Callable[..., Any], **options: Any) -> Any:
    """``function`` through the pass, then plain PyTorch: Inductor takes its time, and has tests of its own."""
    torch._dynamo.reset()
    return torch.compile(function, backend="fastseg", options={"inner": "eager"}, **options)


def operators(report: fastseg.fusion.Report) -> list[str]:
    """The operators that the pass put in."""
    return sorted(replacement.operator for replacement in report.replaced)


class Case(NamedTuple):
    """A function of tensors, and the operators that it is to become."""

    function: Callable[..., Any]
    tensors: Callable[[torch.dtype, str], Sequence[Tensor | None]]
    operators: tuple[str, ...]
    terms: int = 1


class Left(NamedTuple):
    """A function whose calls stay, the reason, and the operators that take a part of them all the same."""

    function: Callable[..., Any]
    tensors: Callable[[torch.dtype, str], Sequence[Tensor | None]]
    reason: str
    replaced: tuple[str, ...]


def left_as_it_is(
    left: dict[str, Left], tensors: Callable[..., Any], reason: str, *replaced: str
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a function in ``left``."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        left[function.__name__] = Left(function, tensors, reason, replaced)
        return function

    return register
