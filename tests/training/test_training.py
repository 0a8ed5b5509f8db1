import dataclasses
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("PIL", reason="Pillow isn't installed: it comes with the extra [train]")
pytest.importorskip("safetensors", reason="safetensors isn't installed: it comes with the extra [train]")
from PIL import Image

from fastseg import metrics
from fastseg.data import (
    DataError,
    MaskDataset,
    Normalize,
    ShapesDataset,
    class_frequencies,
    class_weights,
    find_pairs,
)
from fastseg.training import (
    ConfigError,
    DivergedError,
    SegmentationData,
    SegmentationTask,
    TrainConfig,
    evaluate,
    load_checkpoint,
    run,
    train,
    trainer,
)
from fastseg.training.checkpoint import read_state
from fastseg.training.losses import Loss, mean_squared_error

IGNORED = 255


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve images of 32x32 pixels; every other mask has ignored pixels, so that batches count differently."""
    root = tmp_path_factory.mktemp("shapes")
    ShapesDataset(12, (32, 32)).write(root)
    for path in sorted((root / "masks").iterdir())[::2]:
        with Image.open(path) as file:
            labels = np.array(file)
        labels[:16, :20] = IGNORED
        Image.fromarray(labels).save(path)
    return root


@pytest.fixture(autouse=True)
def _no_curves(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes ten times as long as these runs; the test that looks at the curves has them drawn."""
    if request.function is not test_training_learns:
        monkeypatch.setattr(run, "save_history", lambda *_: None)


def config(data: Path, out: Path, **settings: object) -> TrainConfig:
    """A run of seconds: 9 training and 3 validation images."""
    given = {"epochs": 1, "batch_size": 4, "lr": 0.01, "widths": (4, 8), "val_fraction": 0.25, "device": "cpu"}
    return TrainConfig(data=data, out=out, **(given | settings))


def tensors_of(value: object, name: str = "") -> dict[str, Tensor]:
    """The tensors anywhere in what a checkpoint holds."""
    if isinstance(value, Tensor):
        return {name: value}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return {key: tensor for part, item in items for key, tensor in tensors_of(item, f"{name}.{part}").items()}


def equal(first: Path, second: Path) -> bool:
    """Whether two runs ended with the same tensors of network, optimizer and schedule, bit by bit."""
    parts = ("state_dict", "optimizer_states", "lr_schedulers", "current_model_state")
    tensors, others = (
        tensors_of({part: state.get(part) for part in parts}) for state in map(read_state, (first, second))
    )
    assert len(tensors) > len(load_checkpoint(first)[0].state_dict())
    return tensors.keys() == others.keys() and all(torch.equal(tensors[name], others[name]) for name in tensors)


def without_times(history: tuple) -> list[dict]:
    return [{**dataclasses.asdict(record), "seconds": 0, "images_per_second": 0} for record in history]


