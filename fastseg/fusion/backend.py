"""The backend "fastseg" of torch.compile: the pass over TorchDynamo's graphs, then Inductor or plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch._inductor.config
from torch import Tensor, fx

from fastseg._native import logger
from fastseg.fusion.record import forget, kept
from fastseg.fusion.report import Graph, Report, origin_of
from fastseg.fusion.rewriting import rewrite
from fastseg.ops.convolution.kept import freeze

INNER = ("inductor", "eager")


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
            it) or "eager". The others are Inductor's own. With its "freezing", in predictions, weights are held for
            constants: changes that don't count in their version (through ``weight.data``) go unseen, and the
            convolutions don't read them at each call to see any.

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
    name, code = origin_of(graph_module.graph)
    remark = _remark(graph_module.graph, example_inputs)
    patches = _patches(mode, inductor_options) if inner == "inductor" else {"freezing": False}
    freezing = patches.get("freezing", torch._inductor.config.freezing) and not torch.is_grad_enabled()
    with torch._inductor.config.patch(freezing=freezing):
        replaced, left = rewrite(graph_module)
    graph = Graph(name, code, tuple(replaced), tuple(left), None if replaced else remark)
    logger.info("torch.compile: %s", Report([graph]))
    attributes = list(graph_module.parameters())  # none, but where Inductor's setting "freezing" is on everywhere
    if freezing:
        freeze(value for value in [*example_inputs, *attributes] if isinstance(value, torch.nn.Parameter))
    if inner == "inductor":
        run = _inductor(graph_module, example_inputs, patches)
    else:  # its forward is looked up at each call: TorchDynamo's modules replace it in their first one
        run = lambda *args: graph_module.forward(*args)  # noqa: E731
    return kept(graph, run, example_inputs, attributes)


fastseg.reset = forget  # type: ignore[attr-defined]  # torch.compiler.reset() calls it


def _patches(mode: str | None, options: dict[str, Any]) -> dict[str, Any]:
    """Inductor's settings for a mode and options."""
    from fastseg.fusion.layouts import KeepLayouts

    patches = (torch._inductor.list_mode_options(mode) if mode is not None else {}) | {
        name.replace("-", "_"): value for name, value in options.items()
    }
    if torch._inductor.config.post_grad_custom_post_pass is None:
        patches.setdefault("post_grad_custom_post_pass", KeepLayouts())
    unknown = sorted(set(patches) - set(torch._inductor.config.get_config_copy()))
    if unknown:
        raise ValueError(f'options: expected "inner" or options of Inductor, got {unknown}')
    return patches


def _inductor(
    graph_module: fx.GraphModule, example_inputs: list[Tensor], patches: dict[str, Any]
) -> Callable[..., Any]:
    from torch._dynamo.backends.registry import lookup_backend

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


def _remark(graph: fx.Graph, example_inputs: list[Any]) -> str | None:
    """Why a graph may hold less than its model's code: a tensor subclass, of which each call is a graph of its own."""
    kinds = {type(value).__name__ for value in example_inputs if torch.overrides.has_torch_function((value,))}
    if not kinds:
        return None
    calls = sum(node.op.startswith("call") for node in graph.nodes)
    return (
        f"TorchDynamo captured {calls} call{'s' if calls > 1 else ''}, of {' and '.join(sorted(kinds))}, whose class "
        "overrides __torch_function__: give the model plain tensors"
    )
