"""The command line, end to end on generated images."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("PIL", reason="Pillow isn't installed: it comes with the extra [train]")
pytest.importorskip("safetensors", reason="safetensors isn't installed: it comes with the extra [train]")
pytest.importorskip("typer", reason="typer isn't installed: it comes with the extra [train]")
from PIL import Image

import fastseg
from fastseg.cli import demo as cli_demo
from fastseg.cli.runner import REFUSED, run
from fastseg.data import ShapesDataset
from fastseg.training import demo, load_checkpoint
from fastseg.training import run as run_module
from tests.cli.conftest import SMALL


def test_train_prints_the_run_and_its_best_epoch(
    shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", "unet", "--optimizer", "sgd", "--loss", "mse", "--lr", "0.1", "--rotation", "10"]
    assert run(["train", "--data", str(shapes), "--out", str(tmp_path), *options, *SMALL]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert f"run folder: {tmp_path}\n" in printed.out
    assert re.search(
        r"epoch 1/1: train loss [\d.]+, val loss [\d.]+, pixel accuracy [\d.]+, mean IoU [\d.]+", printed.out
    )
    assert re.search(r"class 3 +│ +(0\.\d+|-)", printed.out)
    assert "best epoch 1 of 1" in printed.out
    model, metadata = load_checkpoint(tmp_path / "best.safetensors")
    assert type(model.model) is fastseg.models.UNet
    assert (metadata.config.loss, metadata.config.optimizer, metadata.config.rotation) == ("mse", "sgd", 10.0)


@pytest.mark.parametrize("backend", ["fastseg", "eager"])
@pytest.mark.parametrize("split", ["val", "test"])
def test_evaluate_prints_scores(
    shapes: Path, trained: Path, split: str, backend: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--data", str(shapes), "--checkpoint", str(trained / "best.safetensors"), "--split", split]
    assert run(["evaluate", *arguments, "--at", "training", "--backend", backend]) == 0
    printed = capsys.readouterr().out
    summary = rf"{split}: loss ([\d.]+), pixel accuracy ([\d.]+), mean IoU ([\d.]+), mean Dice ([\d.]+)\n"
    found = re.search(summary, printed)
    assert found is not None
    rows = re.findall(r"class \d +│ +(0\.\d+|-) +│ +(0\.\d+|-)", printed)
    assert len(rows) == 4
    iou, dice = ([float(value) for value in column if value != "-"] for column in zip(*rows, strict=True))
    # 0.5e-4 of rounding in Dice = 2 IoU / (1 + IoU), and twice that through IoU, where its derivative is largest
    assert dice == pytest.approx([2 * value / (1 + value) for value in iou], abs=1.5e-4)
    assert float(found[4]) == pytest.approx(sum(dice) / len(dice), abs=1e-4)
    if split == "val":
        record = load_checkpoint(trained / "best.safetensors")[1].history[-1]
        assert float(found[1]) == pytest.approx(record.val_loss, abs=1e-4)
        assert float(found[3]) == pytest.approx(record.mean_iou, abs=1e-4)


def test_predict_writes_masks_and_overlays_in_the_images_size(
    shapes: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.effect_noise((50, 20), 64).convert("RGB").save(tmp_path / "wide.jpg")
    arguments = ["--checkpoint", str(trained / "best.safetensors"), "--out", str(tmp_path / "out")]
    assert run(["predict", *arguments, str(shapes / "images"), str(tmp_path / "wide.jpg")]) == 0
    assert "11 masks and overlays" in capsys.readouterr().out
    assert len(list((tmp_path / "out").iterdir())) == 22
    for name, size in (("00003", (34, 30)), ("wide", (50, 20))):
        with Image.open(tmp_path / "out" / f"{name}.png") as mask:
            assert (mask.mode, mask.size) == ("P", size)
            assert np.array(mask).max() < 4
        with Image.open(tmp_path / "out" / f"{name}_overlay.png") as overlay:
            assert (overlay.mode, overlay.height) == ("RGB", size[1])
            assert overlay.width > size[0]  # the legend


@pytest.mark.parametrize("backend", ["fastseg", "eager"])
@pytest.mark.parametrize("size", [(24, 28), (37, 26)], ids=["the network's size", "another size"])
def test_predictions_are_the_most_likely_class_of_the_upsampled_logits(
    trained: Path, tmp_path: Path, size: tuple[int, int], backend: str
) -> None:
    """The network sees 24x28 pixels; its logits, of a quarter of that, are upsampled once, to the file's size."""
    ShapesDataset(1, size, seed=5).write(tmp_path)
    checkpoint, images = str(trained / "best.safetensors"), tmp_path / "images"
    arguments = ["--checkpoint", checkpoint, "--out", str(tmp_path), "--backend", backend]
    assert run(["predict", *arguments, str(images)]) == 0
    model, metadata = load_checkpoint(checkpoint, backend=backend)
    image = fastseg.data.read_image(images / "00000.png", (24, 28))
    logits = model.logits(fastseg.data.Normalize(metadata.mean, metadata.std)(image)[None])
    assert logits.shape[-2:] == (6, 7)
    with Image.open(tmp_path / "00000.png") as mask:
        assert np.array_equal(np.array(mask), model.model.upsample_argmax(logits, size)[0].numpy())


