"""Trains a U-Net of segmentation_models_pytorch on CamVid: ``python examples/camvid_fastseg.py FOLDER``.

One line makes it fastseg's; ``--plain`` leaves it out, and the losses are the same but for roundings. FOLDER holds
``train/`` and ``trainannot/``, with labels of 11 classes and 11 for void. Needs the extras ``train`` and ``models``.
"""

import argparse
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fastseg.data import CAMVID_CLASSES, CAMVID_IGNORE_INDEX, MaskDataset, Normalize, find_pairs


def fused(model: nn.Module) -> None:
    """The line."""
    model.compile(backend="fastseg")


def train(
    batches: Iterable[tuple[Tensor, Tensor]], prepare: Callable[[nn.Module], Any], dtype: torch.dtype = torch.float32
) -> Iterator[float]:
    """The loss of each step."""
    torch.manual_seed(0)
    model = smp.Unet("vgg11", encoder_weights=None, classes=len(CAMVID_CLASSES)).to(dtype)
    prepare(model)
    optimizer, normalize = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), Normalize()
    for images, masks in batches:
        loss = F.cross_entropy(model(normalize(images).to(dtype)), masks.long(), ignore_index=CAMVID_IGNORE_INDEX)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.item()


def camvid(folder: str, size: tuple[int, int], batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of images and masks without end, in the same order every time."""
    pairs = find_pairs(folder, "train")
    dataset = MaskDataset(pairs, size, len(CAMVID_CLASSES), CAMVID_IGNORE_INDEX)
    generator = torch.Generator().manual_seed(0)
    while True:
        yield from DataLoader(dataset, batch_size, shuffle=True, drop_last=True, generator=generator)


def main() -> None:
    """Prints the loss of each step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="where CamVid is")
    parser.add_argument("--plain", action="store_true", help="plain PyTorch")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--size", type=int, nargs=2, default=(352, 480), help="height and width, multiples of 32")
    parser.add_argument("--batch-size", type=int, default=4)
    arguments = parser.parse_args()
    batches = camvid(arguments.folder, tuple(arguments.size), arguments.batch_size)
    losses = train(batches, (lambda model: None) if arguments.plain else fused)
    for step, loss in zip(range(arguments.steps), losses, strict=False):
        print(f"step {step}: loss {loss:.6f}", flush=True)


if __name__ == "__main__":
    main()
