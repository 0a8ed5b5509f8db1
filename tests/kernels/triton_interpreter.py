"""What Triton's interpreter needs to run the kernels rightly, and in bearable time."""

import dataclasses
import math
import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def prepare() -> None:
    """Patch the interpreter of this process (private names; they are the same in Triton 3.6 and 3.9)."""
    np.seterr(all="ignore")  # NaN and infinities are ordinary values here
    _multiply_bfloat16_as_numbers()
    _index_with_tensors()
    _check_no_overflows()
    _patch_the_language_once()
    _describe_each_type_once()
    _broadcast_what_differs()
    _add_bias_as_gpus_do()
    _reduce_nothing_but_nan()


def _multiply_bfloat16_as_numbers() -> None:
    """The interpreter keeps bfloat16 as 16-bit integers, and multiplies those."""

    def as_float32(handle: Any) -> np.ndarray:
        if handle.dtype.scalar == tl.bfloat16:
            return (handle.data.astype(np.uint32) << 16).view(np.float32)
        return handle.data

    create_dot = interpreter.InterpreterBuilder.create_dot

    def dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            return interpreter.TensorHandle(np.matmul(as_float32(a), as_float32(b)) + d.data, d.dtype.scalar)
        return create_dot(self, a, b, d, *rest)

    interpreter.InterpreterBuilder.create_dot = dot


def _index_with_tensors() -> None:
    """Triton 3.6 lets tensors of one element be a range's bounds in a way that numpy 2.4 refuses."""
    patch_tensor = interpreter._patch_lang_tensor

    def patch(tensor: Any, *scope: Any) -> None:
        patch_tensor(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.reshape(-1)[0])

    interpreter._patch_lang_tensor = patch


def _check_no_overflows() -> None:
    """Every integer sum and product would be checked for overflow, by several operations each."""
    options = interpreter.interpreter_builder.options
    interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)


def _patch_the_language_once() -> None:
    """Triton patches its whole language at every launch and at every call of a device function."""
    interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    interpreter._patch_lang = lambda function: interpreter._LangPatchScope()


def _describe_each_type_once() -> None:
    """Every operation makes its result's type and shape anew, and looks up what numpy calls it: a third of the time."""
    describe, numpy_type = tl.block_type.__init__, interpreter._get_np_dtype
    described: dict[Any, dict[str, Any]] = {}
    shapes: dict[tuple[int, ...], tuple[tl.tuple, tl.constexpr]] = {(): (tl.tuple([]), tl.constexpr(1))}
    numpy_types: dict[str, np.dtype] = {}

    def initialise(self: tl.block_type, element_ty: tl.dtype, shape: list) -> None:
        sides = tuple([getattr(side, "value", side) for side in shape])
        key = str(element_ty), sides
        if key not in described:
            describe(self, element_ty, shape)
            if sides not in shapes:
                shapes[sides] = tl.tuple([tl.constexpr(side) for side in sides]), tl.constexpr(math.prod(sides))
            described[key] = {**vars(self), "of_tensors": shapes[sides]}
        vars(self).update(described[key])

    def initialise_tensor(self: tl.tensor, handle: Any, type: tl.dtype) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = type.of_tensors if type.is_block() else shapes[()]

    def of_numpy(type: tl.dtype) -> np.dtype:
        if type.name not in numpy_types:
            numpy_types[type.name] = numpy_type(type)
        return numpy_types[type.name]

    tl.block_type.__init__ = initialise
    tl.tensor.__init__ = initialise_tensor
    interpreter._get_np_dtype = of_numpy


def _broadcast_what_differs() -> None:
    """Of two operands of one shape, each side is looked at on its own."""
    broadcast = type(interpreter.interpreter_semantic).broadcast_impl_value

    def broadcast_if_needed(self: Any, left: tl.tensor, right: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
        if left.shape is right.shape:
            return left, right
        return broadcast(self, left, right)

    type(interpreter.interpreter_semantic).broadcast_impl_value = broadcast_if_needed


def _reduce_nothing_but_nan() -> None:
    """numpy warns where all of what is reduced is NaN, which here is as ordinary as one."""
    min_max = interpreter.ReduceOps.min_max

    def quietly(self: Any, *arguments: Any, **options: Any) -> Any:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "All-NaN", RuntimeWarning)
            return min_max(self, *arguments, **options)

    interpreter.ReduceOps.min_max = quietly


def _add_bias_as_gpus_do() -> None:
    """On GPUs, torch's convolution rounds its output before it adds the bias, on CPUs afterwards alone.

    Our kernels are a GPU's, and plain PyTorch is to be what it is there: else half types would break ties differently.
    """
    conv2d = torch.nn.functional.conv2d

    def conv2d_then_bias(
        input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *rest: Any
    ) -> torch.Tensor:
        output = conv2d(input, weight, None, *rest)
        return output if bias is None else output + bias.to(output.dtype)[:, None, None]

    torch.nn.functional.conv2d = conv2d_then_bias
