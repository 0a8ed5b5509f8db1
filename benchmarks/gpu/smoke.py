"""Each operator once, forward and backward, against the reference in float64."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu.stages import MARK
from fastseg import functional, reference
from fastseg._native import INTERPRETED
from fastseg.testing import assert_parity, make, make_labels, values_and_gradients

LAYOUTS = ("nchw", "channels_last")
HALF = torch.float16 if INTERPRETED else torch.bfloat16  # whose products the interpreter computes wrongly


class Call(NamedTuple):
    """A call of an operator: ``make(dtype, layout)`` gives its tensors."""

    operator: str
    make: Callable[[torch.dtype, str], list[Tensor | None]]
    options: dict[str, Any] = {}
    terms: int = 1


def _convolution(channels: int) -> Callable[[torch.dtype, str], list[Tensor | None]]:
    def tensors(dtype: torch.dtype, layout: str) -> list[Tensor | None]:
        scale = (9 * channels) ** -0.5
        return [
            make((2, channels, 16, 20), dtype, layout=layout, requires_grad=True),
            make((16, channels, 3, 3), dtype, seed=1, layout=layout, scale=scale, requires_grad=True),
            make((16,), dtype, seed=2, scale=0.1, requires_grad=True),
        ]

    return tensors


def _loss(size: tuple[int, int]) -> Callable[[torch.dtype, str], list[Tensor | None]]:
    def tensors(dtype: torch.dtype, layout: str) -> list[Tensor | None]:
        logits = make((2, 19, *size), dtype, layout=layout, scale=3.0, requires_grad=True)
        return [logits, make_labels((2, 16, 20), 19, ignore_index=255)]

    return tensors


def _logits(dtype: torch.dtype, layout: str) -> list[Tensor | None]:
    return [make((2, 19, 4, 5), dtype, layout=layout, scale=3.0)]


SAME, SMALL = (16, 20), (4, 5)
IGNORED = {"ignore_index": 255}
CALLS = {
    "conv_relu_pool2d, first layer": Call("conv_relu_pool2d", _convolution(3), {"padding": 1}, 9 * 3 + 2 * 16 * 20),
    "conv_relu_pool2d, 16 channels": Call("conv_relu_pool2d", _convolution(16), {"padding": 1}, 9 * 16 + 2 * 16 * 20),
    "conv_relu_pool2d, 64 channels": Call("conv_relu_pool2d", _convolution(64), {"padding": 1}, 9 * 64 + 2 * 16 * 20),
    "relu_pool2d": Call("relu_pool2d", lambda d, lay: [make((2, 16, 16, 20), d, layout=lay, requires_grad=True)]),
    "cross_entropy": Call("cross_entropy", _loss(SAME), IGNORED, 2 * 16 * 20),
    "cross_entropy_dice": Call("cross_entropy_dice", _loss(SAME), IGNORED, 2 * 16 * 20),
    "focal_loss": Call("focal_loss", _loss(SAME), IGNORED, 2 * 16 * 20),
    "upsample_cross_entropy": Call("upsample_cross_entropy", _loss(SMALL), IGNORED, 2 * 16 * 20),
    "upsample_cross_entropy_dice": Call("upsample_cross_entropy_dice", _loss(SMALL), IGNORED, 2 * 16 * 20),
    "upsample_focal_loss": Call("upsample_focal_loss", _loss(SMALL), IGNORED, 2 * 16 * 20),
    "upsample_argmax": Call("upsample_argmax", _logits, {"size": (16, 20)}),
    "upsample_confusion_matrix": Call(
        "upsample_confusion_matrix", lambda d, lay: [t.detach() for t in _loss(SMALL)(d, lay) if t is not None], IGNORED
    ),
}


def check(call: Call, dtype: torch.dtype, layout: str) -> None:
    """Raises AssertionError where an operator is farther from the truth than plain PyTorch may be."""
    tensors = call.make(dtype, layout)
    fused, plain = (getattr(module, call.operator) for module in (functional, reference))
    truth = values_and_gradients(plain, tensors, torch.float64, **call.options)
    theirs = values_and_gradients(plain, tensors, **call.options)
    mine = values_and_gradients(fused, tensors, **call.options)
    if not mine[0].is_floating_point():  # predictions: where plain PyTorch's rounding decides, either is right
        share = (mine[0] != truth[0]).double().mean().item()
        if share > 2 * (theirs[0] != truth[0]).double().mean().item() + 0.02:
            raise AssertionError(f"{share:.1%} of the results differ from the truth")
        return
    assert_parity(mine, theirs, truth, terms=call.terms)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=["cpu", "cuda"], required=True)
    torch.set_default_device(parser.parse_args().device)
    torch.backends.cudnn.allow_tf32 = False
    failed = []
    for name, call in CALLS.items():
        for dtype in (torch.float32, HALF):
            for layout in LAYOUTS:
                try:
                    check(call, dtype, layout)
                except Exception as error:  # whatever stops an operator is what this stage is to tell
                    failed.append(f"{name}, {dtype}, {layout}")
                    print(f"{failed[-1]}: {type(error).__name__}: {error}", flush=True)
    cases = 4 * len(CALLS)
    print(f"{MARK}{cases - len(failed)} of {cases} calls right{': ' + '; '.join(failed) if failed else ''}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
