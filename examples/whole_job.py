"""The whole job on a folder of images and masks: ``python examples/whole_job.py DATA OUT [OPTIONS OF TRAIN]``.

Trains a network with fastseg's operators and in plain PyTorch and compares the two; evaluates the first, predicts in
tiles, explains a class, and exports to ONNX. Each step but the last is a command, printed as it would be typed. The
last needs ONNX Runtime, NumPy and Pillow alone: what another program would do with the exported file.

On CamVid: ``python examples/whole_job.py camvid out --class car``. Needs the extras ``train``, ``explain`` and
``models``, and onnx, onnxscript and onnxruntime.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image

from fastseg.cli.runner import run
from fastseg.data import Normalize, find_pairs, read_image
from fastseg.training import load_checkpoint

TRAINING = ["--model", "smp:Unet", "--encoder", "resnet18", "--size", "180x240", "--lr", "auto", "--epochs", "3"]
SHOWN = 3  # images of the validation split to predict and to explain
AGREEMENT = 0.999  # share of pixels: logits that are all but equal may fall either way in another runtime


def fastseg(command: str, *arguments: object) -> None:
    """Run ``fastseg COMMAND ARGUMENTS...``, and end where it fails."""
    words = [command, *map(str, arguments)]
    print("\n$ fastseg", shlex.join(words), flush=True)
    if code := run(words):
        sys.exit(code)


def classes_by_onnx(network: Path, image: Path) -> np.ndarray:
    """The class of each pixel ``[height, width]``, at the size of the training, by an exported network."""
    session = onnxruntime.InferenceSession(network)
    about = json.loads(session.get_modelmeta().custom_metadata_map["fastseg"])
    with Image.open(image) as file:
        picture = file.convert("RGB")
    if about["size"] is not None:
        height, width = about["size"]
        picture = picture.resize((width, height), Image.Resampling.BILINEAR)
    pixels = (np.asarray(picture, dtype=np.float32) / 255 - np.float32(about["mean"])) / np.float32(about["std"])
    return session.run(None, {"images": pixels.transpose(2, 0, 1)[None]})[0][0]


def check(network: Path, checkpoint: Path, images: list[Path]) -> None:
    """Compare the exported network's classes with those of the checkpoint."""
    model, metadata = load_checkpoint(checkpoint)
    normalize = Normalize(metadata.mean, metadata.std)
    for image in images:
        expected = model.eval().predict(normalize(read_image(image, metadata.size))[None])[0]
        agreement = float((classes_by_onnx(network, image) == expected.numpy()).mean())
        print(f"{image}: ONNX Runtime and PyTorch agree on {agreement:.3%} of the pixels")
        if agreement < AGREEMENT:
            sys.exit(f"error: {network} gives other classes than {checkpoint}")


def main() -> None:
    """Runs all of it."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("data", type=Path, help="folder of images and masks: see `fastseg check`")
    parser.add_argument("out", type=Path, help="folder to write to")
    parser.add_argument("--class", dest="target", default="0", help="name or number of the class to explain")
    arguments, training = parser.parse_known_args()
    data, out = arguments.data, arguments.out
    best = out / "fastseg" / "best.safetensors"
    images = [pair.image for pair in find_pairs(data, "val")[:SHOWN]]

    for backend in ("fastseg", "eager"):
        fastseg("train", "--data", data, *(training or TRAINING), "--backend", backend, "--out", out / backend)
    fastseg("compare", out / "fastseg", out / "eager", "--out", out / "curves.png")
    fastseg("evaluate", "--data", data, "--checkpoint", best, "--report", out / "report")
    fastseg("predict", "--checkpoint", best, "--tile", 256, "--out", out / "predictions", *images)
    fastseg("explain", "--checkpoint", best, "--class", arguments.target, "--out", out / "explanations", *images)
    fastseg("export", "--checkpoint", best, "--format", "onnx", "--file", out / "network.onnx")
    check(out / "network.onnx", best, images)


if __name__ == "__main__":
    main()
