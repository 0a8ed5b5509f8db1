"""fastseg.losses.monai's region losses against MONAI's."""

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastseg.losses import monai
from fastseg.testing import make_labels
from tests.losses import cases as losses_cases
from tests.losses.cases import DTYPES, IGNORED, SHAPES, labels_for, logits, maps_for, signature
from tests.losses.test_monai import Precise

OPTIONS: dict[str, dict[str, Any]] = {
    "DiceLoss": {"jaccard": True, "weight": [0.5, 2.0, 1.0, 0.25, 3.0]},
    "TverskyLoss": {"alpha": 0.3, "beta": 0.7},
    "GeneralizedDiceLoss": {"w_type": "simple"},
}
ACTIVATIONS = {"softmax": {"softmax": True}, "sigmoid": {"sigmoid": True}, "none": {}}


@pytest.fixture(scope="module")
def theirs() -> Any:
    return losses_cases.original("monai.losses")


def check(theirs: Any, name: str, input: Tensor, target: Tensor, **options: Any) -> list[Tensor]:
    original: nn.Module = getattr(theirs, name)(**copy.deepcopy(options))
    module = losses_cases.original("monai.losses.tversky" if name == "TverskyLoss" else "monai.losses.dice")
    return losses_cases.check(getattr(monai, name)(**options), Precise(original, module), input, target)


@pytest.mark.parametrize("name", OPTIONS)
def test_signature(theirs: Any, name: str) -> None:
    ours, original = getattr(monai, name), getattr(theirs, name)
    parameters, expected = ([(each, kind) for each, kind, _ in signature(function)] for function in (ours, original))
    assert parameters == expected
    options = OPTIONS[name]
    assert ours(**options).state_dict().keys() == original(**options).state_dict().keys()


@pytest.mark.parametrize("ignore_index", [None, 2, IGNORED])
@pytest.mark.parametrize("changed", [False, True], ids=["default", "options"])
@pytest.mark.parametrize(("batch", "background"), list(itertools.product((False, True), repeat=2)))
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS)
@pytest.mark.parametrize("name", OPTIONS)
def test_labels(
    theirs: Any, name: str, activation: dict[str, bool], reduction: str, batch: bool, background: bool, changed: bool,
    ignore_index: int | None,
) -> None:  # fmt: skip
    options = {**activation, "to_onehot_y": True, "reduction": reduction, "batch": batch}
    if changed:
        options |= OPTIONS[name]
    if not background:
        options |= {"include_background": False, **({"weight": [2.0, 1.0, 0.25, 3.0]} if "weight" in options else {})}
    if ignore_index is not None:
        if name == "GeneralizedDiceLoss":
            pytest.skip("MONAI's has no ignore_index")
        options["ignore_index"] = ignore_index
    input = logits()
    check(theirs, name, input, labels_for(input, ignore_index=ignore_index).unsqueeze(1), **options)


@pytest.mark.parametrize("ignore_index", [None, 2, IGNORED])
@pytest.mark.parametrize("kind", ["masks", "hard", "soft", "soft_label"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS)
@pytest.mark.parametrize("name", OPTIONS)
def test_channels(
    theirs: Any, name: str, activation: dict[str, bool], dtype: torch.dtype, shape: tuple[int, ...], kind: str,
    ignore_index: int | None,
) -> None:  # fmt: skip
    input = logits(shape, dtype) if activation else losses_cases.probabilities(shape, dtype)
    options = {**activation, "soft_label": kind == "soft_label"}
    if name != "GeneralizedDiceLoss":
        options["ignore_index"] = ignore_index
    masks = make_labels(input.shape, 2).to(dtype)
    check(theirs, name, input, masks if kind == "masks" else maps_for(input, soft="soft" in kind), **options)


@pytest.mark.parametrize("ignore_index", [None, IGNORED])
@pytest.mark.parametrize("name", OPTIONS)
def test_one_channel(theirs: Any, name: str, ignore_index: int | None) -> None:
    input = logits((2, 1, 6, 7))
    options = {} if name == "GeneralizedDiceLoss" else {"ignore_index": ignore_index}
    masks = make_labels(input.shape, 2, torch.float32, ignore_index=ignore_index if options else None)
    check(theirs, name, input, masks, sigmoid=True, **options)


@pytest.mark.parametrize("squared_pred", [False, True])
@pytest.mark.parametrize("softmax", [False, True])
def test_squares(theirs: Any, softmax: bool, squared_pred: bool) -> None:
    input = logits()
    options = {"softmax": softmax, "sigmoid": not softmax, "squared_pred": squared_pred, "to_onehot_y": True}
    check(theirs, "DiceLoss", input, labels_for(input).unsqueeze(1), **options)


REFUSED = {
    "act": ({"other_act": 3}, TypeError, "other_act: expected None or a callable"),
    "acts": ({"sigmoid": True, "softmax": True}, ValueError, "sigmoid, softmax, other_act: expected at most one"),
    "reduction": ({"reduction": "average"}, ValueError, "reduction: expected one of"),
    "w_type": ({"w_type": "cubic"}, ValueError, "w_type: expected .*got 'cubic'"),
}


@pytest.mark.parametrize(("options", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        monai.GeneralizedDiceLoss(**options)
