"""Numbers that callers give, made Python's own: torch takes integers of every kind, and no others, where it counts."""

from __future__ import annotations

import operator
from typing import Any

import torch

Pair = tuple[int, int]  # (height, width)


def integer(name: str, value: Any, least: int) -> int:
    """An integer of any kind (NumPy's, a tensor of one) as Python's; a symbolic one stays.

    Raises:
        ValueError: It is none, or less than ``least``; the message names the argument.
    """
    if type(value) is int and value >= least:  # first, what nearly every call gives
        return value
    number = _index(value)
    if number is None or number < least:
        raise ValueError(f"{name}: expected an integer of at least {least}, got {value!r}")
    return number


def pair(name: str, value: Any, least: int) -> Pair:
    """One integer or two, for (height, width), as two; see `integer`."""
    if type(value) is int and value >= least:  # first, what nearly every call gives: this lies on its way
        return value, value
    if type(value) is tuple and len(value) == 2:
        height, width = value
        if type(height) is int and type(width) is int and height >= least and width >= least:
            return value
    number = _index(value)
    try:
        numbers = tuple(map(_index, value)) if number is None else (number,)
    except TypeError:  # neither a number nor several
        numbers = ()
    if len(numbers) == 1:
        numbers *= 2
    if len(numbers) != 2 or any(number is None or number < least for number in numbers):
        raise ValueError(f"{name}: expected one or two integers of at least {least}, got {value!r}")
    return numbers  # type: ignore[return-value]  # two of them, neither is None


def _index(value: Any) -> int | None:
    """A value as Python's integer, or None where it isn't one; torch doesn't count bools among them."""
    if type(value) is int or isinstance(value, torch.SymInt):
        return value  # type: ignore[return-value]  # a symbolic one serves as an int does
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None
