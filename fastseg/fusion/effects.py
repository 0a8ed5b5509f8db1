"""What forbids moving a call over others: changes in place, and changes of autograd's or autocast's state."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import fx

from fastseg.fusion.calls import tensor_of, value_of
from fastseg.fusion.pattern import Match

AUTOCAST = (torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast)

# Names in `operator` that begin with i and change nothing.
_HARMLESS = {"index", "indexOf", "inv", "invert", "is_", "is_not", "itemgetter"}
_CHANGED_STATISTICS = ("running_mean", "running_var")


def obstacle(match: Match) -> str | None:
    """Why the calls of a match can't be done at once, where the last of them is, or None."""
    nodes = match.nodes
    inside = set(nodes)
    read = [value for node in nodes[:-1] for value in node.all_input_nodes if value not in inside]
    kept = [*read, *nodes]
    for node in _between(nodes[0], nodes[-1]):
        if node in inside or (match.across_autocast and node.target in AUTOCAST):
            continue
        if _changes_state(node):
            return f"{node} between them changes autograd's or autocast's state"
        for changed in changed_values(node):
            if any(_may_share_memory(changed, value) for value in kept):
                return f"{node} between them changes a value in place"
    return None


def has_transforms(graph: fx.Graph) -> bool:
    """Whether the graph enters torch.func's transforms, which fastseg's operators don't support."""
    return any(
        node.op == "call_function" and "functorch" in f"{getattr(node.target, '__module__', '')}"
        for node in graph.nodes
    )


def _between(first: fx.Node, last: fx.Node) -> Iterator[fx.Node]:
    node = first
    while node is not last:
        yield node
        node = node.next


def _changes_state(node: fx.Node) -> bool:
    """Whether a call gives no value, and so was made for what it does (TorchDynamo knows the values of all others)."""
    is_call = node.op in ("call_function", "call_method")
    return is_call and value_of(node) is None and next(changed_values(node), None) is None


# ---- changes in place ----


def changed_values(node: fx.Node) -> Iterator[fx.Node]:
    """The values that a call may change."""
    if node.op == "call_method":
        if _ends_in_place(str(node.target)) or str(node.target).startswith(("__i", "__setitem__")):
            yield from _nodes(node.args[:1])
    elif node.op == "call_module":
        yield from _nodes(node.args)  # whatever it is: TorchDynamo looks through torch.nn's
    elif node.op == "call_function":
        yield from _changed_by_function(node)


def _changed_by_function(node: fx.Node) -> Iterator[fx.Node]:
    target, name = node.target, getattr(node.target, "__name__", "")
    yield from _nodes(node.kwargs.get("out"))
    if isinstance(target, torch._ops.HigherOrderOperator):
        yield from node.all_input_nodes
    elif isinstance(target, torch._ops.OpOverload):
        yield from node.all_input_nodes if target._schema.is_mutable else ()
    elif isinstance(target, torch._ops.OpOverloadPacket):
        schemas = (getattr(target, overload)._schema for overload in target.overloads())
        yield from node.all_input_nodes if any(schema.is_mutable for schema in schemas) else ()
    elif getattr(target, "__module__", None) == operator.add.__module__:
        if name in ("setitem", "delitem") or (name.startswith("i") and name not in _HARMLESS):
            yield from _nodes(node.args[:1])
    elif _ends_in_place(name) or _argument(target, node, "inplace"):
        yield from _nodes(node.args[:1] or node.kwargs.get("input"))
    elif _argument(target, node, "training"):
        for statistics in _CHANGED_STATISTICS:
            yield from _nodes(_argument(target, node, statistics))


def _ends_in_place(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__")


def _argument(target: Callable[..., Any] | str, node: fx.Node, name: str) -> Any:
    """An argument of a Python function, by name; None where it has none such."""
    if not inspect.isfunction(target):
        return None
    try:
        bound = inspect.signature(target).bind(*node.args, **node.kwargs)
    except TypeError:  # behind boolean_dispatch, functions take anything
        return node.kwargs.get(name)
    return bound.arguments.get(name)


def _nodes(values: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.map_arg(values, lambda node: found.append(node))
    return found


# ---- aliases ----


def use_of_overwritten(value: Any, by: fx.Node) -> str | None:
    """Who sees that ``by`` overwrites a value beside ``by``'s own users, or None: then it may as well not do so."""
    if not isinstance(value, fx.Node) or value.op in ("placeholder", "get_attr", "output"):
        return "it changes what isn't the graph's own"
    if len(value.users) > 1:
        return f"{value} is used elsewhere"
    if has_transforms(by.graph):
        return "torch.func's transforms hide what shares its memory"
    if any(node is not value and _may_share_memory(node, value) for node in _between(next(iter(by.graph.nodes)), by)):
        return f"{value} is part of another value"
    return None


def _may_share_memory(first: fx.Node, second: fx.Node) -> bool:
    tensors = tensor_of(first), tensor_of(second)
    if tensors[0] is not None and tensors[1] is not None:
        storages = [tensor.untyped_storage()._cdata for tensor in tensors if tensor is not None]
        if storages[0] == storages[1]:
            return True
        # Two of the graph's inputs are two fakes, whatever they share; but no numbers of one type lie in another's.
        given = _storages_of_inputs(first.graph)
        return all(storage in given for storage in storages) and tensors[0].dtype == tensors[1].dtype
    return value_of(first) is None or value_of(second) is None  # else one of them is a number


def _storages_of_inputs(graph: fx.Graph) -> set[int]:
    tensors: Iterable[Any] = (tensor_of(node) for node in graph.nodes if node.op == "placeholder")
    return {tensor.untyped_storage()._cdata for tensor in tensors if tensor is not None}
