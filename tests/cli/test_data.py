"""Data sets as they come, through the command line: each is refused in one line with the remedy, or read rightly."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("PIL", reason="Pillow isn't installed: it comes with the extra [train]")
pytest.importorskip("typer", reason="typer isn't installed: it comes with the extra [train]")
from PIL import Image

from fastseg import metrics
from fastseg.cli.runner import REFUSED, run
from fastseg.data import ShapesDataset, find_pairs

SIZE = 24


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Twelve images of a bright square (label 1) on dark ground (label 0)."""
    root, generator = tmp_path / "data", np.random.default_rng(0)
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
    for number in range(12):
        y, x = generator.integers(0, SIZE - 10, 2)
        mask = np.zeros((SIZE, SIZE), np.uint8)
        mask[y : y + 10, x : x + 10] = 1
        image = generator.integers(0, 60, (SIZE, SIZE, 3)) + mask[..., None] * 150
        Image.fromarray(image.astype(np.uint8)).save(root / "images" / f"a{number}.png")
        Image.fromarray(mask).save(root / "masks" / f"a{number}.png")
    return root


def resave(data: Path, change: object, suffix: str = "png") -> None:
    """Write the masks anew, of other values or in another format."""
    for path in (data / "masks").iterdir():
        mask = np.array(Image.open(path))
        path.unlink()
        Image.fromarray(change(mask)).save(path.with_suffix(f".{suffix}"))


def turn(data: Path) -> None:
    for path in (data / "images").iterdir():
        image = Image.open(path)
        exif = image.getexif()
        exif[0x0112] = 3
        path.unlink()
        image.save(path.with_suffix(".jpg"), exif=exif)


def relabel(data: Path, label: int, dtype: type, suffix: str) -> None:
    path = data / "masks" / "a2.png"
    mask = np.array(Image.open(path)).astype(dtype)
    path.unlink()
    mask[3, 4] = label
    Image.fromarray(mask).save(path.with_suffix(suffix))


def pipe(data: Path) -> None:
    (data / "images" / "a2.png").unlink()
    os.mkfifo(data / "images" / "a2.png")


COLORS = np.array([(0, 0, 0), (200, 30, 60)], np.uint8)

CASES = {
    "0-and-255": (lambda data: resave(data, lambda mask: mask * 255), ["0, 255", "--binary"], ["--binary"]),
    "0-and-100": (lambda data: resave(data, lambda mask: mask * 100), ["100", "101 classes"], ["--classes", "101"]),
    "jpeg": (lambda data: resave(data, lambda mask: mask * 255, "jpg"), [".jpg", "JPEG", "--binary"], ["--binary"]),
    "colours": (
        lambda data: resave(data, lambda mask: COLORS[mask]),
        ["(200,30,60)", "--label-map"],
        ["--label-map", "{map}"],
    ),
    "exif": (turn, ["EXIF orientation is 3", "--exif apply", "--exif ignore"], ["--exif", "ignore"]),
    "label-60000": (lambda data: relabel(data, 60000, np.uint16, ".png"), ["a2.png", "60001 classes"], None),
    "label-10-million": (lambda data: relabel(data, 10**7, np.int32, ".tif"), ["a2.tif", "10000000"], None),
    "pipe": (pipe, ["a2.png: not a regular file"], None),
}


@pytest.mark.parametrize(("damage", "words", "remedy"), CASES.values(), ids=CASES)
def test_data_that_need_a_word(
    data: Path, tmp_path: Path, damage: object, words: list[str], remedy: list[str] | None, capsys: object
) -> None:
    damage(data)
    (tmp_path / "map.json").write_text('{"0,0,0": "ground", "200,30,60": "road"}')
    train = ["train", "--data", str(data), "--out", str(tmp_path / "run"), "--epochs", "1", "--device", "cpu"]
    for command in (["check", "--data", str(data)], train):
        assert run(command) == REFUSED
        printed = capsys.readouterr()
        assert re.fullmatch(r"error: .+\n", printed.err), printed.err
        assert all(word in printed.err for word in words), printed.err
        assert "height x width" in printed.out  # what the data hold is said first
        if remedy is not None:
            assert run([*command, *(text.format(map=tmp_path / "map.json") for text in remedy)]) == 0
            assert "height x width" in capsys.readouterr().out


