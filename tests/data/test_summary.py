import os
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("PIL", reason="Pillow isn't installed: it comes with the extra [train]")
import tifffile
from PIL import Image
from rich.console import Console

from fastseg.data import DataConfig, DataError, ShapesDataset, open_splits


def write_masks(root: Path, *values: int) -> None:
    """Masks of these values in turn, each beside an image of its own."""
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
    for number in range(8):
        noise = np.random.default_rng(number).integers(0, 256, (12, 10, 3), np.uint8)
        Image.fromarray(noise).save(root / "images" / f"{number}.png")
        mask = np.resize(np.array(values), (12, 10)).astype(np.uint8 if max(values) < 256 else np.uint16)
        Image.fromarray(mask).save(root / "masks" / f"{number}.png")


def printed(config: DataConfig) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        config.survey().show(console)
    return capture.get()


def test_the_summary_counts_everything(tmp_path: Path) -> None:
    write_masks(tmp_path, 0, 1, 1, 3, 255)
    images = tmp_path / "images"
    Image.fromarray(np.zeros((5, 4, 3), np.uint8)).save(images / "wide.png")
    Image.fromarray(np.zeros((5, 4), np.uint8)).save(tmp_path / "masks" / "wide.png")
    (images / "notes.txt").touch()
    text = printed(DataConfig(data=tmp_path, val_fraction=0.5))
    assert f"{tmp_path}, layout images" in text
    assert "12x10 (4)" in text
    assert "5x4 (1)" in text
    assert "3 x uint8 (5)" in text
    for label, name, share in ((0, "class 0", "20.00%"), (1, "class 1", "40.00%"), (255, "ignored", "20.00%")):
        assert any(all(word in line for word in (f" {label} ", name, share)) for line in text.splitlines())
    assert "left out: " in text
    assert "notes.txt" in text
    assert "two splits" not in text


def test_the_same_pixels_in_two_splits_are_named(tmp_path: Path) -> None:
    for split in ("train", "val"):
        ShapesDataset(3, (30, 34), seed=split == "val").write(tmp_path / split)
    copy = tmp_path / "val" / "images" / "00002.png"
    Image.open(tmp_path / "train" / "images" / "00001.png").save(copy, compress_level=1)  # other bytes, same pixels
    text = printed(DataConfig(data=tmp_path))
    (line,) = (line for line in text.splitlines() if "the same image in two splits" in line)
    assert "00001.png" in line
    assert line.endswith("00002.png")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((0, 255), r"labels 0, 255 .*, of which one alone counts; the ignored is 255: --label-map FILE"),
        ((0, 0), r"labels 0 .*of which one alone counts"),
        ((255, 255), r"no label other than ignore_index 255"),
        ((0, 100), r"labels 0, 100 .*makes 101 classes of which 99 don't occur: --label-map FILE.*--classes 101 takes"),
        ((0, 100, 200), r"makes 201 classes"),
        ((0, 1, 60000), r"makes 60001 classes"),
    ],
    ids=str,
)
def test_masks_that_would_train_to_nonsense_are_refused(tmp_path: Path, values: tuple[int, ...], message: str) -> None:
    write_masks(tmp_path, *values)
    with pytest.raises(DataError, match=message):
        open_splits(DataConfig(data=tmp_path), None)


@pytest.mark.parametrize(
    ("values", "settings", "names"),
    [
        ((0, 255), {"binary": True}, ("background", "foreground")),
        ((0, 255), {"label_map": {"0": "ground", "255": "road"}}, ("ground", "road")),
        ((0, 100), {"classes": 101}, tuple(f"class {label}" for label in range(101))),
        ((0, 1, 2), {"reduce_labels": True}, ("class 0", "class 1")),
        ((0, 1, 3), {}, tuple(f"class {label}" for label in range(4))),  # a class may be absent
    ],
    ids=str,
)
def test_a_word_makes_classes_of_them(
    tmp_path: Path, values: tuple[int, ...], settings: dict, names: tuple[str, ...]
) -> None:
    write_masks(tmp_path, *values)
    splits = open_splits(DataConfig(data=tmp_path, **settings), (6, 5))
    assert splits.class_names == names
    counted = torch.cat([mask.flatten() for _, mask in splits.train])
    assert set(counted.tolist()) <= {*range(len(names)), splits.ignore_index}


def test_classes_and_names_agree(tmp_path: Path) -> None:
    write_masks(tmp_path, 0, 255)
    with pytest.raises(DataError, match="classes must be 2, as many as have names, but it is 3"):
        open_splits(DataConfig(data=tmp_path, binary=True, classes=3), None)


def test_all_files_that_cannot_be_used_are_told(tmp_path: Path) -> None:
    write_masks(tmp_path, 0, 1)
    (tmp_path / "images" / "2.png").unlink()
    os.mkfifo(tmp_path / "images" / "2.png")
    (tmp_path / "masks" / "5.png").write_bytes(b"no picture")
    text = printed(DataConfig(data=tmp_path))
    assert "2.png: not a regular file" in text
    assert "5.png: can't be read" in text
    with pytest.raises(DataError, match=r"\(and 1 more files that can't be used\)"):
        open_splits(DataConfig(data=tmp_path), None)


def test_images_of_other_channels_bring_their_normalisation(tmp_path: Path) -> None:
    write_masks(tmp_path, 0, 1)
    values = np.random.default_rng(0).normal([10.0, 500.0], [2.0, 30.0], (8, 12, 10, 2)).astype(np.float32)
    for number in range(8):
        (tmp_path / "images" / f"{number}.png").unlink()
        tifffile.imwrite(tmp_path / "images" / f"{number}.tif", values[number], planarconfig="contig")
    splits = open_splits(DataConfig(data=tmp_path), None)
    assert splits.summary.channels == "2 x float32"
    train = torch.stack([image for image, _ in splits.train]).double()
    mean, deviation = splits.summary.normalization
    torch.testing.assert_close(torch.tensor(mean).double(), train.mean((0, 2, 3)), rtol=1e-5, atol=0)
    torch.testing.assert_close(torch.tensor(deviation).double(), train.std((0, 2, 3), correction=0), rtol=1e-5, atol=0)
    Image.fromarray(np.zeros((12, 10, 3), np.uint8)).save(tmp_path / "images" / "8.png")
    Image.fromarray(np.zeros((12, 10), np.uint8)).save(tmp_path / "masks" / "8.png")
    with pytest.raises(DataError, match=r"the same channels, but there are 2 x float32 \(8\), 3 x uint8 \(1\)"):
        open_splits(DataConfig(data=tmp_path), None)
