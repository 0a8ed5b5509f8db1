"""fuse and unfuse: the pass without a compiler, for models that torch.fx can trace."""

from __future__ import annotations

import copy
import inspect
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import TraceError

from fastseg._native import logger
from fastseg.fusion.calls import has_hooks
from fastseg.fusion.report import Report, merge
from fastseg.fusion.rewriting import rewrite

M = TypeVar("M", bound=nn.Module)

_CONSTANTS = (type(None), bool, int, float, str)  # arguments that a graph is traced for, each value by itself
_unchanged: weakref.WeakKeyDictionary[nn.Module, Report] = weakref.WeakKeyDictionary()  # what fuse had no use for


def fuse(model: M, inplace: bool = False) -> M:
    """Puts fastseg's operators into a model that torch.fx can trace, at the places where they give the same.

    Its modules, parameters, buffers and state_dict stay what they are. Its forward runs a graph that is traced for each
    mode (of training, of every module) and each set of arguments that aren't tensors; where nothing is replaced, the
    forward that it had. `fastseg.report` says what was replaced. For models that torch.fx can't trace, and to compile
    the rest as well: ``torch.compile(model, backend="fastseg")``.

    Args:
        model: The model. What its forwards do beside calling operators on tensors (reading a number, say) is done when
            a graph is traced, as always with torch.fx.
        inplace: Change the model itself instead of a copy.

    Returns:
        The model that was changed; unchanged, and the log says so, where there is nothing to replace in evaluation
        nor in the mode that the model is in.

    Raises:
        torch.fx.proxy.TraceError: torch.fx can't trace the model.
    """
    model = unfuse(model, inplace)
    if "forward" in vars(model):
        raise TraceError("the model has a forward that isn't its class's")
    forward = FusedForward(model)
    forward.prepare()
    report = forward.report()
    if report.replaced:
        model.forward = forward
        logger.info("fuse: %s", report)
    else:
        _unchanged[model] = report
        logger.warning("fuse: %s", report)
    return model


def unfuse(model: M, inplace: bool = False) -> M:
    """The inverse of `fuse`: the model, and every module in it, with the forward that it had.

    Args:
        model: The model.
        inplace: Change the model itself instead of a copy.

    Returns:
        The model that was changed.
    """
    model = model if inplace else copy.deepcopy(model)
    for module in model.modules():
        if isinstance(vars(module).get("forward"), FusedForward):
            del module.forward
    _unchanged.pop(model, None)
    return model


def report_of(model: Any) -> Report | None:
    """The report of a model that has been through `fuse`; None for anything else."""
    if not isinstance(model, nn.Module):
        return None
    forward = vars(model).get("forward")
    return forward.report() if isinstance(forward, FusedForward) else _unchanged.get(model)


class FusedForward:
    """The forward of a fused model: traced when it is needed, so that copies and pickles carry no graph."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.original = type(model).forward
        self.signature = inspect.signature(self.original)
        self.graphs: dict[Any, tuple[Callable[..., Any] | None, Report]] = {}

    def __reduce__(self) -> Any:
        return FusedForward, (self.model,)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output."""
        bound = self.signature.bind(self.model, *args, **kwargs)
        bound.apply_defaults()
        values = list(bound.arguments.values())[1:]
        key = self._state(), tuple(value if isinstance(value, _CONSTANTS) else type(value) for value in values)
        if key not in self.graphs:
            constants = {n: v for n, v in bound.arguments.items() if isinstance(v, _CONSTANTS)}
            try:
                self.graphs[key] = self._trace(constants)
            except TraceError as error:
                logger.warning("fuse: the forward runs as it was for %s: %s", constants, error)
                self.graphs[key] = None, Report((), (), 1)
        graph, _ = self.graphs[key]
        return self.original(self.model, *args, **kwargs) if graph is None else graph(self.model, *values)

    def prepare(self) -> None:
        """Traces what the first calls need: in the mode that the model is in, and in evaluation."""
        modes = [(module, module.training) for module in self.model.modules()]
        self._prepare()
        try:
            self.model.eval()
            self._prepare()
        finally:
            for module, training in modes:
                module.training = training

    def _prepare(self) -> None:
        parameters = list(self.signature.parameters.values())[1:]
        constants = {p.name: p.default for p in parameters if isinstance(p.default, _CONSTANTS)}
        values = tuple(constants.get(p.name, Tensor) for p in parameters)
        self.graphs[self._state(), values] = self._trace(constants)

    def report(self) -> Report:
        """The report of all graphs so far."""
        return merge(report for _, report in self.graphs.values())

    def _state(self) -> tuple[Any, ...]:
        """What of the modules a graph depends on."""
        return tuple((module.training, has_hooks(module)) for module in self.model.modules())

    def _trace(self, constants: dict[str, Any]) -> tuple[Callable[..., Any] | None, Report]:
        try:
            graph = _Tracer().trace(self.model, constants)
        except TraceError:
            raise
        except Exception as error:  # whatever code meets that was written for tensors, and gets torch.fx's proxies
            raise TraceError(f"torch.fx can't trace the forward: {type(error).__name__}: {error}") from error
        module = fx.GraphModule(self.model, graph)
        report = rewrite(module)
        return (type(module).forward if report.replaced else None), report


class _Tracer(fx.Tracer):
    """torch.fx's tracer, which refuses what its graph wouldn't repeat."""

    record_stack_traces = True

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """The graph of a model's forward, for arguments that are constants."""
        if any(parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
               for parameter in inspect.signature(type(root).forward).parameters.values()):  # fmt: skip
            raise TraceError("forward takes any number of arguments")
        self.modes = _modes()
        self.known = {id(tensor) for tensor in (*root.parameters(), *root.buffers())}
        self.known |= {id(v) for m in root.modules() for v in vars(m).values() if isinstance(v, Tensor)}
        return super().trace(root, concrete_args)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """A node, unless it is under another state of autograd or autocast than the forward."""
        if _modes() != self.modes:
            raise TraceError(
                "forward changes autograd's or autocast's state, which torch.fx doesn't record; "
                'torch.compile(model, backend="fastseg") does'
            )
        return super().create_node(*args, **kwargs)

    def create_arg(self, a: Any) -> Any:
        """An argument, unless it is a tensor that the forward made without its inputs (a random one, maybe)."""
        if isinstance(a, Tensor) and id(a) not in self.known:
            raise TraceError(
                "forward makes a tensor from none of its arguments, which torch.fx would make once for all calls; "
                'torch.compile(model, backend="fastseg") makes it each time'
            )
        return super().create_arg(a)


def _modes() -> tuple[Any, ...]:
    autocast = ((torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda"))
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast
