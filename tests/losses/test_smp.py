"""fastseg.losses.smp against segmentation_models_pytorch's losses."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastseg import _native
from fastseg.losses import smp
from fastseg.testing import make, make_labels
from tests.losses import cases as losses_cases
from tests.losses.cases import DTYPES, IGNORED, SHAPES, check, labels_for, logits, maps_for, probabilities, signature
from tests.ops import upsample_cases

CLASS_WEIGHTS = [0.5, 2.0, 1.0, 0.25, 3.0]
MAP_MODES = ("binary", "multilabel")
REGIONS = ("DiceLoss", "JaccardLoss", "TverskyLoss")
LOSSES = (*REGIONS, "FocalLoss", "SoftCrossEntropyLoss", "SoftBCEWithLogitsLoss")


@pytest.fixture(scope="module")
def theirs() -> Any:
    return losses_cases.original("segmentation_models_pytorch.losses")


def check_both(theirs: Any, name: str, input: Tensor, target: Tensor, **options: Any) -> list[Tensor]:
    return check(getattr(smp, name)(**options), getattr(theirs, name)(**options), input, target)


def inputs(from_logits: bool, shape: tuple[int, ...] = SHAPES["image"], dtype: torch.dtype = torch.float32) -> Tensor:
    return logits(shape, dtype) if from_logits else probabilities(shape, dtype)


def combinations(**values: tuple[Any, ...]) -> list[dict[str, Any]]:
    """Every combination of options; None, False and 0 leave the original's default."""
    combined = (dict(zip(values, each, strict=True)) for each in itertools.product(*values.values()))
    return [{name: value for name, value in options.items() if value not in (None, False)} for options in combined]


def named(options: dict[str, Any]) -> str:
    return "-".join(f"{name}={value}" for name, value in options.items()) or "default"


@pytest.mark.parametrize("name", LOSSES)
def test_signature(theirs: Any, name: str) -> None:
    ours, original = getattr(smp, name), getattr(theirs, name)
    assert signature(ours) == signature(original)
    assert signature(ours.forward) == signature(original.forward)
    arguments = () if name.startswith("Soft") else ("multiclass",)
    assert ours(*arguments).state_dict() == original(*arguments).state_dict() == {}


# ---- dice ----

DICE_OPTIONS = combinations(
    classes=(None, [1, 3]), log_loss=(False, True), smooth=(None, 1.0), class_weights=(None, CLASS_WEIGHTS)
)


@pytest.mark.parametrize("ignore_index", [None, IGNORED, 2])
@pytest.mark.parametrize("from_logits", [True, False], ids=["logits", "probabilities"])
@pytest.mark.parametrize("options", DICE_OPTIONS, ids=named)
def test_dice_multiclass(theirs: Any, options: dict, from_logits: bool, ignore_index: int | None) -> None:
    input = inputs(from_logits)
    target = labels_for(input, ignore_index=ignore_index)
    options = {**options, "from_logits": from_logits, "ignore_index": ignore_index}
    check_both(theirs, "DiceLoss", input, target, mode="multiclass", **options)


@pytest.mark.parametrize("ignore_index", [None, 0, 1])
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("from_logits", [True, False], ids=["logits", "probabilities"])
@pytest.mark.parametrize("options", combinations(log_loss=(False, True), smooth=(None, 1.0)), ids=named)
@pytest.mark.parametrize("mode", MAP_MODES)
def test_dice_of_maps(
    theirs: Any, mode: str, options: dict, from_logits: bool, soft: bool, ignore_index: int | None
) -> None:
    input = inputs(from_logits)
    options = {**options, "from_logits": from_logits, "ignore_index": ignore_index}
    check_both(theirs, "DiceLoss", input, maps_for(input, soft), mode=mode, **options)


@pytest.mark.parametrize(
    "options", combinations(classes=(None, [0, 4]), class_weights=(None, CLASS_WEIGHTS)), ids=named
)
def test_dice_multilabel_classes(theirs: Any, options: dict[str, Any]) -> None:
    input = logits()
    check_both(theirs, "DiceLoss", input, maps_for(input, soft=False), mode="multilabel", **options)


@pytest.mark.parametrize("absent", [[1], [0, 2, 3], [0, 1, 2, 4]], ids=str)
@pytest.mark.parametrize("options", combinations(log_loss=(False, True), smooth=(None, 1.0)), ids=named)
def test_dice_of_absent_classes(theirs: Any, options: dict[str, Any], absent: list[int]) -> None:
    input = logits()
    target = labels_for(input)
    target[torch.isin(target, torch.tensor(absent))] = min(set(range(5)) - set(absent))
    check_both(theirs, "DiceLoss", input, target, mode="multiclass", **options)


