"""cross_entropy beside its values: which calls are torch's own, other arguments' gradients, compiled, on two ranks."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fastseg
from fastseg import _native, functional, reference
from fastseg.ops import cross_entropy as operator
from fastseg.testing import make, make_labels, values_and_gradients
from tests.ops.cross_entropy_cases import check, labels_for, logits, probabilities_for
from tests.ranks import run_two_ranks

pytestmark = pytest.mark.usefixtures("kernels_for_small_logits")

ALGORITHMS = {
    "small": (make((64, 10)), make_labels((64,), 10), None, "plain"),
    "largest-small": (torch.zeros(16, 2048), torch.zeros(16).long(), torch.ones(2048), "plain"),
    "large": (torch.zeros(16, 2049), torch.zeros(16).long(), None, "kernel"),
    "bfloat16": (make((64, 10), torch.bfloat16), make_labels((64,), 10), None, "kernel"),
    "uint8-labels": (make((64, 10)), make_labels((64,), 10, torch.uint8), None, "kernel"),
    "probabilities": (make((64, 10)), make((64, 10)).softmax(1), None, "kernel"),
    "float64-weight": (make((64, 10)), make_labels((64,), 10), torch.ones(10).double(), "kernel"),
    "no-pixels": (make((0, 10)), make_labels((0,), 10), None, "kernel"),
}


@pytest.mark.parametrize(("input", "target", "weight", "algorithm"), ALGORITHMS.values(), ids=ALGORITHMS)
def test_small_logits_take_torchs_own_operator(
    input: Tensor, target: Tensor, weight: Tensor | None, algorithm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    assert operator.choose_algorithm(input, target, weight) == algorithm
    check(input.clone().requires_grad_(), target, weight, label_smoothing=0.1)


def test_label_outside_the_classes_of_small_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    with pytest.raises(IndexError, match=r"target: expected classes in \[0, 4\) .*, got 9$"):
        functional.cross_entropy(torch.zeros(3, 4), torch.tensor([0, 9, 1]))


@pytest.mark.parametrize("learned", ["target", "weight"])
def test_gradient_of_target_or_weight_takes_plain_pytorch(learned: str, caplog: pytest.LogCaptureFixture) -> None:
    _native.log_fallback.cache_clear()
    input = logits((2, 5, 6, 7))
    target, weight = probabilities_for(input), torch.rand(5)
    (target if learned == "target" else weight).requires_grad_()
    actual = values_and_gradients(functional.cross_entropy, [input, target, weight])
    assert len(actual) == 3
    torch.testing.assert_close(actual, values_and_gradients(reference.cross_entropy, [input, target, weight]))
    assert "another argument than its input needs a gradient" in caplog.text


def test_another_ignore_index_is_compiled_once() -> None:
    torch.compiler.reset()
    compiled = torch.compile(functional.cross_entropy, fullgraph=True, backend="aot_eager", dynamic=True)
    input = logits((2, 5, 6, 8))
    target = labels_for(input)
    compiled(input, target, ignore_index=3)
    compiled(input, target, ignore_index=2)  # from here on a number that may change
    with torch._dynamo.config.patch(error_on_recompile=True):
        actual = values_and_gradients(compiled, [input, target], ignore_index=4)
    torch.testing.assert_close(actual, values_and_gradients(functional.cross_entropy, [input, target], ignore_index=4))


# ---- two processes ----


class Classifier(nn.Module):
    """A convolution and the loss."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.classifier = nn.Conv2d(3, 5, 1)
        self.loss = loss

    def forward(self, images: Tensor, target: Tensor) -> Tensor:
        return self.loss(self.classifier(images), target)


def gradients(model: nn.Module, images: Tensor, target: Tensor) -> list[Tensor]:
    model.zero_grad()
    model(images, target).backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


def train_one_step(rank: int) -> None:
    """One rank: its gradients after DistributedDataParallel's average must be plain PyTorch's."""
    operator.PLAIN_MAX_LOGITS = 0  # a process of its own, without the fixture
    images, target = make((2, 3, 8, 8), seed=rank), make_labels((2, 8, 8), 5, seed=rank)
    target[:, : 1 + 5 * rank] = 255  # the ranks differ in their numbers of valid pixels
    mine, plain = (
        gradients(DistributedDataParallel(Classifier(loss)), images, target)
        for loss in (fastseg.CrossEntropyLoss(ignore_index=255), nn.CrossEntropyLoss(ignore_index=255))
    )
    torch.testing.assert_close(mine, plain)
    first = [gradient.clone() for gradient in mine]
    for gradient in first:
        torch.distributed.broadcast(gradient, 0)
    torch.testing.assert_close(mine, first, rtol=0, atol=0)


def test_two_ranks_with_different_numbers_of_valid_pixels(tmp_path: Path) -> None:
    run_two_ranks(train_one_step, tmp_path)
