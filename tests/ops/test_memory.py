"""What the operators allocate and keep: nothing of the upsampled logits' size, no copy in float32, a byte a window."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastseg import _native, functional
from fastseg.testing import make, make_labels
from tests.ops.operators import CALLS, kernels_for_small_calls
from tests.ops.upsample_cases import MODES, VOLUME_MODES, peak_growth, slow_under_the_interpreter

pytestmark = kernels_for_small_calls

of_cpp_kernels = pytest.mark.skipif(
    _native.INTERPRETED or torch.get_default_device().type != "cpu", reason="an algorithm of the C++ kernels alone"
)

CLASSES, SIZE = 64, (32, 32)
STATISTICS = 2 * 4 * SIZE[0] * SIZE[1]  # two float32 for each pixel

# Of each loss, the bytes that it may allocate forward and backward beside its input's gradient: statistics, a gradient
# in float32 that forward makes, the losses and what comes in for them, 24 numbers for each pixel of the focal losses, a
# few for each class of Dice's. A tensor of the upsampled logits' size has 64 numbers for each pixel.
ALLOWED: dict[str, tuple[str, dict[str, Any], int]] = {
    "cross_entropy": ("cross_entropy", {}, STATISTICS),
    "cross_entropy_dice": ("cross_entropy_dice", {}, STATISTICS + 32 * 3 * 4 * CLASSES),
    "focal_loss": ("focal_loss", {}, 12 * STATISTICS),
    "upsample_cross_entropy": ("upsample_cross_entropy", {}, max(STATISTICS, 2 * 4 * CLASSES * 8 * 8)),
    "upsample_cross_entropy-nearest": (
        "upsample_cross_entropy", {"mode": "nearest"}, max(STATISTICS, 2 * 4 * CLASSES * 8 * 8)
    ),
    "upsample_cross_entropy-none": ("upsample_cross_entropy", {"reduction": "none"}, 3 * STATISTICS),
    "upsample_cross_entropy_dice": ("upsample_cross_entropy_dice", {}, STATISTICS + 32 * 3 * 4 * CLASSES),
    "class_sums": ("class_sums", {}, STATISTICS + 32 * 3 * 4 * CLASSES),
    "class_sums-sigmoid": ("class_sums", {"activation": "sigmoid"}, 32 * 3 * 4 * CLASSES),
    "upsample_class_sums": ("upsample_class_sums", {}, STATISTICS + 32 * 3 * 4 * CLASSES),
    "upsample_class_sums-sigmoid": ("upsample_class_sums", {"activation": "sigmoid"}, 32 * 3 * 4 * CLASSES),
    "upsample_focal_loss": ("upsample_focal_loss", {}, 12 * STATISTICS),
}  # fmt: skip


@pytest.mark.parametrize("autocast", [False, True], ids=["no-autocast", "autocast"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("operator", "options", "allowed"), ALLOWED.values(), ids=ALLOWED)
def test_tensors_that_a_loss_allocates(
    operator: str, options: dict[str, Any], allowed: int, dtype: torch.dtype, autocast: bool
) -> None:
    if torch.get_default_device().type != "cpu":
        pytest.skip("the profiler counts a CPU's memory")
    size = (8, 8) if "upsample" in operator else SIZE
    input, target = make((1, CLASSES, *size), dtype, requires_grad=True), make_labels((1, *SIZE), CLASSES)
    with torch.profiler.profile(profile_memory=True) as profile, torch.autocast("cpu", enabled=autocast):
        getattr(functional, operator)(input, target, **options).sum().backward()
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in profile.events())
    assert allocated < input.nbytes + allowed + 4096  # and numbers


def predict(input: Tensor, target: Tensor, **mode: Any) -> object:
    return functional.upsample_argmax(input, tuple(target.shape[1:]), return_confidence=True, **mode)


def count(input: Tensor, target: Tensor, **mode: Any) -> object:
    return functional.upsample_confusion_matrix(input, target, **mode)


def train(input: Tensor, target: Tensor, **mode: Any) -> object:
    return torch.autograd.grad(functional.upsample_cross_entropy(input, target, **mode), input)


def threshold(input: Tensor, target: Tensor, **mode: Any) -> object:
    return functional.upsample_threshold(input, tuple(target.shape[1:]), return_scores=True, **mode)


def add_masks(input: Tensor, target: Tensor, **mode: Any) -> object:
    probabilities = input.new_ones((*input.shape[:2], CLASSES))
    return functional.upsample_mask_argmax(input, probabilities, tuple(target.shape[1:]), **mode)


# Bytes that remain for each pixel: labels and confidences, nothing, two statistics, masks, labels.
PEAKS = {
    "argmax": (predict, 5), "confusion_matrix": (count, 0), "cross_entropy": (train, 8), "threshold": (threshold, 64),
    "mask_argmax": (add_masks, 1),
}  # fmt: skip


@slow_under_the_interpreter
@pytest.mark.parametrize(("call", "bytes_of_a_pixel"), PEAKS.values(), ids=PEAKS)
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_peak_memory_of_upsampling(
    layout: str, mode: dict[str, Any], call: Callable[..., object], bytes_of_a_pixel: int
) -> None:
    input = make((2, CLASSES, 32, 32), layout=layout, scale=3.0, requires_grad=True)
    target = make_labels((2, 512, 512), CLASSES, torch.uint8)
    full = target.numel() * CLASSES * input.element_size()
    call(input, target, **mode)  # code and scratch memory that stay
    grown = peak_growth(lambda: call(input, target, **mode))
    assert grown < input.nbytes + bytes_of_a_pixel * target.numel() + full / 20  # and the threads' tiles


@slow_under_the_interpreter
@pytest.mark.parametrize(
    ("call", "bytes_of_a_pixel"), [PEAKS["argmax"], PEAKS["confusion_matrix"], PEAKS["cross_entropy"]],
    ids=["argmax", "confusion_matrix", "cross_entropy"],
)  # fmt: skip
@pytest.mark.parametrize("mode", VOLUME_MODES.values(), ids=VOLUME_MODES)
def test_peak_memory_of_upsampling_volumes(
    mode: dict[str, Any], call: Callable[..., object], bytes_of_a_pixel: int
) -> None:
    input = make((1, CLASSES, 16, 16, 16), scale=3.0, requires_grad=True)
    target = make_labels((1, 64, 64, 64), CLASSES, torch.uint8)
    full = target.numel() * CLASSES * input.element_size()
    call(input, target, **mode)
    grown = peak_growth(lambda: call(input, target, **mode))
    # Beside the gradient, in the worst case, as much for the rows that bands share. On a GPU a slab, which is all of
    # such a volume: its planes before they are upsampled, blended of two, and their gradient.
    slab = 0 if input.is_cpu else 4 * input.nbytes * target.shape[1] // input.shape[2]
    assert grown < 2 * input.nbytes + slab + bytes_of_a_pixel * target.numel() + full / 20


@of_cpp_kernels
@pytest.mark.parametrize(
    ("channels", "side", "allowed"), [(16, 512, {"maps": 2, "weights": 0}), (512, 16, {"maps": 0, "weights": 3})]
)
def test_peak_memory_of_a_layer_in_training(channels: int, side: int, allowed: dict[str, int]) -> None:
    """The gradient before ReLU is in memory nowhere, transformed weights and their gradient's sums in parts."""
    input = make((1, channels, side, side), requires_grad=True)
    weight = make((channels, channels, 3, 3), seed=1, scale=0.01, requires_grad=True)

    def train() -> object:
        output = functional.conv_relu_pool2d(input, weight, padding=1, pool_size=1)
        return torch.autograd.grad(output.sum(), (input, weight))

    train()
    tiles = 2**23  # the threads'
    assert peak_growth(train) < allowed["maps"] * input.nbytes + allowed["weights"] * weight.nbytes + tiles


