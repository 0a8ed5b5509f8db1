"""Numbers and tables in Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import quantiles

NOTHING = "-"
MIB = 2**20


def spread(rounds: Sequence[float]) -> str:
    """The median and the quartiles of seconds, in milliseconds."""
    first, middle, third = (significant(1e3 * value) for value in quartiles(rounds))
    return f"{middle} ({first} - {third})"


def factor(values: Sequence[float]) -> str:
    """A median factor and its quartiles; bold below 1."""
    if not values:
        return NOTHING
    first, middle, third = quartiles(values)
    text = f"{middle:.2f}x"
    return f"{text if middle >= 1 else f'**{text}**'} ({first:.2f} - {third:.2f})"


def mebibytes(size: int | None) -> str:
    """Bytes as MiB."""
    return NOTHING if size is None else f"{size / MIB:.1f}"


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The first quartile, the median and the third."""
    first, middle, third = quantiles(values, n=4, method="inclusive") if len(values) > 1 else [*values] * 3
    return first, middle, third


def significant(value: float, digits: int = 3) -> str:
    """A number of zero or more in a few significant digits, without an exponent."""
    return f"{value:.{max(0, digits - 1 - math.floor(math.log10(value)))}f}" if value else "0"


def format_table(lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first line is its head."""
    rule = ["---"] + ["---:"] * (len(lines[0]) - 1)
    return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], rule, *lines[1:])) + "\n"
