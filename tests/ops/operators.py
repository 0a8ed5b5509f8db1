"""The operators as the tests see them: of each a few calls, at any size, in any dtype and layout.

What holds for every operator is tested once, over `CALLS`: values in test_smoke.py, memory, threads, strides and
derivatives in test_conformance.py, torch's machinery in test_framework.py and test_capture.py, errors in
test_refused.py. A new operator gets a call for each of its ways through the kernels, and a line in `REFUSED` for each
argument of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastseg
from fastseg import functional, losses, reference
from fastseg.testing import assert_parity, make, make_labels, values_and_gradients
from tests.ops import cross_entropy_cases, upsample_cases

Size = tuple[int, ...]

CLASSES = 5
PREDICTIONS = ("upsample_argmax", "upsample_confusion_matrix", "upsample_mask_argmax", "upsample_threshold")
IMAGES, SIZE = 2, (12, 14)  # where a test names no other
DEPTH = 3  # of a volume's logits, where a test names no other than height and width
WEIGHT = torch.tensor([0.5, 2.0, 1.0, 0.25, 3.0])


@dataclass(frozen=True)
class Call:
    """A call of an operator.

    Args:
        operator: The function's name, in `functional` and in `reference`.
        make: Makes its tensors, for a number of images, a size, a dtype and a layout.
        options: Its other arguments.
        data: How many of the tensors are data; what follows is a layer's parameters.
        layer: The layer that calls the function, made of `layer_arguments` and the options.
        library: Whether a library's convolution computes it, whose sums depend on the number of threads.
    """

    operator: str
    make: Callable[[int, Size, torch.dtype, str], list[Tensor]]
    options: dict[str, Any] = field(default_factory=dict)
    data: int = 1
    layer: type[nn.Module] | None = None
    layer_arguments: tuple[Any, ...] = ()
    library: bool = False

    def tensors(
        self, images: int = IMAGES, size: Size = SIZE, dtype: torch.dtype = torch.float32, layout: str = "nchw"
    ) -> list[Tensor]:
        """The call's tensors; whatever has a gradient requires it."""
        return self.make(images, size, dtype, layout)

    def fused(self, *tensors: Tensor) -> Any:
        """The call of fastseg's function."""
        return getattr(functional, self.operator)(*tensors, **self.options)

    def plain(self, *tensors: Tensor) -> Any:
        """The call of plain PyTorch's."""
        return getattr(reference, self.operator)(*tensors, **self.options)

    def outputs(self, *tensors: Tensor) -> list[Tensor]:
        """The results of `fused`, as a list."""
        results = self.fused(*tensors)
        return list(results) if isinstance(results, tuple) else [results]

    def make_layer(self) -> nn.Module:
        """The layer, with fixed parameters."""
        assert self.layer is not None
        torch.manual_seed(0)
        return self.layer(*self.layer_arguments, **self.options)

    @property
    def is_differentiable(self) -> bool:
        """Whether any result has a gradient."""
        return self.operator not in PREDICTIONS

    @property
    def is_loss(self) -> bool:
        """Whether the result is a loss."""
        return self.is_differentiable and self.data == 2

    def terms(self, tensors: list[Tensor]) -> int:
        """The longest sum behind a result, for `assert_parity`."""
        input = tensors[0]
        if self.data < len(tensors):  # a weight's gradient runs over all pixels, a value over the kernel's taps
            return max(input[:, 0].numel(), tensors[1][0].numel(), tensors[1][:, 0].numel())
        if self.operator == "upsample_threshold":  # a score's mask
            return input[:1, 0].numel()
        if self.data == 1:
            return 1
        if "upsample" in self.operator:
            mode = self.options.get("mode", "bilinear")
            return upsample_cases.terms_of(input, tuple(tensors[1].shape[2 - input.ndim :]), mode)
        return cross_entropy_cases.terms_of(input)


