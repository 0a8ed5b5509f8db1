"""What a pattern is: a few calls that one of fastseg's operators serves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from fastseg.fusion.calls import Call


class Unfit(Exception):  # noqa: N818 - no error: a verdict on a place
    """Calls that a pattern doesn't replace: with a reason, for the report, where they look like the pattern."""


@dataclass(frozen=True)
class Match:
    """Calls of a graph that one call of ``function`` replaces.

    Attributes:
        nodes: The calls, in the graph's order.
        outputs: Those of them whose values are needed afterwards, and for each its place in the function's results
            (None: it is the result).
        function: What takes their place, a function of fastseg.
        arguments: Its arguments; values of the graph are nodes.
        not_kept: The values that plain PyTorch holds (at least for the backward pass) and ``function`` doesn't: nodes
            of the match, as often as they are held.
        shared: Those of the calls that cost nothing to do again, so that several matches may replace their uses.
        across_autocast: Whether autocast may change between the calls: but for the last of them it chooses no more than
            dtypes that the arguments say.
    """

    nodes: Sequence[fx.Node]
    outputs: Mapping[fx.Node, int | None]
    function: Callable[..., Any]
    arguments: Mapping[str, Any]
    not_kept: Sequence[fx.Node] = ()
    shared: Sequence[fx.Node] = ()
    across_autocast: bool = False

    @property
    def place(self) -> fx.Node:
        """The call before which the function is called: the first of those that it gives the values of."""
        return next(node for node in self.nodes if node in self.outputs)


@dataclass(frozen=True)
class Pattern:
    """One kind of place that the pass looks for.

    Attributes:
        name: The calls, as the report names them.
        anchor: The operation of the last of them, at which the pass calls ``match``.
        becomes: The operator, as the report names it.
        match: What the calls up to this one become; `Unfit` where they are something else, with a reason where they are
            the pattern but for a condition that doesn't hold.
    """

    name: str
    anchor: str
    becomes: str
    match: Callable[[Call], Match]


def demand(condition: bool, *reason: str) -> None:
    """Raises `Unfit` where a condition doesn't hold."""
    if not condition:
        raise Unfit(*reason)


def source(call: Call, *operations: str) -> Call:
    """The call that gives another one its input; `Unfit` where it is none of these operations."""
    found = call.source()
    if found is None or found.operation not in operations:
        raise Unfit
    return found
