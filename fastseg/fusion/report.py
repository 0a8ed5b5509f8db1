"""What the pass did to a model: what it replaced and where, what it left and why, and the memory that this saves."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx

from fastseg.fusion.calls import tensor_of

# Where code is that traces models, and isn't theirs.
_TRACERS = (os.path.dirname(torch.__file__), os.path.dirname(__file__))
KIBIBYTE, MEBIBYTE = 2**10, 2**20


@dataclass(frozen=True)
class Place:
    """Where in a model calls are.

    Attributes:
        module: The path of the innermost module, as in ``named_modules``; "" for calls in none.
        source: The file and line of the innermost call that isn't PyTorch's own; "" where it isn't known.
    """

    module: str
    source: str

    def __str__(self) -> str:
        return " ".join([self.module or "the outermost forward", *([f"({self.source})"] if self.source else [])])


@dataclass(frozen=True)
class Replacement:
    """Calls that the pass replaced.

    Attributes:
        pattern: The calls.
        operator: The operator of fastseg.functional that does their work.
        place: Where the first of them was.
        saved_bytes: Memory of the values that plain PyTorch keeps there and the operator doesn't, at the sizes that
            the graph was captured with; None where they aren't known.
    """

    pattern: str
    operator: str
    place: Place
    saved_bytes: int | None


@dataclass(frozen=True)
class Leftover:
    """Calls that look like a pattern, and stayed.

    Attributes:
        pattern: The calls.
        reason: Why they stayed.
        place: Where the last of them is.
    """

    pattern: str
    reason: str
    place: Place


@dataclass(frozen=True)
class Report:
    """What the pass did, over all graphs of a model (after a graph break or a change of shapes there are several).

    Attributes:
        replaced: The replacements, each place once.
        left: What stayed, each place once for each reason.
        graphs: How many graphs the pass has seen.
    """

    replaced: tuple[Replacement, ...]
    left: tuple[Leftover, ...]
    graphs: int

    @property
    def saved_bytes(self) -> int:
        """The sum over the replacements whose sizes are known."""
        return sum(replacement.saved_bytes or 0 for replacement in self.replaced)

    def summary(self) -> str:
        """The report in one line."""
        if not self.graphs:
            return "no graph was captured yet: call the model first"
        if not self.replaced:
            return f"nothing replaced, {len(self.left)} left: the model runs as it was"
        saved = f", {_readable(self.saved_bytes)} not kept" if self.saved_bytes else ""
        return f"{len(self.replaced)} replaced{saved}, {len(self.left)} left"

    def __str__(self) -> str:
        lines = [f"fastseg: {self.summary()}"]
        for replacement in self.replaced:
            saved = f", {_readable(replacement.saved_bytes)} not kept" if replacement.saved_bytes else ""
            lines.append(f"  replaced {replacement.pattern} -> {replacement.operator}{saved}")
            lines.append(f"    at {replacement.place}")
        for leftover in self.left:
            lines += [f"  left {leftover.pattern}: {leftover.reason}", f"    at {leftover.place}"]
        return "\n".join(lines)


def _readable(count: int) -> str:
    return f"{count / MEBIBYTE:.1f} MiB" if count >= MEBIBYTE else f"{count / KIBIBYTE:.1f} KiB"


def merge(reports: Iterable[Report]) -> Report:
    """One report of several graphs: a place that several of them hold counts once, with its largest size."""
    replaced: dict[tuple[str, Place, int], Replacement] = {}
    left: dict[Leftover, None] = {}
    graphs = 0
    for report in reports:
        graphs += report.graphs
        left |= dict.fromkeys(report.left)
        seen = Counter[tuple[str, Place]]()
        for replacement in report.replaced:
            alike = replacement.pattern, replacement.place
            seen[alike] += 1
            key = *alike, seen[alike]  # one graph may hold several at one line
            known = replaced.get(key)
            if known is None or (replacement.saved_bytes or 0) > (known.saved_bytes or 0):
                replaced[key] = replacement
    return Report(tuple(replaced.values()), tuple(left), graphs)


# ---- what a graph says of its nodes ----


def place_of(node: fx.Node) -> Place:
    """Where in the model a call is."""
    modules = list(node.meta.get("nn_module_stack", {}).values())
    path = _path(modules[-1][0] if isinstance(modules[-1], tuple) else str(modules[-1])) if modules else ""
    lines = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    own = [":".join(line) for line in lines if not line[0].startswith(_TRACERS)]
    return Place(path, own[-1] if own else "")


def _path(name: str) -> str:
    """A module's path from TorchDynamo's name for it, an expression such as ``L['self']._modules['conv'].0``."""
    name = re.sub(r"^L\['[^']*'\]\.?", "", name).replace("_modules", "")
    return ".".join(part for part in re.split(r"[.\[\]'\"]+", name) if part)


def bytes_of(nodes: Iterable[fx.Node]) -> int | None:
    """The memory of the values, at the sizes that the graph was made with; None where one isn't known."""
    total = 0
    for node in nodes:
        tensor = tensor_of(node)
        if tensor is None:
            return None
        for size in tensor.shape:
            hint = size.node.hint if isinstance(size, torch.SymInt) else size
            if hint is None:
                return None
        total += tensor.element_size() * _product(tensor.shape)
    return total


def _product(shape: Iterable[int | torch.SymInt]) -> int:
    product = 1
    for size in shape:
        product *= size.node.hint if isinstance(size, torch.SymInt) else size
    return product
