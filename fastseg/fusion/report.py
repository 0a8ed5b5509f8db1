"""What the pass did to a model: what it replaced and where, what it left and why, and the memory that this saves."""

from __future__ import annotations

import ast
import linecache
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from fastseg.fusion.calls import tensor_of
from fastseg.ops.convolution.kept import kept_bytes

# Where code is that traces models, and isn't theirs.
_TRACERS = (os.path.dirname(torch.__file__), os.path.dirname(__file__))
_NAMED = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
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


@dataclass(frozen=True, eq=False)
class Graph:
    """What the pass did to one graph.

    Attributes:
        name: Of the function or the module whose code was compiled, with its Python module.
        code: The file of that code, and a line of it; the name for PyTorch's own.
        replaced: The replacements.
        left: What stayed.
        remark: Why there may be so little to replace, or None.
        parameters: Those that the graph has run with, or after, where it has none itself; by their ids.
    """

    name: str
    code: tuple[str, int] | str
    replaced: tuple[Replacement, ...]
    left: tuple[Leftover, ...]
    remark: str | None = None
    parameters: dict[int, Callable[[], Tensor | None]] = field(default_factory=dict, repr=False)


@dataclass
class Report:
    """What the pass did to graphs: those of a model (after a graph break or a change of shapes there are several).

    Attributes:
        graphs: The graphs, as they were captured or, of a recording, as they first ran.
        empty: What there is to say where there are none.
    """

    graphs: list[Graph] = field(default_factory=list)
    empty: str = 'no graph yet: compile the model with backend="fastseg", and call it'

    @property
    def replaced(self) -> list[Replacement]:
        """The replacements: a place that several graphs hold counts once, with its largest size."""
        replaced: dict[tuple[str, Place, int], Replacement] = {}
        for graph in self.graphs:
            seen = Counter[tuple[str, Place]]()
            for replacement in graph.replaced:
                alike = replacement.pattern, replacement.place
                seen[alike] += 1
                key = *alike, seen[alike]  # one graph may hold several at one line
                known = replaced.get(key)
                if known is None or (replacement.saved_bytes or 0) > (known.saved_bytes or 0):
                    replaced[key] = replacement
        return list(replaced.values())

    @property
    def left(self) -> list[Leftover]:
        """What stayed, each place once for each reason."""
        return list(dict.fromkeys(leftover for graph in self.graphs for leftover in graph.left))

    @property
    def saved_bytes(self) -> int:
        """The sum over the replacements whose sizes are known."""
        return sum(replacement.saved_bytes or 0 for replacement in self.replaced)

    @property
    def kept_bytes(self) -> int:
        """Memory of the transformed weights that predictions on a CPU keep by now, of the graphs' parameters.

        They are freed with the parameters. ``fastseg.info()["kept_weights"]`` is the sum over the whole process.
        """
        parameters = {key: parameter for graph in self.graphs for key, parameter in graph.parameters.items()}
        return kept_bytes(known for parameter in parameters.values() if (known := parameter()) is not None)

    def summary(self) -> str:
        """The report in one line."""
        replaced = self.replaced
        if not self.graphs:
            return self.empty
        if not replaced:
            return f"nothing replaced, {len(self.left)} left: the model runs as it was"
        saved = f", {_readable(self.saved_bytes)} not kept" if self.saved_bytes else ""
        kept = f", {_readable(self.kept_bytes)} of transformed weights kept" if self.kept_bytes else ""
        return f"{len(replaced)} replaced{saved}{kept}, {len(self.left)} left"

    def __str__(self) -> str:
        lines = [f"fastseg: {self.summary()}"]
        for name in dict.fromkeys(graph.name for graph in self.graphs):
            part = Report([graph for graph in self.graphs if graph.name == name])
            lines.append(f"{name}, {len(part.graphs)} graph{'s' if len(part.graphs) > 1 else ''}")
            for replacement in part.replaced:
                saved = f", {_readable(replacement.saved_bytes)} not kept" if replacement.saved_bytes else ""
                lines.append(f"  replaced {replacement.pattern} -> {replacement.operator}{saved}")
                lines.append(f"    at {replacement.place}")
            for leftover in part.left:
                lines += [f"  left {leftover.pattern}: {leftover.reason}", f"    at {leftover.place}"]
            lines += dict.fromkeys(f"  {graph.remark}" for graph in part.graphs if graph.remark)
        return "\n".join(lines)


def _readable(count: int) -> str:
    return f"{count / MEBIBYTE:.1f} MiB" if count >= MEBIBYTE else f"{count / KIBIBYTE:.1f} KiB"


# ---- what a graph says of its nodes ----


def place_of(node: fx.Node) -> Place:
    """Where in the model a call is."""
    modules = list(node.meta.get("nn_module_stack", {}).values())
    path = _path(modules[-1][0]) if modules else ""
    own = [f"{file}:{line}" for file, line in _frames(node) if not file.startswith(_TRACERS)]
    return Place(path, own[-1] if own else "")


def origin_of(graph: fx.Graph) -> tuple[str, tuple[str, int] | str]:
    """`Graph.name` and `Graph.code`."""
    calls = [node for node in graph.nodes if node.op not in ("placeholder", "get_attr", "output")]
    code = next((frames[0] for node in calls if (frames := _frames(node))), None)
    if code is not None:
        return _name(*code), code
    modules = [list(node.meta.get("nn_module_stack", {}).values()) for node in calls]
    kind = next((stack[0][1] for stack in modules if stack), None)  # PyTorch's own code isn't among the frames
    name = "a function of PyTorch's own" if kind is None else name_of(kind)
    return name, name


def name_of(kind: type) -> str:
    """A class, with its Python module."""
    return f"{kind.__module__}.{kind.__qualname__}"


def _frames(node: fx.Node) -> list[tuple[str, int]]:
    """The files and lines of the calls that led to a node, the outermost first."""
    found = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    return [(file, int(line)) for file, line in found]


def _name(file: str, line: int) -> str:
    """The function that a line is in, with its classes and its Python module, or else its file."""
    module = next((name for name, m in list(sys.modules.items()) if getattr(m, "__file__", None) == file), file)
    try:
        nodes = list(ast.walk(ast.parse("".join(linecache.getlines(file)))))  # the outer ones come first
    except SyntaxError:  # changed since it was imported
        return module
    around = [n for n in nodes if isinstance(n, _NAMED) and n.lineno <= line <= (n.end_lineno or 0)]
    return ".".join([module, *(getattr(n, "name", "<lambda>") for n in around)])


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
