"""Layers that symbolic traces keep whole, as they do torch's own."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch.fx

Forward = TypeVar("Forward", bound=Callable[..., Any])


def leaf_of_traces(forward: Forward) -> Forward:
    """A layer's forward, whose call becomes one ``call_module`` of a `torch.fx.Tracer`'s graph.

    A tracer takes layers of torch.nn alone for leaves, and walks through others. The layer that is traced itself has no
    name in the graph: its calls of `fastseg.functional` are the leaves there.
    """

    @functools.wraps(forward)
    def call(layer: Any, *args: Any, **kwargs: Any) -> Any:
        for value in (*args, *kwargs.values()):
            if isinstance(value, torch.fx.Proxy):
                tracer = value.tracer
                if isinstance(tracer, torch.fx.Tracer) and tracer.root is not layer:
                    return tracer.create_proxy("call_module", tracer.path_of_module(layer), args, kwargs)
                break
        return forward(layer, *args, **kwargs)

    return cast(Forward, call)
