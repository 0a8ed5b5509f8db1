"""Colours for classes, and the pictures and mask files made with them."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.colors import hsv_to_rgb
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

IGNORED_COLOR = (0, 0, 0)

PALETTES = ("ade20k", "camvid", "cityscapes", "voc")  # data sets whose colours are known
_CAMVID_CLASSES, _VOC_CLASSES = 11, 21

_GOLDEN_RATIO = (5**0.5 - 1) / 2  # multiples of it, modulo 1, spread evenly over the hues for any number of classes
_SATURATIONS = (0.9, 0.5)  # cycled with the values below so that near hues differ in strength
_VALUES = (0.95, 0.75, 0.55)
_UINT8_LABELS = 256


def palette(classes: int | str) -> np.ndarray:
    """A colour for each class.

    Args:
        classes: Number of classes C: CamVid's own colours for 11; otherwise the colours of matplotlib's "tab10",
            continued with evenly spread hues, so that a class has the same colour whatever the number of classes, and
            the first 256 all differ. Or the name of a data set whose colours are known: one of `PALETTES`.

    Returns:
        uint8, shape (C, 3): RGB.

    Raises:
        ValueError: The number is not positive, or there is no such name.
    """
    if isinstance(classes, str):
        if classes not in PALETTES:
            raise ValueError(f"there is no palette {classes!r}, only {', '.join(PALETTES)}")
        return _named(classes)
    if classes < 1:
        raise ValueError(f"num_classes must be positive, but it is {classes}")
    if classes == _CAMVID_CLASSES:
        return _named("camvid")
    return _qualitative(classes)


def _named(name: str) -> np.ndarray:
    if name == "voc":  # of a class's bits, three by three, each is one of red's, green's and blue's, the highest first
        bits = [[sum((label >> 3 * bit + channel & 1) << 7 - bit for bit in range(3)) for channel in range(3)]
                for label in range(_VOC_CLASSES)]  # fmt: skip
        return np.array(bits, dtype=np.uint8)
    colors = json.loads(Path(__file__).with_name("palettes.json").read_text())[name]
    return np.array([list(bytes.fromhex(color)) for color in colors], dtype=np.uint8)


def with_legend(
    picture: Image.Image, labels: Tensor | np.ndarray, class_names: Sequence[str], palette: np.ndarray
) -> Image.Image:
    """A picture with the names and colours of the classes that occur in it, in columns beside it.

    Args:
        picture: Such as :func:`overlay` gives.
        labels: Integer, shape (H, W): the mask. Labels without a name aren't in the legend.
        class_names: A name for each class.
        palette: uint8, shape (C, 3), from :func:`palette`.

    Returns:
        An RGB picture as high as ``picture``, and wider.
    """
    occurring = [int(label) for label in np.unique(_labels(labels)) if 0 <= label < len(class_names)]
    size = min(max(picture.height // 30, 10), 32)  # of the letters, in pixels
    line, font = 2 * size, ImageFont.load_default(size)
    rows = max(picture.height // line, 1)
    columns = [occurring[start : start + rows] for start in range(0, len(occurring), rows)]
    widths = [line + round(max(font.getlength(class_names[label]) for label in column)) + size for column in columns]
    result = Image.new("RGB", (picture.width + sum(widths), picture.height), "white")
    result.paste(picture)
    draw, left = ImageDraw.Draw(result), picture.width
    for column, width in zip(columns, widths, strict=True):
        for row, label in enumerate(column):
            middle = row * line + size
            box = (left + size // 2, middle - size // 2, left + size * 3 // 2, middle + size // 2)
            draw.rectangle(box, fill=tuple(palette[label].tolist()), outline="black")
            draw.text((left + line, middle), class_names[label], fill="black", font=font, anchor="lm")
        left += width
    return result


def colorize(mask: Tensor | np.ndarray, palette: np.ndarray, ignore_index: int) -> Image.Image:
    """Paint a mask in the colours of its classes; ignored pixels are black.

    Args:
        mask: Integer, shape (H, W).
        palette: uint8, shape (C, 3), from :func:`palette`.
        ignore_index: Label of the pixels that don't count.

    Returns:
        An RGB picture of W x H pixels.

    Raises:
        ValueError: ``mask`` is not two-dimensional, or a label is outside [0, C) and not ``ignore_index``.
    """
    labels = _labels(mask)
    ignored = labels == ignore_index
    outside = _outside(labels, palette) & ~ignored
    if outside.any():
        raise ValueError(f"mask holds the label {labels[outside][0]}, but the palette has {len(palette)} colours")
    colors = palette[np.where(ignored, 0, labels)]
    colors[ignored] = IGNORED_COLOR
    return Image.fromarray(colors)


def overlay(
    image: Tensor | Image.Image, mask: Tensor | np.ndarray, palette: np.ndarray, alpha: float = 0.5
) -> Image.Image:
    """Lay the colours of a mask over its image: ``(1 - alpha) * image + alpha * colour``.

    Pixels whose label has no colour, as the ignored ones, show the image alone.

    Args:
        image: uint8 or floating point, shape (C, H, W) (see :func:`read_image`), or a picture of W x H pixels.
        mask: Integer, shape (H, W).
        palette: uint8, shape (C, 3), from :func:`palette`.
        alpha: Share of the colour, in [0, 1].

    Returns:
        An RGB picture of W x H pixels.

    Raises:
        ValueError: The sizes of ``image`` and ``mask`` differ or ``alpha`` is outside [0, 1].
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be in [0, 1], but it is {alpha}")
    picture = to_picture(image)
    labels = _labels(mask)
    if picture.size != labels.shape[::-1]:
        raise ValueError(f"image is {picture.width}x{picture.height}, but mask is {labels.shape[1]}x{labels.shape[0]}")
    bare = _outside(labels, palette)
    painted = Image.blend(picture, Image.fromarray(palette[np.where(bare, 0, labels)]), alpha)
    return Image.composite(picture, painted, Image.fromarray(bare))


