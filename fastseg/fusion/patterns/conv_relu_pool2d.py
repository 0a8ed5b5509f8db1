"""conv2d + [batch_norm in evaluation] + relu + max_pool2d becomes conv_relu_pool2d.

The ReLU may come before the pool, and its result be used elsewhere (a U-Net's skip), or after it: they commute, in
their gradients too. Batch normalisation by running statistics is folded into weight and bias each time the graph runs,
so that gradients reach both.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from fastseg.functional import conv_relu_pool2d
from fastseg.fusion.calls import Call, has_nodes, tensor_of
from fastseg.fusion.pattern import Match, Pattern, Unfit, demand, source
from fastseg.ops.convolution.convolve import scaled
from fastseg.ops.convolution.geometry import MAX_WINDOW

NUMBERS = ("stride", "padding", "dilation", "groups")  # of a convolution
_STATISTICS = ("running_mean", "running_var", "weight", "bias", "eps")


def conv_batch_norm_relu_pool2d(
    input: Tensor, weight: Tensor, bias: Tensor | None, batch_norm: dict[str, Any] | None, return_indices: bool,
    return_skip: bool, **options: Any,
) -> Any:  # fmt: skip
    """What the graph calls: the pooled value (with its indices where asked, as max_pool2d), then the skip."""
    weight, bias, scale = fold(weight, bias, batch_norm)
    results = conv_relu_pool2d(
        input, weight, bias, **options, return_indices=return_indices, return_skip=return_skip, scale=scale
    )
    if return_indices and return_skip:
        output, indices, skip = results
        return (output, indices), skip
    return results


def fold(
    weight: Tensor, bias: Tensor | None, batch_norm: dict[str, Any] | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Weight, bias and scale of the convolution that does what ``batch_norm(conv2d(...))`` does in evaluation.

    Half types have no scale but another weight: rounded, the scale would add an error of its own.
    """
    if batch_norm is None:
        return weight, bias, None
    accumulated = torch.promote_types(weight.dtype, torch.float32)
    scale = torch.rsqrt(batch_norm["running_var"].to(accumulated) + batch_norm["eps"])
    if batch_norm["weight"] is not None:
        scale = scale * batch_norm["weight"]
    mean = batch_norm["running_mean"]
    folded = (-mean if bias is None else bias.to(accumulated) - mean) * scale
    if batch_norm["bias"] is not None:
        folded = folded + batch_norm["bias"]
    if accumulated != weight.dtype:
        return scaled(weight, scale).to(weight.dtype), folded.to(weight.dtype), None
    return weight, folded.to(weight.dtype), scale.to(weight.dtype)


def _match_relu_pool(pool: Call) -> Match:
    relu = source(pool, "relu")
    chain = convolution(relu.source())
    _demand_pool(pool, chain[0])
    with_skip = len(relu.node.users) > 1
    outputs: dict[fx.Node, int | None] = {relu.node: 1, pool.node: 0} if with_skip else {pool.node: None}
    kept_by_norm = [chain[0].node] if len(chain) > 1 else []
    not_kept = kept_by_norm + ([] if with_skip else [relu.node])
    return _make(chain, relu, pool, outputs, bool(pool["return_indices"]), with_skip, not_kept)


def _match_pool_relu(relu: Call) -> Match:
    pool = source(relu, "max_pool2d")
    chain = convolution(pool.source())
    _demand_pool(pool, chain[0])
    return _make(chain, pool, relu, {relu.node: None}, False, False, [call.node for call in chain])


def convolution(call: Call | None) -> list[Call]:
    """The convolution that a call is, and the batch normalisation by running statistics after it; or `Unfit`."""
    if call is not None and call.operation == "conv2d":
        return [call]
    if call is None or call.operation != "batch_norm" or call["training"]:
        raise Unfit  # in training it needs statistics of the whole map before ReLU
    return [source(call, "conv2d"), call]


def arguments_of(chain: list[Call]) -> dict[str, Any]:
    """What `convolution` gives as arguments: conv2d's, and as ``batch_norm`` what `fold` takes of it, or None."""
    convolution_arguments = {name: chain[0][name] for name in ("input", "weight", "bias", *NUMBERS)}
    return convolution_arguments | {"batch_norm": _normalisation(chain)}


def _normalisation(chain: list[Call]) -> dict[str, Any] | None:
    norm = {name: chain[1][name] for name in _STATISTICS} if len(chain) > 1 else None
    if norm is not None and norm["running_mean"] is None:
        raise Unfit("batch_norm without running statistics")
    return norm


def why_not_pool(pool: Call) -> str | None:
    """Why no operator serves a max_pool2d, whatever is before it, or None."""
    if has_nodes([pool[name] for name in ("kernel_size", "stride", "padding")]):
        return "sizes of the window are computed while the model runs"
    if _pair(pool["dilation"]) != (1, 1):
        return "max_pool2d with dilation"
    height, width = _pair(pool["kernel_size"])
    return f"a pool window of more than {MAX_WINDOW} positions" if height * width > MAX_WINDOW else None


def _demand_pool(pool: Call, conv: Call) -> None:
    reason = why_not_pool(pool)
    if reason is not None:
        raise Unfit(reason)
    demand(not has_nodes([conv[name] for name in NUMBERS]), "sizes of the kernel are computed while the model runs")
    if pool["return_indices"]:
        convolved = tensor_of(conv.node)
        demand(convolved is not None, "return_indices: the dtype isn't known before the model runs")
        wide = convolved is not None and convolved.dtype in (torch.float32, torch.float64)
        demand(wide, "return_indices: in half types, values that round to one number have other positions")


def _pair(value: Any) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    return (pair[0], pair[-1])


def _make(
    chain: list[Call], second: Call, last: Call, outputs: dict[fx.Node, int | None], with_indices: bool,
    with_skip: bool, not_kept: list[fx.Node],
) -> Match:  # fmt: skip
    pool = last if last.operation == "max_pool2d" else second
    arguments = arguments_of(chain) | {
        "pool_size": pool["kernel_size"],
        "pool_stride": pool["stride"] or None,  # torch takes an empty list for None
        "pool_padding": pool["padding"],
        "ceil_mode": bool(pool["ceil_mode"]),
        "return_indices": with_indices,
        "return_skip": with_skip,
    }
    nodes = [call.node for call in (*chain, second, last)]
    return Match(nodes, outputs, conv_batch_norm_relu_pool2d, arguments, not_kept)


CONV_RELU_POOL = Pattern(
    "conv2d + [batch_norm] + relu + max_pool2d", "max_pool2d", "conv_relu_pool2d", _match_relu_pool
)
CONV_POOL_RELU = Pattern("conv2d + [batch_norm] + max_pool2d + relu", "relu", "conv_relu_pool2d", _match_pool_relu)
