"""What every operator registers beside its kernels: itself in plain PyTorch, and its gradient.

The gradient belongs to the operator, so that a call keeps it however it came about: eager, compiled, exported, traced.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._decomp import register_decomposition
from torch.autograd import forward_ad

from fastseg._native import log_fallback, log_missing_kernel
from fastseg.ops import sharding

# The dispatch keys of what lies below autograd: kernels, and the modes that trace them.
BELOW_AUTOGRAD = torch._C._after_autograd_keyset

_decompositions: dict[torch._ops.OpOverload, Callable[..., Any]] = {}
_of_channels_last: set[torch._ops.OpOverload] = set()


def decompositions() -> dict[torch._ops.OpOverload, Callable[..., Any]]:
    """Every operator of fastseg, with a function that computes it with PyTorch's own operators.

    For `torch.export.ExportedProgram.run_decompositions`, which with this table leaves none of fastseg's operators in
    a program, and for whatever else takes such a table. `torch.onnx.export` needs no table. Add the entries to
    `torch.export.default_decompositions()` where ATen's operators are to be decomposed, too.

    Returns:
        A new dictionary, from overloads to functions of the same arguments and results.
    """
    return dict(_decompositions)


def register_plain(
    library: torch.library.Library, operator: str, plain: Callable[..., Any], fake: Callable[..., Any],
    other_devices: Callable[..., Any] | None = None, channels_last: bool = False,
) -> None:  # fmt: skip
    """Registers an operator in plain PyTorch: as its decomposition, and for devices that have no kernel.

    Args:
        library: Where the operator is defined.
        operator: Its name.
        plain: The operator for any device, without a look at values, so that compilers can trace it.
        fake: The operator for tensors without memory, which is registered already.
        other_devices: What devices without a kernel run, if it isn't ``plain``.
        channels_last: Whether Inductor, which is free in that, is to give the first argument in channels_last.
    """
    overload = getattr(torch.ops.fastseg, operator).default

    def without_kernel(*args: Any) -> Any:
        log_missing_kernel(operator, next(arg for arg in args if isinstance(arg, Tensor)))
        return (other_devices or plain)(*args)

    library.impl(operator, without_kernel, "CompositeExplicitAutograd")
    _decompositions[overload] = plain
    if channels_last:
        _of_channels_last.add(overload)
    # PyTorch's own table is where torch.onnx.export looks for what ONNX has no operator for. FakeTensorMode would
    # prefer it to the fake where sizes are symbolic, but for what stands in the table of fakes.
    register_decomposition(overload)(plain)
    register_decomposition(overload, type="meta")(fake)


def register_fallbacks(lowering: ModuleType) -> None:
    """Tells Inductor's module of lowerings that the operators run as they are, although they have decompositions.

    It would find that by itself, but for an assertion where the environment's variable CI is set.
    """
    # torch 2.6 has the other of the two
    strides = getattr(lowering, "constrain_to_fake_tensors", lowering.constrain_to_fx_strides)

    def first_in_channels_last(_: Any, input: Any, *rest: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        from torch._inductor.ir import ExternKernel

        return (ExternKernel.require_channels_last(input), *rest), {}

    for overload in _decompositions:
        constraint = first_in_channels_last if overload in _of_channels_last else strides
        lowering.make_fallback(overload, constraint, warn=False)


def register_gradient(
    library: torch.library.Library, operator: str, kernels: dict[str, Callable[..., Any]], record: Callable[..., Any],
    plain: Callable[..., Any], tensors: int, differentiable: int,
) -> None:  # fmt: skip
    """Registers an operator's gradient.

    Plain PyTorch serves what has no formula here: forward-mode differentiation, torch.func's transforms of a gradient,
    and gradients of arguments that the kernels have none for.

    Args:
        library: Where the operator is defined.
        operator: Its name.
        kernels: What is registered for each device. Tensors of nothing but that device go there at once: a second way
            through the dispatcher costs as much as the rest of a small call.
        record: Calls the operator and records its gradient: ``apply`` of a `torch.autograd.Function`. It takes the
            operator without its gradient, and then the operator's arguments.
        plain: The operator in plain PyTorch.
        tensors: How many of the operator's arguments are tensors or None; they come first.
        differentiable: How many of those, the first of them, ``record`` has a gradient for.
    """
    kernel_of, below = _ways_below_autograd(operator, kernels)

    def differentiate(keyset: Any, *args: Any) -> Any:
        if forward_ad._current_level >= 0 and any(map(_has_tangent, args[:tensors])):
            log_fallback(operator, "forward-mode differentiation")
            return plain(*args)
        kernel = kernel_of(keyset.raw_repr())
        call = kernel or below(keyset)
        if torch.is_grad_enabled():
            needing = [tensor is not None and tensor.requires_grad for tensor in args[:tensors]]
            if True in needing[differentiable:]:
                log_fallback(operator, "another argument than its input needs a gradient")
                return plain(*args)
            if True in needing:
                if kernel is None and torch._C._are_functorch_transforms_active():
                    log_fallback(operator, "a transform of torch.func")
                    return plain(*args)
                return record(call, *args)
        return call(*args)

    library.impl(operator, differentiate, "Autograd", with_keyset=True)


def register_no_gradient(library: torch.library.Library, operator: str, kernels: dict[str, Callable[..., Any]]) -> None:
    """Registers that an operator's results have no gradient for its input; see `register_gradient`."""
    kernel_of, below = _ways_below_autograd(operator, kernels)

    def detach(keyset: Any, input: Tensor, *rest: Any) -> Any:
        call = kernel_of(keyset.raw_repr()) or below(keyset)
        return call(input.detach() if input.requires_grad else input, *rest)

    library.impl(operator, detach, "Autograd", with_keyset=True)


def _ways_below_autograd(
    operator: str, kernels: dict[str, Callable[..., Any]]
) -> tuple[Callable[[int], Any], Callable[[Any], Callable[..., Any]]]:
    """Two functions: a call's kernel, from its dispatch keys' number, or None; and the way that serves every call."""
    redispatch = getattr(torch.ops.fastseg, operator).default.redispatch

    def below(keyset: Any) -> Callable[..., Any]:
        if "torch.distributed.tensor" in sys.modules:
            sharding.register()
        return functools.partial(redispatch, keyset & BELOW_AUTOGRAD)

    return {_keys_of_nothing_but(device).raw_repr(): kernel for device, kernel in kernels.items()}.get, below


def _keys_of_nothing_but(device: str) -> Any:
    """The dispatch keys of a call whose tensors are a device's, where no mode is on."""
    keys = torch._C.DispatchKey
    return torch._C.DispatchKeySet(getattr(keys, device)) | torch._C.DispatchKeySet(getattr(keys, f"Autograd{device}"))


def _has_tangent(tensor: Tensor | None) -> bool:
    return tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None
