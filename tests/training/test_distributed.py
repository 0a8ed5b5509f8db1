"""Two processes on the CPU, started by torchrun as a user would."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("PIL", reason="Pillow isn't installed: it comes with the extra [train]")
pytest.importorskip("safetensors", reason="safetensors isn't installed: it comes with the extra [train]")
pytest.importorskip("typer", reason="typer isn't installed: it comes with the extra [train]")
from PIL import Image

from fastseg.data import ShapesDataset
from fastseg.training import TrainConfig, evaluate, load_checkpoint, train

Pair = tuple[Path, subprocess.CompletedProcess[str]]

TIMEOUT = 240  # seconds; a lost process would wait forever


def config(data: Path, out: Path, batch_size: int) -> TrainConfig:
    """A run without anything random but the order: its batches are the same images for any number of processes."""
    return TrainConfig(
        data=data,
        out=out,
        batch_size=batch_size,
        epochs=2,
        val_fraction=1 / 3,
        optimizer="sgd",
        lr=0.1,
        widths=(4, 8),
        hflip=0.0,
        device="cpu",
    )


def options(settings: TrainConfig) -> list[str]:
    """The command line of settings, as far as `config` sets them."""
    names = ("data", "out", "batch_size", "epochs", "val_fraction", "optimizer", "lr", "hflip", "device")
    pairs = ((f"--{name.replace('_', '-')}", str(getattr(settings, name))) for name in names)
    return [*itertools.chain.from_iterable(pairs), "--widths", ",".join(map(str, settings.widths))]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine images: six train; three validate, so that one process has more of them than the other."""
    root = tmp_path_factory.mktemp("shapes")
    ShapesDataset(9, (32, 32)).write(root)
    return root


# What two processes do one after the other: starting them takes longer than all of it.
SCRIPT = """
import json, sys
from fastseg.cli.runner import main, run
from fastseg.training.devices import from_first, launched_rank

training, prediction, bad = json.loads(sys.argv.pop())
assert run(training) == 0
print("taken", from_first(lambda: print("made by", launched_rank()) or "this"))
print("predict ended with", run(prediction), flush=True)
sys.argv[1:] = bad
main()
"""


@pytest.fixture(scope="module")
def pair(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """The folder and the outcome of `SCRIPT`: a run, an image that is none among those to predict, then a bad label."""
    folder = tmp_path_factory.mktemp("pair")
    images, data, script = folder / "images", folder / "data", folder / "script.py"
    shutil.copytree(shapes / "images", images)
    (images / "00003.png").write_text("no image")
    ShapesDataset(9, (32, 32)).write(data)
    labels = np.zeros((32, 32), np.uint8)
    labels[0, 0] = 77
    Image.fromarray(labels).save(data / "masks" / "00004.png")
    script.write_text(SCRIPT)
    training = ["train", *options(config(shapes, folder / "run", batch_size=3))]
    checkpoint = str(folder / "run" / "best.safetensors")
    prediction = ["predict", "--checkpoint", checkpoint, "--out", str(folder / "out"), str(images)]
    bad = ["train", *options(config(data, folder / "bad", batch_size=3)), "--classes", "4"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return folder, subprocess.run(
        [*command, json.dumps([training, prediction, bad])],
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )


def test_one_process_prints(pair: Pair) -> None:
    _, finished = pair
    for text in ("run folder", "epoch 1/2", "epoch 2/2", "best epoch"):
        assert finished.stdout.count(text) == 1, finished.stderr


def test_scores_are_those_of_one_process(shapes: Path, pair: Pair) -> None:
    out = pair[0] / "run"
    (loss, scores), metadata = evaluate(out / "last.ckpt", shapes, device="cpu")
    record = metadata.history[-1]
    assert (record.pixel_accuracy, record.mean_iou) == (scores.pixel_accuracy, scores.mean_iou)
    assert record.val_loss == pytest.approx(loss, rel=1e-6)
    assert json.loads((out / "history.jsonl").read_text().splitlines()[-1])["mean_iou"] == record.mean_iou


def test_weights_are_those_of_one_process_with_the_whole_batch(shapes: Path, pair: Pair, tmp_path: Path) -> None:
    """No pixel is ignored: the mean of the two processes' means is the mean of the whole batch."""
    train(config(shapes, tmp_path, batch_size=6))
    both, single = (load_checkpoint(out / "last.ckpt")[0].state_dict() for out in (pair[0] / "run", tmp_path))
    assert both.keys() == single.keys()
    for name, value in both.items():
        # two steps with another order of summation: a few units in the last place of the largest element
        assert (value - single[name]).abs().max() <= 1e-5 * single[name].abs().max(), name


def test_a_label_that_one_process_finds_ends_both(pair: Pair) -> None:
    folder, finished = pair
    assert finished.returncode != 0
    assert f"{folder / 'data' / 'masks' / '00004.png'}: label 77" in finished.stderr


def test_predictions_are_shared(pair: Pair) -> None:
    folder, finished = pair
    assert sorted(re.findall("predict ended with (.)", finished.stdout)) == ["0", "2"]
    assert "process 1: 1 of 4 images can't be used" in finished.stderr
    assert len(list((folder / "out").glob("*_overlay.png"))) == 8


def test_the_first_process_alone_makes_what_all_take(pair: Pair) -> None:
    _, finished = pair
    assert finished.stdout.count("made by 0") == 1
    assert finished.stdout.count("made by") == 1
    assert finished.stdout.count("taken this") == 2
