"""Calls in a graph, whatever spelling they have: which of torch's operations a node is, and its arguments by name."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

# The arguments of each operation, as its longest spelling has them.
_SIGNATURES: dict[str, Callable[..., None]] = {
    "conv2d": lambda input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1: None,
    "batch_norm": lambda input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1,
    eps=1e-5: None,
    "relu": lambda input, inplace=False: None,
    "max_pool2d": lambda input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False,
    return_indices=False: None,
    "interpolate": lambda input, size=None, scale_factor=None, mode="nearest", align_corners=None,
    recompute_scale_factor=None, antialias=False: None,
    "cross_entropy": lambda input, target, weight=None, size_average=None, ignore_index=-100, reduce=None,
    reduction="mean", label_smoothing=0.0: None,
    "nll_loss": lambda input, target, weight=None, size_average=None, ignore_index=-100, reduce=None,
    reduction="mean": None,
    "softmax": lambda input, dim=None, _stacklevel=3, dtype=None: None,
    "torch.softmax": lambda input, dim, dtype=None: None,
    "log_softmax": lambda input, dim=None, _stacklevel=3, dtype=None: None,
    "torch.log_softmax": lambda input, dim, dtype=None: None,
    "argmax": lambda input, dim=None, keepdim=False: None,
    "max": lambda input, dim, keepdim=False: None,
    "vector_norm": lambda input, ord=2, dim=None, keepdim=False, *, dtype=None, out=None: None,
}  # fmt: skip

# Spellings that aren't the operation's name in torch.nn.functional: which signature they have, and what they set.
_FUNCTIONS: dict[Any, tuple[str, dict[str, Any]]] = {
    **{getattr(F, name): (name, {}) for name in ("conv2d", "batch_norm", "relu", "max_pool2d", "interpolate")},
    **{getattr(F, name): (name, {}) for name in ("cross_entropy", "nll_loss", "softmax", "log_softmax")},
    F.relu_: ("relu", {"inplace": True}),
    F.max_pool2d_with_indices: ("max_pool2d", {"return_indices": True}),
    torch.relu: ("relu", {}),
    torch.max_pool2d: ("max_pool2d", {}),
    torch.softmax: ("torch.softmax", {}),
    torch.log_softmax: ("torch.log_softmax", {}),
    torch.argmax: ("argmax", {}),
    torch.max: ("max", {}),
    torch.linalg.vector_norm: ("vector_norm", {}),
}
_METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "relu": ("relu", {}),
    "relu_": ("relu", {"inplace": True}),
    "softmax": ("torch.softmax", {}),
    "log_softmax": ("torch.log_softmax", {}),
    "argmax": ("argmax", {}),
    "max": ("max", {}),
}


@dataclass(frozen=True)
class Call:
    """A node as a call of one of torch's operations.

    Attributes:
        node: The node.
        operation: The operation's name in torch.nn.functional or torch.
        arguments: All of its arguments by name, defaults included; values of the graph are nodes. A module's
            parameters are `Attribute`.
        obstacle: Why the call must stay as it is, whatever the pattern, or None.
    """

    node: fx.Node
    operation: str
    arguments: Mapping[str, Any]
    obstacle: str | None = None

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]


@dataclass(frozen=True)
class Attribute:
    """A tensor of a module that the graph calls: its qualified name, for a get_attr node."""

    name: str


def recognise(node: Any) -> Call | None:
    """The call that a node is, or None where it is none that a pattern knows."""
    if not isinstance(node, fx.Node):
        return None
    if node.op == "call_module":
        return _of_module(node)
    table: Mapping[Any, tuple[str, dict[str, Any]]] = {"call_function": _FUNCTIONS, "call_method": _METHODS}.get(
        node.op, {}
    )
    if node.target in (operator.getitem, getattr):
        return _part_of(node)
    try:
        found = table.get(node.target)
    except TypeError:  # a target without a hash
        return None
    return None if found is None else _bind(node, *found)


def _bind(node: fx.Node, signature: str, fixed: Mapping[str, Any], obstacle: str | None = None) -> Call | None:
    try:
        bound = inspect.signature(_SIGNATURES[signature]).bind(*node.args, **{**node.kwargs, **fixed})
    except TypeError:  # an overload (an out= variant, names of dimensions) that no pattern knows
        return None
    bound.apply_defaults()
    return Call(node, signature.removeprefix("torch."), bound.arguments, obstacle)


def _part_of(node: fx.Node) -> Call | None:
    """A part of what a call of torch.max along a dimension gives."""
    whole, part = node.args
    call = recognise(whole) if part in (1, -1, "indices") else None
    if call is None or call.operation != "max" or not isinstance(call["dim"], int):
        return None
    return Call(node, "indices of max", {"input": whole})


# ---- modules: what a graph of torch.fx holds, where TorchDynamo has looked through them ----


def _convolution(module: nn.Conv2d, name: str) -> tuple[str, dict[str, Any], str | None]:
    names = ("stride", "padding", "dilation", "groups")
    numbers = {key: getattr(module, key) for key in names} | _tensors(module, name, "weight", "bias")
    zeros = module.padding_mode == "zeros"
    return "conv2d", numbers, None if zeros else f"padding_mode {module.padding_mode!r} pads in a call of its own"


def _batch_norm(module: nn.BatchNorm2d, name: str) -> tuple[str, dict[str, Any], str | None]:
    tensors = _tensors(module, name, "running_mean", "running_var", "weight", "bias")
    return (
        "batch_norm",
        {**tensors, "training": module.training or module.running_mean is None, "eps": module.eps},
        None,
    )


def _tensors(module: nn.Module, name: str, *names: str) -> dict[str, Any]:
    return {key: None if getattr(module, key) is None else Attribute(f"{name}.{key}") for key in names}


def _max_pool2d(module: nn.MaxPool2d, name: str) -> tuple[str, dict[str, Any], str | None]:
    names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
    return "max_pool2d", {key: getattr(module, key) for key in names}, None


def _upsample(module: nn.Upsample, name: str) -> tuple[str, dict[str, Any], str | None]:
    names = ("size", "scale_factor", "mode", "align_corners", "recompute_scale_factor")
    return "interpolate", {key: getattr(module, key) for key in names}, None


def _cross_entropy(module: nn.CrossEntropyLoss, name: str) -> tuple[str, dict[str, Any], str | None]:
    names = ("ignore_index", "reduction", "label_smoothing")
    return "cross_entropy", {key: getattr(module, key) for key in names} | _tensors(module, name, "weight"), None


def _nll_loss(module: nn.NLLLoss, name: str) -> tuple[str, dict[str, Any], str | None]:
    numbers = {key: getattr(module, key) for key in ("ignore_index", "reduction")}
    return "nll_loss", numbers | _tensors(module, name, "weight"), None


_MODULES: dict[type, Callable[[Any, str], tuple[str, dict[str, Any], str | None]]] = {
    nn.Conv2d: _convolution,
    nn.BatchNorm2d: _batch_norm,
    nn.ReLU: lambda module, name: ("relu", {"inplace": module.inplace}, None),
    nn.MaxPool2d: _max_pool2d,
    nn.Upsample: _upsample,
    nn.UpsamplingBilinear2d: _upsample,
    nn.UpsamplingNearest2d: _upsample,
    nn.CrossEntropyLoss: _cross_entropy,
    nn.NLLLoss: _nll_loss,
    nn.Softmax: lambda module, name: ("softmax", {"dim": module.dim}, None),
    nn.LogSoftmax: lambda module, name: ("log_softmax", {"dim": module.dim}, None),
}


def _of_module(node: fx.Node) -> Call | None:
    owner = node.graph.owning_module
    module = None if owner is None else owner.get_submodule(str(node.target))
    describe = _MODULES.get(type(module))  # no subclass: it may do something else
    if module is None or describe is None:
        return None
    operation, fixed, obstacle = describe(module, str(node.target))
    return _bind(node, operation, fixed, "the module has hooks" if has_hooks(module) else obstacle)


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of the module does more than its forward."""
    return any(
        getattr(module, name)
        for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    )


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