def save_mask(mask: Tensor | np.ndarray, path: str | Path, palette: np.ndarray | None = None) -> None:
    """Write a mask as a PNG file of class numbers, which MaskDataset reads back unchanged.

    Labels up to 255 give an 8-bit palette file, which viewers show in the classes' colours; larger ones a 16-bit
    grayscale file.

    Args:
        mask: Integer, shape (H, W), labels in 0..65535.
        path: File to write.
        palette: uint8, shape (C, 3), from :func:`palette`; None takes that of 256 classes. Labels without a colour are
            black.

    Raises:
        ValueError: ``mask`` is not two-dimensional, or a label is outside 0..65535.
    """
    labels = _labels(mask)
    largest = labels.max(initial=0)
    if labels.min(initial=0) < 0 or largest > np.iinfo(np.uint16).max:
        raise ValueError(f"a mask file holds labels 0..65535, but mask holds {labels.min()}..{largest}")
    if largest < _UINT8_LABELS:
        image = Image.fromarray(labels.astype(np.uint8))
        # all 256 entries: Pillow picks the bits of a pixel from the palette's length
        colors = np.zeros((_UINT8_LABELS, 3), dtype=np.uint8)
        given = _qualitative(_UINT8_LABELS) if palette is None else palette[:_UINT8_LABELS]
        colors[: len(given)] = given
        image.putpalette(colors.tobytes())
    else:
        image = Image.fromarray(labels.astype(np.uint16))
    image.save(path, format="PNG")


def _qualitative(num_classes: int) -> np.ndarray:
    tab10 = colormaps["tab10"]
    base = tab10(np.arange(tab10.N))[:, :3]
    extra = np.arange(max(0, num_classes - len(base)))
    hues = np.stack(
        [
            extra * _GOLDEN_RATIO % 1,
            np.take(_SATURATIONS, extra, mode="wrap"),
            np.take(_VALUES, extra, mode="wrap"),
        ],
        axis=-1,
    )
    return np.rint(np.concatenate([base, hsv_to_rgb(hues)])[:num_classes] * 255).astype(np.uint8)


def _labels(mask: Tensor | np.ndarray) -> np.ndarray:
    """The mask as an integer array of shape (H, W)."""
    labels = mask.detach().cpu().numpy() if isinstance(mask, torch.Tensor) else np.asarray(mask)
    if labels.ndim != 2 or labels.dtype.kind not in "iu":
        raise ValueError(f"mask must be integer of shape (H, W), but it is {labels.dtype} of shape {labels.shape}")
    return labels


def _outside(labels: np.ndarray, palette: np.ndarray) -> np.ndarray:
    return (labels < 0) | (labels >= len(palette))


def to_picture(image: Tensor | Image.Image) -> Image.Image:
    """An image as RGB: its first three channels, or its first as gray; floating point from its least to its largest."""
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    if image.ndim != 3 or not (image.dtype == torch.uint8 or image.is_floating_point()):
        raise ValueError(f"image must be uint8 or float of shape (C, H, W), but it is {image.dtype} {image.shape}")
    shown = image[: 3 if len(image) >= 3 else 1].expand(3, -1, -1).cpu()
    if shown.is_floating_point():
        least, largest = shown.aminmax()
        shown = ((shown - least) / (largest - least).clamp(min=torch.finfo(shown.dtype).tiny) * 255).to(torch.uint8)
    return Image.fromarray(shown.permute(1, 2, 0).contiguous().numpy())