FOLDERS = {  # images, masks, the largest label, classes
    "camvid": ("{split}/{name}.png", "{split}annot/{name}.png", 11, 11),
    "voc": ("JPEGImages/{split}{name}.jpg", "SegmentationClass/{split}{name}.png", 255, 21),
    "cityscapes": (
        "leftImg8bit/{split}/ulm/ulm_{name}_leftImg8bit.png",
        "gtFine/{split}/ulm/ulm_{name}_gtFine_labelIds.png",
        33,
        19,
    ),
    "ade20k": ("images/{long}/ADE_{split}_{name}.jpg", "annotations/{long}/ADE_{split}_{name}.png", 150, 150),
    "lists": ("images/{split}{name}.jpg", "masks/{split}{name}.png", 3, 4),
    "split/images": ("{split}/images/{name}.png", "{split}/masks/{name}.png", 3, 4),
    "images/split": ("images/{split}/{name}.png", "masks/{split}/{name}.png", 3, 4),
}


@pytest.mark.parametrize("layout", FOLDERS)
def test_a_tiny_folder_of_every_layout(tmp_path: Path, layout: str, capsys: pytest.CaptureFixture[str]) -> None:
    image, mask, largest, classes = FOLDERS[layout]
    labels = np.random.default_rng(0).integers(0, 4, (SIZE, SIZE)).astype(np.uint8)
    labels[0, 0] = largest
    for split, long in (("train", "training"), ("val", "validation")):
        for name in ("a", "b"):
            for pattern, pixels in ((image, np.dstack([labels] * 3)), (mask, labels)):
                path = tmp_path / pattern.format(split=split, long=long, name=name)
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
        if layout in ("voc", "lists"):
            listed = tmp_path / ("ImageSets/Segmentation" if layout == "voc" else "") / f"{split}.txt"
            listed.parent.mkdir(parents=True, exist_ok=True)
            listed.write_text(f"{split}a\n{split}b\n")
    for options in ([], ["--layout", layout]):
        assert run(["check", "--data", str(tmp_path), *options]) == 0
        printed = capsys.readouterr().out
        assert f"layout {layout}\n" in printed
        assert f"\n{classes} classes\n" in printed
        assert re.search(r"│ train +│ 2 .*\n│ val +│ 2 ", printed)


def test_check_writes_the_mask_as_a_picture(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["check", "--data", str(data), "--picture", str(tmp_path / "picture.png")]) == 0
    assert "2 classes" in capsys.readouterr().out
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.size == (2 * SIZE, SIZE)
        left, right = np.split(np.array(picture), 2, axis=1)
    bright = left.mean(-1) > 100
    assert len(np.unique(right[bright], axis=0)) == len(np.unique(right[~bright], axis=0)) == 1


def test_check_refuses_a_wrong_label_map(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "map.json").write_text("[]")
    assert run(["check", "--data", str(data), "--label-map", str(tmp_path / "map.json")]) == REFUSED
    assert "map.json: a label map is a JSON object" in capsys.readouterr().err


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("run")
    ShapesDataset(6, (SIZE, SIZE)).write(root / "data")
    train = ["train", "--data", str(root / "data"), "--out", str(root / "run"), "--size", "12x12", "--epochs", "1"]
    assert run([*train, "--widths", "4,8", "--device", "cpu"]) == 0
    return root / "run" / "best.safetensors"


