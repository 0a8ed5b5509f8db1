"""fastseg.losses.smp: signatures, dtypes, derivatives, compilation, memory and errors of all its losses."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastseg import _native
from fastseg.losses import smp
from fastseg.testing import make
from tests.losses.cases import DTYPES, IGNORED, SHAPES, labels_for, logits, maps_for, probabilities, signature
from tests.losses.smp_cases import CLASS_WEIGHTS, LOSSES, MAP_MODES, check_both, originals
from tests.ops import upsample_cases


@pytest.mark.parametrize("name", LOSSES)
def test_signature(name: str) -> None:
    ours, original = getattr(smp, name), getattr(originals(), name)
    assert signature(ours) == signature(original)
    assert signature(ours.forward) == signature(original.forward)
    arguments = () if name.startswith("Soft") else ("multiclass",)
    assert ours(*arguments).state_dict() == original(*arguments).state_dict() == {}


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
def test_dtypes(name: str, options: dict[str, Any], dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    input = logits(shape, dtype)
    check_both(name, input, labels_for(input, ignore_index=IGNORED), **options)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", ["DiceLoss", "FocalLoss"])
@pytest.mark.parametrize("mode", MAP_MODES)
def test_dtypes_of_maps(mode: str, name: str, dtype: torch.dtype) -> None:
    input = logits(SHAPES["volume"], dtype)
    check_both(name, input, maps_for(input, soft=False), mode=mode)


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
