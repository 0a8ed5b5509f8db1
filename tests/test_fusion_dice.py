"""torch.compile(..., backend="fastseg") on Dice losses that others wrote."""

from typing import Any

import losses_cases
import pytest
import torch
from fusion_cases import CLASSES, compiled, operators
from torch import Tensor

import fastseg
from fastseg.testing import assert_parity, make, make_labels, values_and_gradients

PIXELS = 2 * 24 * 32
OPTIONS = {
    "default": {},
    "ignored": {"ignore_index": 255},
    "ignored-class": {"ignore_index": 2, "smooth": 1.0},
    "log": {"log_loss": True, "smooth": 0.5, "classes": [1, 3]},
    "weights": {"class_weights": [0.5, 2.0, 1.0, 0.25, 3.0]},
    "tversky": {"alpha": 0.3, "beta": 0.7, "gamma": 1.5, "ignore_index": 255},
}


@pytest.fixture(scope="module")
def theirs() -> Any:
    return losses_cases.original("segmentation_models_pytorch.losses")


def tensors(dtype: torch.dtype = torch.float32, layout: str = "nchw", ignored: int | None = None) -> list[Tensor]:
    return [
        make((2, CLASSES, 24, 32), dtype, scale=3.0, layout=layout, requires_grad=True),
        make_labels((2, 24, 32), CLASSES, seed=2, ignore_index=ignored),
    ]


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_sums_of_the_softmax(theirs: Any, name: str, dtype: torch.dtype, layout: str) -> None:
    options = OPTIONS[name]
    loss = (theirs.TverskyLoss if name == "tversky" else theirs.DiceLoss)("multiclass", **options)
    fused, given = compiled(loss, fullgraph=True), tensors(dtype, layout, options.get("ignore_index"))
    actual, plain = (values_and_gradients(function, given) for function in (fused, loss))
    assert_parity(actual, plain, values_and_gradients(loss, given, torch.float64), terms=PIXELS)
    report = fastseg.report(fused)
    assert operators(report) == ["cross_entropy_dice"]
    assert report.saved_bytes >= 4 * given[0].nbytes
    assert not report.left


def test_dynamic_sizes_and_labels_with_a_channel(theirs: Any) -> None:
    loss = theirs.DiceLoss("multiclass", ignore_index=255)
    fused = compiled(loss, fullgraph=True)
    for images, *size in ((3, 16, 24), (2, 20, 12)):
        input, target = make((images, CLASSES, *size)), make_labels((images, 1, *size), CLASSES, ignore_index=255)
        for tensor in (input, target):
            for dimension in (0, 2, 3):
                torch._dynamo.mark_dynamic(tensor, dimension)
        torch.testing.assert_close(fused(input, target), loss(input, target))
    report = fastseg.report(fused)
    assert (operators(report), report.graphs) == (["cross_entropy_dice"], 1)


def test_with_inductor(theirs: Any) -> None:
    loss, given = theirs.DiceLoss("multiclass"), tensors()
    torch._dynamo.reset()
    fused = torch.compile(loss, backend="fastseg", fullgraph=True)
    torch.testing.assert_close(values_and_gradients(fused, given), values_and_gradients(loss, given))
    assert operators(fastseg.report(fused)) == ["cross_entropy_dice"]


def test_labels_outside_the_classes_are_refused(theirs: Any) -> None:
    input, target = tensors(ignored=255)
    for loss in (compiled(theirs.DiceLoss("multiclass")), theirs.DiceLoss("multiclass")):
        with pytest.raises((IndexError, RuntimeError), match=r"255|smaller than num_classes"):
            loss(input, target)


@pytest.mark.parametrize("options", [{"mode": "multilabel"}, {"mode": "multiclass", "from_logits": False}], ids=str)
def test_other_sums_stay(theirs: Any, options: dict[str, Any]) -> None:
    loss = theirs.DiceLoss(**options)
    input, target = tensors()
    probabilities = input.detach().softmax(1)
    if options["mode"] == "multilabel":
        target = torch.nn.functional.one_hot(target, CLASSES).permute(0, 3, 1, 2)
    fused = compiled(loss, fullgraph=True)
    assert torch.equal(fused(probabilities, target), loss(probabilities, target))
    report = fastseg.report(fused)
    assert (report.replaced, report.left) == ((), ())


def test_probabilities_used_elsewhere_stay(theirs: Any) -> None:
    """As by a loss of another kind on the same softmax, which is then in memory all the same."""

    def function(input: Tensor, target: Tensor) -> Tensor:
        probabilities = input.log_softmax(dim=1).exp()
        rows, labels = probabilities.reshape(2, CLASSES, -1), target.reshape(2, -1)
        one_hot = torch.nn.functional.one_hot(labels, CLASSES).permute(0, 2, 1)
        score = theirs._functional.soft_dice_score(rows, one_hot.type_as(rows), dims=(0, 2))
        return score * (one_hot.sum((0, 2)) > 0) + probabilities.amax()

    fused, given = compiled(function, fullgraph=True), tensors()
    assert torch.equal(fused(*given), function(*given))
    report = fastseg.report(fused)
    assert not report.replaced


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # TorchDynamo's own, at values between graphs
def test_monai_breaks_the_graph_before_the_sums() -> None:
    loss = losses_cases.original("monai.losses").DiceCELoss(to_onehot_y=True, softmax=True)
    input, target = tensors()
    fused = compiled(loss)
    torch.testing.assert_close(fused(input, target[:, None]), loss(input, target[:, None]))
    report = fastseg.report(fused)
    assert report.graphs > 1
    assert operators(report) == ["cross_entropy"]
