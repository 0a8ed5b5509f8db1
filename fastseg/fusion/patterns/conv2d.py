"""conv2d, or conv2d + batch_norm in evaluation, becomes fastseg's conv2d where no other pattern takes it in.

Such are the convolutions before batch normalisation in training. Only on a CPU, and only where Winograd's algorithm
serves them, or taps see nothing but padding: elsewhere PyTorch's own is at least as good, and such places, which are
everywhere, are no news for the report.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastseg.functional import conv2d
from fastseg.fusion.calls import Call, tensor_of
from fastseg.fusion.pattern import Match, Pattern, demand
from fastseg.fusion.patterns.conv_relu import looks_served
from fastseg.fusion.patterns.conv_relu_pool2d import arguments_of, convolution, fold
from fastseg.ops.convolution.algorithms import serves_conv2d


def conv_batch_norm(
    input: Tensor, weight: Tensor, bias: Tensor | None, batch_norm: dict[str, Any] | None, **numbers: Any
) -> Tensor:
    """What the graph calls."""
    weight, bias, scale = fold(weight, bias, batch_norm)
    return conv2d(input, weight, bias, **numbers, scale=scale)


def _match(last: Call) -> Match:
    chain = convolution(last)
    convolved = tensor_of(chain[0].node)
    demand(convolved is not None and convolved.dtype in (torch.float32, torch.float64))
    demand(looks_served(chain[0], functools.partial(serves_conv2d, keep=not torch.is_grad_enabled())))
    return match_of(chain, conv_batch_norm)


def match_of(chain: list[Call], function: Callable[..., Tensor]) -> Match:
    """The match of a convolution, and maybe its batch normalisation, that a function of their arguments replaces."""
    return Match(
        nodes=[call.node for call in chain],
        outputs={chain[-1].node: None},
        function=function,
        arguments=arguments_of(chain),
        not_kept=[call.node for call in chain[:-1]],
    )


CONV_NORM = Pattern("conv2d + batch_norm", "batch_norm", "conv2d", _match)
CONV = Pattern("conv2d", "conv2d", "conv2d", _match)
