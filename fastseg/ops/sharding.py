"""How the operators' tensors may lie on a mesh of devices, for torch.distributed.tensor: whole, or by images.

The mean of a loss over a batch isn't the mean of its shards' means, so it takes whole tensors, as the overlap does
whose loss is a mean.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

# Placements of a tensor by its dimension of images, or as terms of a sum: for each operator those of its results, and
# those of its tensors. "whole" is a copy on every device.
WHOLE = "whole"
SUM = "sum"
Placed = int | str
BY_IMAGES: dict[str, tuple[tuple[Placed, ...], tuple[Placed, ...]]] = {
    "conv2d": ((0,), (0, WHOLE, WHOLE, WHOLE)),
    "conv2d_packed": ((0,), (0, WHOLE, WHOLE, WHOLE)),
    "conv2d_backward": ((0, SUM, SUM), (0, 0, WHOLE)),
    "conv_relu_pool2d": ((0, 0, 0), (0, WHOLE, WHOLE, WHOLE)),
    "conv_relu_pool2d_backward": ((0, SUM, SUM), (0, 0, 0, WHOLE, 0, 0)),
    "instance_norm": ((0, 1), (0, WHOLE, WHOLE)),
    "instance_norm_backward": ((0, SUM, SUM), (0, 0, 1, WHOLE, WHOLE)),
    "relu_pool2d": ((0, 0, 0), (0,)),
    "relu_pool2d_backward": ((0,), (0, 0, 0, 0)),
    "upsample_argmax": ((0, 0), (0,)),
    "upsample_confusion_matrix": ((SUM,), (0, 0)),
    "upsample_mask_argmax": ((0,), (0, 0)),
    "upsample_threshold": ((0, 0, 0), (0,)),
    "upsample_sigmoid_sums": ((1,), (0, 0)),
    "upsample_sigmoid_sums_backward": ((0,), (1, 0, 0)),
}
# The same of losses, whose reduction tells how the loss (SUM here) lies.
LOSSES_BY_IMAGES: dict[str, tuple[tuple[Placed, ...], tuple[Placed, ...]]] = {
    "cross_entropy": ((SUM, 1, SUM), (0, 0, WHOLE)),
    "cross_entropy_backward": ((0,), (WHOLE, 0, 0, WHOLE, 1, WHOLE)),
    "upsample_cross_entropy": ((SUM, 1, SUM, 1), (0, 0, WHOLE)),
    "upsample_cross_entropy_backward": ((0,), (WHOLE, 1, 0, 0, WHOLE, 1, WHOLE)),
    "upsample_cross_entropy_with_gradient": ((SUM, SUM, 0), (0, 0, WHOLE)),
    "upsample_cross_entropy_with_gradient_backward": ((0,), (WHOLE, 0, 0, WHOLE, WHOLE, 0)),
}


@functools.cache
def register() -> None:
    """Tells torch.distributed.tensor, whose import takes half a second; so not before somebody else has imported it."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
    from torch.distributed.tensor._op_schema import RuntimeSchemaInfo
    from torch.distributed.tensor.experimental import register_sharding

    propagator = DTensor._op_dispatcher.sharding_propagator

    def placement(placed: Placed) -> Any:
        return Shard(placed) if isinstance(placed, int) else Partial() if placed == SUM else Replicate()

    def strategies(sharded: bool, results: tuple[Placed, ...], tensors: tuple[Placed, ...], *args: Any) -> list[Any]:
        # None for what isn't a tensor.
        given = [None if arg is None else at for arg, at in zip(args, tensors, strict=False)]
        rest = [None] * (len(args) - len(tensors))
        whole: list[Placed | None] = [None if at is None else WHOLE for at in given]
        ways: list[tuple[Sequence[Placed], list[Placed | None]]] = [([WHOLE] * len(results), whole)]
        if sharded:
            ways.append((results, given))
        return [
            ([placement(at) for at in outputs], [None if at is None else placement(at) for at in inputs] + rest)
            for outputs, inputs in ways
        ]

    def of_loss(results: tuple[Placed, ...], tensors: tuple[Placed, ...], *args: Any) -> list[Any]:
        reduction = next(arg for arg in args if isinstance(arg, str))
        if reduction == "none":
            forward = results[0] == SUM
            results = (0, *results[1:]) if forward else results
            tensors = tensors if forward else (0, *tensors[1:])
        return strategies(reduction != "mean", results, tensors, *args)

    for table, strategy in (
        (BY_IMAGES, functools.partial(strategies, True)), (LOSSES_BY_IMAGES, of_loss)
    ):  # fmt: skip
        for operator, (results, tensors) in table.items():
            overload = getattr(torch.ops.fastseg, operator).default
            register_sharding(overload)(functools.partial(strategy, results, tensors))
            # DTensor remembers a call's shapes by what this names: register_sharding leaves lists of numbers out.
            propagator.op_to_schema_info[overload] = RuntimeSchemaInfo(len(tensors), needs_pytree=True)