@of_cpp_kernels
def test_peak_memory_of_a_deep_layer_on_two_threads(threads: Callable[[int], None]) -> None:
    """What a pass frees serves the next one, although each thread's scratch memory lies in between."""
    threads(2)
    input = make((1, 2048, 16, 16), requires_grad=True)
    weight = make((512, 2048, 3, 3), seed=1, scale=0.01, requires_grad=True)
    functional.conv2d(input, weight, padding=1)
    assert peak_growth(lambda: functional.conv2d(input, weight, padding=1)) < weight.nbytes


def kept_for_backward(call: Callable[[], object]) -> dict[int, int]:
    """Bytes by address."""
    kept: dict[int, int] = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.update({tensor.data_ptr(): tensor.nbytes}) or tensor, lambda tensor: tensor
    ):
        call()
    return kept


@of_cpp_kernels
def test_a_layer_without_a_pool_keeps_its_output_for_backward() -> None:
    """As plain PyTorch does: the next layer keeps it anyway."""
    input, weight = make((1, 8, 15, 15), requires_grad=True), make((4, 8, 3, 3), seed=1, requires_grad=True)
    outputs: list[Tensor] = []
    kept = kept_for_backward(lambda: outputs.append(functional.conv_relu_pool2d(input, weight, pool_size=1)))
    for tensor in (input, weight, *outputs):
        kept.pop(tensor.data_ptr())
    assert sum(kept.values()) == 0


@pytest.mark.parametrize(("name", "bytes_of_a_value"), [("conv2d", 0), ("conv_relu_pool2d", 1), ("relu_pool2d", 1)])
def test_what_is_kept_for_backward(name: str, bytes_of_a_value: int) -> None:
    """Arguments, and the position of each window's maximum."""
    tensors = CALLS[name].tensors()
    outputs: list[Tensor] = []
    kept = kept_for_backward(lambda: outputs.extend(CALLS[name].outputs(*tensors)))
    for tensor in tensors:
        kept.pop(tensor.data_ptr(), None)
    assert sum(kept.values()) == bytes_of_a_value * outputs[0].numel()
