"""fastseg.losses.monai.FocalLoss against MONAI's."""

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from fastseg import _native
from fastseg.losses import monai
from fastseg.testing import make, make_labels
from tests.losses import cases as losses_cases
from tests.losses.cases import DTYPES, IGNORED, SHAPES, labels_for, logits, maps_for, signature
from tests.losses.test_monai import Precise
from tests.ops import upsample_cases

WEIGHT = [0.5, 2.0, 1.0, 0.25, 3.0]
FACTORS: dict[str, dict[str, Any]] = {
    "plain": {},
    "alpha": {"alpha": 0.25},
    "alphas": {"alpha": WEIGHT},
    "weight": {"weight": 2.0},
    "both": {"alpha": 0.7, "weight": WEIGHT},
}
REDUCTIONS = ("mean", "sum", "none")


@pytest.fixture(scope="module")
def theirs() -> Any:
    return losses_cases.original("monai.losses.focal_loss")


def check(theirs: Any, input: Tensor, target: Tensor, **options: Any) -> list[Tensor]:
    original = theirs.FocalLoss(**copy.deepcopy(options))
    return losses_cases.check(monai.FocalLoss(**options), Precise(original, theirs), input, target)


def foreground(options: dict[str, Any]) -> dict[str, Any]:
    """Options for the classes but the first."""
    counting = {name: value[1:] if isinstance(value, list) else value for name, value in options.items()}
    return {**counting, "include_background": False}


