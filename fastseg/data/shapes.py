"""A generated data set: overlapping shapes on textured ground, for demonstrations and tests."""

from pathlib import Path

import numpy as np
import torch
from matplotlib.colors import hsv_to_rgb
from PIL import Image, ImageDraw
from torch import Tensor
from torch.utils.data import Dataset

from fastseg.data.pictures import palette, save_mask

_CIRCLE, _RECTANGLE, _TRIANGLE = 1, 2, 3  # labels, as in ShapesDataset.CLASSES

_SHAPES = (4, 9)  # shapes in an image: at least, and below
_RADIUS = (0.12, 0.26)  # of a shape, as a share of the image's shorter side
_STRETCH = (0.5, 1.0)  # height of a rectangle or triangle, as a share of its width
_CORNERS = {  # of a shape of radius 1 around 0; the circle has none
    _RECTANGLE: np.array([(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)]),
    _TRIANGLE: np.array([(-1.0, -0.6), (1.0, -0.6), (0.0, 1.2)]),
}
_HUES = (0.0, 0.15, 0.40, 0.65)  # centre of each class's hues; ground first
_HUE_SPREAD = 0.12  # standard deviation: neighbouring classes share many hues
_SATURATION = (0.25, 0.8)
_VALUE = (0.35, 0.85)
_PATTERN_PERIOD = 4  # pixels, few enough for 3x3 filters to tell the patterns apart
_PATTERN_CONTRAST = (0.05, 0.15)  # amplitude of a shape's pattern, of full brightness 1
_GROUND_CELLS = 12  # pixels of one cell of the ground's coarse noise
_GROUND_CONTRAST = 0.10  # standard deviation of that noise
_NOISE = 0.05  # standard deviation of the noise on every pixel


class ShapesDataset(Dataset[tuple[Tensor, Tensor]]):
    """Images of overlapping circles, rectangles and triangles on textured ground, with their masks.

    The label of a pixel is the class of the uppermost shape there, 0 is the ground. A class shows in its hue (the hues
    of the classes overlap), in a faint pattern (circles have horizontal stripes, rectangles vertical ones, triangles
    are chequered) and in its outline. An item is determined by ``seed`` and its index.

    Args:
        length: Number of images.
        size: ``(height, width)`` in pixels.
        seed: Seed of the whole data set.

    Raises:
        ValueError: ``length`` or ``seed`` is negative, or ``size`` is not positive.
    """

    CLASSES = ("background", "circle", "rectangle", "triangle")

    def __init__(self, length: int, size: tuple[int, int] = (96, 96), seed: int = 0) -> None:
        if length < 0:
            raise ValueError(f"length must not be negative, but it is {length}")
        if seed < 0:
            raise ValueError(f"seed must not be negative, but it is {seed}")
        if len(size) != 2 or min(size) < 1:
            raise ValueError(f"size must be two positive numbers (height, width), but it is {size}")
        self.length = length
        self.size = size
        self.seed = seed

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """The image, uint8 of shape (3, H, W), and its mask, uint8 of shape (H, W)."""
        if not 0 <= index < self.length:
            raise IndexError(f"index must be in [0, {self.length}), but it is {index}")
        generator = np.random.default_rng((self.seed, index))
        height, width = self.size
        image = _ground(generator, height, width)
        mask = np.zeros((height, width), dtype=np.uint8)
        for _ in range(generator.integers(*_SHAPES)):
            label = int(generator.integers(1, len(self.CLASSES)))
            inside = _outline(generator, label, height, width)
            brightness = generator.uniform(*_PATTERN_CONTRAST) * _pattern(generator, label, height, width)[inside]
            image[inside] = _color(generator, label) + brightness[:, None]
            mask[inside] = label
        image += _NOISE * generator.standard_normal(image.shape)
        pixels = np.rint(image.clip(0, 1) * 255).astype(np.uint8)
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous(), torch.from_numpy(mask)

    def write(self, root: str | Path) -> None:
        """Save every item as ``root/images/NNNNN.png`` and ``root/masks/NNNNN.png``, which ``find_pairs`` finds.

        Args:
            root: Folder, made where it doesn't exist.
        """
        images, masks = Path(root, "images"), Path(root, "masks")
        images.mkdir(parents=True, exist_ok=True)
        masks.mkdir(parents=True, exist_ok=True)
        colors = palette(len(self.CLASSES))
        for index in range(self.length):
            image, mask = self[index]
            Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(images / f"{index:05d}.png")
            save_mask(mask, masks / f"{index:05d}.png", colors)


def _color(generator: np.random.Generator, label: int) -> np.ndarray:
    hue = generator.normal(_HUES[label], _HUE_SPREAD) % 1
    return hsv_to_rgb([hue, generator.uniform(*_SATURATION), generator.uniform(*_VALUE)])


def _ground(generator: np.random.Generator, height: int, width: int) -> np.ndarray:
    """One colour with coarse smooth noise, float64 of shape (height, width, 3)."""
    cells = (height // _GROUND_CELLS + 1, width // _GROUND_CELLS + 1)
    noise = Image.fromarray(generator.normal(0, _GROUND_CONTRAST, cells).astype(np.float32))
    smooth = np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float64)
    return _color(generator, 0) + smooth[..., None]


def _pattern(generator: np.random.Generator, label: int, height: int, width: int) -> np.ndarray:
    """The pattern of the class ``label`` at a random offset: 1 and -1, of shape (height, width)."""
    rows, columns = _stripes(generator, height)[:, None], _stripes(generator, width)[None, :]
    pattern = {_CIRCLE: rows, _RECTANGLE: columns, _TRIANGLE: rows * columns}[label]
    return np.broadcast_to(pattern, (height, width))


def _stripes(generator: np.random.Generator, length: int) -> np.ndarray:
    phase = (np.arange(length) + generator.integers(_PATTERN_PERIOD)) % _PATTERN_PERIOD
    return np.where(phase < _PATTERN_PERIOD / 2, 1, -1)


def _outline(generator: np.random.Generator, label: int, height: int, width: int) -> np.ndarray:
    """The pixels of a shape of the class ``label`` at a random place, bool of shape (height, width)."""
    canvas = Image.new("1", (width, height))
    draw = ImageDraw.Draw(canvas)
    center = generator.uniform((0, 0), (width, height))
    radius = generator.uniform(*_RADIUS) * min(height, width)
    if label == _CIRCLE:
        draw.ellipse([*(center - radius), *(center + radius)], fill=1)
    else:
        angle = generator.uniform(0, 2 * np.pi)
        turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        stretch = (1, generator.uniform(*_STRETCH))
        points = center + radius * (_CORNERS[label] * stretch) @ turn
        draw.polygon([tuple(point) for point in points], fill=1)
    return np.asarray(canvas)
