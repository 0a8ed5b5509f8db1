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
from torch import nn

from fastseg import models
from fastseg.data import palette
from fastseg.training import (
    Architecture,
    CheckpointError,
    EpochRecord,
    Metadata,
    Network,
    TrainConfig,
    load_checkpoint,
    save_checkpoint,
)
from fastseg.training.checkpoint import (
    colors_of,
    load_weights,
    read_metadata,
    read_state,
    write_atomically,
    write_state,
    write_weights,
)


def make_metadata(model: str = "fcn", **changes: object) -> Metadata:
    record = EpochRecord(1, 0.1, 0.2, 1 / 3, 0.4, (0.4, None, 2 / 3), 1.5, 7.25)
    fields = {
        "network": Architecture(model, num_classes=3, widths=(4, 8)),
        "class_names": ("sky", "tree", "road"),
        "palette": colors_of(palette(3)),
        "ignore_index": 255,
        "mean": (0.1, 0.2, 0.3),
        "std": (1.0, 1.1, 1.2),
        "size": (24, 32),
        "class_weights": (0.1, 2.5, 1 / 3),
        "config": TrainConfig(data=Path("data"), size=(24, 32), widths=(4, 8), model=model),
        "history": (record,),
    }
    return Metadata(**(fields | changes))


def trained(model: str = "fcn") -> models.SegmentationModel:
    network = getattr(models, {"fcn": "FCN", "unet": "UNet"}[model])(num_classes=3, widths=(4, 8))
    optimizer = torch.optim.Adam(network.parameters())
    network.loss(torch.randn(1, 3, 8, 8), torch.zeros(1, 8, 8, dtype=torch.uint8)).backward()
    optimizer.step()
    return network


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    save_checkpoint(tmp_path / "run.safetensors", trained(), make_metadata())
    return tmp_path / "run.safetensors"


@pytest.fixture
def state_file(tmp_path: Path) -> Path:
    """What Lightning keeps, as far as fastseg reads it."""
    weights = {f"network.model.{name}": value for name, value in trained().state_dict().items()}
    state = {"state_dict": weights, "fastseg": make_metadata().to_json(), "optimizer_states": [{0: torch.ones(3)}]}
    write_state(tmp_path / "last.ckpt", state)
    return tmp_path / "last.ckpt"


@pytest.mark.parametrize("backend", ["fastseg", "eager"])
@pytest.mark.parametrize("model", ["fcn", "unet"])
def test_a_checkpoint_brings_back_network_and_metadata(tmp_path: Path, model: str, backend: str) -> None:
    network = trained(model)
    save_checkpoint(tmp_path / "a", network, make_metadata(model))
    loaded, metadata = load_checkpoint(tmp_path / "a", backend=backend)
    assert metadata == make_metadata(model)
    assert type(loaded.model) is getattr(models if backend == "fastseg" else models.plain, type(network).__name__)
    images = torch.randn(2, 3, 12, 16)
    torch.testing.assert_close(loaded.model(images), network(images))
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_a_channels_last_network_is_stored_whole(tmp_path: Path) -> None:
    network = trained().to(memory_format=torch.channels_last)
    save_checkpoint(tmp_path / "a", network, make_metadata())
    for name, value in load_checkpoint(tmp_path / "a")[0].model.state_dict().items():
        assert torch.equal(value, network.state_dict()[name])


def test_what_lightning_keeps_comes_back_and_has_the_network(state_file: Path) -> None:
    state = read_state(state_file)
    assert torch.equal(state["optimizer_states"][0][0], torch.ones(3))
    network, metadata = load_checkpoint(state_file)
    assert metadata == make_metadata() == read_metadata(state_file)
    for name, value in network.model.state_dict().items():
        assert torch.equal(value, state["state_dict"][f"network.model.{name}"])
    assert torch.load(state_file, weights_only=True).keys() == state.keys()  # torch's own reader takes it, too


@pytest.mark.parametrize("name", ["run.safetensors", "last.ckpt"])
def test_a_flipped_bit_is_refused(checkpoint: Path, state_file: Path, name: str) -> None:
    """Every byte of the first and last 300, of which the header and the checksum are part, and some between."""
    path = checkpoint.parent / name
    content = path.read_bytes()
    places = {*range(300), *range(len(content) - 300, len(content)), *range(300, len(content), 97)}
    for number, place in enumerate(sorted(places)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << number % 8
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"\A[^\n]*\Z"):
            load_checkpoint(path)


def test_the_header_is_json_without_nan(checkpoint: Path) -> None:
    with safe_open(checkpoint, framework="pt") as file:
        header = json.loads(file.metadata()["fastseg"], parse_constant=pytest.fail)
    assert header["history"][0]["iou"] == [0.4, None, 2 / 3]


