"""Sliding windows: against the same sums made with the whole image's logits at once, and their memory."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastseg
from fastseg.inference import GAUSSIAN_SIGMA, TestTimeAugmentation

CLASSES = 5


class Net(nn.Module):
    """A network that sees its neighbours, so that a tile's logits at its edge aren't the image's."""

    def __init__(self, dimensions: int = 2, stride: int = 1) -> None:
        super().__init__()
        self.conv = (nn.Conv2d, nn.Conv3d)[dimensions - 2](3, CLASSES, 5, padding=2, stride=stride)

    def forward(self, images: Tensor) -> Tensor:
        return self.conv(images)


def weighted_mean(model: nn.Module, image: Tensor, tile: Sequence[int], steps: Sequence[int], blend: str) -> Tensor:
    """The definition, with all logits of the image in memory: tiles every ``steps``, the last flush with the end."""
    size = image.shape[1:]
    padded = [max(extent, side) for extent, side in zip(size, tile, strict=True)]
    image = F.pad(
        image, [n for extent, whole in zip(size[::-1], padded[::-1], strict=True) for n in (0, whole - extent)]
    )
    window = torch.ones(tuple(tile), dtype=torch.float64)
    if blend == "gaussian":
        for axis, side in enumerate(tile):
            offsets = torch.arange(side, dtype=torch.float64) - (side - 1) / 2
            bell = torch.exp(-((offsets / (GAUSSIAN_SIGMA * side)) ** 2) / 2)
            window = window * bell.view([-1 if other == axis else 1 for other in range(len(tile))])
    sums, total = torch.zeros((CLASSES, *padded), dtype=torch.float64), torch.zeros(padded, dtype=torch.float64)
    starts = [
        sorted({*range(0, extent - side, step), extent - side})
        for extent, side, step in zip(padded, tile, steps, strict=True)
    ]
    for corner in itertools.product(*starts):
        at = tuple(slice(start, start + side) for start, side in zip(corner, tile, strict=True))
        logits = model(image[(slice(None), *at)][None])
        if logits.shape[2:] != window.shape:
            logits = F.interpolate(logits, size=tuple(tile), mode="bilinear" if len(tile) == 2 else "trilinear")
        sums[(slice(None), *at)] += (logits[0] * window).detach()
        total[at] += window
    return (sums / total)[(slice(None), *(slice(extent) for extent in size))]


@pytest.mark.parametrize("blend", ["gaussian", "constant"])
@pytest.mark.parametrize(
    ("size", "tile", "overlap", "steps", "stride"),
    [
        ((40, 56), (16, 16), 0.25, (12, 12), 1),
        ((41, 57), (16, 20), 0.5, (8, 10), 1),
        ((33, 29), (16, 16), 0.8, (3, 3), 1),  # more than two tiles over a pixel
        ((40, 56), (16, 16), 0.0, (16, 16), 1),
        ((16, 30), (16, 16), 0.25, (12, 12), 1),  # one row of tiles
        ((9, 30), (16, 16), 0.25, (12, 12), 1),  # smaller than a tile
        ((40, 56), (16, 16), 0.25, (12, 12), 2),  # logits of half the size
        ((12, 20, 17), (8, 8, 8), 0.25, (6, 6, 6), 1),
        ((12, 6, 17), (8, 8, 8), 0.5, (4, 4, 4), 2),
    ],
)
def test_is_the_weighted_mean_of_the_tiles(
    size: tuple[int, ...], tile: tuple[int, ...], overlap: float, steps: tuple[int, ...], stride: int, blend: Any
) -> None:
    model, image = Net(len(size), stride), torch.randn(3, *size)
    mean = weighted_mean(model.double(), image.double(), tile, steps, blend)
    labels, confidence = fastseg.sliding_window(
        model.float(), image, tile, overlap=overlap, blend=blend, batch_size=3, return_confidence=True
    )
    assert labels.dtype == torch.uint8
    assert confidence.dtype == torch.float32
    best = mean.topk(2, dim=0)
    clear = best.values[0] - best.values[1] > 1e-4
    assert clear.float().mean() > 0.99
    assert torch.equal(labels[clear].long(), best.indices[0][clear])
    torch.testing.assert_close(confidence.double(), mean.softmax(0).amax(0), rtol=1e-4, atol=1e-5)
    assert torch.equal(labels, fastseg.sliding_window(model, image, tile, overlap=overlap, blend=blend))


@pytest.mark.parametrize(
    ("size", "tile", "output"),
    [
        ((40, 56), (16, 16), (60, 84)),
        ((41, 30), (16, 16), (17, 61)),
        ((40, 30), (16, 16), (3, 30)),  # rows that no label is made of
        ((9, 30), (16, 16), (9, 45)),
        ((12, 20, 17), (8, 8, 8), (18, 30, 25)),
        ((20, 6, 17), (8, 8, 8), (7, 9, 17)),
    ],
    ids=str,
)
def test_labels_of_another_size(size: tuple[int, ...], tile: tuple[int, ...], output: tuple[int, ...]) -> None:
    model, image = Net(len(size)), torch.randn(3, *size)
    steps = [side - math.ceil(side * 0.25) for side in tile]
    mean = weighted_mean(model.double(), image.double(), tile, steps, "gaussian")
    mean = F.interpolate(mean[None], output, mode="bilinear" if len(size) == 2 else "trilinear")[0]
    labels, confidence = fastseg.sliding_window(model.float(), image, tile, size=output, return_confidence=True)
    best = mean.topk(2, dim=0)
    clear = best.values[0] - best.values[1] > 1e-4
    assert labels.shape == output
    assert torch.equal(labels[clear].long(), best.indices[0][clear])
    torch.testing.assert_close(confidence.double(), mean.softmax(0).amax(0), rtol=1e-4, atol=1e-5)
    assert torch.equal(labels, fastseg.sliding_window(model, image, tile, size=output))