@pytest.mark.parametrize("mode", ["multiclass", *MAP_MODES])
def test_dice_of_nothing_labelled_is_zero(theirs: Any, mode: str) -> None:
    input = logits()
    target = torch.full_like(labels_for(input) if mode == "multiclass" else input.detach(), IGNORED)
    loss, gradient = check_both(theirs, "DiceLoss", input, target, mode=mode, ignore_index=IGNORED)
    assert loss == 0
    assert gradient.count_nonzero() == 0


def test_dice_of_no_image_is_zero() -> None:
    input = logits((0, 5, 4, 3))
    loss = smp.DiceLoss("multiclass")(input, labels_for(input))
    (gradient,) = torch.autograd.grad(loss, input)
    assert loss == 0
    assert gradient.shape == input.shape


def test_dice_target_with_a_channel(theirs: Any) -> None:
    input = logits()
    check_both(theirs, "DiceLoss", input, labels_for(input).unsqueeze(1), mode="multiclass")


# ---- focal ----

FOCAL_OPTIONS = combinations(
    alpha=(None, 0.25), gamma=(None, 0.5), normalized=(False, True), reduced_threshold=(None, 0.3)
)
FOCAL_REDUCTIONS = ("mean", "sum", "batchwise_mean", "none", None, "unknown")


@pytest.mark.parametrize("ignore_index", [None, IGNORED, 2])
@pytest.mark.parametrize("from_logits", [True, False], ids=["logits", "probabilities"])
@pytest.mark.parametrize("options", FOCAL_OPTIONS, ids=named)
def test_focal_multiclass(theirs: Any, options: dict, from_logits: bool, ignore_index: int | None) -> None:
    input = inputs(from_logits)
    target = labels_for(input, ignore_index=ignore_index)
    options = {**options, "from_logits": from_logits, "ignore_index": ignore_index}
    check_both(theirs, "FocalLoss", input, target, mode="multiclass", **options)


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("from_logits", [True, False], ids=["logits", "probabilities"])
@pytest.mark.parametrize("options", FOCAL_OPTIONS, ids=named)
@pytest.mark.parametrize("mode", MAP_MODES)
def test_focal_of_maps(theirs: Any, mode: str, options: dict, from_logits: bool, soft: bool) -> None:
    input = inputs(from_logits)
    check_both(
        theirs, "FocalLoss", input, maps_for(input, soft), mode=mode, from_logits=from_logits, **options
    )  # fmt: skip


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("reduction", FOCAL_REDUCTIONS, ids=str)
@pytest.mark.parametrize(
    ("mode", "ignore_index"),
    [("multiclass", None), ("multiclass", 1), ("binary", None), ("binary", 1), ("multilabel", None)],
)
def test_focal_reductions(
    theirs: Any, mode: str, ignore_index: int | None, reduction: str | None, normalized: bool
) -> None:
    input = logits()
    target = labels_for(input) if mode == "multiclass" else maps_for(input, soft=False)
    options = {"reduction": reduction, "ignore_index": ignore_index, "normalized": normalized, "alpha": 0.3}
    check_both(theirs, "FocalLoss", input, target, mode=mode, **options)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("mode", ["multiclass", "multilabel"])
def test_focal_class_weights(theirs: Any, mode: str, reduction: str) -> None:
    input = logits()
    target = labels_for(input) if mode == "multiclass" else maps_for(input, soft=False)
    check_both(theirs, "FocalLoss", input, target, mode=mode, reduction=reduction, class_weights=CLASS_WEIGHTS)


def test_focal_label_of_no_class(theirs: Any) -> None:
    input = logits()
    check_both(theirs, "FocalLoss", input, labels_for(input, ignore_index=IGNORED), mode="multiclass")


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("images", [0, 2])
def test_focal_of_nothing(theirs: Any, images: int, reduction: str) -> None:
    input = logits((images, 5, 4, 3))
    target = torch.full((images, 4, 3), IGNORED)
    options = {"ignore_index": IGNORED, "reduction": reduction}
    loss, _ = check_both(theirs, "FocalLoss", input, target, mode="multiclass", **options)
    assert loss.isnan() == (reduction == "mean")


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("options", [{}, {"reduced_threshold": 0.4, "normalized": True, "ignore_index": 3}], ids=str)
def test_focal_layouts(theirs: Any, options: dict[str, Any], layout: str) -> None:
    input = logits((3, 5, 6, 7), layout=layout)
    _, gradient = check_both(theirs, "FocalLoss", input, labels_for(input), mode="multiclass", **options)
    assert gradient.stride() == input.stride()


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_focal_gradient_is_finite_where_certain(gamma: float) -> None:
    input = torch.tensor([0.0, 5.0, 100.0, 1e4, -1e4]).view(-1, 1, 1, 1).requires_grad_()
    for mode, target in (("multiclass", torch.zeros(5, 1, 1).long()), ("binary", torch.ones(5, 1, 1, 1))):
        loss = smp.FocalLoss(mode, gamma=gamma, reduction="sum")(input, target)
        assert torch.autograd.grad(loss, input)[0].isfinite().all()