def drop(path: Path) -> None:
    path.unlink()


def relabel(path: Path) -> None:
    labels = np.zeros((30, 34), np.uint8)
    labels[3, 4] = 9
    Image.fromarray(labels).save(path)


def shrink(path: Path) -> None:
    Image.fromarray(np.zeros((8, 9), np.uint8)).save(path)


def scramble(path: Path) -> None:
    path.write_bytes(b"no picture")


DAMAGE = {
    "image without mask": (lambda data: drop(data / "masks" / "00002.png"), ["00002.png", "no mask"]),
    "mask without image": (lambda data: drop(data / "images" / "00002.png"), ["00002.png", "no image"]),
    "sizes differ": (lambda data: shrink(data / "masks" / "00002.png"), ["00002.png", "34x30", "9x8"]),
    "unreadable image": (lambda data: scramble(data / "images" / "00002.png"), ["00002.png", "can't be read"]),
    "unreadable mask": (lambda data: scramble(data / "masks" / "00002.png"), ["00002.png", "can't be read"]),
    "label outside classes": (lambda data: relabel(data / "masks" / "00002.png"), ["00002.png", "label 9"]),
}


def assert_one_line(printed: object, words: list[str]) -> None:
    assert re.fullmatch(r"error: .+\n", printed.err), printed.err
    assert all(word in printed.err for word in words), printed.err


