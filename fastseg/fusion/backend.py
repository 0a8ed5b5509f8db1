"""The backend "fastseg" of torch.compile: the pass over TorchDynamo's graphs, then Inductor or plain PyTorch."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from fastseg._native import logger
from fastseg.fusion.report import Report, merge
from fastseg.fusion.rewriting import rewrite

INNER = ("inductor", "eager")
_REPORTS = "fastseg_reports"  # the attribute of a torch.compile call's own object that holds the reports of its graphs

# The attributes in which TorchDynamo's wrappers of a backend hold what they wrap: of torch 2.13, and of older versions.
_WRAPPED = ("_torchdynamo_orig_backend", "_torchdynamo_orig_callable")

# What torch.compile calls of a module: its forward, after hooks.
_MODULE_CALLS = (nn.Module._call_impl.__code__, nn.Module._wrapped_call_impl.__code__)


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


class _Filed(NamedTuple):
    """A graph's report, kept with the torch.compile call that the graph belongs to.

    Attributes:
        structure: What was compiled, see `_structure`.
        report: The report.
    """

    structure: Any
    report: Report


def _file(report: Report) -> None:
    """Keeps a graph's report with the torch.compile call that the graph belongs to.

    TorchDynamo doesn't tell a backend whose graph it gets; but the object that torch.compile made calls it, and the
    function that torch.compile returned is farther up the stack.
    """
    frame = sys._getframe(2)
    caller = frame.f_locals.get("self")
    if not isinstance(caller, torch._TorchCompileWrapper):
        return
    compiled: FrameType | None = frame
    while compiled is not None and not _is_compiled_call(compiled):
        compiled = compiled.f_back
    structure = None if compiled is None else _structure(compiled.f_locals["fn"])
    vars(caller).setdefault(_REPORTS, []).append(_Filed(structure, report))


def _is_compiled_call(frame: FrameType) -> bool:
    """Whether a frame is a call of what torch.compile returned."""
    code = frame.f_code
    return code.co_filename == torch._dynamo.eval_frame.__file__ and "fn" in code.co_freevars


def report_of(compiled: Any) -> Report | None:
    """The report of all graphs of what torch.compile gave with this backend; None for anything else.

    TorchDynamo runs the graphs of one torch.compile call for another one with equal options, of the same function or of
    a model of the same structure. Those count, too.
    """
    if isinstance(compiled, nn.Module) and compiled._compiled_call_impl is not None:  # model.compile(...)
        compiled = compiled._compiled_call_impl
    wrapper, original = _wrapper(compiled), _original(compiled)
    if wrapper is None or wrapper.compiler_fn is not fastseg:
        return None
    structure = _structure(original)
    own = [filed.report for filed in vars(wrapper).get(_REPORTS, ())]
    shared = [
        filed.report
        for other in _equal_wrappers(wrapper, original)
        for filed in vars(other).get(_REPORTS, ())
        if filed.structure == structure
    ]
    return merge([*own, *shared])


def _wrapper(compiled: Any) -> torch._TorchCompileWrapper | None:
    """The object that torch.compile made for its backend."""
    context = getattr(compiled, "dynamo_ctx", None)  # a module's; a function has it in a closure only
    if context is None and hasattr(compiled, "get_compiler_config"):
        cells = compiled.get_compiler_config.__closure__ or ()
        context = next((cell.cell_contents for cell in cells), None)
    return _innermost(getattr(context, "callback", None))


def _innermost(backend: Any) -> torch._TorchCompileWrapper | None:
    """What TorchDynamo's wrappers of a backend hold, where torch.compile made it."""
    while inner := [getattr(backend, name) for name in _WRAPPED if hasattr(backend, name)]:
        backend = inner[0]
    return backend if isinstance(backend, torch._TorchCompileWrapper) else None


def _original(compiled: Any) -> Callable[..., Any]:
    """What torch.compile was given: a module, a method of one, or a function."""
    module = getattr(compiled, "_orig_mod", None)
    return getattr(compiled, "_torchdynamo_orig_callable", compiled) if module is None else module


def _structure(function: Callable[..., Any]) -> Any:
    """What two torch.compile calls have in common whose graphs TorchDynamo shares: layers and method, or a function."""
    owner = getattr(function, "__self__", function)
    if not isinstance(owner, nn.Module):
        return function
    code = getattr(function, "__code__", None)
    return repr(owner), type(owner).forward.__code__ if code in (None, *_MODULE_CALLS) else code


def _equal_wrappers(
    wrapper: torch._TorchCompileWrapper, original: Callable[..., Any]
) -> list[torch._TorchCompileWrapper]:
    """Those of equal torch.compile calls whose graphs TorchDynamo still holds for the code of a model or function."""
    owner = getattr(original, "__self__", original)
    forwards = [type(module).forward for module in owner.modules()] if isinstance(owner, nn.Module) else []
    codes = {code for code in (getattr(f, "__code__", None) for f in (*forwards, original)) if code is not None}
    found: dict[int, torch._TorchCompileWrapper] = {}
    for code in (*codes, *_MODULE_CALLS):
        for entry in torch._dynamo.eval_frame._debug_get_cache_entry_list(code):
            other = _innermost(getattr(entry, "backend", None))  # older versions of torch don't tell
            if other is not None and other is not wrapper and other == wrapper:
                found[id(other)] = other
    return list(found.values())
