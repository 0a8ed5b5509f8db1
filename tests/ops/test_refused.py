"""Arguments that are refused, and the error that names each: what the operators have in common is written once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastseg import _native, functional
from fastseg.ops import cross_entropy
from fastseg.testing import make, make_labels
from tests.ops.operators import OF_LABELS

Change = Callable[[Tensor], Any]
Refusal = tuple[dict[str, Any], type[Exception], str]

IMAGES = torch.ones(1, 8, 20, 20)
CONVOLUTION = {"input": torch.ones(1, 3, 8, 8), "weight": torch.ones(4, 3, 3, 3)}
LOGITS, LABELS = torch.zeros(2, 4, 3, 5), torch.zeros(2, 6, 7, dtype=torch.int64)
UPSAMPLED = {"input": LOGITS, "target": LABELS}
OF_ONE_SIZE = {"input": LOGITS, "target": LABELS[:, :3, :5]}

# Arguments that each operator takes.
VALID: dict[str, dict[str, Any]] = {
    "conv2d": {"input": IMAGES, "weight": torch.ones(6, 8, 3, 3)},
    "conv_relu_pool2d": CONVOLUTION,
    "relu_pool2d": {"input": torch.ones(1, 3, 8, 8)},
    "upsample_argmax": {"input": LOGITS, "size": 4},
    "upsample_mask_argmax": {"input": LOGITS, "class_probabilities": torch.ones(2, 4, 3), "size": 4},
    "upsample_threshold": {"input": LOGITS, "size": 4},
    **{name: UPSAMPLED if "upsample" in name else OF_ONE_SIZE for name in OF_LABELS},
}

OF_SUMS = ["class_sums", "upsample_class_sums"]
WITH_WEIGHT = [name for name in OF_LABELS if name not in ("upsample_confusion_matrix", *OF_SUMS)]
RESIZING = ["upsample_argmax", "upsample_mask_argmax", "upsample_threshold"]
UPSAMPLING = [name for name in VALID if "upsample" in name]
WITH_PIXEL_WEIGHT = ["cross_entropy", "upsample_cross_entropy"]
WITH_REDUCTION = [*WITH_PIXEL_WEIGHT, "focal_loss", "upsample_focal_loss"]
SMOOTHED = [*WITH_PIXEL_WEIGHT, "cross_entropy_dice", "upsample_cross_entropy_dice"]
OF_DICE = SMOOTHED[2:]
OF_FOCUS = WITH_REDUCTION[2:]
CHANNELS_MISSING = {"input": LOGITS[:, :0]}

# What several operators refuse alike.
SHARED: dict[str, tuple[list[str], Refusal]] = {
    "integer-logits": (
        [*OF_LABELS, *RESIZING],
        ({"input": LOGITS.long()}, TypeError, "input: expected float32.* got torch.int64"),
    ),
    "complex-logits": (
        [*OF_LABELS, *RESIZING],
        ({"input": LOGITS.cfloat()}, TypeError, "input: expected float32.* got torch.complex64"),
    ),
    "no-class": (
        [*WITH_WEIGHT, *OF_SUMS, *RESIZING],
        (CHANNELS_MISSING, ValueError, r"input: expected at least one class, got shape \(2, 0, 3, 5\)"),
    ),
    "no-batch": (
        ["cross_entropy_dice", "class_sums"],
        ({"input": LOGITS[0, :, 0, 0], "target": LABELS[0, 0, 0]}, ValueError, r"input: expected \[N, C, d1, ...\]"),
    ),
    "no-pixel": (
        ["cross_entropy_dice", "class_sums"],
        ({"input": LOGITS[:, :, :0], "target": LABELS[:, :0, :5]}, ValueError, "at least one pixel, got shape"),
    ),
    "rank": (UPSAMPLING, ({"input": LOGITS[0]}, ValueError, r"input: expected \[N, C, h, w\].* shape \(4, 3, 5\)")),
    "no-rows": (UPSAMPLING, ({"input": LOGITS[:, :, :0]}, ValueError, "input: expected at least one row")),
    "scalar": (
        ["cross_entropy", "cross_entropy_dice", "focal_loss", "class_sums"],
        ({"input": torch.tensor(1.0), "target": torch.tensor(0)}, ValueError, "input: expected .*got a scalar"),
    ),
    "mode": (UPSAMPLING, ({"mode": "area"}, ValueError, "mode: expected \"bilinear\" or \"nearest\", got 'area'")),
    "corners": (UPSAMPLING, ({"mode": "nearest", "align_corners": True}, ValueError, "align_corners: only mode")),
    "labels-rank": (
        [name for name in UPSAMPLING if name in OF_LABELS],
        ({"target": LABELS[0]}, ValueError, r"target: expected labels \[N, H, W\] .*got shape \(6, 7\)"),
    ),
    "labels-no-columns": (
        [name for name in UPSAMPLING if name in OF_LABELS],
        ({"target": LABELS[..., :0]}, ValueError, r"target: expected labels .*got shape \(2, 6, 0\)"),
    ),
    "batch": (OF_LABELS, ({"input": LOGITS[:1]}, ValueError, r"target: expected labels of shape \(1, .*, got \(2, ")),
    "bool-labels": (
        OF_LABELS, ({"target": LABELS.bool()}, (TypeError, ValueError), "target: expected labels"),
    ),
    "labels-device": (OF_LABELS, ({"target": LABELS.to("meta")}, ValueError, "target: expected ")),
    "neither-size-nor-factor": (
        RESIZING, ({"size": None}, ValueError, "size: expected either it or scale_factor, got None and None"),
    ),
    "size-and-factor": (
        RESIZING, ({"scale_factor": 2}, ValueError, "size: expected either it or scale_factor, got 4 and 2"),
    ),
    "label-dtype": (RESIZING[:2], ({"dtype": torch.int8}, TypeError, "dtype: expected uint8.*got torch.int8")),
    "weight-shape": (
        WITH_WEIGHT, ({"weight": torch.ones(3)}, ValueError, r"weight: expected shape \(4,\), got \(3,\)"),
    ),
    "weight-rank": (
        WITH_WEIGHT, ({"weight": torch.ones(1, 4)}, ValueError, r"weight: expected shape \(4,\), got \(1, 4\)"),
    ),
    "weight-dtype": (
        WITH_WEIGHT, ({"weight": torch.ones(4).long()}, TypeError, "weight: expected a floating-point dtype"),
    ),
    "weight-device": (
        WITH_WEIGHT, ({"weight": torch.ones(4, device="meta")}, ValueError, "weight: .* device .*, got meta"),
    ),
    "reduction": (WITH_REDUCTION, ({"reduction": "average"}, ValueError, "reduction: expected .*got 'average'")),
    "smoothing": (SMOOTHED, ({"label_smoothing": 1.5}, ValueError, r"label_smoothing: expected .*, got 1.5")),
    "smoothing-negative": (SMOOTHED, ({"label_smoothing": -0.1}, ValueError, "label_smoothing: expected .*got -0.1")),
    "pixel-weight-shape": (
        WITH_PIXEL_WEIGHT, ({"pixel_weight": LOGITS[:, 0, 1:]}, ValueError, r"pixel_weight: expected shape \(2, "),
    ),
    "pixel-weight-dtype": (
        WITH_PIXEL_WEIGHT, ({"pixel_weight": LABELS}, (TypeError, ValueError), "pixel_weight: expected "),
    ),
    "smooth": (OF_DICE, ({"smooth": -1.0}, ValueError, "smooth: expected a number of at least 0, got -1.0")),
    "ce-weight": (OF_DICE, ({"ce_weight": -1.0}, ValueError, "ce_weight: expected .* at least 0, got -1.0")),
    "dice-weight": (OF_DICE, ({"dice_weight": float("nan")}, ValueError, "dice_weight: expected .* got nan")),
    "background": (
        OF_DICE,
        ({"input": LOGITS[:, :1], "include_background": False}, ValueError, "include_background: with one class"),
    ),
    "learned-weight": (
        OF_DICE, ({"weight": torch.ones(4, requires_grad=True)}, ValueError, "weight: it has no gradient"),
    ),
    "activation": (OF_SUMS, ({"activation": "tanh"}, ValueError, "activation: expected .*got 'tanh'")),
    "shares-shape": (
        OF_SUMS,
        (
            {"target": torch.zeros(2, 3, 3, 5), "activation": "sigmoid"}, ValueError,
            r"target: expected labels or a target of shape \(2, 4, 3, 5\), got \(2, 3, 3, 5\)",
        ),
    ),
    "shares-dtype": (
        OF_SUMS,
        ({"target": LOGITS.cfloat(), "activation": "sigmoid"}, TypeError, "target: expected a boolean, integer or fl"),
    ),
    "shares-device": (
        OF_SUMS, ({"target": LOGITS.to("meta"), "activation": "sigmoid"}, ValueError, "target: expected input's dev"),
    ),
    "gamma": (OF_FOCUS, ({"gamma": -1.0}, ValueError, "gamma: expected a number of at least 0, got -1.0")),
    "gamma-nan": (OF_FOCUS, ({"gamma": float("nan")}, ValueError, "gamma: expected .*got nan")),
    "pool-size": (["conv_relu_pool2d", "relu_pool2d"], ({"pool_size": 0}, ValueError, "pool_size: expected")),
    "pool-stride": (
        ["conv_relu_pool2d", "relu_pool2d"], ({"pool_stride": (1, 1, 1)}, ValueError, "pool_stride: expected"),
    ),
    "pool-too-large": (["conv_relu_pool2d", "relu_pool2d"], ({"pool_size": 9}, ValueError, "leaves no output")),
    "pool-padding": (["conv_relu_pool2d", "relu_pool2d"], ({"pool_padding": 2}, ValueError, "at most half")),
    "integers": (
        ["conv_relu_pool2d", "relu_pool2d"],
        ({"input": torch.ones(1, 3, 8, 8).int()}, TypeError, "input: expected float32"),
    ),
    "maps-rank": (["conv_relu_pool2d", "relu_pool2d"], ({"input": torch.ones(3, 3)}, ValueError, "input: expected")),
}  # fmt: skip

# What one operator alone refuses, or in words of its own.
OWN: dict[str, dict[str, Refusal]] = {
    "conv2d": {
        "rank": ({"input": torch.ones(3, 3)}, RuntimeError, "input"),
        "channels": ({"input": IMAGES[:, :7]}, RuntimeError, "to have 8 channels"),
        "bias": ({"bias": torch.ones(5)}, RuntimeError, "bias"),
        "dtype": ({"weight": torch.ones(6, 8, 3, 3).double()}, RuntimeError, "type"),
        "stride": ({"stride": 0}, ValueError, "stride: expected"),
        "padding": ({"padding": "full"}, ValueError, "padding: expected"),
        "too-small": ({"input": IMAGES[:, :, :2]}, RuntimeError, "Kernel size can't be greater"),
    },
    "conv_relu_pool2d": {
        "channels": ({"input": torch.ones(1, 2, 8, 8)}, ValueError, "expected 3 channels"),
        "weight-rank": ({"weight": torch.ones(4, 3, 3)}, ValueError, "weight: expected"),
        "no-kernels": ({"weight": torch.ones(0, 3, 3, 3)}, ValueError, "at least one output channel"),
        "groups": ({"groups": 3}, ValueError, "groups: expected a divisor"),
        "bias": ({"bias": torch.ones(5)}, ValueError, "bias: expected shape"),
        "dtypes": ({"weight": torch.ones(4, 3, 3, 3).double()}, TypeError, "weight: expected input's dtype"),
        "stride": ({"stride": 0}, ValueError, "stride: expected"),
        "three-numbers": ({"dilation": (1, 1, 1)}, ValueError, "dilation: expected"),
        "padding-word": ({"padding": "full"}, ValueError, "padding: expected"),
        "same-stride": ({"padding": "same", "stride": 2}, ValueError, "needs stride 1"),
        "kernel-too-large": ({"input": torch.ones(1, 3, 2, 8)}, ValueError, "reaches over 3 pixels of height"),
    },
    "relu_pool2d": {"no-channels": ({"input": torch.ones(2, 0, 8, 8)}, ValueError, "input: expected channels")},
    "cross_entropy": {
        "pixels": ({"target": LABELS}, ValueError, r"target: expected labels of shape \(2, 3, 5\), got \(2, 6, 7\)"),
        "label-in-brackets": (
            {"input": LOGITS[0, :, 0, 0], "target": LABELS[:1, 0, 0]}, ValueError,
            r"target: expected labels of shape \(\), got \(1,\)",
        ),
        "float-labels": (
            {"target": OF_ONE_SIZE["target"].float()}, ValueError,
            "target: expected class probabilities.*need an integer dtype",
        ),
        "integer-probabilities": (
            {"target": LOGITS.long()}, ValueError, r"target: expected labels of shape \(2, 3, 5\), got \(2, 4, 3, 5\)",
        ),
        "ignored-probabilities": (
            {"target": LOGITS, "ignore_index": 1}, ValueError, "ignore_index: class probabilities .*got 1",
        ),
    },
    "upsample_cross_entropy": {
        "float-labels": (
            {"target": LABELS.float()}, ValueError, "target: expected class probabilities.*need an integer dtype",
        ),
    },
    **{
        name: {
            "class-probabilities": ({"target": LOGITS}, ValueError, r"target: expected labels \[N, H, W\]"),
            "float-labels": ({"target": LABELS.float()}, TypeError, "target: expected labels of an integer dtype"),
        }
        for name in (
            "upsample_cross_entropy_dice", "upsample_focal_loss", "upsample_confusion_matrix", "upsample_class_sums"
        )
    },
    **{
        name: {
            "class-probabilities": ({"target": LOGITS}, TypeError, "target: expected labels of an integer dtype"),
            "pixels": ({"target": LABELS}, ValueError, r"target: expected labels of shape \(2, 3, 5\), got \(2, 6, 7"),
        }
        for name in ("cross_entropy_dice", "focal_loss", "class_sums")
    },
    "upsample_argmax": {
        "mode-of-images": (
            {"input": LOGITS[:, :, None]}, ValueError,
            r"mode: expected \"trilinear\" or \"nearest\" for \[N, C, d, h, w\], got 'bilinear'",
        ),
        "no-depth": ({"input": LOGITS[:, :, None][:, :, :0]}, ValueError, "input: expected at least one row"),
        "pair-for-volumes": (
            {"input": LOGITS[:, :, None], "size": (1, 2), "mode": "trilinear"}, ValueError,
            r"size: expected one number or \(depth, height, width\), got \(1, 2\)",
        ),
        "no-columns": ({"input": LOGITS[..., :0]}, ValueError, "input: expected at least one row and one column"),
        "triple": ({"size": (1, 2, 3)}, ValueError, r"size: expected one number or \(height, width\), got \(1, 2, 3\)"),
        "no-output": ({"size": (0, 4)}, ValueError, r"size: expected at least one row .* got 0 x 4 of size \(0, 4\)"),
        "float-size": ({"size": 4.0}, ValueError, "size: expected an integer .* got 4.0"),
        "no-size-in-a-pair": ({"size": (None, 4)}, ValueError, "size: expected an integer .* got None"),
        "small-factor": ({"size": None, "scale_factor": 0.3}, ValueError, "got 0 x 1 of scale_factor 0.3"),
        **{
            f"factor-{factor}": ({"size": None, "scale_factor": factor}, ValueError, "scale_factor: expected finite")
            for factor in ((None, 2.0), [[2.0], [2.0]], float("nan"), (1.0, float("inf")), -2.0, "2")
        },
        **{
            f"factors-{factors}": ({"size": None, "scale_factor": factors}, ValueError, "scale_factor: expected one")
            for factors in ((2.0,), [2.0, 2.0, 2.0])
        },
        "small-dtype": (
            {"input": torch.zeros(1, 257, 2, 2), "dtype": torch.uint8}, ValueError,
            "dtype: torch.uint8 can't hold the labels of 257 classes",
        ),
    },
    "upsample_threshold": {
        f"threshold-{threshold}": (
            {"threshold": threshold}, ValueError, rf"threshold: expected a probability in \[0, 1\], got {threshold}",
        )
        for threshold in (-0.1, 1.5, float("nan"))
    },
    "upsample_mask_argmax": {
        **{
            f"probabilities-{shape}": (
                {"class_probabilities": torch.ones(shape)}, ValueError,
                r"class_probabilities: expected \[2, 4, C\] with classes, got",
            )
            for shape in ((2, 4), (1, 4, 3), (2, 3, 4), (2, 4, 0))
        },
        "integers": (
            {"class_probabilities": torch.ones(2, 4, 3).long()}, TypeError, "class_probabilities: expected a floating",
        ),
        "device": (
            {"class_probabilities": torch.ones(2, 4, 3, device="meta")}, ValueError,
            "class_probabilities: expected input's device .*, got meta",
        ),
        "small-dtype": (
            {"class_probabilities": torch.ones(2, 4, 257), "dtype": torch.uint8}, ValueError,
            "dtype: torch.uint8 can't hold the labels of 257 classes",
        ),
    },
}  # fmt: skip

REFUSED: dict[str, tuple[str, dict[str, Any], Any, str]] = {
    **{f"{name}-{case}": (name, *refusal) for case, (names, refusal) in SHARED.items() for name in names},
    **{f"{name}-{case}": (name, *refusal) for name, refusals in OWN.items() for case, refusal in refusals.items()},
}


@pytest.mark.parametrize(("operator", "changes", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(operator: str, changes: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        getattr(functional, operator)(**VALID[operator] | changes)


def test_refused_by_the_kernels_of_large_logits_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "PLAIN_MAX_LOGITS", 0)
    for operator, changes, error, message in REFUSED.values():
        if operator == "cross_entropy":
            test_refused(operator, changes, error, message)


# ---- labels outside the classes ----

OUTSIDE = {
    "too-large": (21, torch.int64),
    "ignore-of-other-data-sets": (255, torch.uint8),
    "negative": (-1, torch.int16),
    "far-negative": (-(2**31), torch.int32),
    "32-bits-look-right": (2**32 + 1, torch.int64),
}
MODES: dict[str, dict[str, Any]] = {
    "default": {},
    "align_corners": {"align_corners": True},
    "nearest": {"mode": "nearest"},
}


def logits_for(operator: str, classes: int, size: tuple[int, int]) -> Tensor:
    """Logits for labels of a size, of half of it for what upsamples."""
    if "upsample" in operator:
        size = (size[0] // 2, size[1] // 2)
    return make((2, classes, *size), requires_grad=operator != "upsample_confusion_matrix")


@pytest.mark.usefixtures("kernels_for_small_logits")
@pytest.mark.parametrize(("label", "dtype"), OUTSIDE.values(), ids=OUTSIDE)
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("ignored", [None, 3, -100], ids=["default", "a-class", "-100"])
@pytest.mark.parametrize("operator", OF_LABELS)
def test_label_outside_the_classes(
    isa: str, operator: str, ignored: int | None, mode: dict[str, Any], label: int, dtype: torch.dtype
) -> None:
    input = logits_for(operator, 21, (43, 41))
    target = make_labels((2, 43, 41), 21, dtype)
    target.view(-1)[-3] = label
    if "upsample" not in operator:
        input, mode = make((2, 21, 43, 41), requires_grad=True), {}
    options = mode if ignored is None else {**mode, "ignore_index": ignored}
    function = getattr(functional, operator)
    if _native.INTERPRETED or torch.get_default_device().type != "cpu":  # a GPU's kernels can't raise
        result = function(input, target, **options)
        assert result.isnan() if result.is_floating_point() else (result < 0).all()
        return
    for leaf in (input, input.detach()):
        with pytest.raises(IndexError, match=rf"^target: expected classes in \[0, 21\).*, got {label}$"):
            function(leaf, target, **options)


@pytest.mark.usefixtures("kernels_for_small_logits")
@pytest.mark.parametrize("operator", OF_LABELS)
def test_first_label_outside_is_named_for_any_number_of_threads(operator: str, threads: Callable[[int], None]) -> None:
    if _native.INTERPRETED or torch.get_default_device().type != "cpu":
        pytest.skip("the Triton kernels run here, which give NaN instead")
    input = logits_for(operator, 3, (400, 400))
    target = torch.arange(2 * 400 * 400).view(2, 400, 400) + 3
    for count in (1, 2, 3):
        threads(count)
        with pytest.raises(IndexError, match=r"got 3$"):
            getattr(functional, operator)(input, target)