def test_signature(theirs: Any) -> None:
    assert signature(monai.FocalLoss) == signature(theirs.FocalLoss)
    assert signature(monai.FocalLoss.forward) == signature(theirs.FocalLoss.forward)
    ours, original = (module.FocalLoss(weight=WEIGHT).state_dict() for module in (monai, theirs))
    torch.testing.assert_close(dict(ours), dict(original), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:.*alpha.* (is )?ignored")
@pytest.mark.parametrize("ignore_index", [None, 0, 2, IGNORED])
@pytest.mark.parametrize("background", [True, False], ids=["all", "foreground"])
@pytest.mark.parametrize("factors", FACTORS.values(), ids=FACTORS)
@pytest.mark.parametrize(("use_softmax", "reduction"), list(itertools.product((False, True), REDUCTIONS)))
def test_labels(
    theirs: Any, use_softmax: bool, reduction: str, factors: dict[str, Any], background: bool, ignore_index: int | None
) -> None:
    input = logits()
    target = labels_for(input, ignore_index=ignore_index).unsqueeze(1)
    options = {"to_onehot_y": True, "use_softmax": use_softmax, "reduction": reduction, "ignore_index": ignore_index}
    check(theirs, input, target, **options, **(factors if background else foreground(factors)))


@pytest.mark.parametrize("ignore_index", [None, 2, IGNORED])
@pytest.mark.parametrize("kind", ["integer", "hard", "soft"])
@pytest.mark.parametrize("factors", FACTORS.values(), ids=FACTORS)
@pytest.mark.parametrize(("use_softmax", "reduction"), list(itertools.product((False, True), REDUCTIONS)))
def test_channels(
    theirs: Any, use_softmax: bool, reduction: str, factors: dict[str, Any], kind: str, ignore_index: int | None
) -> None:
    input = logits()
    target = make_labels(input.shape, 2) if kind == "integer" else maps_for(input, soft=kind == "soft")
    options = {"use_softmax": use_softmax, "reduction": reduction, "ignore_index": ignore_index}
    check(theirs, input, target, **options, **factors)


@pytest.mark.parametrize("gamma", [-0.5, 0, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("labelled", [True, False], ids=["labels", "channels"])
@pytest.mark.parametrize("use_softmax", [False, True])
def test_gamma(theirs: Any, use_softmax: bool, labelled: bool, gamma: float) -> None:
    input = logits()
    target = labels_for(input).unsqueeze(1) if labelled else maps_for(input, soft=False)
    check(theirs, input, target, to_onehot_y=labelled, use_softmax=use_softmax, gamma=gamma)


@pytest.mark.parametrize("shape", [(2, 5), *SHAPES.values()], ids=["vectors", *SHAPES])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("labelled", [True, False], ids=["labels", "channels"])
@pytest.mark.parametrize("use_softmax", [False, True])
def test_dtypes(theirs: Any, use_softmax: bool, labelled: bool, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    input = logits(shape, dtype)
    target = labels_for(input).unsqueeze(1) if labelled else maps_for(input, soft=False)
    check(theirs, input, target, to_onehot_y=labelled, use_softmax=use_softmax, alpha=0.25, weight=WEIGHT)


@pytest.mark.parametrize("ignore_index", [None, IGNORED])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_one_channel(theirs: Any, soft: bool, reduction: str, ignore_index: int | None) -> None:
    input = logits((2, 1, 6, 7))
    target = maps_for(input, soft)
    if ignore_index is not None:
        target[:, :, 2:4] = ignore_index
    check(theirs, input, target, alpha=0.25, reduction=reduction, ignore_index=ignore_index, weight=2.0)


@pytest.mark.parametrize("use_softmax", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_nothing_counts(theirs: Any, reduction: str, use_softmax: bool) -> None:
    input = logits()
    target = torch.full((2, 1, *input.shape[2:]), IGNORED)
    options = {"reduction": reduction, "use_softmax": use_softmax, "ignore_index": IGNORED, "to_onehot_y": True}
    loss, gradient = check(theirs, input, target, **options)
    assert loss == 0
    assert gradient.count_nonzero() == 0


@pytest.mark.parametrize("use_softmax", [False, True])
@pytest.mark.parametrize("background", [True, False], ids=["all", "foreground"])
def test_machinery(use_softmax: bool, background: bool) -> None:
    input = logits((2, 4, 2, 3), torch.float64)
    loss = monai.FocalLoss(background, to_onehot_y=True, weight=0.5, use_softmax=use_softmax, ignore_index=IGNORED)
    target = labels_for(input, ignore_index=IGNORED).unsqueeze(1)
    assert torch.autograd.gradcheck(lambda x: loss(x, target), input)
    assert torch.autograd.gradgradcheck(lambda x: loss(x, target), input)
    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(input, target)
    torch.testing.assert_close(compiled, loss(input, target))


@pytest.mark.parametrize("use_softmax", [False, True])
def test_memory_is_the_gradient(use_softmax: bool) -> None:
    input, loss = make((1, 96, 400, 400), requires_grad=True), monai.FocalLoss(
        to_onehot_y=True, use_softmax=use_softmax
    )  # fmt: skip
    target = labels_for(input).unsqueeze(1)
    grown = upsample_cases.peak_growth(lambda: torch.autograd.grad(loss(input, target), input))
    assert grown < 1.5 * input.nbytes


FALLBACKS: dict[str, tuple[dict[str, Any], bool, str]] = {
    "none": ({"reduction": "none"}, False, 'reduction="none" gives'),
    "gamma": ({"gamma": -1.0}, False, "gamma < 0"),
    "channels": ({"use_softmax": True}, False, "the target has a channel for each class"),
    "ignored": ({"ignore_index": 1}, False, "ignore_index with a target"),
    "shares": ({"alpha": 0.25}, True, "alpha with a target between 0 and 1"),
}


@pytest.mark.parametrize(("options", "soft", "reason"), FALLBACKS.values(), ids=FALLBACKS)
def test_fallback_is_said_once(
    caplog: pytest.LogCaptureFixture, options: dict[str, Any], soft: bool, reason: str
) -> None:
    _native.log_fallback.cache_clear()
    input = logits()
    for _ in range(2):
        monai.FocalLoss(**options)(input, maps_for(input, soft))
        monai.FocalLoss(alpha=0.25)(input, maps_for(input, soft=False))
        monai.FocalLoss()(input, maps_for(input, soft=True))
    (record,) = caplog.records
    assert record.getMessage().startswith(f"fastseg.losses.monai.FocalLoss runs as plain PyTorch: {reason}")


def test_warns_of_an_alpha_without_meaning() -> None:
    input = logits()
    with pytest.warns(UserWarning, match="alpha: one number is ignored for a softmax without the background"):
        monai.FocalLoss(False, True, alpha=0.25, use_softmax=True)(input, labels_for(input).unsqueeze(1))


X, Y = torch.zeros(2, 5, 3, 4), torch.zeros(2, 1, 3, 4, dtype=torch.int64)
REFUSED: dict[str, tuple[dict[str, Any], tuple[Tensor, Tensor], type[Exception], str]] = {
    "labels": ({}, (X, Y), ValueError, r"target: expected shape \(2, 5, 3, 4\).*labels need to_onehot_y=True"),
    "alpha": ({"alpha": [0.5, 0.5]}, (X, X), ValueError, r"alpha: expected a number or 5 of them, got shape \(2,\)"),
    "weight": ({"weight": [1.0, 1.0]}, (X, X), ValueError, r"weight: expected .*\(2,\)"),
    "label": ({"to_onehot_y": True}, (X, Y + 5), IndexError, r"expected classes in \[0, 5\), got 5"),
    "softmax-label": (
        {"to_onehot_y": True, "use_softmax": True}, (X, Y - 1), IndexError, r"expected classes in \[0, 5\).*, got -1",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("options", "arguments", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(options: dict[str, Any], arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        monai.FocalLoss(**options)(*arguments)
