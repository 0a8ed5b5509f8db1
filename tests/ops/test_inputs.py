"""What other code feeds: subclasses of Tensor, numbers and labels of every kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastseg
from fastseg import functional, reference

# ---- subclasses of Tensor ----


class Tagged(Tensor):
    """As monai.data.MetaTensor: results keep the class and an attribute, and new_empty takes a tuple alone."""

    tag = "none"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})
        tags = [arg.tag for arg in args if isinstance(arg, Tagged)]
        for part in result if isinstance(result, tuple) else (result,):
            if isinstance(part, Tagged) and tags:
                part.tag = tags[0]
        return result

    def new_empty(self, size: Any, dtype: Any = None, device: Any = None, requires_grad: bool = False) -> Any:
        if not isinstance(size, tuple | list):
            raise TypeError("new_empty(): argument 'size' must be tuple of ints, not int")
        plain = self.as_subclass(Tensor)
        return plain.new_empty(size, dtype=dtype, device=device, requires_grad=requires_grad).as_subclass(Tagged)


def tagged(tensor: Tensor) -> Tensor:
    """The tensor as one of the subclass."""
    result = tensor.as_subclass(Tagged)
    result.tag = "x"  # type: ignore[attr-defined]
    return result


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "conv2d": lambda: fastseg.Conv2d(8, 8, 3, padding=1),
    "conv_relu_pool2d": lambda: fastseg.ConvReLUPool2d(8, 4, 3, padding=1),
    "library": lambda: fastseg.ConvReLUPool2d(8, 4, 5, padding=2, pool_size=3, pool_stride=2),
    "skip": lambda: fastseg.ConvReLUPool2d(8, 4, 3, padding=1, return_skip=True, return_indices=True),
    "relu_pool2d": lambda: fastseg.ReLUPool2d(2),
    "relu_pool2d-skip": lambda: fastseg.ReLUPool2d(2, return_skip=True),
    "upsample_argmax": lambda: fastseg.UpsampleArgmax(scale_factor=2, return_confidence=True),
    "upsample_threshold": lambda: fastseg.UpsampleThreshold(scale_factor=2, return_scores=True),
}
LOSSES: dict[str, Callable[[], nn.Module]] = {
    "cross_entropy": fastseg.CrossEntropyLoss,
    "cross_entropy_dice": fastseg.CrossEntropyDiceLoss,
    "focal_loss": fastseg.FocalLoss,
    "upsample_cross_entropy": fastseg.UpsampleCrossEntropyLoss,
    "upsample_cross_entropy-none": lambda: fastseg.UpsampleCrossEntropyLoss(reduction="none"),
    "upsample_cross_entropy_dice": fastseg.UpsampleCrossEntropyDiceLoss,
    "upsample_focal_loss": fastseg.UpsampleFocalLoss,
}


def results_of(layer: nn.Module, *inputs: Tensor) -> list[Tensor]:
    """The layer's results, and the gradients of its first input and of its parameters where there are any."""
    layer.zero_grad()
    leaf = inputs[0].detach().requires_grad_()
    results = layer(leaf, *inputs[1:])
    results = list(results) if isinstance(results, tuple) else [results]
    terms = [result.square().sum() for result in results if result.requires_grad]
    if terms:
        torch.stack(terms).sum().backward()
        results += [leaf.grad, *(parameter.grad for parameter in layer.parameters())]
    return results


@pytest.mark.parametrize("name", LAYERS)
def test_layers_take_subclasses_of_tensor(name: str) -> None:
    layer = LAYERS[name]()
    input = torch.randn(1, 8, 96, 96)  # enough for the kernels
    want, got = results_of(layer, input), results_of(layer, tagged(input))
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours.as_subclass(Tensor), theirs)
    with torch.no_grad():
        result = layer(tagged(input))
    assert all(part.tag == "x" for part in (result if isinstance(result, tuple) else (result,)))


@pytest.mark.parametrize("name", LOSSES)
def test_losses_take_subclasses_of_tensor(name: str) -> None:
    size = (40, 40) if "upsample" in name else (80, 80)
    input, target = torch.randn(1, 6, *size), torch.randint(0, 6, (1, 80, 80))
    loss = LOSSES[name]()
    want, got = results_of(loss, input, target), results_of(loss, tagged(input), tagged(target))
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours.as_subclass(Tensor), theirs)
    torch.testing.assert_close(loss(input, tagged(target)).as_subclass(Tensor), want[0])


def test_confusion_matrix_takes_subclasses_of_tensor() -> None:
    input, target = torch.randn(1, 6, 40, 40), torch.randint(0, 6, (1, 80, 80))
    got = functional.upsample_confusion_matrix(tagged(input), tagged(target))
    assert torch.equal(got.as_subclass(Tensor), reference.upsample_confusion_matrix(input, target))


