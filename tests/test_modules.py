"""The drop-in layers: torch's constructors, state_dict and repr, conversion both ways."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastseg
from fastseg import functional, reference
from fastseg.testing import assert_parity, make, make_labels

CONVOLUTIONS = {
    "default": ((3, 8, 3), {}),
    "stem": ((3, 8, 7), {"stride": 2, "padding": 3, "bias": False}),
    "same-dilated": ((4, 8, 3), {"padding": "same", "dilation": 2, "groups": 2}),
    "reflect": ((3, 8, 3), {"padding": 1, "padding_mode": "reflect"}),
    "circular": ((3, 8, (3, 5)), {"padding": (1, 2), "padding_mode": "circular"}),
}
POOLS = {
    "2x2": ((2,), {}),
    "3x3-stride-2": ((3,), {"stride": 2, "padding": 1}),
    "ceil-indices": ((2,), {"ceil_mode": True, "return_indices": True}),
}


@pytest.mark.parametrize(("args", "options"), CONVOLUTIONS.values(), ids=CONVOLUTIONS)
@pytest.mark.parametrize(("pool_args", "pool_options"), POOLS.values(), ids=POOLS)
def test_from_torch_and_back(args: tuple, options: dict, pool_args: tuple, pool_options: dict) -> None:
    conv, pool = nn.Conv2d(*args, **options), nn.MaxPool2d(*pool_args, **pool_options)
    layer = fastseg.ConvReLUPool2d.from_torch(conv, pool)
    assert layer.weight is conv.weight
    assert layer.bias is conv.bias
    again = layer.to_torch()
    assert again[0].weight is conv.weight
    assert repr(again[2]) == repr(pool)

    input = make((2, args[0], 15, 18))

    def results(module: nn.Module) -> list[torch.Tensor]:
        output = module(input.to(next(module.parameters()).dtype))
        return [o.detach() for o in (output if isinstance(output, tuple) else (output,))]

    actual, plain = results(layer), results(nn.Sequential(conv, nn.ReLU(), pool))
    torch.testing.assert_close(results(again), plain, rtol=0, atol=0)
    truth = results(nn.Sequential(conv, nn.ReLU(), pool).double())
    assert_parity(actual, plain, truth, terms=conv.weight[0].numel())


def test_state_dict_is_that_of_conv2d() -> None:
    conv = nn.Conv2d(3, 8, 3)
    layer = fastseg.ConvReLUPool2d(3, 8, 3)
    layer.load_state_dict(conv.state_dict())
    conv.load_state_dict(layer.state_dict())
    torch.testing.assert_close(dict(layer.named_parameters()), dict(conv.named_parameters()), rtol=0, atol=0)


def test_same_initialisation_as_conv2d() -> None:
    torch.manual_seed(3)
    conv = nn.Conv2d(3, 8, 3)
    torch.manual_seed(3)
    layer = fastseg.ConvReLUPool2d(3, 8, 3)
    assert torch.equal(conv.weight, layer.weight)
    assert torch.equal(conv.bias, layer.bias)


def test_outputs_in_order() -> None:
    layer = fastseg.ConvReLUPool2d(3, 8, 3, return_indices=True, return_skip=True)
    output, indices, skip = layer(make((1, 3, 10, 10)))
    assert indices.dtype == torch.int64
    assert torch.equal(skip.flatten(2).gather(2, indices.flatten(2)), output.flatten(2))


def test_unsupported_is_refused() -> None:
    conv = nn.Conv2d(3, 8, 3)
    with pytest.raises(ValueError, match="dilation"):
        fastseg.ConvReLUPool2d.from_torch(conv, nn.MaxPool2d(2, dilation=2))
    with pytest.raises(ValueError, match="return_skip"):
        fastseg.ConvReLUPool2d(3, 8, 3, return_skip=True).to_torch()


def test_repr_names_what_differs() -> None:
    text = repr(fastseg.ConvReLUPool2d(3, 8, 3, pool_size=3, pool_stride=2, pool_padding=1, return_skip=True))
    for part in ("3, 8, kernel_size=(3, 3)", "pool_size=3", "pool_stride=2", "pool_padding=1", "return_skip=True"):
        assert part in text


def test_cross_entropy_loss_takes_torchs_arguments() -> None:
    options = {"weight": torch.rand(5), "ignore_index": 3, "reduction": "sum", "label_smoothing": 0.1}
    logits, target = make((2, 5, 6, 7)), torch.randint(5, (2, 6, 7))
    fused, plain = fastseg.CrossEntropyLoss(**options), nn.CrossEntropyLoss(**options)
    assert fused.state_dict().keys() == plain.state_dict().keys()
    truth = reference.cross_entropy(logits.double(), target, **options)
    assert_parity(fused(logits, target), plain(logits, target), truth, terms=target.numel())


# ---- losses and predictions ----

LOGITS, LABELS, WEIGHT = make((2, 5, 6, 7)), make_labels((2, 12, 9), 5, ignore_index=3), torch.rand(5)
GRID = {"mode": "bilinear", "align_corners": True}
DICE = {
    "ignore_index": 3, "label_smoothing": 0.1, "ce_weight": 0.5, "dice_weight": 2.0, "smooth": 1.0, "batch_dice": True,
    "include_background": False,
}  # fmt: skip
FOCAL = {"ignore_index": 3, "reduction": "sum", "gamma": 1.5}
CROSS_ENTROPY = {"ignore_index": 3, "reduction": "sum", "label_smoothing": 0.1}
# Layers, the functions that they call, and arguments of both, none of which is a default.
LOSSES: dict[str, tuple[type[nn.Module], Callable[..., Tensor], dict[str, Any]]] = {
    "CrossEntropyLoss": (fastseg.CrossEntropyLoss, functional.cross_entropy, CROSS_ENTROPY),
    "UpsampleCrossEntropyLoss": (
        fastseg.UpsampleCrossEntropyLoss, functional.upsample_cross_entropy, CROSS_ENTROPY | GRID
    ),
    "CrossEntropyDiceLoss": (fastseg.CrossEntropyDiceLoss, functional.cross_entropy_dice, DICE),
    "UpsampleCrossEntropyDiceLoss": (
        fastseg.UpsampleCrossEntropyDiceLoss, functional.upsample_cross_entropy_dice, DICE | GRID
    ),
    "FocalLoss": (fastseg.FocalLoss, functional.focal_loss, FOCAL),
    "UpsampleFocalLoss": (fastseg.UpsampleFocalLoss, functional.upsample_focal_loss, FOCAL | GRID),
}  # fmt: skip
LAYERS = [layer for layer, _, _ in LOSSES.values()]


def labels_of(layer: type[nn.Module]) -> Tensor:
    """Labels of the size that a layer expects for `LOGITS`."""
    return LABELS if "Upsample" in layer.__name__ else LABELS[:, :6, :7]


@pytest.mark.parametrize(("layer", "function", "options"), LOSSES.values(), ids=LOSSES)
def test_loss_passes_its_arguments_on(layer: type[nn.Module], function: Callable[..., Tensor], options: dict) -> None:
    expected = function(LOGITS, labels_of(layer), WEIGHT, **options)
    torch.testing.assert_close(layer(WEIGHT, **options)(LOGITS, labels_of(layer)), expected, rtol=0, atol=0)
    for name in options:  # each of them matters, but for the grid's mode, which is the default
        others = {key: value for key, value in options.items() if key != name}
        if name != "mode":
            assert layer(WEIGHT, **others)(LOGITS, labels_of(layer)).sum() != expected.sum()


@pytest.mark.parametrize("layer", LAYERS)
def test_loss_without_arguments_has_the_functions_defaults(layer: type[nn.Module]) -> None:
    _, function, _ = LOSSES[layer.__name__]
    target = labels_of(layer)
    torch.testing.assert_close(layer()(LOGITS, target), function(LOGITS, target), rtol=0, atol=0)


@pytest.mark.parametrize("layer", LAYERS)
def test_weight_is_a_buffer_as_torchs(layer: type[nn.Module]) -> None:
    plain, loss = nn.CrossEntropyLoss(WEIGHT), layer(torch.ones(5))
    loss.load_state_dict(plain.state_dict())
    plain.load_state_dict(loss.state_dict())
    torch.testing.assert_close(loss.weight, WEIGHT, rtol=0, atol=0)
    assert loss.double().weight.dtype == torch.float64
    assert layer().state_dict() == {}
    assert not list(loss.parameters())
    torch.testing.assert_close(copy.deepcopy(loss).weight, loss.weight, rtol=0, atol=0)


@pytest.mark.parametrize("layer", [fastseg.CrossEntropyLoss, fastseg.UpsampleCrossEntropyLoss])
def test_pixel_weight(layer: type[nn.Module]) -> None:
    target = labels_of(layer)
    pixel_weight = torch.rand(target.shape)
    _, function, options = LOSSES[layer.__name__]
    torch.testing.assert_close(
        layer(WEIGHT, **options)(LOGITS, target, pixel_weight),
        function(LOGITS, target, WEIGHT, **options, pixel_weight=pixel_weight),
        rtol=0,
        atol=0,
    )


def test_upsample_cross_entropy_loss_is_a_cross_entropy_loss() -> None:
    assert issubclass(fastseg.UpsampleCrossEntropyLoss, nn.CrossEntropyLoss)


@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
def test_upsample_argmax_takes_torchs_arguments(mode: str) -> None:
    for extent in ({"size": (12, 9)}, {"scale_factor": (2.0, 1.5)}, {"size": 11}):
        plain = nn.Upsample(**extent, mode=mode)(LOGITS).argmax(1)
        assert torch.equal(fastseg.UpsampleArgmax(**extent, mode=mode)(LOGITS).long(), plain)


def test_upsample_argmax_of_another_size_at_the_call() -> None:
    expected = functional.upsample_argmax(LOGITS, (12, 9))
    for layer in (fastseg.UpsampleArgmax(), fastseg.UpsampleArgmax(5), fastseg.UpsampleArgmax(scale_factor=3)):
        assert torch.equal(layer(LOGITS, (12, 9)), expected)
    with pytest.raises(ValueError, match="size: expected either it or scale_factor, got None and None"):
        fastseg.UpsampleArgmax()(LOGITS)
    with pytest.raises(ValueError, match=r"size: expected either it or scale_factor, got 5 and 2\.0"):
        fastseg.UpsampleArgmax(5, 2.0)


def test_upsample_argmax_returns_confidence_in_the_dtype_asked_for() -> None:
    layer = fastseg.UpsampleArgmax((12, 9), align_corners=True, dtype=torch.int32, return_confidence=True)
    labels, confidence = layer(LOGITS)
    expected = functional.upsample_argmax(
        LOGITS, (12, 9), align_corners=True, dtype=torch.int32, return_confidence=True
    )
    torch.testing.assert_close((labels, confidence), expected, rtol=0, atol=0)
    assert labels.dtype == torch.int32


REPRS = {
    "UpsampleCrossEntropyLoss(mode='nearest', align_corners=False)": fastseg.UpsampleCrossEntropyLoss(mode="nearest"),
    "UpsampleArgmax(size=(3, 4), mode='bilinear', align_corners=False)": fastseg.UpsampleArgmax((3, 4)),
    "UpsampleArgmax(scale_factor=2.0, mode='bilinear', align_corners=True)": fastseg.UpsampleArgmax(
        scale_factor=2.0, align_corners=True
    ),
    "UpsampleThreshold(threshold=0.3, size=(3, 4), mode='nearest', align_corners=False)": fastseg.UpsampleThreshold(
        (3, 4), 0.3, mode="nearest"
    ),
    "UpsampleMaskArgmax(scale_factor=2, mode='bilinear', align_corners=False)": fastseg.UpsampleMaskArgmax(
        scale_factor=2
    ),
    "CrossEntropyDiceLoss(ce_weight=1.0, dice_weight=2.0, smooth=1e-05, batch_dice=False, include_background=True)": (
        fastseg.CrossEntropyDiceLoss(dice_weight=2.0)
    ),
    "FocalLoss(gamma=0.5)": fastseg.FocalLoss(gamma=0.5),
    "UpsampleFocalLoss(mode='bilinear', align_corners=True, gamma=2.0)": fastseg.UpsampleFocalLoss(align_corners=True),
}


@pytest.mark.parametrize(("text", "layer"), REPRS.items(), ids=lambda value: type(value).__name__)
def test_repr_of_losses(text: str, layer: nn.Module) -> None:
    assert repr(layer) == text


@pytest.mark.parametrize(("layer", "function", "options"), LOSSES.values(), ids=LOSSES)
def test_compiled_loss(layer: type[nn.Module], function: Callable[..., Tensor], options: dict) -> None:
    torch.compiler.reset()
    loss = layer(WEIGHT, **options)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(LOGITS, labels_of(layer)), loss(LOGITS, labels_of(layer)))


def test_compiled_argmax() -> None:
    torch.compiler.reset()
    layer = fastseg.UpsampleArgmax(scale_factor=2.0, return_confidence=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(LOGITS), layer(LOGITS), rtol=0, atol=0)