# ---- cross-entropy ----


@pytest.mark.parametrize("ignore_index", [None, -100, IGNORED, 2])
@pytest.mark.parametrize("smooth_factor", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy(theirs: Any, reduction: str, smooth_factor: float, ignore_index: int | None) -> None:
    input = logits()
    options = {"reduction": reduction, "smooth_factor": smooth_factor, "ignore_index": ignore_index}
    check_both(theirs, "SoftCrossEntropyLoss", input, labels_for(input, ignore_index=ignore_index), **options)


@pytest.mark.parametrize("channel", [False, True], ids=["labels", "labels-with-a-channel"])
@pytest.mark.parametrize("ignore_index", [None, 2])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dim", [0, 1, 3, -1, -2])
def test_cross_entropy_dim(theirs: Any, dim: int, reduction: str, ignore_index: int | None, channel: bool) -> None:
    input = logits((5, 6, 5, 7))
    classes = input.shape[dim]
    target = make_labels(input.select(dim, 0).shape, classes)
    options = {"dim": dim, "reduction": reduction, "ignore_index": ignore_index, "smooth_factor": 0.1}
    check_both(theirs, "SoftCrossEntropyLoss", input, target.unsqueeze(dim) if channel else target, **options)


def test_cross_entropy_without_smoothing(theirs: Any) -> None:
    input = logits()
    ours, original = smp.SoftCrossEntropyLoss(), theirs.SoftCrossEntropyLoss(smooth_factor=0.0)
    check(ours, original, input, labels_for(input))
    check(ours, original, logits((0, 5, 4, 3)), torch.zeros(0, 4, 3, dtype=torch.int64))


# ---- jaccard and tversky ----


@pytest.mark.parametrize("ignore_index", [None, IGNORED, 2])
@pytest.mark.parametrize("from_logits", [True, False], ids=["logits", "probabilities"])
@pytest.mark.parametrize("options", DICE_OPTIONS, ids=named)
@pytest.mark.parametrize("name", ["JaccardLoss", "TverskyLoss"])
def test_regions_multiclass(
    theirs: Any, name: str, options: dict[str, Any], from_logits: bool, ignore_index: int | None
) -> None:
    input = inputs(from_logits)
    target = labels_for(input, ignore_index=ignore_index)
    if name == "TverskyLoss":
        options = {"alpha": 0.3, "beta": 0.7, "gamma": 1.5, **options}
    options = {**options, "from_logits": from_logits, "ignore_index": ignore_index}
    check_both(theirs, name, input, target, mode="multiclass", **options)


@pytest.mark.parametrize("ignore_index", [None, 0, 1, IGNORED])
@pytest.mark.parametrize("kind", ["masks", "hard", "soft"])
@pytest.mark.parametrize("from_logits", [True, False], ids=["logits", "probabilities"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("mode", MAP_MODES)
@pytest.mark.parametrize("name", REGIONS)
def test_regions_of_maps(
    theirs: Any, name: str, mode: str, dtype: torch.dtype, from_logits: bool, kind: str, ignore_index: int | None
) -> None:
    input = inputs(from_logits, SHAPES["image"], dtype)
    masks = make_labels(input.shape, 2, ignore_index=ignore_index)
    target = masks if kind == "masks" else maps_for(input, soft=kind == "soft")
    check_both(theirs, name, input, target, mode=mode, from_logits=from_logits, ignore_index=ignore_index)


# ---- focal losses and cross-entropies of masks ----


@pytest.mark.parametrize("reduction", ["mean", "sum", "batchwise_mean"])
@pytest.mark.parametrize(
    "options", combinations(alpha=(None, 0.25), normalized=(False, True), reduced_threshold=(None, 0.5)), ids=named
)
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("mode", MAP_MODES)
def test_focal_of_masks(theirs: Any, mode: str, gamma: float, options: dict[str, Any], reduction: str) -> None:
    if mode == "multilabel" and reduction == "batchwise_mean":
        options = {**options, "class_weights": None}
    input = logits()
    ignore_index = IGNORED if mode == "binary" else None
    masks = make_labels(input.shape, 2, ignore_index=ignore_index)
    options = {**options, "gamma": gamma, "reduction": reduction, "ignore_index": ignore_index}
    check_both(theirs, "FocalLoss", input, masks, mode=mode, **options)


@pytest.mark.parametrize("ignore_index", [None, -100, 1])
@pytest.mark.parametrize("smooth_factor", [None, 0.1])
@pytest.mark.parametrize("weight", [None, (5, 1, 1), (1, 5, 1, 1), (1,), (2, 5, 9, 13)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_soft_bce(
    theirs: Any, reduction: str, weight: tuple[int, ...] | None, smooth_factor: float | None, ignore_index: int | None
) -> None:
    input = logits()
    target = make_labels(input.shape, 2, torch.float32, ignore_index=ignore_index)
    weights = {} if weight is None else {
        "weight": make(weight, seed=1).abs(), "pos_weight": make(weight, seed=2).abs()
    }  # fmt: skip
    options = {"reduction": reduction, "smooth_factor": smooth_factor, "ignore_index": ignore_index, **weights}
    check_both(theirs, "SoftBCEWithLogitsLoss", input, target, **options)


# ---- all of labels ----

EVERY: dict[str, tuple[str, dict[str, Any]]] = {
    "dice": ("DiceLoss", {"mode": "multiclass", "ignore_index": IGNORED}),
    "dice-weighted": ("DiceLoss", {"mode": "multiclass", "ignore_index": IGNORED, "class_weights": CLASS_WEIGHTS}),
    "focal": ("FocalLoss", {"mode": "multiclass", "ignore_index": IGNORED, "alpha": 0.25}),
    "focal-weighted": ("FocalLoss", {"mode": "multiclass", "ignore_index": IGNORED, "class_weights": CLASS_WEIGHTS}),
    "cross-entropy": ("SoftCrossEntropyLoss", {"smooth_factor": 0.1, "ignore_index": IGNORED}),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("name", "options"), EVERY.values(), ids=EVERY)
def test_dtypes(theirs: Any, name: str, options: dict[str, Any], dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    input = logits(shape, dtype)
    check_both(theirs, name, input, labels_for(input, ignore_index=IGNORED), **options)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", ["DiceLoss", "FocalLoss"])
@pytest.mark.parametrize("mode", MAP_MODES)
def test_dtypes_of_maps(theirs: Any, mode: str, name: str, dtype: torch.dtype) -> None:
    input = logits(SHAPES["volume"], dtype)
    check_both(theirs, name, input, maps_for(input, soft=False), mode=mode)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.float32], ids=str)
@pytest.mark.parametrize(("name", "options"), EVERY.values(), ids=EVERY)
def test_label_dtypes(name: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    input, loss = logits(), getattr(smp, name)(**options)
    target = labels_for(input, ignore_index=IGNORED)
    torch.testing.assert_close(loss(input, target.to(dtype)), loss(input, target), rtol=0, atol=0)


@pytest.mark.parametrize(("name", "options"), EVERY.values(), ids=EVERY)
def test_second_derivative(name: str, options: dict[str, Any]) -> None:
    input = logits((2, 5, 2, 3), torch.float64)
    target = labels_for(input, ignore_index=IGNORED)
    function: Callable[[Tensor], Tensor] = lambda x: getattr(smp, name)(**options)(x, target)  # noqa: E731
    assert torch.autograd.gradcheck(function, input)
    assert torch.autograd.gradgradcheck(function, input)


@pytest.mark.parametrize(("name", "options"), EVERY.values(), ids=EVERY)
def test_compile(name: str, options: dict[str, Any]) -> None:
    torch.compiler.reset()
    input, loss = logits(), getattr(smp, name)(**options)
    target = labels_for(input, ignore_index=IGNORED)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(input, target)
    eager = loss(input, target)
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(*(torch.autograd.grad(each, input)[0] for each in (compiled, eager)))


@pytest.mark.parametrize("case", ["dice", "focal", "cross-entropy"])
def test_memory_is_the_gradient(case: str) -> None:
    name, options = EVERY[case]
    input, loss = make((1, 96, 400, 400), requires_grad=True), getattr(smp, name)(**options)
    target = labels_for(input, ignore_index=IGNORED)
    grown = upsample_cases.peak_growth(lambda: torch.autograd.grad(loss(input, target), input))
    assert grown < 1.5 * input.nbytes


def test_fallback_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    _native.log_fallback.cache_clear()
    input = probabilities((1, 3, 4, 5), torch.float32)
    for _ in range(2):
        smp.DiceLoss("multiclass", from_logits=False)(input, labels_for(input))
        smp.DiceLoss("multiclass")(input, labels_for(input))
        smp.DiceLoss("multilabel")(input, maps_for(input, soft=True))
        smp.FocalLoss("multilabel")(input, maps_for(input, soft=False))
        smp.FocalLoss("multilabel")(input, maps_for(input, soft=True))
    reasons = (
        "DiceLoss runs as plain PyTorch: from_logits=False",
        "FocalLoss runs as plain PyTorch: masks between 0 and 1",
    )
    for record, reason in zip(caplog.records, reasons, strict=True):
        assert record.getMessage().startswith(f"fastseg.losses.smp.{reason}")


# ---- errors ----

REFUSED_ARGUMENTS = {
    "dice-mode": ("DiceLoss", {"mode": "multi"}, "mode: expected .*got 'multi'"),
    "dice-binary-classes": ("DiceLoss", {"mode": "binary", "classes": [0]}, "classes: mode .binary. has one class"),
    "dice-number-of-classes": ("DiceLoss", {"mode": "multiclass", "classes": 3}, "classes: expected a list.*got 3"),
    "dice-binary-weights": ("DiceLoss", {"mode": "binary", "class_weights": [1.0]}, "class_weights: mode .binary."),
    "focal-mode": ("FocalLoss", {"mode": "multi"}, "mode: expected .*got 'multi'"),
    "focal-gamma": ("FocalLoss", {"mode": "multiclass", "gamma": None}, "gamma: expected a number, got None"),
    "focal-weights": (
        "FocalLoss", {"mode": "multiclass", "class_weights": [1.0], "reduction": "none"}, "class_weights: reduction",
    ),
    "smooth-factor": ("SoftCrossEntropyLoss", {"smooth_factor": 1.5}, "smooth_factor: expected .*got 1.5"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "options", "message"), REFUSED_ARGUMENTS.values(), ids=REFUSED_ARGUMENTS)
def test_refused_arguments(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(smp, name)(**options)


X, Y = torch.zeros(2, 5, 3, 4), torch.zeros(2, 3, 4, dtype=torch.int64)
REFUSED = {
    "dice-labels": (smp.DiceLoss("multiclass"), (X, Y[:1]), ValueError, r"y_true: expected .*\(2, 3, 4\), got \(1,"),
    "dice-map": (smp.DiceLoss("binary"), (X, Y), ValueError, "y_true: expected as many targets as y_pred"),
    "dice-pixels": (smp.DiceLoss("multiclass"), (X[..., :0], Y[..., :0]), ValueError, "y_pred: expected .*pixels"),
    "dice-integers": (smp.DiceLoss("multiclass"), (X.long(), Y), TypeError, "y_pred: expected float32.*int64"),
    "dice-weights": (smp.DiceLoss("multiclass", class_weights=[1.0]), (X, Y), ValueError, "class_weights: expected 5"),
    "dice-label": (smp.DiceLoss("multiclass"), (X, Y + 5), IndexError, r"expected classes in \[0, 5\), got 5"),
    "dice-label-ignored": (
        smp.DiceLoss("multiclass", ignore_index=7), (X, Y - 1), IndexError, r"\[0, 5\) or ignore_index \(7\), got -1",
    ),
    "dice-plain-label": (
        smp.DiceLoss("multiclass", from_logits=False), (X, Y + 5), IndexError, r"y_true: .*\[0, 5\), got 5",
    ),
    "focal-labels": (smp.FocalLoss("multiclass"), (X, Y[:1]), ValueError, "y_true: expected labels of shape"),
    "focal-multilabel": (smp.FocalLoss("multilabel"), (X, Y), ValueError, "y_true: expected y_pred's shape"),
    "focal-binary": (smp.FocalLoss("binary"), (X, Y), ValueError, "y_true: expected as many targets .*120, got 24"),
    "cross-entropy-labels": (smp.SoftCrossEntropyLoss(), (X, Y[:1]), ValueError, "y_true: expected labels of shape"),
    "cross-entropy-label": (smp.SoftCrossEntropyLoss(), (X, Y + 5), IndexError, r"\[0, 5\) .*got 5"),
    "cross-entropy-dim": (smp.SoftCrossEntropyLoss(dim=4), (X, Y), ValueError, "dim: expected .*got 4"),
}  # fmt: skip


@pytest.mark.parametrize(("loss", "arguments", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(loss: nn.Module, arguments: tuple[Tensor, Tensor], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        loss(*arguments)
