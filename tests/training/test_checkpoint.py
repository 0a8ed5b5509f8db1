import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("PIL", reason="Pillow isn't installed: it comes with the extra [train]")
pytest.importorskip("safetensors", reason="safetensors isn't installed: it comes with the extra [train]")
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fastseg import models
from fastseg.training import CheckpointError, EpochRecord, Metadata, TrainConfig, load_checkpoint, save_checkpoint
from fastseg.training.checkpoint import load_training_state, write_atomically
from fastseg.training.networks import complete_arguments


def make_metadata(model: str = "fcn", **changes: object) -> Metadata:
    record = EpochRecord(1, 0.1, 0.2, 1 / 3, 0.4, (0.4, None, 2 / 3), 1.5, 7.25)
    fields = {
        "model": model,
        "arguments": complete_arguments(model, num_classes=3, widths=(4, 8)),
        "class_names": ("sky", "tree", "road"),
        "ignore_index": 255,
        "mean": (0.1, 0.2, 0.3),
        "std": (1.0, 1.1, 1.2),
        "size": (24, 32),
        "class_weights": (0.1, 2.5, 1 / 3),
        "config": TrainConfig(data=Path("data"), size=(24, 32), widths=(4, 8), model=model),
        "history": (record,),
    }
    return Metadata(**(fields | changes))


def trained(model: str = "fcn") -> tuple[models.SegmentationModel, torch.optim.Optimizer]:
    network = getattr(models, {"fcn": "FCN", "unet": "UNet"}[model])(num_classes=3, widths=(4, 8))
    optimizer = torch.optim.Adam(network.parameters())
    network.loss(torch.randn(1, 3, 8, 8), torch.zeros(1, 8, 8, dtype=torch.uint8)).backward()
    optimizer.step()
    return network, optimizer


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    network, optimizer = trained()
    save_checkpoint(tmp_path / "run.safetensors", network, make_metadata(), optimizer)
    return tmp_path / "run.safetensors"


@pytest.mark.parametrize("backend", ["fastseg", "plain"])
@pytest.mark.parametrize("model", ["fcn", "unet"])
def test_a_checkpoint_brings_back_network_and_metadata(tmp_path: Path, model: str, backend: str) -> None:
    network, _ = trained(model)
    save_checkpoint(tmp_path / "a", network, make_metadata(model))
    loaded, metadata = load_checkpoint(tmp_path / "a", backend=backend)
    assert metadata == make_metadata(model)
    assert type(loaded) is getattr(models if backend == "fastseg" else models.plain, type(network).__name__)
    images = torch.randn(2, 3, 12, 16)
    torch.testing.assert_close(loaded(images), network(images))
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_a_channels_last_network_is_stored_whole(tmp_path: Path) -> None:
    network = trained()[0].to(memory_format=torch.channels_last)
    save_checkpoint(tmp_path / "a", network, make_metadata())
    for name, value in load_checkpoint(tmp_path / "a")[0].state_dict().items():
        assert torch.equal(value, network.state_dict()[name])


def test_training_continues_with_weights_and_optimizer_state(checkpoint: Path) -> None:
    expected = load_file(checkpoint)
    network = models.FCN(num_classes=3, widths=(4, 8))
    optimizer = torch.optim.Adam(network.parameters(), lr=0.5)
    assert load_training_state(checkpoint, network, optimizer) == make_metadata()
    for name, value in network.state_dict().items():
        assert torch.equal(value, expected[f"model.{name}"])
    for number, state in optimizer.state_dict()["state"].items():
        assert set(state) == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(value, expected[f"optimizer.{number}.{name}"]) for name, value in state.items())
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_the_header_is_json_without_nan(checkpoint: Path) -> None:
    with safe_open(checkpoint, framework="pt") as file:
        header = json.loads(file.metadata()["fastseg"], parse_constant=pytest.fail)
    assert header["history"][0]["iou"] == [0.4, None, 2 / 3]


def rewrite(path: Path, change: Callable[[dict, dict], object]) -> None:
    """Change a checkpoint's tensors and header in place."""
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["fastseg"])
    change(tensors, header)
    save_file(tensors, path, metadata={"fastseg": json.dumps(header)})


BROKEN: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: path.unlink(),
    "folder": lambda path: (path.unlink(), path.mkdir()),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("hello, this is not a checkpoint"),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-10]),
    "pickle": lambda path: torch.save({"model": torch.zeros(3)}, path),
    "foreign": lambda path: save_file({"weight": torch.zeros(3)}, path),
    "no json": lambda path: save_file({"weight": torch.zeros(3)}, path, metadata={"fastseg": "{"}),
    "json list": lambda path: save_file({"weight": torch.zeros(3)}, path, metadata={"fastseg": "[1]"}),
    "other version": lambda path: rewrite(path, lambda _, header: header.update(version=99)),
    "no version": lambda path: rewrite(path, lambda _, header: header.pop("version")),
    "no classes": lambda path: rewrite(path, lambda _, header: header.pop("class_names")),
    "more classes": lambda path: rewrite(path, lambda _, header: header["class_names"].append("car")),
    "bad setting": lambda path: rewrite(path, lambda _, header: header["config"].update(epochs=0)),
    "bad history": lambda path: rewrite(path, lambda _, header: header["history"][0].pop("iou")),
    "other network": lambda path: rewrite(path, lambda _, header: header.update(model="unet")),
    "unknown network": lambda path: rewrite(path, lambda _, header: header.update(model="vgg")),
    "other argument": lambda path: rewrite(path, lambda _, header: header["arguments"].update(depth=3)),
    "missing weight": lambda path: rewrite(path, lambda tensors, _: tensors.pop("model.classifier.bias")),
    "other shape": lambda path: rewrite(path, lambda _, header: header["arguments"].update(widths=[4, 16])),
    "huge network": lambda path: rewrite(path, lambda _, header: header["arguments"].update(widths=[2**30, 2**30])),
}


@pytest.mark.parametrize("damage", BROKEN.values(), ids=BROKEN.keys())
def test_what_is_no_checkpoint_is_refused_in_one_line(checkpoint: Path, damage: Callable[[Path], object]) -> None:
    damage(checkpoint)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(checkpoint)
    assert str(caught.value).startswith(f"{checkpoint}: ")
    assert "\n" not in str(caught.value)


def test_the_optimizer_state_of_another_network_is_refused(checkpoint: Path) -> None:
    network = models.FCN(num_classes=3, widths=(4,))
    with pytest.raises(CheckpointError, match="doesn't fit the run to continue"):
        load_training_state(checkpoint, network, torch.optim.Adam(network.parameters()))


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_an_interrupted_write_leaves_the_old_file(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    content = checkpoint.read_bytes()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, moment, interrupt)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(checkpoint, trained()[0], dataclasses.replace(make_metadata(), history=()))
    assert checkpoint.read_bytes() == content
    assert list(checkpoint.parent.iterdir()) == [checkpoint]


def test_a_write_replaces_what_a_killed_one_left(tmp_path: Path) -> None:
    (tmp_path / ".a.tmp").write_bytes(b"half")
    write_atomically(tmp_path / "a", b"whole")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"whole"