# ---- numbers ----

INTEGERS = {
    "numpy": np.int64(2),
    "numpy-uint8": np.uint8(2),
    "numpy-in-a-tuple": (np.int64(2), 2),
    "list": [2, np.int32(2)],
    "tensor": torch.tensor(2),
    "one-in-a-tuple": (2,),
}
INPUT, WEIGHT = torch.randn(1, 4, 20, 20), torch.randn(4, 2, 3, 3)


@pytest.mark.parametrize("two", INTEGERS.values(), ids=INTEGERS)
def test_integers_of_every_kind(two: Any) -> None:
    want = functional.conv_relu_pool2d(INPUT, WEIGHT, None, 2, 2, 2, 2, pool_size=4, pool_stride=2, pool_padding=2)
    got = functional.conv_relu_pool2d(
        INPUT, WEIGHT, None, two, two, two, np.int64(2), pool_size=(np.int64(4), 4), pool_stride=two, pool_padding=two
    )
    assert torch.equal(got, want)
    assert torch.equal(fastseg.ReLUPool2d(two, two)(INPUT), fastseg.ReLUPool2d(2)(INPUT))
    layer = fastseg.ConvReLUPool2d(4, 4, 3, pool_size=two)
    torch.testing.assert_close(layer(INPUT), layer.to_torch()(INPUT))


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        ({"size": np.int64(9)}, {"size": 9}),
        ({"size": [np.int64(9), torch.tensor(8)]}, {"size": (9, 8)}),
        ({"scale_factor": np.float32(1.5)}, {"scale_factor": 1.5}),
        ({"scale_factor": [np.int64(2), 1.5]}, {"scale_factor": (2, 1.5)}),
    ],
)
def test_sizes_of_every_kind(given: dict[str, Any], plain: dict[str, Any]) -> None:
    logits = torch.randn(1, 3, 5, 6)
    assert torch.equal(functional.upsample_argmax(logits, **given), functional.upsample_argmax(logits, **plain))


def test_numpy_ignore_index() -> None:
    logits, labels = torch.randn(1, 3, 5, 6), torch.randint(0, 3, (1, 9, 9))
    for operator in ("upsample_cross_entropy", "upsample_cross_entropy_dice", "upsample_focal_loss"):
        function = getattr(functional, operator)
        assert torch.equal(function(logits, labels, ignore_index=np.int64(1)), function(logits, labels, ignore_index=1))
    got = functional.upsample_confusion_matrix(logits, labels, np.int64(1))
    assert torch.equal(got, functional.upsample_confusion_matrix(logits, labels, 1))


NO_INTEGERS = {
    "float": 2.0,
    "float-in-a-tuple": (2, 2.0),
    "numpy-float": np.float64(2),
    "bool": True,
    "none": None,
    "word": "ab",
    "three": (2, 2, 2),
    "nothing": (),
    "nested": ((2, 2), 2),
}
PAIRS = ("stride", "padding", "dilation", "pool_size", "pool_stride", "pool_padding")


@pytest.mark.parametrize("number", NO_INTEGERS.values(), ids=NO_INTEGERS)
@pytest.mark.parametrize("argument", PAIRS)
def test_what_is_no_integer_is_refused_whatever_was_called_before(argument: str, number: Any) -> None:
    options = {"pool_size": 4, "groups": 2}
    for valid in (2, (2, 2), 1):
        functional.conv_relu_pool2d(INPUT, WEIGHT, **options | {argument: valid})
    if argument == "pool_stride" and number is None:
        return  # means pool_size
    with pytest.raises(ValueError, match=f"{argument}: expected"):
        functional.conv_relu_pool2d(INPUT, WEIGHT, **options | {argument: number})
    if "pool" in argument:
        functional.relu_pool2d(INPUT, **{"pool_size": 4, argument: 2})
        with pytest.raises(ValueError, match=f"{argument}: expected"):
            functional.relu_pool2d(INPUT, **{"pool_size": 4, argument: number})


@pytest.mark.parametrize("groups", [2.0, None, "2", True, (2,), 0])
def test_groups_that_are_no_integer(groups: Any) -> None:
    functional.conv_relu_pool2d(INPUT, WEIGHT, groups=2)
    with pytest.raises(ValueError, match="groups: expected an integer"):
        functional.conv_relu_pool2d(INPUT, WEIGHT, groups=groups)


