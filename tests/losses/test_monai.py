"""fastseg.losses.monai against MONAI's losses."""

import copy
import functools
import itertools
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastseg import _native
from fastseg.losses import monai
from fastseg.testing import make
from tests.losses import cases as losses_cases
from tests.losses.cases import DTYPES, SHAPES, labels_for, logits, maps_for, signature
from tests.ops import upsample_cases

LOSSES = ("DiceCELoss", "DiceFocalLoss")
WEIGHT = torch.tensor([0.5, 2.0, 1.0, 0.25, 3.0])


class Precise(nn.Module):
    """A loss of MONAI's that is computed in float64 throughout, for float64 input: the truth.

    As it is, one-hot targets are float32, and the focal loss rounds its input to it.
    """

    def __init__(self, loss: nn.Module, module: Any) -> None:
        super().__init__()
        self.loss = loss
        self.module = module.__name__  # a module can't be copied

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        if input.dtype != torch.float64:
            return self.loss(input, target)
        module = sys.modules[self.module]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "one_hot", functools.partial(module.one_hot, dtype=torch.float64))
            patch.setattr(Tensor, "float", Tensor.double)
            return self.loss(input, target)


@pytest.fixture(scope="module")
def theirs() -> Any:
    return losses_cases.original("monai.losses.dice")


def build(module: Any, name: str, options: dict[str, Any]) -> nn.Module:
    """A loss; the weight of the one whose background has none is without it."""
    options = dict(options)
    if name == "DiceFocalLoss":
        options.pop("label_smoothing", None)
        if options.get("weight") is not None and not options.get("include_background", True):
            options["weight"] = options["weight"][1:]
    return getattr(module, name)(**copy.deepcopy(options))


def check(theirs: Any, name: str, input: Tensor, target: Tensor, **options: Any) -> list[Tensor]:
    original = build(theirs, name, options)
    return losses_cases.check(build(monai, name, options), Precise(original, theirs), input, target)


def labels(input: Tensor, **options: Any) -> Tensor:
    return labels_for(input, **options).unsqueeze(1)


def named(options: dict[str, Any]) -> str:
    shown = {name: "given" if isinstance(value, Tensor) else value for name, value in options.items()}
    return "-".join(f"{name}={value}" for name, value in shown.items()) or "default"


def combinations(**values: Any) -> list[dict[str, Any]]:
    """Every choice among options that differ from the original's defaults."""
    choices = itertools.product((False, True), repeat=len(values))
    return [dict(itertools.compress(values.items(), chosen)) for chosen in choices]


FUSED = {"softmax": True, "to_onehot_y": True}


@pytest.mark.parametrize("name", LOSSES)
def test_signature(theirs: Any, name: str) -> None:
    ours, original = getattr(monai, name), getattr(theirs, name)
    assert signature(ours) == signature(original)
    assert signature(ours.forward) == signature(original.forward)


@pytest.mark.parametrize("weight", [None, WEIGHT], ids=["unweighted", "weighted"])
@pytest.mark.parametrize("include_background", [True, False])
@pytest.mark.parametrize("name", LOSSES)
def test_state_dict_is_theirs(theirs: Any, name: str, include_background: bool, weight: Tensor | None) -> None:
    options = {"weight": weight, "include_background": include_background}
    ours, original = build(monai, name, options), build(theirs, name, options)
    torch.testing.assert_close(dict(ours.state_dict()), dict(original.state_dict()), rtol=0, atol=0)
    ours.load_state_dict(original.state_dict())


# ---- options ----

DICE_OPTIONS = combinations(include_background=False, batch=True, weight=WEIGHT, jaccard=True)


@pytest.mark.parametrize("squared_pred", [False, True], ids=["fused", "squared"])
@pytest.mark.parametrize("options", DICE_OPTIONS, ids=named)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", LOSSES)
def test_softmax_of_labels(theirs: Any, name: str, reduction: str, options: dict[str, Any], squared_pred: bool) -> None:
    input = logits()
    options = {**FUSED, **options, "reduction": reduction, "squared_pred": squared_pred}
    check(theirs, name, input, labels(input), **options)


@pytest.mark.parametrize("options", combinations(include_background=False, batch=True, weight=WEIGHT), ids=named)
@pytest.mark.parametrize("labelled", [True, False], ids=["labels", "channels"])
@pytest.mark.parametrize("activation", ["none", "sigmoid", "softmax", "other_act"])
@pytest.mark.parametrize("name", LOSSES)
def test_activations(theirs: Any, name: str, activation: str, labelled: bool, options: dict[str, Any]) -> None:
    input = logits()
    if activation != "none":
        options = {**options, activation: torch.tanh if activation == "other_act" else True}
    # The soft targets of a cross-entropy are probabilities.
    target = labels(input) if labelled else maps_for(input, soft=True).softmax(1)
    check(theirs, name, input, target, to_onehot_y=labelled, **options)


