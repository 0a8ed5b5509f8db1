"""What a checkpoint is for after training: predictions in tiles and versions, explanations, exports, comparisons."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("typer", reason="typer isn't installed: it comes with the extra [train]")
from PIL import Image

from fastseg import functional
from fastseg.cli.runner import REFUSED, run
from fastseg.data import Normalize, ShapesDataset, palette, read_image
from fastseg.inference import TestTimeAugmentation
from fastseg.training import load_checkpoint


@pytest.fixture
def image(tmp_path: Path) -> Path:
    ShapesDataset(1, (50, 70), seed=5).write(tmp_path)
    return tmp_path / "images" / "00000.png"


def read(file: Path) -> np.ndarray:
    with Image.open(file) as picture:
        return np.array(picture)


def predict(trained: Path, image: Path, out: Path, *options: str) -> np.ndarray:
    checkpoint = str(trained / "best.safetensors")
    assert run(["predict", "--checkpoint", checkpoint, "--out", str(out), *options, str(image)]) == 0
    return read(out / f"{image.stem}.png")


def test_predict_in_tiles(trained: Path, image: Path, tmp_path: Path) -> None:
    model, metadata = load_checkpoint(trained / "best.safetensors")
    found = predict(trained, image, tmp_path / "one", "--tile", "80", "--overlap", "0.5")
    padded = torch.zeros(3, 80, 80)
    padded[:, :50, :70] = Normalize(metadata.mean, metadata.std)(read_image(image))
    expected = functional.upsample_argmax(model.eval().logits(padded[None]), size=(80, 80))[0, :50, :70]
    assert (found == expected.numpy()).mean() > 0.999  # one tile, padded
    tiles = predict(trained, image, tmp_path / "some", "--tile", "24", "--blend", "constant")
    assert tiles.shape == (50, 70)


def test_predict_with_augmentation_and_confidence(trained: Path, image: Path, tmp_path: Path) -> None:
    found = predict(trained, image, tmp_path / "out", "--tta", "flip,2", "--confidence")
    model, metadata = load_checkpoint(trained / "best.safetensors")
    seen = Normalize(metadata.mean, metadata.std)(read_image(image, metadata.size))[None]
    logits = TestTimeAugmentation(model.eval().logits, scales=(1.0, 2.0))(seen)
    labels, confidence = functional.upsample_argmax(logits, size=(50, 70), return_confidence=True)
    assert (found == labels[0].numpy()).mean() > 0.999
    shown = read(tmp_path / "out" / "00000_confidence.png")
    assert abs(shown - 255 * confidence[0].detach().numpy()).max() < 1


def test_overlays_have_the_palettes_colours_and_a_legend(trained: Path, image: Path, tmp_path: Path) -> None:
    mask = predict(trained, image, tmp_path / "out", "--palette", "voc", "--alpha", "1")
    overlay = read(tmp_path / "out" / "00000_overlay.png")
    assert np.array_equal(overlay[:, :70], palette("voc")[mask])
    assert overlay.shape[1] > 70


@pytest.mark.parametrize("method", ["gradcam", "saliency"])
def test_explain(trained: Path, image: Path, tmp_path: Path, method: str) -> None:
    pytest.importorskip("captum", reason="captum isn't installed")
    label = int(np.bincount(predict(trained, image, tmp_path / "out").ravel()).argmax())
    arguments = ["--checkpoint", str(trained / "best.safetensors"), "--out", str(tmp_path), "--method", method]
    assert run(["explain", *arguments, "--class", str(label), str(image)]) == 0
    numbers = json.loads((tmp_path / "explanations.json").read_text())[str(image)]
    assert numbers["class"] == f"class {label}"
    assert 0 <= numbers["share_inside"] <= 1
    assert read(tmp_path / f"00000_{method}.png").shape == (24, 28, 3)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_export(trained: Path, image: Path, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    checkpoint, file = str(trained / "best.safetensors"), tmp_path / "network.onnx"
    assert run(["export", "--checkpoint", checkpoint, "--format", "onnx", "--file", str(file)]) == 0
    session = onnxruntime.InferenceSession(file)
    described = json.loads(session.get_modelmeta().custom_metadata_map["fastseg"])
    assert described["classes"] == [f"class {number}" for number in range(4)]
    seen = Normalize(described["mean"], described["std"])(read_image(image, described["size"]))[None]
    model, _ = load_checkpoint(checkpoint)
    found = session.run(None, {"images": seen.numpy()})[0]
    assert (found == model.eval().predict(seen).numpy()).mean() > 0.999


def test_compare(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other"
    other.mkdir()
    line = (trained / "history.jsonl").read_text()
    second = {**json.loads(line), "epoch": 2, "mean_iou": 0.875}
    (other / "history.jsonl").write_text(line + json.dumps(second) + "\n")
    picture = tmp_path / "curves.png"
    assert run(["compare", str(trained), str(other), "--out", str(picture)]) == 0
    assert "0.8750" in capsys.readouterr().out
    assert read(picture).shape[1] > 1000


def test_evaluate_with_a_report(
    shapes: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    arguments = ["--checkpoint", str(trained / "best.safetensors"), "--data", str(shapes)]
    assert run(["evaluate", *arguments, "--report", str(tmp_path / "new")]) == 0
    page = (tmp_path / "new" / "report.html").read_text()
    printed = re.search(r"mean IoU (0\.\d+)", capsys.readouterr().out)
    assert printed is not None
    assert f"mean IoU {printed[1]}" in page
    assert page.count("<h3>") == 2  # the images of the split
    for part in ("truth", "prediction", "errors", "validation loss", "class 3"):
        assert part in page


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("predict --checkpoint {best} --out {new} --tta mirror {image}", "tta must be flip and numbers"),
        ("predict --checkpoint {best} --out {new} --tile 0 {image}", "tile must be positive, but it is 0"),
        ("explain --checkpoint {best} --out {new} --class tree {image}", "class must be one of class 0, class 1"),
        ("export --checkpoint {best} --format openvino --file {new}.onnx", "OpenVINO's files end in .xml"),
        ("compare {new}", "no run that can be read"),
        ("compare {trained} {trained}", "a run is given twice"),
    ],
)
def test_refuses(
    command: str, message: str, trained: Path, image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    names = {"best": trained / "best.safetensors", "new": tmp_path / "new", "image": image, "trained": trained}
    assert run(command.format(**names).split()) == REFUSED
    assert message in capsys.readouterr().err
