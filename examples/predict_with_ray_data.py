"""Segments images on a Ray cluster: ``python examples/predict_with_ray_data.py CHECKPOINT OUT IMAGES...``.

Writes what ``fastseg predict`` writes, to a folder that all machines see; ``--gpus 1`` gives each process a GPU. Needs
the extra ``train``, and ``ray[data]``.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import ray

from fastseg.data import DataError
from fastseg.training import predict
from fastseg.training.prediction import image_files


def segment(batch: dict[str, Any], checkpoint: str, out: str) -> dict[str, list[str]]:
    """Write the masks and overlays of a batch of files; what is wrong with those that can't be used."""
    try:
        predict(checkpoint, list(batch["item"]), out)
    except DataError as error:
        return {"problem": [str(error)]}
    return {"problem": []}


def main() -> None:
    """Shares the files among Ray's processes, and ends with an error where some can't be used."""
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint", type=Path, help="best.safetensors of a run")
    parser.add_argument("out", type=Path, help="folder to write to")
    parser.add_argument("images", type=Path, nargs="+", help="image files, and folders of them")
    parser.add_argument("--batch-size", type=int, default=64, help="images for which a network is loaded once")
    parser.add_argument("--gpus", type=float, default=0, help="GPUs of a process")
    arguments = parser.parse_args()
    files = [str(file.resolve()) for file in image_files(arguments.images)]
    places = {"checkpoint": str(arguments.checkpoint.resolve()), "out": str(arguments.out.resolve())}
    problems = (
        ray.data.from_items(files)
        .map_batches(segment, batch_size=arguments.batch_size, num_gpus=arguments.gpus, fn_kwargs=places)
        .take_all()
    )
    print(f"{len(files)} images, in batches of {arguments.batch_size}: results in {arguments.out}")
    if problems:
        sys.exit("\n".join(row["problem"] for row in problems))


if __name__ == "__main__":
    main()
