"""What the backend did in this process: which graphs it got, and which of them ran with which parameters."""

from __future__ import annotations

import contextlib
import inspect
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from fastseg.fusion.report import Graph, Report, name_of

_graphs: list[Graph] = []  # as they were captured
_recordings: list[Report] = []  # those that are open
_latest: Callable[[], Tensor | None] = lambda: None  # noqa: E731 - a weak reference to what a graph last ran with


def report(of: Any = None) -> Report:
    """What the backend "fastseg" did: what it replaced and where, what it left and why, and the memory that this saves.

    A model's graphs are those that ran with one of its parameters, compiled with the model, with a part of it or with
    a function that calls it; and those without any parameter that ran next (a loss after a graph break). A function's
    graphs, and those of a model without parameters, are those that come from its own code; `recording` has those of
    what it calls after a graph break as well.

    Args:
        of: A model, compiled in place or not, or what torch.compile gave for a model, a method or a function. None for
            all graphs of this process.

    Returns:
        The report of the graphs so far, since the last torch.compiler.reset(); ``print`` it, or read its attributes.

    Raises:
        TypeError: It is neither a module nor a function.
    """
    if of is None:
        return Report(list(_graphs))
    if isinstance(of, nn.Module):
        return _of_module(of)
    function = inspect.unwrap(of)
    if not hasattr(function, "__code__"):
        raise TypeError(f"of: expected a module or a function, compiled or not, got {type(of)}")
    return Report([graph for graph in _graphs if graph.code in _lines(function)])


def _of_module(model: nn.Module) -> Report:
    parameters = list(model.parameters())
    if parameters:
        found = Report([graph for graph in _graphs if any(_knows(graph, parameter) for parameter in parameters)])
    else:
        kinds = {type(module) for module in model.modules()}
        codes = set().union({name_of(kind) for kind in kinds}, *(_lines(kind.forward) for kind in kinds))
        found = Report([graph for graph in _graphs if graph.code in codes])
    if type(model).__module__.startswith("torch.nn."):
        kind = type(model).__name__
        found.empty += f"; PyTorch compiles a bare {kind} by torch.compile(model, ...), not by model.compile(...)"
    return found


@contextlib.contextmanager
def recording() -> Iterator[Report]:
    """The report of what runs in a block: ``with fastseg.recording() as report:``.

    Yields:
        The report, of the graphs that have run so far, whenever they were compiled.
    """
    recorded = Report(empty='no graph of backend="fastseg" ran here')
    _recordings.append(recorded)
    try:
        yield recorded
    finally:
        _recordings[:] = [other for other in _recordings if other is not recorded]


def kept(
    graph: Graph, run: Callable[..., Any], inputs: Sequence[Any], attributes: Sequence[nn.Parameter]
) -> Callable[..., Any]:
    """What runs a graph, keeping that it did, and with which parameters: of its inputs, or those it has as attributes.

    TorchDynamo runs a graph for other models that are alike, too, and doesn't ask the backend again. Attributes are
    those of one model.
    """
    _graphs.append(graph)
    places = [at for at, value in enumerate(inputs) if isinstance(value, nn.Parameter)]
    _note(graph, attributes)
    own = weakref.ref(attributes[0]) if attributes else lambda: None

    def call(*args: Any) -> Any:
        global _latest
        first = args[places[0]] if places else own()
        if first is None:
            first = _latest()
        if first is not None:
            if not _knows(graph, first):
                _note(graph, [first, *(args[at] for at in places[1:])])
            _latest = graph.parameters[id(first)]
        for recorded in _recordings:
            if graph not in recorded.graphs:
                recorded.graphs.append(graph)
        return run(*args)

    return call


def forget() -> None:
    """Forgets all graphs, as TorchDynamo does."""
    _graphs.clear()


def _note(graph: Graph, parameters: Sequence[Tensor]) -> None:
    for key, known in list(graph.parameters.items()):
        if known() is None:  # of a model that is gone
            del graph.parameters[key]
    graph.parameters.update((id(parameter), weakref.ref(parameter)) for parameter in parameters)


def _knows(graph: Graph, parameter: Tensor) -> bool:
    known = graph.parameters.get(id(parameter))
    return known is not None and known() is parameter  # else the id is another one's by now


def _lines(function: Any) -> set[tuple[str, int]]:
    """The lines of a function's own code, with their file."""
    code = getattr(function, "__code__", None)
    return set() if code is None else {(code.co_filename, line) for *_, line in code.co_lines() if line is not None}
