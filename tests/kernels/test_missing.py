"""What GPU tensors get where Triton isn't installed: plain PyTorch's results, and a line in the log."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import fastseg
from fastseg import _native, _triton
from fastseg.ops import (
    conv_relu_pool2d,
    cross_entropy,
    upsample_argmax,
    upsample_confusion_matrix,
    upsample_cross_entropy,
    upsample_mask_argmax,
    upsample_threshold,
)
from fastseg.ops.convolution.geometry import flatten, resolve
from fastseg.testing import make, make_labels

GEOMETRY = flatten(resolve((3, 3), 1, 1, 1, 1, 2, None, 0, False)[0])


@pytest.fixture(autouse=True)
def no_triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(_triton, "version", lambda: None)
    _triton._load.cache_clear()
    _native.log_fallback.cache_clear()
    yield
    _triton._load.cache_clear()


def conv(forward: Callable[..., tuple[Tensor, ...]], backward: Callable[..., tuple[Tensor, ...]]) -> list[Tensor]:
    input, weight, bias = make((2, 3, 10, 12)), make((8, 3, 3, 3), seed=1), make((8,), seed=2)
    output, positions, skip = forward(input, weight, bias, None, GEOMETRY, True, True, False)
    saved = (input, weight, positions, skip, GEOMETRY, [True, True, True])
    return [output, positions, skip, *backward(make(output.shape, seed=3), make(skip.shape, seed=4), *saved)]


def loss(forward: Callable[..., tuple[Tensor, ...]], backward: Callable[..., Tensor]) -> list[Tensor]:
    input, target, options = make((2, 5, 6, 7)), make_labels((2, 6, 7), 5), (-100, "mean", 0.1)
    value, statistics, total_weight = forward(input, target, None, *options)
    saved = (input, target, None, statistics, total_weight, *options)
    return [value, statistics, total_weight, backward(torch.ones(()), *saved)]


def upsampled_loss(forward: Callable[..., tuple[Tensor, ...]], backward: Callable[..., Tensor]) -> list[Tensor]:
    input, target = make((2, 5, 6, 7)), make_labels((2, 11, 9), 5)
    options = (-100, "mean", 0.1, "bilinear", False)
    value, statistics, total_weight, overlap = forward(input, target, None, *options, True, True)
    saved = (input, target, None, statistics, total_weight, *options)
    return [value, statistics, total_weight, overlap, backward(torch.ones(()), torch.ones_like(overlap), *saved)]


def prediction(forward: Callable[..., tuple[Tensor, ...]], backward: None) -> list[Tensor]:
    return list(forward(make((2, 5, 6, 7)), [11, 9], None, "bilinear", False, torch.uint8, True))


def counts(forward: Callable[..., Tensor], backward: None) -> list[Tensor]:
    return [forward(make((2, 5, 6, 7)), make_labels((2, 11, 9), 5), 3, "bilinear", False)]


def masks(forward: Callable[..., tuple[Tensor, ...]], backward: None) -> list[Tensor]:
    return list(forward(make((2, 5, 6, 7)), [11, 9], None, 0.5, "bilinear", False, True))


def added_masks(forward: Callable[..., Tensor], backward: None) -> list[Tensor]:
    probabilities = make((2, 5, 3), seed=1).softmax(2)
    return [forward(make((2, 5, 6, 7)), probabilities, [11, 9], None, "bilinear", False, torch.uint8)]


OPERATORS = {
    "conv_relu_pool2d": (conv, conv_relu_pool2d),
    "cross_entropy": (loss, cross_entropy),
    "upsample_cross_entropy": (upsampled_loss, upsample_cross_entropy),
    "upsample_argmax": (prediction, upsample_argmax),
    "upsample_confusion_matrix": (counts, upsample_confusion_matrix),
    "upsample_threshold": (masks, upsample_threshold),
    "upsample_mask_argmax": (added_masks, upsample_mask_argmax),
}


def test_info_tells_it() -> None:
    assert fastseg.info()["triton"] is None
    assert fastseg.info()["gpu"] == "plain PyTorch (no Triton)"


@pytest.mark.parametrize(("version", "used"), [("3.5.1", False), ("3.6.0", True), ("3.10.0+git1", True)])
def test_an_older_triton_is_not_used(version: str, used: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_triton, "version", lambda: version)
    expected = "Triton kernels" if used else "plain PyTorch (Triton 3.5.1 is older than 3.6)"
    assert fastseg.info()["gpu"] == expected


@pytest.mark.parametrize("name", OPERATORS)
def test_plain_pytorch_serves_and_the_log_says_why(name: str, caplog: pytest.LogCaptureFixture) -> None:
    run, module = OPERATORS[name]
    actual = run(module._forward_triton, getattr(module, "_backward_triton", None))
    expected = run(module.forward_plain, getattr(module, "backward_plain", None))
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    line = f"{name} runs as plain PyTorch: the Triton kernels can't be used (no Triton)"
    assert caplog.text.count(line) == 1
