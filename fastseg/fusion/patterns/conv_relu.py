"""conv2d + [batch_norm in evaluation] + relu without a pool becomes conv_relu_pool2d with a window of one position.

Only on a CPU, and only where Winograd's algorithm serves it: elsewhere PyTorch's own is at least as good, and such
places, which are everywhere, are no news for the report.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastseg import _native
from fastseg.functional import conv_relu_pool2d
from fastseg.fusion.calls import Call, has_nodes, sizes_of, tensor_of
from fastseg.fusion.pattern import Match, Pattern, demand
from fastseg.fusion.patterns.conv_relu_pool2d import NUMBERS, arguments_of, convolution, fold
from fastseg.ops.convolution.algorithms import choose_cpu_forward
from fastseg.ops.convolution.geometry import Geometry, resolve


def conv_batch_norm_relu(
    input: Tensor, weight: Tensor, bias: Tensor | None, batch_norm: dict[str, Any] | None, **numbers: Any
) -> Tensor:
    """What the graph calls."""
    weight, bias, scale = fold(weight, bias, batch_norm)
    return conv_relu_pool2d(input, weight, bias, **numbers, pool_size=1, scale=scale)  # type: ignore[return-value]


def _match(relu: Call) -> Match:
    chain = convolution(relu.source())
    demand(looks_served(chain[0], _is_served))
    return Match(
        nodes=[call.node for call in (*chain, relu)],
        outputs={relu.node: None},
        function=conv_batch_norm_relu,
        arguments=arguments_of(chain),
        not_kept=[chain[0].node] if len(chain) > 1 else [],  # else ReLU holds its own result alone
    )


def _is_served(input: Tensor, weight: Tensor, geometry: Geometry) -> bool:
    return choose_cpu_forward(input, weight, geometry, False, keep=not torch.is_grad_enabled()) == "winograd"


def looks_served(conv: Call, serves: Callable[[Tensor, Tensor, Geometry], bool]) -> bool:
    """Whether ``serves`` says so of a call in a graph on a CPU, with the sizes that it was captured with."""
    numbers = {name: conv[name] for name in NUMBERS}
    input, weight, convolved = (tensor_of(value) for value in (conv["input"], conv["weight"], conv.node))
    if input is None or weight is None or convolved is None or has_nodes(numbers):
        return False
    sizes = sizes_of(input)
    if sizes is None or not all(isinstance(size, int) for size in weight.shape):
        return False
    if len(sizes) != 4 or weight.ndim != 4 or weight.device.type != "cpu" or _native._C is None:
        return False
    geometry, _ = resolve(tuple(weight.shape[2:]), **numbers)
    # Autocast convolves in another dtype than the input's, which is that of the result.
    return serves(torch.empty(sizes, dtype=convolved.dtype, device="meta"), weight, geometry)


CONV_RELU = Pattern("conv2d + [batch_norm] + relu", "relu", "conv_relu_pool2d", _match)