@pytest.mark.parametrize(
    ("damage", "words", "workers"),
    [*((*case, "0") for case in DAMAGE.values()), (*DAMAGE["label outside classes"], "1")],
    ids=[*DAMAGE, "label outside classes, in a loading process"],
)
def test_damaged_data_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None], words: list[str], workers: str
) -> None:
    ShapesDataset(5, (30, 34)).write(tmp_path)
    damage(tmp_path)
    arguments = ["--data", str(tmp_path), "--out", str(tmp_path / "run"), "--classes", "4", "--workers", workers]
    assert run(["train", *arguments, *SMALL]) == 2
    assert_one_line(capsys.readouterr(), words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("train", ["Missing option '--data'"]),
        ("train --data {missing}", ["{missing}: no such folder"]),
        ("train --data {shapes} --model vgg", ["model must be fcn, unet, smp:NAME", "'vgg'"]),
        ("train --data {shapes} --model smp:Uner", ["model must be", "such as Unet", "'Uner'"]),
        ("train --data {shapes} --model smp:Unet --encoder resnet8", ["encoder must be", "resnet18", "'resnet8'"]),
        ("train --data {shapes} --model torchvision:deeplab", ["model must be", "deeplabv3_resnet50", "'deeplab'"]),
        ("train --data {shapes} --model nowhere.at:all", ["model nowhere.at:all needs nowhere", "Python's path"]),
        ("train --data {shapes} --model math:tau", ["math has no function tau"]),
        ("train --data {shapes} --model math:hypot", ["math:hypot", "num_classes"]),
        ("train --data {shapes} --weights {missing}", ["{missing}: no such file"]),
        ("train --data {shapes} --weights {file}", ["{file}: can't be read as weights"]),
        ("train --data {shapes} --weights pretrained", ["weights must be none or a file for fcn"]),
        ("train --data {shapes} --lr fast", ["lr must be a number or auto", "fast"]),
        ("train --data {shapes} --scale 2", ["scale must be two numbers", "2"]),
        ("train --data {shapes} --precision fp16 --device cpu", ["precision must be fp32 or bf16 on a CPU"]),
        ("train --data {shapes} --logger tensorboard", ["logger tensorboard needs a package", "tensorboard"]),
        ("train --data {shapes} --epochs many", ["--epochs"]),
        ("train --data {shapes} --size 32", ["size must be HxW", "32"]),
        ("train --data {shapes} --widths 4;8", ["widths must be numbers with commas", "4;8"]),
        ("train --data {shapes} --lr -1", ["lr must be positive", "-1"]),
        ("train --data {shapes} --hflip 2", ["hflip must be in [0, 1]"]),
        ("train --data {shapes} --wings", ["--wings"]),
        ("train --data {shapes} --out {trained}", ["{trained} holds a run"]),
        ("train --data {shapes} --out {file}", ["{file}"]),
        ("train --data {shapes} --resume", ["resume needs out"]),
        ("train --data {shapes} --resume --out {missing}", ["{missing}", "no such file"]),
        ("train --data {shapes} --resume --out {trained} --test-fraction 0.2 --model unet", ["model must be fcn"]),
        ("evaluate --data {shapes} --checkpoint {missing}", ["{missing}: no such file"]),
        ("evaluate --data {shapes} --checkpoint {file}", ["{file}: can't be read as a checkpoint"]),
        ("evaluate --data {missing} --checkpoint {best}", ["{missing}: no such folder"]),
        ("predict --checkpoint {best} --out {new} {missing}", ["{missing}: no such file or folder"]),
        ("predict --checkpoint {best} --out {new} {file}", ["{file}: can't be read as an image"]),
        (
            "predict --checkpoint {best} --out {new} {shapes}/images {shapes}/masks/00000.png",
            ["would overwrite the result"],
        ),
        ("predict --checkpoint {best} --out {shapes}/images {shapes}/images", ["would overwrite the image"]),
        ("demo --steps 0", ["--steps"]),
        ("fly", ["No such command 'fly'"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_mistake_is_one_line(
    shapes: Path,
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: str,
    words: list[str],
) -> None:
    places = {"shapes": shapes, "trained": trained, "best": trained / "best.safetensors"}
    places |= {name: tmp_path / name for name in ("missing", "new", "file")}
    places["file"].write_text("neither a folder nor a checkpoint nor an image")
    capsys.readouterr()  # what the fixtures printed
    assert run([argument.format(**places) for argument in arguments.split()]) == 2
    assert_one_line(capsys.readouterr(), [word.format(**places) for word in words])


def test_a_checkpoint_of_fewer_classes_is_one_line(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ShapesDataset(5, (30, 34)).write(tmp_path)
    for path in (tmp_path / "masks").iterdir():
        relabel(path)
    assert run(["evaluate", "--data", str(tmp_path), "--checkpoint", str(trained / "best.safetensors")]) == 2
    assert_one_line(capsys.readouterr(), ["masks", "label 9 is outside the classes 0..3"])


def test_a_diverging_run_fails_in_one_line(shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["--data", str(shapes), "--out", str(tmp_path), "--lr", "1e30", "--optimizer", "sgd"]
    assert run(["train", *settings, *SMALL]) == 1
    assert_one_line(capsys.readouterr(), ["epoch 1: the loss of step 2 is", "lower lr"])
    model, metadata = load_checkpoint(tmp_path / "last.ckpt")
    assert metadata.epoch == 0
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_a_programming_error_is_not_hidden(shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "open_splits", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(["train", "--data", str(shapes), "--out", str(tmp_path), *SMALL])


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delitem(sys.modules, "fastseg.cli.runner")
    monkeypatch.delattr(fastseg.cli, "runner")
    monkeypatch.setitem(sys.modules, "typer", None)  # an import of it fails
    with pytest.raises(SystemExit) as caught:
        fastseg.cli.main()
    assert caught.value.code == 2
    assert_one_line(capsys.readouterr(), ["the command line needs typer", "fastseg-kernels[train]"])


def listen_to_interrupts() -> None:
    """For a new process: a shell's background jobs, which the tests may be, ignore Ctrl-C, and children inherit it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize(
    ("number", "code"),
    [
        pytest.param(signal.SIGINT, 130, id="Ctrl-C"),
        pytest.param(signal.SIGTERM, 143, id="kill", marks=pytest.mark.full),
        pytest.param(signal.SIGKILL, -9, id="kill -9", marks=pytest.mark.full),
    ],
)
def test_an_ended_run_leaves_a_checkpoint_that_loads(
    shapes: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    command = [sys.executable, "-m", "fastseg", "train", "--data", str(shapes), "--out", str(tmp_path), *SMALL]
    with subprocess.Popen(
        [*command, "--epochs", "10000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=listen_to_interrupts,
    ) as process:
        for line in process.stdout:
            if line.startswith("epoch 2/"):
                process.send_signal(number)
                break
        out, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert load_checkpoint(tmp_path / "last.ckpt")[1].epoch >= 2
    assert "Traceback" not in err
    if number == signal.SIGINT:
        assert err.splitlines()[-1] == "error: interrupted"  # a torchvision that does not fit is warned of before
        assert "resume continues from there" in out


def test_demo_compares_and_draws(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "TRAIN_IMAGES", 16)
    monkeypatch.setattr(demo, "VAL_IMAGES", 4)
    results = []

    def demonstrate(*arguments: object, **settings: object) -> demo.DemoResult:
        results.append(demo.demonstrate(*arguments, **settings))
        return results[0]

    monkeypatch.setattr(cli_demo, "demonstrate", demonstrate)
    assert run(["demo", "--steps", "4", "--out", str(tmp_path), "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    for row in ("mean IoU", "IoU triangle", "seconds per step", "peak memory"):
        assert row in printed
    for name in ("demo.png", "curves.png"):
        assert str(tmp_path / name) in printed
        with Image.open(tmp_path / name) as picture:
            assert picture.format == "PNG"
    (result,) = results
    assert all(len(run.losses) == 4 for run in result.runs.values())
    assert 0 < result.runs["fastseg"].peak_memory < result.runs["eager"].peak_memory
    # float32's relative precision is 6e-8; 32 * 9 products are summed, and four steps of Adam carry errors on
    assert result.logit_difference <= 1e-5 * result.logit_range
    assert result.loss_difference < 1e-4


def test_version_and_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"fastseg {fastseg.__version__}\n"
    assert run(["info"]) == 0
    printed = capsys.readouterr().out
    assert torch.__version__ in printed
    assert run([]) == 0
    assert "Usage: fastseg" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["info", pytest.param("train", marks=pytest.mark.full)])
def test_an_instruction_set_that_there_is_not(command: str) -> None:
    arguments = [sys.executable, "-m", "fastseg", command, *(["--data", "nowhere"] if command == "train" else [])]
    result = subprocess.run(
        arguments, env={**os.environ, "FASTSEG_CPU_ISA": "nonsense"}, capture_output=True, text=True
    )
    assert result.returncode == REFUSED
    assert re.fullmatch(r"error: instruction set 'nonsense' .*portable.*; check FASTSEG_CPU_ISA\n", result.stderr)
