"""Runs from data to the best checkpoint."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastseg.data import ShapesDataset
from fastseg.training import ConfigError, DivergedError, load_checkpoint, train
from tests.training.runs import IGNORED, config


@pytest.fixture(autouse=True)
def _without_curves(request: pytest.FixtureRequest) -> None:
    """But for the test that looks at them."""
    if request.function is not test_training_learns:
        request.getfixturevalue("without_curves")


@pytest.mark.parametrize("model", ["fcn", "unet"])
def test_both_backends_train_alike(shapes: Path, tmp_path: Path, model: str) -> None:
    settings = {"model": model, "optimizer": "sgd", "epochs": 2}
    plain, fast = (
        train(config(shapes, tmp_path / backend, backend=backend, **settings)).epochs
        for backend in ("eager", "fastseg")
    )
    # float32 rounding, over 6 steps of SGD: each amplifies an error by no more than 1 + lr * curvature
    for one, other in zip(plain, fast, strict=True):
        assert one.train_loss == pytest.approx(other.train_loss, rel=1e-5)
        assert one.val_loss == pytest.approx(other.val_loss, rel=1e-5)


def test_channels_last_trains_alike(shapes: Path, tmp_path: Path) -> None:
    (plain,), (channels_last,) = (
        train(config(shapes, tmp_path / str(flag), optimizer="sgd", channels_last=flag)).epochs
        for flag in (False, True)
    )
    assert channels_last.val_loss == pytest.approx(plain.val_loss, rel=1e-5)


def test_training_learns(shapes: Path, tmp_path: Path) -> None:
    history = train(config(shapes, tmp_path, epochs=12, hflip=0.0))
    assert history.epochs[-1].train_loss < 0.8 * history.epochs[0].train_loss
    assert history.best.mean_iou == max(record.mean_iou for record in history.epochs)
    best = load_checkpoint(tmp_path / "best.safetensors")[1]
    assert best.history[-1] == history.best
    assert len((tmp_path / "history.jsonl").read_text().splitlines()) == 12
    with Image.open(tmp_path / "curves.png") as curves:
        assert curves.format == "PNG"


def test_a_run_takes_the_first_free_folder(shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = dataclasses.replace(config(shapes, tmp_path), out=None)
    assert [str(train(settings).out) for _ in range(2)] == ["runs/fcn", "runs/fcn-2"]


def test_a_run_is_not_overwritten(shapes: Path, tmp_path: Path) -> None:
    train(config(shapes, tmp_path))
    with pytest.raises(ConfigError, match="holds a run"):
        train(config(shapes, tmp_path))


def test_a_batch_without_labelled_pixels_is_named(tmp_path: Path) -> None:
    ShapesDataset(4, (32, 32)).write(tmp_path / "data")
    for path in (tmp_path / "data" / "masks").iterdir():
        Image.fromarray(np.full((32, 32), IGNORED, np.uint8)).save(path)
    with pytest.raises(DivergedError, match=r"epoch 1: the loss of step 1 is nan.*no labelled pixel"):
        train(config(tmp_path / "data", tmp_path / "run", classes=4))


def test_camvid_layout_brings_its_classes(tmp_path: Path) -> None:
    for split, folder in (("train", 3), ("val", 2)):
        images, masks = tmp_path / split, tmp_path / f"{split}annot"
        images.mkdir()
        masks.mkdir()
        for number in range(folder):
            labels = np.random.default_rng(number).integers(0, 12, (32, 32), dtype=np.uint8)  # 11 is ignored
            Image.fromarray(labels).save(masks / f"{number}.png")
            Image.fromarray(labels).convert("RGB").save(images / f"{number}.png")
    history = train(config(tmp_path, tmp_path / "run"))
    metadata = load_checkpoint(history.out / "last.ckpt")[1]
    assert (metadata.num_classes, metadata.ignore_index, metadata.class_names[0]) == (11, 11, "sky")
