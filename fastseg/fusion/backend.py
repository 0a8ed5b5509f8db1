"""The backend "fastseg" of torch.compile: the pass over TorchDynamo's graphs, then Inductor or plain PyTorch."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from fastseg._native import logger
from fastseg.fusion.report import Report, merge
from fastseg.fusion.rewriting import rewrite

INNER = ("inductor", "eager")
_REPORTS = "fastseg_reports"  # the attribute of a torch.compile call's own object that holds the reports of its graphs

# The attributes in which TorchDynamo's wrappers of a backend hold what they wrap: of torch 2.13, and of older versions.
_WRAPPED = ("_torchdynamo_orig_backend", "_torchdynamo_orig_callable")


def fastseg(
    graph_module: fx.GraphModule, example_inputs: list[Tensor], *, mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:  # fmt: skip
    """What ``torch.compile(model, backend="fastseg")`` calls for each graph that TorchDynamo captures.

    Args:
        graph_module: The graph; rewritten in place.
        example_inputs: Its inputs.
        mode: Inductor's, as torch.compile takes it.
        options: "inner": what runs the rewritten graph, "inductor" (where it isn't given, and there is a compiler for
            it) or "eager". The others are Inductor's own.

    Returns:
        What runs in the graph's place.

    Raises:
        ValueError: An option isn't known.
    """
    inductor_options = dict(options or {})
    inner = inductor_options.pop("inner", None)
    if inner not in (None, *INNER):
        raise ValueError(f"options: expected inner to be one of {INNER}, got {inner!r}")
    if inner is None:
        missing = _missing_compiler(example_inputs)
        inner = "inductor" if missing is None else "eager"
        if missing is not None:
            logger.warning("the graph runs without Inductor, by plain PyTorch: %s", missing)
    if inner == "eager" and (mode is not None or inductor_options):
        logger.warning("mode and options of Inductor have no meaning without it: %s, %s", mode, inductor_options)
    report = rewrite(graph_module)
    logger.info("torch.compile: %s", report)
    _file(report)
    return graph_module.forward if inner == "eager" else _inductor(graph_module, example_inputs, mode, inductor_options)


def _inductor(
    graph_module: fx.GraphModule, example_inputs: list[Tensor], mode: str | None, options: dict[str, Any]
) -> Callable[..., Any]:
    from torch._dynamo.backends.registry import lookup_backend

    patches = (torch._inductor.list_mode_options(mode) if mode is not None else {}) | {
        name.replace("-", "_"): value for name, value in options.items()
    }
    unknown = sorted(set(patches) - set(torch._inductor.config.get_config_copy()))
    if unknown:
        raise ValueError(f'options: expected "inner" or options of Inductor, got {unknown}')
    return lookup_backend("inductor")(graph_module, example_inputs, config_patches=patches)  # type: ignore[call-arg]


def _missing_compiler(example_inputs: list[Any]) -> str | None:
    """Why Inductor can't compile for the inputs' devices, or None."""
    devices = {value.device.type for value in example_inputs if isinstance(value, Tensor)}
    if devices - {"cpu"}:
        from torch.utils._triton import has_triton

        return None if has_triton() else "Triton isn't installed, or doesn't know the device"
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        return str(error).splitlines()[0]
    return None


# ---- reports ----


def _file(report: Report) -> None:
    """Keeps a graph's report with the torch.compile call that the graph belongs to.

    TorchDynamo doesn't tell a backend whose graph it gets; but the object that torch.compile made calls it.
    """
    caller = sys._getframe(2).f_locals.get("self")
    if isinstance(caller, torch._TorchCompileWrapper):
        vars(caller).setdefault(_REPORTS, []).append(report)


def report_of(compiled: Any) -> Report | None:
    """The report of all graphs of what torch.compile gave with this backend; None for anything else."""
    if isinstance(compiled, nn.Module) and compiled._compiled_call_impl is not None:  # model.compile(...)
        compiled = compiled._compiled_call_impl
    wrapper = _wrapper(compiled)
    if wrapper is None or wrapper.compiler_fn is not fastseg:
        return None
    return merge(vars(wrapper).get(_REPORTS, []))


def _wrapper(compiled: Any) -> torch._TorchCompileWrapper | None:
    """The object that torch.compile made for its backend."""
    context = getattr(compiled, "dynamo_ctx", None)  # a module's; a function has it in a closure only
    if context is None and hasattr(compiled, "get_compiler_config"):
        cells = compiled.get_compiler_config.__closure__ or ()
        context = next((cell.cell_contents for cell in cells), None)
    backend: Any = getattr(context, "callback", None)
    while inner := [getattr(backend, name) for name in _WRAPPED if hasattr(backend, name)]:
        backend = inner[0]
    return backend if isinstance(backend, torch._TorchCompileWrapper) else None
