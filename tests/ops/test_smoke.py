"""Each operator once, forward and backward, against plain PyTorch in float64: what a GPU run begins with."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from fastseg import functional, reference
from fastseg._native import INTERPRETED
from fastseg.testing import assert_parity, make, make_labels, values_and_gradients

CLASSES, SIZE, SMALL_SIZE = 19, (16, 20), (4, 5)
PIXELS = 2 * SIZE[0] * SIZE[1]
HALF = torch.float16 if INTERPRETED else torch.bfloat16  # whose products Triton's interpreter computes wrongly

Maker = Callable[[torch.dtype, str], list[Tensor]]


class Call(NamedTuple):
    """An operator, its tensors for a dtype and a layout, its other arguments, and its longest sum."""

    operator: str
    make: Maker
    options: dict[str, Any]
    terms: int = 1


def convolution(channels: int) -> Maker:
    return lambda dtype, layout: [
        make((2, channels, *SIZE), dtype, layout=layout, requires_grad=True),
        make((16, channels, 3, 3), dtype, seed=1, layout=layout, scale=(9 * channels) ** -0.5, requires_grad=True),
        make((16,), dtype, seed=2, scale=0.1, requires_grad=True),
    ]


def loss(size: tuple[int, int]) -> Maker:
    return lambda dtype, layout: [
        make((2, CLASSES, *size), dtype, layout=layout, scale=3.0, requires_grad=True),
        make_labels((2, *SIZE), CLASSES, ignore_index=255),
    ]


def map_of(channels: int, size: tuple[int, int], requires_grad: bool) -> Maker:
    return lambda dtype, layout: [make((2, channels, *size), dtype, layout=layout, requires_grad=requires_grad)]


IGNORED = {"ignore_index": 255}
CALLS = {
    "conv_relu_pool2d-first-layer": Call("conv_relu_pool2d", convolution(3), {"padding": 1}, 9 * 3 + PIXELS),
    "conv_relu_pool2d-16-channels": Call("conv_relu_pool2d", convolution(16), {"padding": 1}, 9 * 16 + PIXELS),
    "conv_relu_pool2d-64-channels": Call("conv_relu_pool2d", convolution(64), {"padding": 1}, 9 * 64 + PIXELS),
    "relu_pool2d": Call("relu_pool2d", map_of(16, SIZE, True), {}),
    **{
        name: Call(name, loss(SMALL_SIZE if name.startswith("upsample") else SIZE), IGNORED, PIXELS)
        for name in (
            "cross_entropy", "cross_entropy_dice", "focal_loss", "upsample_cross_entropy",
            "upsample_cross_entropy_dice", "upsample_focal_loss",
        )
    },
    "upsample_argmax": Call("upsample_argmax", map_of(CLASSES, SMALL_SIZE, False), {"size": SIZE}),
    "upsample_confusion_matrix": Call(
        "upsample_confusion_matrix", lambda *of: [tensor.detach() for tensor in loss(SMALL_SIZE)(*of)], IGNORED
    ),
}  # fmt: skip


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_operator(call: Call, dtype: torch.dtype, layout: str) -> None:
    tensors = call.make(dtype, layout)
    fused, plain = (getattr(module, call.operator) for module in (functional, reference))
    truth = values_and_gradients(plain, tensors, torch.float64, **call.options)
    theirs = values_and_gradients(plain, tensors, **call.options)
    mine = values_and_gradients(fused, tensors, **call.options)
    if not mine[0].is_floating_point():  # where rounding to a half type decides which class is the largest
        wrong = [(results[0] != truth[0]).sum() for results in (mine, theirs)]
        assert wrong[0] <= 2 * wrong[1]
        return
    assert_parity(mine, theirs, truth, terms=call.terms)