def test_conv2d_refuses_floats_as_torch_does() -> None:
    input, weight = torch.randn(1, 32, 64, 64), torch.randn(32, 32, 3, 3)  # enough for Winograd's algorithm
    functional.conv2d(input, weight, stride=1, padding=1, groups=1)
    for name in ("stride", "padding", "dilation", "groups"):
        with pytest.raises((TypeError, ValueError), match=name):
            functional.conv2d(input, weight, **{"padding": 1, name: 1.0})


# ---- labels ----

LABEL_DTYPES = (torch.int8, torch.uint16, torch.uint32, torch.uint64)
OF_LABELS = (
    "cross_entropy",
    "cross_entropy_dice",
    "focal_loss",
    "upsample_cross_entropy",
    "upsample_cross_entropy_dice",
    "upsample_focal_loss",
    "upsample_confusion_matrix",
)


def logits_for(operator: str, size: int) -> Tensor:
    """Logits of the labels' size, or of half of it for what upsamples."""
    side = size // 2 if "upsample" in operator else size
    return torch.randn(2, 5, side, side, dtype=torch.float64)


@pytest.mark.parametrize("dtype", LABEL_DTYPES, ids=str)
@pytest.mark.parametrize("operator", OF_LABELS)
def test_labels_of_every_integer_dtype(operator: str, dtype: torch.dtype) -> None:
    input, labels = logits_for(operator, 12), torch.randint(0, 5, (2, 12, 12))
    ignored = -1 if dtype == torch.int8 else torch.iinfo(dtype).max if dtype != torch.uint64 else 2**63 - 1
    labels[0, :3] = ignored
    function = getattr(functional, operator)
    leaves = [input.clone().requires_grad_() for _ in range(2)]
    want, got = (function(x, y, ignore_index=ignored) for x, y in zip(leaves, (labels, labels.to(dtype)), strict=True))
    assert torch.equal(got, want)
    if want.requires_grad:
        want.backward(), got.backward()
        assert torch.equal(leaves[1].grad, leaves[0].grad)


@pytest.mark.parametrize("operator", OF_LABELS)
@pytest.mark.parametrize(
    ("dtype", "label", "ignore_index"),
    [
        (torch.int8, -1, 255),  # uint8's 255
        (torch.uint16, 2**16 - 100, -100),
        (torch.uint32, 2**32 - 100, -100),
        (torch.uint64, 2**64 - 100, -100),
        (torch.uint64, 2**63, -(2**63)),
        (torch.uint64, 2**63, 2**63 - 1),
    ],
)
def test_no_label_wraps_to_the_ignored_one(operator: str, dtype: torch.dtype, label: int, ignore_index: int) -> None:
    labels = torch.zeros(2, 12, 12, dtype=dtype)
    labels[1, 2, 3] = torch.tensor(label, dtype=dtype)
    with pytest.raises(IndexError, match="target: expected classes"):
        getattr(functional, operator)(logits_for(operator, 12), labels, ignore_index=ignore_index)


@pytest.mark.parametrize("operator", OF_LABELS)
@pytest.mark.parametrize("size", [12, 200])  # small logits of labels go to torch's own operator first
def test_a_channel_of_labels_is_explained(operator: str, size: int) -> None:
    labels = torch.zeros(2, 1, size, size, dtype=torch.long)
    input = logits_for(operator, size).float()
    with pytest.raises(ValueError, match=r"target: .*squeeze\(1\)"):
        getattr(functional, operator)(input, labels)
    if "upsample" in operator:
        with pytest.raises(ValueError, match=r"target: .*squeeze\(1\)"):
            getattr(functional, operator)(torch.randn(2, 5, size, size), labels)


@pytest.mark.parametrize("dtype", LABEL_DTYPES, ids=str)
def test_labels_of_drop_in_losses_and_metrics(dtype: torch.dtype) -> None:
    input, labels = torch.randn(2, 5, 12, 12), torch.randint(0, 5, (2, 12, 12))
    loss = fastseg.losses.smp.DiceLoss("multiclass")
    assert torch.equal(loss(input, labels.to(dtype)), loss(input, labels))
    matrix = fastseg.metrics.confusion_matrix(labels.to(dtype), labels.to(dtype), 5, None)
    assert torch.equal(matrix, fastseg.metrics.confusion_matrix(labels, labels, 5, None))


def test_no_label_of_metrics_and_drop_in_losses_wraps() -> None:
    labels = torch.tensor([[1, 2**64 - 100], [2**63, 0]], dtype=torch.uint64)
    with pytest.raises(ValueError, match="label"):
        fastseg.metrics.confusion_matrix(torch.zeros(2, 2, dtype=torch.long), labels, 3, ignore_index=-100)
    with pytest.raises(IndexError, match="target: expected classes"):
        fastseg.losses.smp.DiceLoss("multiclass")(torch.randn(1, 3, 2, 2), labels[None])
