"""Formulas with which `torch.utils.flop_counter.FlopCounterMode` counts the convolutions as it counts torch's own.

They are registered when that module is imported, which imports Triton: `import fastseg` doesn't.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch

from fastseg.ops.convolution.geometry import output_shapes, unflatten

Shape = Sequence[int]


def register(counter: ModuleType) -> None:
    """Gives the counter's module the formulas, which get shapes for tensors."""
    operators = torch.ops.fastseg

    def backward(grad_output: Shape, input: Shape, weight: Shape, needs: list[bool], gradients: Any) -> int:
        unused = [None] * 4
        return counter.conv_backward_flop(
            grad_output, input, weight, *unused, False, None, None, needs, out_val=gradients
        )

    @counter.register_flop_formula(operators.conv2d)
    def conv2d(input: Shape, weight: Shape, *rest: Any, out_shape: Shape) -> int:
        return counter.conv_flop_count(input, weight, out_shape)

    @counter.register_flop_formula(operators.conv2d_packed)
    def conv2d_packed(input: Shape, weight: Shape, *rest: Any, out_shape: Shape) -> int:
        return counter.conv_flop_count(input, weight, out_shape)

    @counter.register_flop_formula(operators.conv2d_backward)
    def conv2d_backward(
        grad_output: Shape, input: Shape, weight: Shape, geometry: list[int], needs: list[bool], *, out_shape: Any
    ) -> int:
        return backward(grad_output, input, weight, needs, out_shape)

    @counter.register_flop_formula(operators.conv_relu_pool2d)
    def conv_relu_pool2d(
        input: Shape,
        weight: Shape,
        bias: Shape | None,
        scale: Shape | None,
        geometry: list[int],
        *rest: Any,
        out_shape: Any,
    ) -> int:
        return counter.conv_flop_count(input, weight, _convolved(input, weight, geometry))

    @counter.register_flop_formula(operators.conv_relu_pool2d_backward)
    def conv_relu_pool2d_backward(
        grad_output: Shape | None, grad_skip: Shape | None, input: Shape, weight: Shape, positions: Shape,
        skip: Shape | None, geometry: list[int], needs: list[bool], *, out_shape: Any,
    ) -> int:  # fmt: skip
        return backward(_convolved(input, weight, geometry), input, weight, needs, out_shape)


def _convolved(input: Shape, weight: Shape, geometry: list[int]) -> Shape:
    """The shape of the convolution's output, before the pool."""
    return output_shapes(tuple(input), tuple(weight), unflatten(tuple(geometry)))[1]
