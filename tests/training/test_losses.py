"""The losses of a training: plain PyTorch's, of a whole split, and with class weights."""

from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastseg import metrics
from fastseg.data import MaskDataset, Normalize, class_frequencies, class_weights, find_pairs
from fastseg.training import SegmentationData, SegmentationTask, evaluate, load_checkpoint, train, trainer
from fastseg.training.losses import Loss, mean_squared_error
from tests.training.runs import IGNORED, config

pytestmark = pytest.mark.usefixtures("without_curves")


def validation_split(checkpoint: Path, data: Path) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, prediction and masks of the whole validation split, in one batch."""
    model, metadata = load_checkpoint(checkpoint)
    pairs = find_pairs(data, "val", val_fraction=metadata.config.val_fraction)
    images, masks = map(torch.stack, zip(*MaskDataset(pairs), strict=True))
    images = Normalize()(images)
    with torch.no_grad():
        return model.model(images), model.predict(images), masks.long()


@pytest.mark.parametrize("batch_size", [1, 2, 3])
@pytest.mark.parametrize("weighting", ["none", "median"])
def test_the_loss_of_a_split_is_that_of_one_batch(
    shapes: Path, tmp_path: Path, weighting: str, batch_size: int
) -> None:
    train(config(shapes, tmp_path, class_weights=weighting, label_smoothing=0.1))
    checkpoint = tmp_path / "best.safetensors"
    weights = load_checkpoint(checkpoint)[1].class_weights
    logits, prediction, masks = validation_split(checkpoint, shapes)
    expected = F.cross_entropy(
        logits.double(),
        masks,
        None if weights is None else torch.tensor(weights, dtype=torch.float64),
        ignore_index=IGNORED,
        label_smoothing=0.1,
    )
    (loss, scores), _ = evaluate(checkpoint, shapes, batch_size=batch_size, device="cpu")
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    expected = metrics.scores(metrics.confusion_matrix(prediction, masks, 4, IGNORED))
    for found, wanted in zip(scores, expected, strict=True):
        assert found == pytest.approx(wanted, rel=0, abs=0, nan_ok=True)


@pytest.mark.parametrize("kind", ["ce", "mse", "dice", "ce+dice", "focal"])
def test_evaluation_runs_the_network_once(shapes: Path, tmp_path: Path, kind: str) -> None:
    model, _ = load_checkpoint(train(config(shapes, tmp_path)).out / "last.ckpt")
    batch = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8), torch.randint(4, (2, 32, 32))
    expected = Loss(model, kind, IGNORED)(model.logits(Normalize()(batch[0])), batch[1]).item()
    seen = []
    model.model.classifier.register_forward_hook(lambda *_: seen.append(1))
    task = SegmentationTask(model, loss=kind)
    data = SegmentationData(None, [(image, mask) for image, mask in zip(*batch, strict=True)])
    with trainer.quiet_lightning():
        trainer.new_trainer("cpu").validate(task, data, verbose=False)
    assert len(seen) == 1
    assert task.evaluation.loss == pytest.approx(expected, rel=1e-6)  # float32, and a product and a quotient in float64


@pytest.mark.parametrize("kind", ["ce", "mse", "dice", "ce+dice", "focal"])
def test_every_loss_is_that_of_plain_pytorch_and_trains(shapes: Path, tmp_path: Path, kind: str) -> None:
    first, *_, last = train(config(shapes, tmp_path, loss=kind, epochs=6)).epochs
    assert last.train_loss < first.train_loss
    images, masks = torch.randn(2, 3, 24, 20), torch.randint(4, (2, 24, 20))
    masks[:, :5] = IGNORED
    values = []
    for backend in ("fastseg", "eager"):
        network, _ = load_checkpoint(tmp_path / "best.safetensors", backend=backend)
        values.append(Loss(network, kind, IGNORED)(network.logits(images), masks))
    torch.testing.assert_close(*values)


@pytest.mark.parametrize("method", ["inverse", "median"])
def test_class_weights_come_from_the_training_split(shapes: Path, tmp_path: Path, method: str) -> None:
    settings = config(shapes, tmp_path, class_weights=method)
    train(settings)
    metadata = load_checkpoint(tmp_path / "last.ckpt")[1]
    split = settings.dataset("train", None, 4)
    labels = [Counter(split[index][1].flatten().tolist()) for index in range(len(split))]
    counts = class_frequencies(labels, 4, IGNORED)
    assert metadata.class_weights == tuple(class_weights(*counts, method).tolist())


def test_the_network_trains_on_class_weights(shapes: Path, tmp_path: Path) -> None:
    model, _ = load_checkpoint(train(config(shapes, tmp_path)).out / "last.ckpt")
    images, masks = torch.randn(2, 3, 32, 32), torch.randint(4, (2, 32, 32))
    weights = torch.tensor([1.0, 0.0, 5.0, 0.5])
    loss = Loss(model, "ce", IGNORED, weights)(model.logits(images), masks)
    torch.testing.assert_close(loss, F.cross_entropy(model.model(images), masks, weights))


def test_mean_squared_error_is_that_of_the_labelled_pixels() -> None:
    logits = torch.randn(2, 5, 4, 3, dtype=torch.float64, requires_grad=True)
    target = torch.randint(5, (2, 4, 3))
    target[0, :2] = IGNORED
    counted = target != IGNORED
    probabilities = logits.softmax(1).movedim(1, -1)[counted]
    expected = F.mse_loss(probabilities, F.one_hot(target[counted], 5).double())
    loss = mean_squared_error(logits, target, IGNORED)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(value, logits)[0] for value in (loss, expected)))


def test_mean_squared_error_trains(shapes: Path, tmp_path: Path) -> None:
    first, *_, last = train(config(shapes, tmp_path, loss="mse", epochs=8)).epochs
    assert last.train_loss < first.train_loss
    (loss, _), _ = evaluate(tmp_path / "last.ckpt", shapes, device="cpu")
    assert loss == pytest.approx(last.val_loss, rel=1e-6)