# Not in the original: squares of integers.
@pytest.mark.parametrize(
    ("target", "squared_pred"), [("hard", False), ("hard", True), ("soft", False), ("soft", True), ("integer", False)]
)
@pytest.mark.parametrize("name", LOSSES)
def test_targets_with_channels(theirs: Any, name: str, target: str, squared_pred: bool) -> None:
    input = logits()
    given = maps_for(input, soft=target == "soft")
    given = given.long() if target == "integer" else given
    check(theirs, name, input, given, softmax=True, squared_pred=squared_pred)


@pytest.mark.parametrize(
    "options", [{"smooth_nr": 0.0, "smooth_dr": 1e-3}, {"smooth_nr": 2, "smooth_dr": 3}], ids=named
)
@pytest.mark.parametrize("factors", [(0.3, 2.0), (0.0, 1.0), (1.0, 0.0)], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_smoothing_and_factors(theirs: Any, name: str, factors: tuple[float, float], options: dict[str, Any]) -> None:
    input = logits()
    second = "lambda_ce" if name == "DiceCELoss" else "lambda_focal"
    check(theirs, name, input, labels(input), **FUSED, lambda_dice=factors[0], **{second: factors[1]}, **options)


@pytest.mark.parametrize("options", combinations(reduction="sum", weight=WEIGHT, include_background=False), ids=named)
@pytest.mark.parametrize("labelled", [True, False], ids=["labels", "channels"])
def test_label_smoothing(theirs: Any, labelled: bool, options: dict[str, Any]) -> None:
    input = logits()
    target = labels(input) if labelled else maps_for(input, soft=False).softmax(1)
    check(theirs, "DiceCELoss", input, target, softmax=True, to_onehot_y=labelled, label_smoothing=0.2, **options)


@pytest.mark.parametrize("labelled", [True, False], ids=["labels", "channels"])
@pytest.mark.parametrize("alpha", [None, 0.0, 0.25, 1, [0.5, 0.25, 1.0, 2.0]], ids=str)
@pytest.mark.parametrize("gamma", [0, 0.5, 1.0, 2.0, 3.0])
def test_focal_options(theirs: Any, gamma: float, alpha: Any, labelled: bool) -> None:
    input = logits()
    target = labels(input) if labelled else maps_for(input, soft=not isinstance(alpha, list))
    options = {"gamma": gamma, "alpha": alpha, "include_background": not isinstance(alpha, list)}
    check(theirs, "DiceFocalLoss", input, target, softmax=True, to_onehot_y=labelled, **options)


@pytest.mark.parametrize("options", combinations(include_background=False, batch=True, weight=WEIGHT), ids=named)
@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_no_reduction(theirs: Any, activation: str, options: dict[str, Any]) -> None:
    input = logits(SHAPES["volume"])
    options = {activation: True, **options}
    loss, _ = check(theirs, "DiceFocalLoss", input, labels(input), to_onehot_y=True, reduction="none", **options)
    assert loss.shape == (2, 4 if "include_background" in options else 5, *input.shape[2:])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weight", [2, 0.5, [0.5, 2.0, 1.0, 0.25, 3.0]], ids=str)
def test_focal_weights(theirs: Any, weight: Any, reduction: str) -> None:
    input = logits()
    check(theirs, "DiceFocalLoss", input, labels(input), **FUSED, weight=weight, reduction=reduction)


# ---- shapes, dtypes, hard values ----


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("options", [FUSED, {"sigmoid": True, "to_onehot_y": True}, {"softmax": True}], ids=named)
@pytest.mark.parametrize("name", LOSSES)
def test_dtypes(theirs: Any, name: str, options: dict, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    input = logits(shape, dtype)
    target = labels(input) if "to_onehot_y" in options else maps_for(input, soft=False)
    check(theirs, name, input, target, weight=WEIGHT.to(dtype), **options)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.float32], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_label_dtypes(name: str, dtype: torch.dtype) -> None:
    input, loss = logits(), getattr(monai, name)(**FUSED)
    torch.testing.assert_close(loss(input, labels(input).to(dtype)), loss(input, labels(input)), rtol=0, atol=0)


@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("smooth", [1e-5, 0.0])
@pytest.mark.parametrize("name", LOSSES)
def test_absent_classes(theirs: Any, name: str, smooth: float, batch: bool) -> None:
    input = logits()
    target = labels(input) % 2 * 3
    check(theirs, name, input, target, **FUSED, smooth_nr=smooth, smooth_dr=smooth, batch=batch)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", LOSSES)
def test_no_image(theirs: Any, name: str, reduction: str) -> None:
    input = logits((0, 5, 4, 3))
    loss, _ = check(theirs, name, input, labels(input), **FUSED, reduction=reduction)
    assert loss.isnan() == (reduction == "mean")


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("name", LOSSES)
def test_few_classes_without_background(theirs: Any, name: str, classes: int) -> None:
    input = logits((2, classes, 6, 7))
    weight = None if (name, classes) == ("DiceFocalLoss", 2) else WEIGHT[:classes]
    check(theirs, name, input, labels(input), **FUSED, include_background=False, weight=weight)


@pytest.mark.parametrize("options", [{}, {"sigmoid": True, "batch": True}], ids=named)
@pytest.mark.parametrize("name", LOSSES)
def test_one_channel(theirs: Any, name: str, options: dict[str, Any]) -> None:
    input = logits((2, 1, 6, 7))
    weight = torch.tensor([2.0]) if name == "DiceCELoss" else 2.0
    check(theirs, name, input, maps_for(input, soft=True), weight=weight, **options)


@pytest.mark.filterwarnings("ignore:single channel prediction")
@pytest.mark.parametrize("option", [{"softmax": True}, {"to_onehot_y": True}, {"include_background": False}], ids=named)
@pytest.mark.parametrize("name", LOSSES)
def test_warns_of_what_one_channel_ignores(theirs: Any, name: str, option: dict[str, bool]) -> None:
    input = logits((2, 1, 6, 7))
    with pytest.warns(UserWarning, match=rf"{named(option)}: ignored for an input of one channel"):
        check(theirs, name, input, maps_for(input, soft=False), **option)


# ---- machinery ----

EVERY: dict[str, tuple[str, dict[str, Any]]] = {
    "cross-entropy": ("DiceCELoss", {"weight": WEIGHT, "label_smoothing": 0.1, "jaccard": True}),
    "focal": ("DiceFocalLoss", {"weight": WEIGHT, "alpha": 0.25}),
    "focal-foreground": ("DiceFocalLoss", {"include_background": False, "batch": True}),
}


@pytest.mark.parametrize(("name", "options"), EVERY.values(), ids=EVERY)
def test_second_derivative(name: str, options: dict[str, Any]) -> None:
    input = logits((2, 5, 2, 3), torch.float64)
    loss = build(monai, name, {**FUSED, **options})
    function: Callable[[Tensor], Tensor] = lambda x: loss(x, labels(input))  # noqa: E731
    assert torch.autograd.gradcheck(function, input)
    assert torch.autograd.gradgradcheck(function, input)


@pytest.mark.parametrize(("name", "options"), EVERY.values(), ids=EVERY)
def test_compile(name: str, options: dict[str, Any]) -> None:
    torch.compiler.reset()
    input, loss = logits(), build(monai, name, {**FUSED, **options})
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(input, labels(input))
    eager = loss(input, labels(input))
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(*(torch.autograd.grad(each, input)[0] for each in (compiled, eager)))


@pytest.mark.filterwarnings("ignore")  # TorchScript is deprecated
@pytest.mark.parametrize("name", [*LOSSES, "DiceLoss", "FocalLoss"])
def test_script_is_the_originals(theirs: Any, name: str) -> None:
    weighted = name in ("DiceCELoss", "FocalLoss")  # the other originals with a weight don't run once scripted
    loss = copy.deepcopy(build(monai, name, {"weight": WEIGHT} if weighted else {}))
    input, target = logits(), maps_for(logits(), soft=False)
    torch.testing.assert_close(torch.jit.script(loss)(input, target), loss(input, target))


@pytest.mark.parametrize("name", LOSSES)
def test_memory_is_the_gradient(name: str) -> None:
    input, loss = make((1, 96, 400, 400), requires_grad=True), getattr(monai, name)(**FUSED)
    target = labels(input)
    grown = upsample_cases.peak_growth(lambda: torch.autograd.grad(loss(input, target), input))
    gradients = 1 if name == "DiceCELoss" else 2  # the other one's activations differ, and so do its two passes
    assert grown < (gradients + 0.5) * input.nbytes


REASONS = {
    "squared": ({**FUSED, "squared_pred": True}, "DiceLoss", "squared_pred=True needs"),
    "channels": ({"softmax": True}, "DiceLoss", "the target has a channel for each class"),
    "none": ({**FUSED, "reduction": "none"}, "FocalLoss", 'reduction="none" gives'),
}


@pytest.mark.parametrize(("options", "term", "reason"), REASONS.values(), ids=REASONS)
def test_fallback_is_said_once(
    caplog: pytest.LogCaptureFixture, options: dict[str, Any], term: str, reason: str
) -> None:
    _native.log_fallback.cache_clear()
    input, loss = logits(), monai.DiceFocalLoss(**options)
    for _ in range(2):
        loss(input, labels(input) if "to_onehot_y" in options else maps_for(input, soft=False))
        monai.DiceFocalLoss(**FUSED)(input, labels(input))
        monai.DiceFocalLoss(sigmoid=True)(input, maps_for(input, soft=False))
    (record,) = caplog.records
    assert record.getMessage().startswith(f"fastseg.losses.monai.{term} runs as plain PyTorch: {reason}")


def test_import_without_the_originals() -> None:
    script = "import sys, fastseg.losses; print({'monai', 'segmentation_models_pytorch'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert result.stdout == "set()\n"


# ---- errors ----

REFUSED_ARGUMENTS = {
    "reduction": ("DiceCELoss", {"reduction": "none"}, ValueError, "reduction: expected one of mean, sum, got 'none'"),
    "focal-reduction": ("DiceFocalLoss", {"reduction": "all"}, ValueError, "reduction: expected .*got 'all'"),
    "activations": ("DiceCELoss", {"sigmoid": True, "softmax": True}, ValueError, "sigmoid, softmax, other_act: "),
    "other-act": ("DiceCELoss", {"other_act": 3}, TypeError, "other_act: expected None or a callable, got int"),
    "lambda-dice": ("DiceFocalLoss", {"lambda_dice": -1.0}, ValueError, "lambda_dice: expected .*got -1.0"),
    "lambda-ce": ("DiceCELoss", {"lambda_ce": -1.0}, ValueError, "lambda_ce: expected .*got -1.0"),
    "lambda-focal": ("DiceFocalLoss", {"lambda_focal": -1.0}, ValueError, "lambda_focal: expected .*got -1.0"),
    "weight": ("DiceFocalLoss", {"weight": [-1.0, 1.0]}, ValueError, "weight: expected numbers of at least 0"),
}


@pytest.mark.parametrize(("name", "options", "error", "message"), REFUSED_ARGUMENTS.values(), ids=REFUSED_ARGUMENTS)
def test_refused_arguments(name: str, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        getattr(monai, name)(**options)


X, Y = torch.zeros(2, 5, 3, 4), torch.zeros(2, 1, 3, 4, dtype=torch.int64)
REFUSED = {
    "labels": ({}, (X, Y), ValueError, r"target: expected shape \(2, 5, 3, 4\).*labels need to_onehot_y=True"),
    "channels": (FUSED, (X, X), ValueError, r"target: expected shape \(2, 1, 3, 4\), got \(2, 5, 3, 4\)"),
    "rank": (FUSED, (X, Y[:, 0]), ValueError, r"target: expected shape \(2, 1, 3, 4\), got \(2, 3, 4\)"),
    "no-pixels": (FUSED, (X[:, :, 0, 0], Y[:, :, 0, 0]), ValueError, "input: expected .*with classes and pixels"),
    "integers": (FUSED, (X.long(), Y), TypeError, "input: expected float32.*got torch.int64"),
    "weight": ({**FUSED, "weight": WEIGHT[:3]}, (X, Y), ValueError, r"weight: expected .*\(3,\)"),
    "label": (FUSED, (X, Y + 5), IndexError, r"target: expected classes in \[0, 5\), got 5"),
    "plain-label": ({"to_onehot_y": True}, (X, Y - 1), IndexError, r"target: expected classes in \[0, 5\).*, got -1"),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(("options", "arguments", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(name: str, options: dict, arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build(monai, name, options)(*arguments)


def test_refused_alpha() -> None:
    with pytest.raises(ValueError, match=r"alpha: expected a number or 5 of them, got shape \(2,\)"):
        monai.DiceFocalLoss(**FUSED, alpha=[0.5, 0.5])(X, Y)


def test_refused_learned_weight() -> None:
    with pytest.raises(ValueError, match="weight: it has no gradient"):
        monai.DiceCELoss(**FUSED, weight=nn.Parameter(WEIGHT))(X, Y)


@pytest.mark.parametrize("target_dtype", [torch.float32, torch.bfloat16, torch.uint8], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_sigmoids_give_the_originals_dtype(
    theirs: Any, name: str, dtype: torch.dtype, target_dtype: torch.dtype
) -> None:
    input = logits(dtype=dtype)
    target = maps_for(input, soft=False).to(target_dtype)
    ours, original = (build(module, name, {"sigmoid": True})(input, target) for module in (monai, theirs))
    assert ours.dtype == original.dtype
