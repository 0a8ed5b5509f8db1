"""A replacement run on fake tensors first: what it gives must look like what it replaces."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor

from fastseg.fusion.calls import value_of
from fastseg.fusion.effects import AUTOCAST
from fastseg.fusion.pattern import Match


def obstacle(match: Match) -> str | None:
    """Why the values that a match gives would be others than those it replaces, by shape, dtype or strides; or None."""
    inputs: list[fx.Node] = []
    fx.map_arg(dict(match.arguments), lambda node: inputs.append(node))
    before = {node: value_of(node) for node in match.outputs}
    values = [value_of(node) for node in inputs]
    # Not torch._guards.detect_fake_mode: TorchDynamo has another one for backends than for the values in its graph.
    mode = next((value.fake_mode for value in values if isinstance(value, FakeTensor)), None)
    if mode is None or any(value is None for value in (*values, *before.values())):
        return "the graph's maker didn't say what the values are"
    arguments = fx.map_arg(dict(match.arguments), value_of)
    try:
        # Without Python's dispatcher interpolate refuses sizes that may change.
        with enable_python_dispatcher(), mode, torch.no_grad(), _autocast_at(match.place):
            results = match.function(**arguments)
    except (RuntimeError, TypeError, ValueError) as error:
        return f"{match.function.__name__} refuses it: {error}"
    for node, index in match.outputs.items():
        difference = _difference(before[node], results if index is None else results[index])
        if difference is not None:
            return difference
    return None


def _difference(before: Any, after: Any) -> str | None:
    if isinstance(before, tuple):
        differences = (_difference(b, a) for b, a in zip(before, after, strict=True))
        return next((difference for difference in differences if difference is not None), None)
    for what, old, new in (
        ("dtype", before.dtype, after.dtype),
        ("shape", tuple(before.shape), tuple(after.shape)),
        ("strides", _strides(before), _strides(after)),
    ):
        if old != new:
            return f"the {what} would be {new} instead of {old}"
    return None


def _strides(tensor: Tensor) -> tuple[int, ...]:
    """The strides that matter."""
    if 0 in tensor.shape:
        return ()
    return tuple(step for step, size in zip(tensor.stride(), tensor.shape, strict=True) if size != 1)


@contextlib.contextmanager
def _autocast_at(place: fx.Node) -> Iterator[None]:
    """The autocast that the graph itself has entered before a node, on top of the one around it."""
    enter, leave = AUTOCAST
    entered: dict[fx.Node, tuple[Any, ...]] = {}
    for node in place.graph.nodes:
        if node is place:
            break
        if node.target is enter:
            entered[node] = node.args
        elif node.target is leave:
            entered.pop(node.args[0], None)
    with contextlib.ExitStack() as stack:
        for device, dtype, enabled, cache in entered.values():
            stack.enter_context(torch.autocast(device, dtype, enabled, cache))
        yield
