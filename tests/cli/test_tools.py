"""What a checkpoint is for after training: predictions in tiles and versions, explanations, exports, comparisons."""

from __future__ import annotations

import json
import re
import sys
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


def turned(video: bytes) -> bytes:
    """An MP4 file that says that it is to be shown a quarter to the right, as a phone's."""
    straight, right = (
        bytes.fromhex(f"{a} {b} 00000000 {c} {a} 00000000 00000000 00000000 40000000")
        for a, b, c in (("00010000", "00000000", "00000000"), ("00000000", "00010000", "FFFF0000"))
    )
    start = video.index(straight, video.index(b"tkhd"))
    return video[:start] + right + video[start + len(right) :]


def test_predict_a_video(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    av = pytest.importorskip("av", reason="PyAV isn't installed: it comes with the extra [video]")
    file, out = tmp_path / "phone.mp4", tmp_path / "segmented.mp4"
    with av.open(file, "w") as video:
        stream = video.add_stream("mpeg4", rate=10)
        stream.width, stream.height = 46, 30
        for index in range(3):
            frame = np.full((30, 46, 3), 60 * index, np.uint8)
            frame[:10] = (255, 0, 0)  # on top: at the right, once turned
            video.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        video.mux(stream.encode(None))
    file.write_bytes(turned(file.read_bytes()))
    arguments = ["predict", "--checkpoint", str(trained / "best.safetensors"), "--out", str(out), "--alpha", "0"]
    assert run([*arguments, str(file)]) == 0
    assert "3 frames in" in capsys.readouterr().out
    with av.open(out) as video:
        assert video.streams.video[0].average_rate == 10
        frames = [frame.to_ndarray(format="rgb24").astype(int) for frame in video.decode(video=0)]
    assert len(frames) == 3
    assert frames[0].shape[0] == 46
    assert frames[0].shape[1] > 30  # and a legend
    red = frames[2][23, :30, 0] - frames[2][23, :30, 1] > 100
    assert red[21:30].all()
    assert not red[:19].any()
    assert run([*arguments, "--confidence", str(file)]) == REFUSED
    assert run([*arguments[:-3], str(tmp_path), str(file)]) == REFUSED
    out.write_text("no video")
    assert run([*arguments[:-3], str(tmp_path / "other.mp4"), str(out)]) == REFUSED
    monkeypatch.setitem(sys.modules, "av", None)
    assert run([*arguments, str(file)]) == REFUSED
    refusals = capsys.readouterr().err
    for message in ("a video is segmented alone", "out must be another video", "can't be read and", "needs PyAV"):
        assert message in refusals


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
    printed = capsys.readouterr().out
    assert "0.8750" in printed
    assert "…" not in printed.replace("\n", "")  # two runs' names may differ at their ends alone
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