def assert_call_parity(call: Call, tensors: list[Tensor], view: Callable[[Tensor], Tensor] = lambda t: t) -> None:
    """Values and gradients are as near to the truth as plain PyTorch's; of integers, as few differ from it.

    ``view`` gives the call's first argument; the gradient is that of the tensor behind it.
    """

    def through_view(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda base, *others: function(view(base), *others)

    mine = values_and_gradients(through_view(call.fused), tensors)
    plain = values_and_gradients(through_view(call.plain), tensors)
    truth = values_and_gradients(through_view(call.plain), tensors, torch.float64)
    for results in zip(mine, plain, truth, strict=True):
        if results[0].is_floating_point():
            assert_parity(*results, terms=call.terms([view(tensors[0]), *tensors[1:]]))
        else:  # where rounding decides which of two is the largest
            wrong = [(result != results[2]).sum() for result in results[:2]]
            assert wrong[0] <= 2 * wrong[1]


Maker = Callable[[int, Size, torch.dtype, str], list[Tensor]]


def convolution(channels: int, outputs: int = 8, kernel: int = 3, groups: int = 1) -> Maker:
    taps = channels // groups * kernel**2

    def tensors(images: int, size: Size, dtype: torch.dtype, layout: str) -> list[Tensor]:
        shape = (outputs, channels // groups, kernel, kernel)
        return [
            make((images, channels, *size), dtype, layout=layout, requires_grad=True),
            make(shape, dtype, seed=1, layout=layout, scale=taps**-0.5, requires_grad=True),
            make((outputs,), dtype, seed=2, scale=0.1, requires_grad=True),
        ]

    return tensors


def feature_map(channels: int = 5, requires_grad: bool = True) -> Maker:
    return lambda images, size, dtype, layout: [
        make((images, channels, *size), dtype, layout=layout, requires_grad=requires_grad)
    ]


def logits_and_labels(ignore_index: int | None = -100, upsampled: bool = False, requires_grad: bool = True) -> Maker:
    def tensors(images: int, size: Size, dtype: torch.dtype, layout: str) -> list[Tensor]:
        of_labels = (*(2 * depth for depth in size[:-2]), 2 * size[-2] + 1, 3 * size[-1] - 1) if upsampled else size
        return [
            make((images, CLASSES, *size), dtype, layout=layout, scale=3.0, requires_grad=requires_grad),
            make_labels((images, *of_labels), CLASSES, ignore_index=ignore_index),
        ]

    return tensors


def logits_and_probabilities(images: int, size: Size, dtype: torch.dtype, layout: str) -> list[Tensor]:
    input = make((images, CLASSES, *size), dtype, layout=layout, scale=3.0, requires_grad=True)
    return [input, make((images, CLASSES, *size), torch.float64, seed=3).softmax(1).to(dtype)]


def masks_and_probabilities(images: int, size: Size, dtype: torch.dtype, layout: str) -> list[Tensor]:
    input = make((images, CLASSES, *size), dtype, layout=layout, scale=3.0)
    return [input, make((images, CLASSES, 12), torch.float64, seed=3).softmax(-1).to(dtype)]


def logits_and_masks(upsampled: bool = False, soft: bool = False) -> Maker:
    """Each class's own mask, of which a value of 3 is to be ignored, or soft shares in logits' dtype."""

    def tensors(images: int, size: Size, dtype: torch.dtype, layout: str) -> list[Tensor]:
        of_masks = (2 * size[0] + 1, 3 * size[1] - 1) if upsampled else size
        shape = (images, CLASSES, *of_masks)
        shares = make(shape, torch.float64, seed=3).sigmoid().to(dtype)
        masks = make_labels(shape, 2, torch.uint8, ignore_index=3)
        return [
            make((images, CLASSES, *size), dtype, layout=layout, scale=3.0, requires_grad=True),
            shares if soft else masks,
        ]

    return tensors


def of_volumes(make: Maker) -> Maker:
    return lambda images, size, dtype, layout: make(images, (DEPTH, *size)[-3:], dtype, layout)


def loss(operator: str, layer: type[nn.Module], volumes: bool = False, **options: Any) -> Call:
    """A loss, whose labels are a multiple of the logits' size where it upsamples."""
    made = logits_and_labels(options.get("ignore_index", -100), "upsample" in operator)
    made = of_volumes(made) if volumes else made
    return Call(operator, made, options, data=2, layer=layer)


def conv_relu_pool2d(make: Maker, *layer_arguments: int, library: bool = False, **options: Any) -> Call:
    return Call(
        "conv_relu_pool2d", make, options, layer=fastseg.ConvReLUPool2d, layer_arguments=layer_arguments,
        library=library,
    )  # fmt: skip


STEM = {"stride": 2, "padding": 3, "pool_size": 3, "pool_stride": 2, "pool_padding": 1}
OVERLAP = {"pool_size": 3, "pool_stride": 2, "pool_padding": 1}
NNUNET = {"batch_dice": True, "include_background": False}

# Each operator's ways through its kernels.
CALLS = {
    "conv2d": Call(
        "conv2d", convolution(12), {"padding": 1}, layer=fastseg.Conv2d, layer_arguments=(12, 8, 3)
    ),
    "conv_relu_pool2d": conv_relu_pool2d(convolution(3), 3, 8, 3, padding=1),
    "conv_relu_pool2d-stem": conv_relu_pool2d(convolution(3, kernel=7), 3, 8, 7, **STEM),
    "conv_relu_pool2d-skip": conv_relu_pool2d(
        convolution(12), 12, 8, 3, padding=1, return_indices=True, return_skip=True
    ),
    "conv_relu_pool2d-direct": conv_relu_pool2d(convolution(6), 6, 8, 3, **OVERLAP),
    "conv_relu_pool2d-library": conv_relu_pool2d(
        convolution(6, groups=2), 6, 8, 3, padding=1, groups=2, return_skip=True, library=True
    ),
    "relu_pool2d": Call("relu_pool2d", feature_map(), layer=fastseg.ReLUPool2d),
    "relu_pool2d-skip": Call(
        "relu_pool2d", feature_map(16), {**OVERLAP, "return_indices": True, "return_skip": True},
        layer=fastseg.ReLUPool2d,
    ),
    "cross_entropy": loss("cross_entropy", fastseg.CrossEntropyLoss),
    "cross_entropy-none": loss(
        "cross_entropy", fastseg.CrossEntropyLoss, reduction="none", weight=WEIGHT, ignore_index=1
    ),
    "cross_entropy-sum": loss(
        "cross_entropy", fastseg.CrossEntropyLoss, reduction="sum", label_smoothing=0.1, ignore_index=255
    ),
    "cross_entropy-probabilities": Call(
        "cross_entropy", logits_and_probabilities, {"weight": WEIGHT, "label_smoothing": 0.1}, data=2,
        layer=fastseg.CrossEntropyLoss,
    ),
    "upsample_cross_entropy": loss("upsample_cross_entropy", fastseg.UpsampleCrossEntropyLoss),
    "upsample_cross_entropy-none": loss(
        "upsample_cross_entropy", fastseg.UpsampleCrossEntropyLoss, reduction="none", weight=WEIGHT, ignore_index=1,
        align_corners=True,
    ),
    "upsample_cross_entropy-sum": loss(
        "upsample_cross_entropy", fastseg.UpsampleCrossEntropyLoss, reduction="sum", label_smoothing=0.1,
        weight=WEIGHT, mode="nearest",
    ),
    "upsample_cross_entropy-volume": loss(
        "upsample_cross_entropy", fastseg.UpsampleCrossEntropyLoss, volumes=True, mode="trilinear", weight=WEIGHT,
        ignore_index=1,
    ),
    "cross_entropy_dice": loss("cross_entropy_dice", fastseg.CrossEntropyDiceLoss, weight=WEIGHT),
    "upsample_cross_entropy_dice": loss("upsample_cross_entropy_dice", fastseg.UpsampleCrossEntropyDiceLoss),
    "upsample_cross_entropy_dice-batch": loss(
        "upsample_cross_entropy_dice", fastseg.UpsampleCrossEntropyDiceLoss, **NNUNET, ignore_index=1,
        label_smoothing=0.1, align_corners=True,
    ),
    "upsample_cross_entropy_dice-volume": loss(
        "upsample_cross_entropy_dice", fastseg.UpsampleCrossEntropyDiceLoss, volumes=True, mode="trilinear",
        ignore_index=1,
    ),
    "focal_loss": loss("focal_loss", fastseg.FocalLoss),
    "upsample_focal_loss": loss("upsample_focal_loss", fastseg.UpsampleFocalLoss),
    "upsample_focal_loss-none": loss(
        "upsample_focal_loss", fastseg.UpsampleFocalLoss, reduction="none", gamma=0.5, weight=WEIGHT, mode="nearest",
        ignore_index=1,
    ),
    "binary_cross_entropy": Call(
        "binary_cross_entropy", logits_and_masks(), {"weight": WEIGHT, "ignore_index": 3}, data=2,
        layer=losses.BinaryCrossEntropyLoss,
    ),
    "upsample_binary_cross_entropy": Call(
        "upsample_binary_cross_entropy", logits_and_masks(upsampled=True), {"pos_weight": WEIGHT, "ignore_index": 3},
        data=2, layer=losses.UpsampleBinaryCrossEntropyLoss,
    ),
    "upsample_binary_cross_entropy-sum": Call(
        "upsample_binary_cross_entropy", logits_and_masks(upsampled=True, soft=True),
        {"reduction": "sum", "align_corners": True}, data=2, layer=losses.UpsampleBinaryCrossEntropyLoss,
    ),
    "class_sums": Call("class_sums", logits_and_labels(255), {"ignore_index": 255}, data=2),
    "class_sums-sigmoid": Call(
        "class_sums", logits_and_labels(1), {"ignore_index": 1, "activation": "sigmoid"}, data=2
    ),
    "class_sums-shares": Call("class_sums", logits_and_masks(soft=True), {"activation": "sigmoid"}, data=2),
    "upsample_class_sums": Call("upsample_class_sums", logits_and_labels(None, upsampled=True), data=2),
    "upsample_class_sums-masks": Call(
        "upsample_class_sums", logits_and_masks(upsampled=True), {"ignore_index": 3, "activation": "sigmoid"}, data=2
    ),
    "upsample_class_sums-nearest": Call(
        "upsample_class_sums", logits_and_labels(255, upsampled=True),
        {"ignore_index": 255, "activation": "sigmoid", "mode": "nearest"}, data=2,
    ),
    "upsample_argmax": Call(
        "upsample_argmax", feature_map(requires_grad=False), {"scale_factor": 1.5, "return_confidence": True},
        layer=fastseg.UpsampleArgmax,
    ),
    "upsample_argmax-nearest": Call(
        "upsample_argmax", feature_map(requires_grad=False), {"size": (29, 31), "mode": "nearest"},
        layer=fastseg.UpsampleArgmax,
    ),
    "upsample_argmax-volume": Call(
        "upsample_argmax", of_volumes(feature_map(requires_grad=False)),
        {"scale_factor": 1.5, "mode": "trilinear", "return_confidence": True}, layer=fastseg.UpsampleArgmax,
    ),
    "upsample_confusion_matrix": Call(
        "upsample_confusion_matrix", logits_and_labels(255, upsampled=True, requires_grad=False),
        {"ignore_index": 255}, data=2,
    ),
    "upsample_confusion_matrix-volume": Call(
        "upsample_confusion_matrix", of_volumes(logits_and_labels(None, upsampled=True, requires_grad=False)),
        {"mode": "trilinear", "align_corners": True}, data=2,
    ),
    "upsample_threshold": Call(
        "upsample_threshold", feature_map(requires_grad=False), {"scale_factor": 1.5, "return_scores": True},
        layer=fastseg.UpsampleThreshold,
    ),
    "upsample_threshold-nearest": Call(
        "upsample_threshold", feature_map(requires_grad=False), {"size": (29, 31), "threshold": 0.7, "mode": "nearest"},
        layer=fastseg.UpsampleThreshold,
    ),
    "upsample_mask_argmax": Call(
        "upsample_mask_argmax", masks_and_probabilities, {"scale_factor": 1.5}, data=2,
        layer=fastseg.UpsampleMaskArgmax,
    ),
}  # fmt: skip

DIFFERENTIABLE = {name: call for name, call in CALLS.items() if call.is_differentiable}
WITH_LAYERS = {name: call for name, call in CALLS.items() if call.layer}
# For what takes a second a call: one of each operator, and where another call leads to other operators or results.
CAPTURED = {
    name: call
    for name, call in CALLS.items()
    if name == call.operator or name.partition("-")[2] in ("skip", "none", "batch", "masks")
}
OF_LABELS = sorted(
    {call.operator for call in CALLS.values() if call.data == 2}
    - {"binary_cross_entropy", "upsample_binary_cross_entropy", "upsample_mask_argmax"}
)


def parametrize(calls: dict[str, Call]) -> pytest.MarkDecorator:
    """Gives a test each of the calls as its argument ``call``."""
    return pytest.mark.parametrize("call", calls.values(), ids=calls)


each_call = parametrize(CALLS)
each_gradient = parametrize(DIFFERENTIABLE)

# Leads small calls, too, to the kernels: for `pytestmark` of what takes these calls.
kernels_for_small_calls = pytest.mark.usefixtures("kernels_for_small_logits", "kernels_for_small_maps")
