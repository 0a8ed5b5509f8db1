"""Settings that a run can't have."""

from pathlib import Path

import pytest
import torch

from fastseg.data import DataError, ShapesDataset
from fastseg.training import ConfigError, TrainConfig, load_checkpoint, train
from tests.training.runs import config

pytestmark = pytest.mark.usefixtures("without_curves")


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


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_device_is_named(shapes: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="torch sees no CUDA device"):
        train(config(shapes, tmp_path, device="cuda"))


def test_settings_that_cannot_be_used_leave_no_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        train(config(tmp_path / "missing", tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_images_of_different_sizes_need_a_size(tmp_path: Path) -> None:
    data = tmp_path / "data"
    ShapesDataset(8, (32, 32)).write(data)
    ShapesDataset(4, (32, 40)).write(data)
    with pytest.raises(DataError, match="images of different sizes"):
        train(config(data, tmp_path / "run", batch_size=9))
    history = train(config(data, tmp_path / "run2", size=(24, 28)))
    assert load_checkpoint(history.out / "last.ckpt")[1].size == (24, 28)
