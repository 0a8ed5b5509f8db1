"""What makes a run what it is: its seed, and nothing of how often it was interrupted and resumed."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastseg.training import ConfigError, DivergedError, SegmentationTask, load_checkpoint, train
from fastseg.training.checkpoint import read_state
from tests.training.runs import config

pytestmark = pytest.mark.usefixtures("without_curves")


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


def test_another_setting_does_not_continue_a_run(shapes: Path, tmp_path: Path) -> None:
    train(config(shapes, tmp_path))
    with pytest.raises(ConfigError, match=r"batch_size must be 4 as in the run to continue, but it is 2"):
        train(config(shapes, tmp_path, resume=True, batch_size=2))
