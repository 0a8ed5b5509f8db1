"""What a pattern is: a few calls that one of fastseg's operators serves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from fastseg.fusion.calls import Call


class Unfit(Exception):  # noqa: N818 - no error: a verdict on a place, for the report
    """Calls look like a pattern, and must stay as they are: the reason."""


@dataclass(frozen=True)
class Match:
    """Calls of a graph that one call of ``function`` replaces.

    Attributes:
        nodes: The calls, in the graph's order.
        outputs: Those of them whose values are needed afterwards, and for each its place in the function's results
            (None: it is the result).
        function: What takes their place, a function of fastseg.
        arguments: Its arguments; values of the graph are nodes, tensors of its modules `Attribute`.
        not_kept: The values that plain PyTorch holds (at least for the backward pass) and ``function`` doesn't: nodes
            of the match, as often as they are held.
        shared: Those of the calls that cost nothing to do again, so that several matches may replace their uses.
    """

    nodes: Sequence[fx.Node]
    outputs: Mapping[fx.Node, int | None]
    function: Callable[..., Any]
    arguments: Mapping[str, Any]
    not_kept: Sequence[fx.Node] = ()
    shared: Sequence[fx.Node] = ()


@dataclass(frozen=True)
class Pattern:
    """One kind of place that the pass looks for.

    Attributes:
        name: The calls, as the report names them.
        anchor: The operation of the last of them, at which the pass calls ``match``.
        becomes: The operator, as the report names it.
        match: What the calls up to this one become; None where they are something else; `Unfit` where they are the
            pattern but for a condition that doesn't hold.
    """

    name: str
    anchor: str
    becomes: str
    match: Callable[[Call], Match | None]


def demand(condition: bool, reason: str) -> None:
    """Raises `Unfit` where a condition doesn't hold."""
    if not condition:
        raise Unfit(reason)


def demand_free(*calls: Call) -> None:
    """Raises `Unfit` where one of the calls must stay, whatever the pattern."""
    for call in calls:
        if call.obstacle is not None:
            raise Unfit(call.obstacle)