@pytest.mark.parametrize("wrap", [lambda x: {"out": x}, lambda x: SimpleNamespace(logits=x)], ids=["out", "logits"])
def test_of_what_libraries_return(wrap: Any) -> None:
    model, image = Net(), torch.randn(3, 40, 56)
    expected = fastseg.sliding_window(model, image, 16)
    assert torch.equal(fastseg.sliding_window(lambda tiles: wrap(model(tiles)), image, 16), expected)


def test_preprocess_makes_the_networks_input_of_bytes() -> None:
    model, image = Net(), torch.randint(256, (3, 9, 40), dtype=torch.uint8)
    expected = fastseg.sliding_window(model, image / 255 - 0.5, 16)
    found = fastseg.sliding_window(model, image, 16, preprocess=lambda tiles: tiles / 255 - 0.5, batch_size=2)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image": torch.zeros(40, 56)}, r"image: expected \[channels, H, W\]"),
        ({"image": torch.zeros(3, 0, 56)}, r"image: expected"),
        ({"tile": (16, 16, 16)}, "tile: expected one number or 2"),
        ({"tile": 0}, "tile: expected"),
        ({"size": (40, 56, 3)}, r"size: expected 2 numbers above 0, got \(40, 56, 3\)"),
        ({"size": (0, 56)}, "size: expected 2 numbers above 0"),
        ({"overlap": 1.0}, r"overlap: expected a number in \[0, 1\), got 1.0"),
        ({"blend": "linear"}, "blend: expected"),
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"model": lambda tiles: tiles[:, :1]}, r"model: expected logits .* at least 2 classes, got \[1, 1, 16, 16\]"),
        ({"model": lambda tiles: 3}, "model: expected logits .* got int"),
    ],
)
def test_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fastseg.sliding_window(**({"model": Net(), "image": torch.zeros(3, 40, 56), "tile": 16} | arguments))


@pytest.mark.parametrize(("flip", "scales"), [(True, (1.0,)), (False, (1.0, 0.5, 1.5)), (True, (0.5, 1.0))])
def test_augmentation_is_the_mean_of_the_versions(flip: bool, scales: tuple[float, ...]) -> None:
    model, images = Net(stride=2), torch.randn(2, 3, 64, 96)
    versions = []
    for scale in scales:
        scaled = F.interpolate(images, size=[round(scale * side) for side in (64, 96)], mode="bilinear")
        for version in (scaled, scaled.flip(3))[: 1 + flip]:
            logits = model(version).flip(3) if version is not scaled else model(version)
            versions.append(logits)
    size = versions[0].shape[2:]
    expected = torch.stack([F.interpolate(version, size=size, mode="bilinear") for version in versions]).mean(0)
    torch.testing.assert_close(TestTimeAugmentation(model, flip=flip, scales=scales, divisor=16)(images), expected)


def test_augmentation_keeps_sizes_that_the_network_takes() -> None:
    sizes = []
    TestTimeAugmentation(lambda images: sizes.append(images.shape[2:]) or Net()(images), scales=(1.0, 0.7, 0.1))(
        torch.randn(1, 3, 64, 96)
    )
    assert sizes == [(64, 96)] * 2 + [(32, 64)] * 2 + [(32, 32)] * 2
    with pytest.raises(ValueError, match=r"scales: expected numbers above 0, got \(0.5, 0\)"):
        TestTimeAugmentation(Net(), scales=(0.5, 0))


def test_is_monais_inferer_and_nnunets_export() -> None:
    """With constant weights: MONAI's bell curve is bounded from below, which is a lot in a tile's corners."""
    inferers = pytest.importorskip("monai.inferers", reason="MONAI is one of the extra models")
    model, image, size = Net(3), torch.randn(3, 20, 29, 17), (30, 43, 26)
    with torch.no_grad():
        inferer = inferers.SlidingWindowInferer((8, 8, 8), sw_batch_size=4, overlap=0.25)
        logits = F.interpolate(inferer(image[None], model), size, mode="trilinear")[0]
    labels = fastseg.sliding_window(model, image, (8, 8, 8), overlap=0.25, blend="constant", size=size)
    best = logits.topk(2, dim=0)
    clear = best.values[0] - best.values[1] > 1e-4
    assert clear.float().mean() > 0.99
    assert torch.equal(labels[clear].long(), best.indices[0][clear])


MEMORY = {
    "image": (19, 128, (512, 8192), None),
    "volume": (14, 32, (256, 64, 64), (384, 96, 96)),
}


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from Linux' /proc")
@pytest.mark.parametrize(("classes", "tile", "size", "output"), MEMORY.values(), ids=MEMORY)
def test_memory_is_a_bands(classes: int, tile: int, size: tuple[int, ...], output: tuple[int, ...] | None) -> None:
    code = f"""
import math
import torch, fastseg
peak = lambda: int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024
classes, tile, size, output = {classes}, {tile}, {size}, {output}
image = torch.zeros(3, *size, dtype=torch.uint8)
model = lambda tiles: tiles[:, :1].expand(-1, classes, *[-1] * len(size))
run = lambda image, output: fastseg.sliding_window(
    model, image, tile, size=output, preprocess=lambda tiles: tiles / 255
)
run(image[:, :tile, :tile], output and (tile + 1,) * 2 + output[2:])
before = peak()
run(image, output)
band = classes * tile * math.prod(size[1:]) * 4  # of the image: four times that, or eight times
grown = peak() - before
assert grown < 1.3 * band + 2 * math.prod(output or size), (grown, band)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