def test_predict_goes_on_after_a_file_that_it_cannot_read(
    data: Path, tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a1.png", "a7.png"):
        path = data / "images" / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    out = tmp_path / "out"
    assert run(["predict", "--checkpoint", str(checkpoint), "--out", str(out), str(data / "images")]) == REFUSED
    message = capsys.readouterr().err
    assert all(text in message for text in ("2 of 12 images", "a1.png: can't be read", "a7.png: can't be read"))
    assert len([path for path in out.glob("a*.png") if "overlay" not in path.name]) == 10


def test_images_of_other_channels_are_refused(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(np.zeros((SIZE, SIZE), np.uint16)).save(tmp_path / "deep.png")
    assert (
        run(["predict", "--checkpoint", str(checkpoint), "--out", str(tmp_path / "out"), str(tmp_path / "deep.png")])
        == 2
    )
    assert "deep.png: the network takes 3 channels, but the image has 1" in capsys.readouterr().err
    for folder, dtype in (("images", np.uint16), ("masks", np.uint8)):
        (tmp_path / folder).mkdir()
        for name in "abc":
            Image.fromarray(np.eye(SIZE).astype(dtype)).save(tmp_path / folder / f"{name}.png")
    assert run(["evaluate", "--checkpoint", str(checkpoint), "--data", str(tmp_path)]) == REFUSED
    assert "the network takes 3 channels, but the images have 1" in capsys.readouterr().err


@pytest.mark.parametrize("split", ["train", "val"])
def test_evaluate_scores_the_masks_that_predict_writes(
    tmp_path: Path, checkpoint: Path, split: str, capsys: pytest.CaptureFixture[str]
) -> None:
    ShapesDataset(6, (SIZE, SIZE)).write(tmp_path)
    for number in (1, 2, 4):  # masks of two sizes form a batch; the images have the network's
        for folder, resample in (("images", Image.Resampling.BILINEAR), ("masks", Image.Resampling.NEAREST)):
            path = tmp_path / folder / f"{number:05d}.png"
            Image.open(path).resize((31, 27), resample).save(path)
    arguments = ["--checkpoint", str(checkpoint)]
    assert run(["predict", *arguments, "--out", str(tmp_path / "out"), str(tmp_path / "images")]) == 0
    matrix = torch.zeros(4, 4, dtype=torch.int64)
    for pair in find_pairs(tmp_path, split):
        files = (tmp_path / "out" / pair.image.name, pair.mask)
        prediction, truth = (torch.from_numpy(np.array(Image.open(path))).long()[None] for path in files)
        matrix += metrics.confusion_matrix(prediction, truth, 4, 255)
    capsys.readouterr()
    assert run(["evaluate", *arguments, "--data", str(tmp_path), "--split", split]) == 0
    native = capsys.readouterr().out
    assert f"mean IoU {metrics.scores(matrix).mean_iou:.4f}" in native
    assert run(["evaluate", *arguments, "--data", str(tmp_path), "--split", split, "--at", "training"]) == 0
    assert capsys.readouterr().out != native


def test_a_checkpoint_keeps_how_the_data_are_read(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    resave(data, lambda mask: COLORS[mask])
    (tmp_path / "map.json").write_text('{"0,0,0": "ground", "200,30,60": "road"}')
    out, places = tmp_path / "run", ["--data", str(data), "--device", "cpu"]
    train = ["train", *places, "--epochs", "1", "--label-map", str(tmp_path / "map.json"), "--out", str(out)]
    assert run(train) == 0
    assert run(["evaluate", *places, "--checkpoint", str(out / "best.safetensors")]) == 0
    assert re.search(r"│ ground +│.*\n│ road +│", capsys.readouterr().out)
    assert run(["predict", "--checkpoint", str(out / "best.safetensors"), "--out", str(out), str(data / "images")]) == 0
    with Image.open(out / "a0.png") as mask:
        assert mask.getpalette()[:6] == COLORS.flatten().tolist()  # the map's colours are the classes'


def test_predict_takes_images_up_to_its_own_limit(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)  # Pillow's, which scans exceed
    Image.new("1", (600, 400)).save(tmp_path / "scan.png")
    arguments = ["predict", "--checkpoint", str(checkpoint), "--out", str(tmp_path / "out"), str(tmp_path / "scan.png")]
    assert run(arguments) == 0
    assert run([*arguments, "--max-pixels", "239999"]) == REFUSED
    assert "600x400 is more than 239999 pixels; --max-pixels raises the limit" in capsys.readouterr().err
