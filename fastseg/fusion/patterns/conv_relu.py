"""conv2d + [batch_norm in evaluation] + relu without a pool becomes conv_relu_pool2d with a window of one position.

Only on a CPU, and only where Winograd's algorithm serves it: elsewhere PyTorch's own is at least as good, and such
places, which are everywhere, are no news for the report.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fastseg import _native
from fastseg.functional import conv_relu_pool2d
from fastseg.fusion.calls import Attribute, Call, has_nodes, recognise, sizes_of, tensor_of
from fastseg.fusion.pattern import Match, Pattern, demand_free
from fastseg.fusion.patterns.conv_relu_pool2d import NUMBERS, arguments_of, convolution, fold, is_pool_served
from fastseg.ops.conv_relu_pool2d_geometry import resolve
from fastseg.ops.conv_relu_pool2d_roads import choose_forward_road

MANY_PIXELS = (1, 2**10, 2**10)  # of an image whose size only the call knows: images, height, width


def conv_batch_norm_relu(
    input: Tensor, weight: Tensor, bias: Tensor | None, batch_norm: dict[str, Any] | None, **numbers: Any
) -> Tensor:
    """What the graph calls; where its maker knew no sizes, they are looked at here."""
    if batch_norm is not None:
        weight, bias = fold(weight, bias, **batch_norm)
    if not torch.compiler.is_compiling() and not is_served(input, weight, **numbers):
        return F.relu(F.conv2d(input, weight, bias, **numbers), inplace=True)
    return conv_relu_pool2d(input, weight, bias, **numbers, pool_size=1)  # type: ignore[return-value]  # one result


def is_served(input: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any, groups: int) -> bool:
    """Whether Winograd's algorithm serves the convolution."""
    if input.ndim != 4 or weight.ndim != 4 or weight.device.type != "cpu" or _native._C is None:
        return False
    geometry, _ = resolve(tuple(weight.shape[2:]), stride, padding, dilation, groups, 1, None, 0, False)
    return choose_forward_road(input, weight, geometry, False) == "winograd"


def _match(relu: Call) -> Match | None:
    chain = convolution(relu["input"])
    if not chain or not looks_served(chain[0]) or any(is_pool_served(recognise(user)) for user in relu.node.users):
        return None
    demand_free(*chain, relu)
    return Match(
        nodes=[call.node for call in (*chain, relu)],
        outputs={relu.node: None},
        function=conv_batch_norm_relu,
        arguments=arguments_of(chain),
        not_kept=[chain[0].node] if len(chain) > 1 else [],  # else ReLU holds its own result alone
    )


def looks_served(conv: Call, serves: Callable[..., bool] = is_served) -> bool:
    """Whether ``serves`` says so of a call in a graph, with the sizes that it was captured with."""
    numbers = {name: conv[name] for name in NUMBERS}
    weight, input = _tensor(conv["weight"], conv.node), tensor_of(conv["input"])
    if weight is None or has_nodes(numbers):
        return False
    if input is not None:
        sizes = sizes_of(input)
    else:
        images, *pixels = MANY_PIXELS
        sizes = (images, weight.shape[1], *pixels)
    if sizes is None or not all(isinstance(size, int) for size in weight.shape):
        return False
    return serves(torch.empty(sizes, device="meta"), weight, **numbers)


def _tensor(value: Any, node: fx.Node) -> Tensor | None:
    """A tensor that the graph's maker has computed, or that its modules hold."""
    name = value.name if isinstance(value, Attribute) else getattr(value, "target", None)
    if isinstance(value, Attribute) or (isinstance(value, fx.Node) and value.op == "get_attr"):
        found = operator.attrgetter(str(name))(node.graph.owning_module)
        return found if isinstance(found, Tensor) else None
    return tensor_of(value)


CONV_RELU = Pattern("conv2d + [batch_norm] + relu", "relu", "conv_relu_pool2d", _match)