def validation_split(checkpoint: Path, data: Path) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, prediction and masks of the whole validation split, in one batch."""
    model, metadata = load_checkpoint(checkpoint)
    pairs = find_pairs(data, "val", val_fraction=metadata.config.val_fraction)
    images, masks = map(torch.stack, zip(*MaskDataset(pairs), strict=True))
    images = Normalize()(images)
    with torch.no_grad():
        return model.model(images), model.predict(images), masks.long()


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(shapes: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(config(shapes, tmp_path / name, seed=seed, hflip=0.5, vflip=0.5, rotation=20.0))
    assert equal(tmp_path / "a" / "last.ckpt", tmp_path / "b" / "last.ckpt")
    assert not equal(tmp_path / "a" / "last.ckpt", tmp_path / "c" / "last.ckpt")


RESUMED = {
    **{optimizer: {"optimizer": optimizer, "weight_decay": 0.01} for optimizer in ("sgd", "adam", "adamw")},
    "average": {"ema": 0.9},
    "warm-up": {"warmup": 0.5, "clip": 0.1, "accumulate": 2},
    "crops": {"scale": (0.5, 2.0), "crop": (24, 20), "jitter": 0.3, "loss": "ce+dice"},
}


@pytest.mark.parametrize("settings", RESUMED.values(), ids=RESUMED)
def test_a_resumed_run_equals_an_uninterrupted_one(shapes: Path, tmp_path: Path, settings: dict) -> None:
    settings = {"rotation": 20.0, **settings}
    whole = train(config(shapes, tmp_path / "whole", epochs=3, **settings))
    train(config(shapes, tmp_path / "parts", epochs=1, **settings))
    for epochs in (2, 3):
        parts = train(config(shapes, tmp_path / "parts", epochs=epochs, resume=True, **settings))
    assert equal(tmp_path / "whole" / "last.ckpt", tmp_path / "parts" / "last.ckpt")
    assert without_times(parts.epochs) == without_times(whole.epochs)
    assert parts.best.epoch == whole.best.epoch


@pytest.mark.parametrize("schedule", ["poly", "cosine", "onecycle"])
def test_an_interrupted_epoch_starts_again(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, schedule: str
) -> None:
    settings = {"epochs": 2, "schedule": schedule}
    train(config(shapes, tmp_path / "whole", **settings))

    def interrupt(task: SegmentationTask, batch: object, batch_idx: int) -> Tensor:
        if (task.current_epoch, batch_idx) == (1, 1):
            raise KeyboardInterrupt
        return training_step(task, batch, batch_idx)

    training_step = SegmentationTask.training_step
    with monkeypatch.context() as patched:
        patched.setattr(SegmentationTask, "training_step", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(config(shapes, tmp_path / "parts", **settings))
    assert load_checkpoint(tmp_path / "parts" / "last.ckpt")[1].epoch == 1
    train(config(shapes, tmp_path / "parts", resume=True, **settings))
    assert equal(tmp_path / "whole" / "last.ckpt", tmp_path / "parts" / "last.ckpt")


def test_a_run_that_ended_before_its_first_epoch_starts_again(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(config(shapes, tmp_path / "whole"))
    with monkeypatch.context() as patched:
        patched.setattr(SegmentationTask, "validation_step", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(config(shapes, tmp_path / "parts"))
    train(config(shapes, tmp_path / "parts", resume=True))
    assert equal(tmp_path / "whole" / "last.ckpt", tmp_path / "parts" / "last.ckpt")


def test_the_best_weights_stay_the_best_in_a_folder_that_moved(shapes: Path, tmp_path: Path) -> None:
    settings = {"lr": 0.05}
    best = train(config(shapes, tmp_path / "run", epochs=6, **settings)).best
    (tmp_path / "run").rename(tmp_path / "moved")
    after = train(config(shapes, tmp_path / "moved", epochs=7, resume=True, **settings))
    assert load_checkpoint(tmp_path / "moved" / "best.safetensors")[1].history[-1] == after.best
    assert after.best.mean_iou >= best.mean_iou


def test_resuming_a_finished_run_changes_nothing(shapes: Path, tmp_path: Path) -> None:
    first = train(config(shapes, tmp_path))
    content = (tmp_path / "last.ckpt").read_bytes()
    assert train(config(shapes, tmp_path, resume=True)) == first
    assert (tmp_path / "last.ckpt").read_bytes() == content


def test_loading_processes_change_nothing(shapes: Path, tmp_path: Path) -> None:
    train(config(shapes, tmp_path / "none", workers=0, rotation=20.0))
    train(config(shapes, tmp_path / "one", workers=1, rotation=20.0))
    assert equal(tmp_path / "none" / "last.ckpt", tmp_path / "one" / "last.ckpt")


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


def test_settings_that_cannot_be_used_leave_no_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        train(config(tmp_path / "missing", tmp_path / "run"))
    assert not (tmp_path / "run").exists()


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


def test_a_diverging_run_keeps_its_last_good_checkpoint(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(config(shapes, tmp_path))
    content = (tmp_path / "last.ckpt").read_bytes()

    def diverge(task: SegmentationTask) -> None:
        task.network.model.classifier.bias.data.fill_(float("inf"))

    monkeypatch.setattr(SegmentationTask, "on_validation_start", diverge)
    with pytest.raises(DivergedError, match="epoch 2: weights are not finite"):
        train(config(shapes, tmp_path, epochs=2, resume=True))
    assert (tmp_path / "last.ckpt").read_bytes() == content


def test_a_batch_without_labelled_pixels_is_named(tmp_path: Path) -> None:
    ShapesDataset(4, (32, 32)).write(tmp_path / "data")
    for path in (tmp_path / "data" / "masks").iterdir():
        Image.fromarray(np.full((32, 32), IGNORED, np.uint8)).save(path)
    with pytest.raises(DivergedError, match=r"epoch 1: the loss of step 1 is nan.*no labelled pixel"):
        train(config(tmp_path / "data", tmp_path / "run", classes=4))


def test_images_of_different_sizes_need_a_size(tmp_path: Path) -> None:
    data = tmp_path / "data"
    ShapesDataset(8, (32, 32)).write(data)
    ShapesDataset(4, (32, 40)).write(data)
    with pytest.raises(DataError, match="images of different sizes"):
        train(config(data, tmp_path / "run", batch_size=9))
    history = train(config(data, tmp_path / "run2", size=(24, 28)))
    assert load_checkpoint(history.out / "last.ckpt")[1].size == (24, 28)


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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, but it is 0"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"lr": float("nan")}, "lr must be positive"),
        ({"epochs": 1.5}, "epochs must be int, but it is 1.5"),
        ({"lr": "fast"}, "lr must be float or one of auto, but it is 'fast'"),
        ({"size": [24, 24]}, r"size must be tuple\[int, int\] or None, but it is \[24, 24\]"),
        ({"loss": "l1"}, "loss must be one of ce, mse, dice, ce\\+dice, focal, but it is 'l1'"),
        ({"model": "vgg"}, "model must be fcn, unet, smp:NAME.*, but it is 'vgg'"),
        ({"encoder": "resnet18"}, "encoder is for the networks of smp, but model is fcn"),
        ({"loss": "focal", "label_smoothing": 0.1}, "label_smoothing must be 0 with loss focal"),
        ({"loss": "dice", "class_weights": "median"}, "class_weights must be none with loss dice"),
        ({"schedule": "onecycle", "warmup": 1.0}, "warmup must be 0 with schedule onecycle"),
        ({"scale": (2.0, 0.5)}, "scale must be two positive numbers"),
        ({"crop": (0, 5)}, "crop must be two positive numbers"),
        ({"clip": 0.0}, "clip must be positive"),
        ({"momentum": 1.5}, r"momentum must be in \[0, 1\], but it is 1.5"),
        ({"val_fraction": 0.0}, "val_fraction must be more than 0"),
        ({"val_fraction": 0.5, "test_fraction": 0.5}, "must leave something to train on"),
        ({"loss": "mse", "class_weights": "median"}, "class_weights must be none with loss mse"),
        ({"loss": "mse", "label_smoothing": 0.1}, "label_smoothing must be 0 with loss mse"),
        ({"widths": ()}, "widths must be positive"),
        ({"model": "unet", "widths": (4,)}, "widths must be at least two numbers for unet"),
        ({"size": (0, 32)}, "size must be two positive numbers"),
        ({"ignore_index": 70000}, "ignore_index must be at most 65535"),
        ({"resume": True, "out": None}, "resume needs out"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_setting_out_of_range_is_named(tmp_path: Path, settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**({"data": tmp_path, "out": tmp_path} | settings))


def test_a_size_too_small_for_the_network_is_named(shapes: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="size must be at least 4x4 for these widths, but it is 3x8"):
        train(config(shapes, tmp_path, size=(3, 8)))
    with pytest.raises(ConfigError, match="crop must be at least 4x4"):
        train(config(shapes, tmp_path, crop=(8, 2)))


def test_another_setting_does_not_continue_a_run(shapes: Path, tmp_path: Path) -> None:
    train(config(shapes, tmp_path))
    with pytest.raises(ConfigError, match=r"batch_size must be 4 as in the run to continue, but it is 2"):
        train(config(shapes, tmp_path, resume=True, batch_size=2))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_device_is_named(shapes: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="torch sees no CUDA device"):
        train(config(shapes, tmp_path, device="cuda"))
