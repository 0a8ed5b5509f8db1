"""Calls in a graph, whatever spelling they have: which of torch's operations a node is, and its arguments by name."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

# The arguments of each operation, as its longest spelling has them.
_SIGNATURES: dict[str, Callable[..., None]] = {
    "conv2d": lambda input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1: None,
    "batch_norm": lambda input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1,
    eps=1e-5: None,
    "instance_norm": lambda input, running_mean=None, running_var=None, weight=None, bias=None, use_input_stats=True,
    momentum=0.1, eps=1e-5: None,
    "relu": lambda input, inplace=False: None,
    "leaky_relu": lambda input, negative_slope=0.01, inplace=False: None,
    "dropout": lambda input, p=0.5, training=True, inplace=False: None,
    "max_pool2d": lambda input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False,
    return_indices=False: None,
    "interpolate": lambda input, size=None, scale_factor=None, mode="nearest", align_corners=None,
    recompute_scale_factor=None, antialias=False: None,
    "cross_entropy": lambda input, target, weight=None, size_average=None, ignore_index=-100, reduce=None,
    reduction="mean", label_smoothing=0.0: None,
    "binary_cross_entropy_with_logits": lambda input, target, weight=None, size_average=None, reduce=None,
    reduction="mean", pos_weight=None: None,
    "nll_loss": lambda input, target, weight=None, size_average=None, ignore_index=-100, reduce=None,
    reduction="mean": None,
    "linear": lambda input, weight, bias=None: None,
    "pad": lambda input, pad, mode="constant", value=None: None,
    "cat": lambda tensors, dim=0: None,
    "softmax": lambda input, dim=None, _stacklevel=3, dtype=None: None,
    "torch.softmax": lambda input, dim, dtype=None: None,
    "log_softmax": lambda input, dim=None, _stacklevel=3, dtype=None: None,
    "torch.log_softmax": lambda input, dim, dtype=None: None,
    "argmax": lambda input, dim=None, keepdim=False: None,
    "max": lambda input, dim, keepdim=False: None,
    "sigmoid": lambda input: None,
    "gt": lambda input, other: None,
    "einsum": lambda equation, *operands: None,
    "getitem": lambda input, index: None,
    "cast": lambda input, *to, **kwargs: None,
    "contiguous": lambda input: None,
    "permute": lambda input, *dims: None,
    "transpose": lambda input, dim0, dim1: None,
    "flatten": lambda input, start_dim=0, end_dim=-1: None,
    "reshape": lambda input, *shape: None,
}  # fmt: skip
_BOUND = {operation: inspect.signature(arguments) for operation, arguments in _SIGNATURES.items()}

# Spellings that aren't the operation's name in torch.nn.functional: which signature they have, and what they set.
_FUNCTIONS: dict[Any, tuple[str, dict[str, Any]]] = {
    **{getattr(F, name): (name, {}) for name in ("conv2d", "batch_norm", "relu", "max_pool2d", "linear")},
    **{getattr(F, name): (name, {}) for name in ("interpolate", "cross_entropy", "nll_loss", "softmax", "log_softmax")},
    F.binary_cross_entropy_with_logits: ("binary_cross_entropy_with_logits", {}),
    **{getattr(F, name): (name, {}) for name in ("instance_norm", "leaky_relu", "dropout")},
    F.relu_: ("relu", {"inplace": True}),
    F.leaky_relu_: ("leaky_relu", {"inplace": True}),
    **{function: ("pad", {}) for function in (F.pad, torch._C._nn.pad)},
    F.max_pool2d_with_indices: ("max_pool2d", {"return_indices": True}),
    **{function: ("cat", {}) for function in (torch.cat, torch.concat, torch.concatenate)},
    torch.relu: ("relu", {}),
    torch.max_pool2d: ("max_pool2d", {}),
    torch.softmax: ("torch.softmax", {}),
    torch.log_softmax: ("torch.log_softmax", {}),
    torch.argmax: ("argmax", {}),
    torch.max: ("max", {}),
    **{function: ("sigmoid", {}) for function in (torch.sigmoid, F.sigmoid, torch.special.expit)},
    **{function: ("gt", {}) for function in (torch.gt, operator.gt)},
    torch.einsum: ("einsum", {}),
    torch.permute: ("permute", {}),
    torch.transpose: ("transpose", {}),
    torch.flatten: ("flatten", {}),
    torch.reshape: ("reshape", {}),
    operator.getitem: ("getitem", {}),
}
_METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "relu": ("relu", {}),
    "relu_": ("relu", {"inplace": True}),
    "softmax": ("torch.softmax", {}),
    "log_softmax": ("torch.log_softmax", {}),
    "argmax": ("argmax", {}),
    "max": ("max", {}),
    "sigmoid": ("sigmoid", {}),
    "gt": ("gt", {}),
    **{name: (name, {}) for name in ("contiguous", "permute", "transpose", "flatten", "reshape")},
    "view": ("reshape", {}),
    **{name: ("cast", {}) for name in ("float", "double", "half", "bfloat16", "to", "type")},
}


@dataclass(frozen=True)
class Call:
    """A node as a call of one of torch's operations.

    Attributes:
        node: The node.
        operation: The operation's name in torch.nn.functional or torch.
        arguments: All of its arguments by name, defaults included; values of the graph are nodes.
        calls: Those of the whole graph, by their nodes.
    """

    node: fx.Node
    operation: str
    arguments: Mapping[str, Any]
    calls: Mapping[fx.Node, Call] = field(repr=False, compare=False)

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def source(self, name: str = "input") -> Call | None:
        """The call that gives an argument, where a pattern knows it."""
        value = self.arguments[name]
        return self.calls.get(value) if isinstance(value, fx.Node) else None


def recognise(graph: fx.Graph) -> dict[fx.Node, Call]:
    """The nodes of a graph that are calls which a pattern knows."""
    calls: dict[fx.Node, Call] = {}
    for node in graph.nodes:
        table: Mapping[Any, tuple[str, dict[str, Any]]] = {"call_function": _FUNCTIONS, "call_method": _METHODS}.get(
            node.op, {}
        )
        try:
            found = table.get(node.target)
        except TypeError:  # a target without a hash
            continue
        if found is None:
            continue
        signature, fixed = found
        try:
            bound = _BOUND[signature].bind(*node.args, **{**node.kwargs, **fixed})
        except TypeError:  # an overload (an out= variant, names of dimensions) that no pattern knows
            continue
        bound.apply_defaults()
        calls[node] = Call(node, signature.removeprefix("torch."), bound.arguments, calls)
    return calls


# ---- what is known of a value ----


def has_nodes(arguments: Any) -> bool:
    """Whether the graph computes any of the arguments."""
    found: list[fx.Node] = []
    fx.map_arg(arguments, lambda node: found.append(node))
    return bool(found)


def value_of(node: Any) -> Any:
    """The fake tensor (or number) that the graph's maker has computed for a node, or None."""
    return node.meta.get("example_value", node.meta.get("val")) if isinstance(node, fx.Node) else None


def tensor_of(node: Any) -> Tensor | None:
    """The fake tensor of a node, or None where it isn't known."""
    value = value_of(node)
    return value if isinstance(value, Tensor) else None


def sizes_of(tensor: Tensor) -> tuple[int, ...] | None:
    """The sizes that the graph was captured with, whatever they may be later; None where one isn't known."""
    sizes = tuple(size.node.hint if isinstance(size, torch.SymInt) else size for size in tensor.shape)
    return None if None in sizes else sizes


def number_of(argument: Any) -> Any:
    """An argument's number where the graph takes it as an input (as TorchDynamo does with dynamic=True); else itself.

    What asks for it holds for that number alone: TorchDynamo compiles again for another.
    """
    value = value_of(argument)
    return float(value) if isinstance(value, (float, torch.SymFloat)) else argument