def rewrite(path: Path, change: Callable[[dict, dict], object]) -> None:
    """Change a checkpoint's tensors and header in place, with the checksum that then belongs to it."""
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["fastseg"])
    change(tensors, header)
    write_weights(path, tensors, json.dumps(header))


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
    "no checksum": lambda path: save_file(load_file(path), path, metadata={"fastseg": make_metadata().to_json()}),
    "no classes": lambda path: rewrite(path, lambda _, header: header.pop("class_names")),
    "more classes": lambda path: rewrite(path, lambda _, header: header["class_names"].append("car")),
    "bad setting": lambda path: rewrite(path, lambda _, header: header["config"].update(epochs=0)),
    "bad history": lambda path: rewrite(path, lambda _, header: header["history"][0].pop("iou")),
    "other network": lambda path: rewrite(path, lambda _, header: header["network"].update(model="unet")),
    "unknown network": lambda path: rewrite(path, lambda _, header: header["network"].update(model="vgg")),
    "other argument": lambda path: rewrite(path, lambda _, header: header["network"].update(depth=3)),
    "missing weight": lambda path: rewrite(path, lambda tensors, _: tensors.pop("classifier.bias")),
    "other shape": lambda path: rewrite(path, lambda _, header: header["network"].update(widths=[4, 16])),
    "text for a number": lambda path: rewrite(path, lambda _, header: header.update(ignore_index="255")),
    "number for text": lambda path: rewrite(path, lambda _, header: header["class_names"].__setitem__(0, 7)),
    "truth for a number": lambda path: rewrite(path, lambda _, header: header["network"].update(kernel_size=True)),
    "object for a list": lambda path: rewrite(path, lambda _, header: header.update(mean={"r": 0.5})),
    "list for an object": lambda path: rewrite(path, lambda _, header: header.update(network=["fcn", 3])),
    "null": lambda path: rewrite(path, lambda _, header: header.update(palette=None)),
    "three sides": lambda path: rewrite(path, lambda _, header: header.update(size=[1, 2, 3])),
    "text in history": lambda path: rewrite(path, lambda _, header: header["history"][0].update(mean_iou="good")),
    "a user's function": lambda path: rewrite(path, lambda _, header: header["network"].update(model="os:system")),
    "huge network": lambda path: rewrite(path, lambda _, header: header["network"].update(widths=[2**30, 2**30])),
}


@pytest.mark.parametrize("damage", BROKEN.values(), ids=BROKEN.keys())
def test_what_is_no_checkpoint_is_refused_in_one_line(checkpoint: Path, damage: Callable[[Path], object]) -> None:
    damage(checkpoint)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(checkpoint)
    assert str(caught.value).startswith(f"{checkpoint}: ")
    assert "\n" not in str(caught.value)


def test_what_is_no_checkpoint_of_lightning_is_refused(state_file: Path) -> None:
    for state in ([1, 2], {"state_dict": {}}, {"state_dict": {}, "fastseg": 3}):
        write_state(state_file, state)
        with pytest.raises(CheckpointError, match="no checkpoint"):
            load_checkpoint(state_file)


def test_loading_executes_nothing(state_file: Path, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "executed",))

    write_state(state_file, {"state_dict": {}, "fastseg": make_metadata().to_json(), "bomb": Bomb()})
    with pytest.raises(CheckpointError, match="can't be read as a checkpoint"):
        load_checkpoint(state_file)
    assert not (tmp_path / "executed").exists()


def test_the_weights_of_another_network_are_refused(checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match="none of its 6 tensors fits"):
        load_weights(checkpoint, Network(nn.Linear(2, 2), 3))


@pytest.mark.parametrize("name", ["run.safetensors", "last.ckpt", "state.pt"])
def test_weights_that_fit_are_taken(checkpoint: Path, state_file: Path, name: str) -> None:
    torch.save(trained().state_dict(), checkpoint.parent / "state.pt")
    network = Network(models.FCN(num_classes=5, widths=(4, 8)))
    before = network.model.classifier.weight.clone()
    assert load_weights(checkpoint.parent / name, network) == (4, 6)  # not the classifier's, of other classes
    assert torch.equal(network.model.classifier.weight, before)
    assert not torch.equal(network.model.stages[0].weight, models.FCN(num_classes=5, widths=(4, 8)).stages[0].weight)


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
            save_checkpoint(checkpoint, trained(), dataclasses.replace(make_metadata(), history=()))
    assert checkpoint.read_bytes() == content
    assert list(checkpoint.parent.iterdir()) == [checkpoint]


def test_a_write_replaces_what_a_killed_one_left(tmp_path: Path) -> None:
    (tmp_path / ".a.tmp").write_bytes(b"half")
    write_atomically(tmp_path / "a", b"whole")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"whole"
