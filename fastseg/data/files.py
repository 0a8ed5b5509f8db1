"""Reading image files: what they hold, as arrays and as checked tensors."""

import contextlib
import logging
import struct
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import kornia_rs.io
import numpy as np
import tifffile
import torch
from PIL import Image
from torch import Tensor

from fastseg.data.errors import DataError

MAX_PIXELS = 500_000_000  # 1.5 GB of RGB; Pillow's own limit would refuse a scanned map

# What Pillow and tifffile raise on damaged files (found by damaging files of ten formats): OSError for most,
# SyntaxError for broken PNG chunks, ValueError for headers, struct.error for EXIF data, all others for TIFF.
_UNREADABLE = (
    OSError, SyntaxError, ValueError, struct.error,
    ArithmeticError, LookupError, MemoryError, RuntimeError, TypeError, zlib.error,
)  # fmt: skip

_DEEP_MODES = ("I", "I;16", "I;16L", "I;16B", "I;16N", "F")  # more than 8 bits: Pillow would clip them to RGB
_INDEX_MODES = ("1", "L", "P")
_ORIENTATION = 0x0112  # EXIF's and TIFF's tag
_CMYK = 5  # TIFF's photometric interpretations that Pillow turns into RGB
_ALPHA = (1, 2)  # TIFF's kinds of extra samples that are alpha channels

_logger = logging.getLogger("fastseg")

_pillow_limit = threading.Lock()


class Raster(NamedTuple):
    """What an image file holds.

    Args:
        pixels: ``[H, W]`` or ``[H, W, C]``.
        orientation: The EXIF orientation, 1 for none.
        frames: The number of images in the file, of which this is the first.
        lossy: Whether compression changed the values (JPEG).
    """

    pixels: np.ndarray
    orientation: int
    frames: int
    lossy: bool


def read_raster(
    path: Path,
    kind: Literal["image", "labels", "colors"],
    *,
    exif: str = "apply",
    max_pixels: int | None = None,
) -> Raster:
    """Read a file by Pillow, or by tifffile or kornia_rs where Pillow would lose channels or bits.

    Args:
        path: The file.
        kind: ``"image"``: RGB where the file has up to 8 bits, an alpha channel is dropped; ``"labels"``: the numbers
            of grayscale and palette files, RGB of others; ``"colors"``: RGB.
        exif: ``"ignore"`` leaves the pixels as they are in the file; else its EXIF orientation turns them.
        max_pixels: The largest file; None takes ``MAX_PIXELS``.

    Raises:
        DataError: The file can't be read, isn't a regular file or has more pixels.
    """
    if not path.is_file():  # opening a pipe would wait for ever
        raise DataError(f"{path}: " + ("not a regular file" if path.exists() else "can't be read: no such file"))
    try:
        raster = _read_deep_tiff(path, max_pixels) if path.suffix.lower() in (".tif", ".tiff") else None
        raster = raster or _read_by_pillow(path, kind, max_pixels)
    except DataError:
        raise
    except _UNREADABLE as error:
        raise DataError(f"{path}: can't be read as an image: {error}") from error
    if raster.pixels.dtype.kind == "f" and not np.isfinite(raster.pixels).all():
        raise DataError(f"{path}: holds values that are not finite")
    turn = 1 if exif == "ignore" else raster.orientation
    return raster._replace(pixels=_turned(raster.pixels, turn))


def read_image(
    path: str | Path, size: tuple[int, int] | None = None, *, exif: str = "apply", max_pixels: int | None = None
) -> Tensor:
    """Read an image.

    Files with up to 8 bits and the usual channels become RGB: grayscale, palette and CMYK are converted, an alpha
    channel is dropped. Others are read as what they are: 16 bits, floating point, any number of channels. Of an
    animation the first frame is read, which the logger ``fastseg`` says.

    Args:
        path: Any file that Pillow reads, or tifffile.
        size: ``(height, width)`` to resize to, bilinear with antialiasing; None keeps the file's.
        exif: ``"ignore"`` leaves the pixels as they are in the file; else its EXIF orientation turns them.
        max_pixels: The largest file; None takes 500 million.

    Returns:
        Shape (C, H, W). uint8 for up to 8 bits; float32 else: integers as shares of their type's largest value,
        floating point as it is.

    Raises:
        DataError: The file can't be read or has more pixels.
    """
    return image_tensor(read_pixels(Path(path), exif=exif, max_pixels=max_pixels), size)


def read_pixels(path: Path, *, exif: str = "apply", max_pixels: int | None = None) -> np.ndarray:
    """The pixels of an image, ``[H, W]`` or ``[H, W, C]``, of which :func:`image_tensor` makes that of `read_image`."""
    raster = read_raster(path, "image", exif=exif, max_pixels=max_pixels)
    if raster.frames > 1:
        _logger.warning("%s: the first of its %d frames is read", path, raster.frames)
    return raster.pixels


def image_tensor(pixels: np.ndarray, size: tuple[int, int] | None = None) -> Tensor:
    """The tensor of an image: see :func:`read_image`."""
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.dtype.kind in "iu" and pixels.dtype != np.uint8:
        pixels = pixels.astype(np.float32) / np.iinfo(pixels.dtype).max
    if pixels.dtype.kind == "f":
        pixels = pixels.astype(np.float32, copy=False)
    if size is not None and size != pixels.shape[:2]:
        pixels = _resized(pixels, size)
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1).contiguous()


def _resized(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    height, width = size
    if pixels.shape[2] == 3 and pixels.dtype == np.uint8:
        return np.array(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR))  # antialiases
    planes = [Image.fromarray(np.ascontiguousarray(pixels[..., channel])) for channel in range(pixels.shape[2])]
    return np.stack([np.asarray(plane.resize((width, height), Image.Resampling.BILINEAR)) for plane in planes], -1)


def _read_by_pillow(path: Path, kind: str, max_pixels: int | None) -> Raster:
    with _open(path) as file:
        _check_extent(path, file.width, file.height, max_pixels)
        tile = getattr(file, "tile", [])  # before loading
        coding = tile[0][3] if kind == "image" and file.format == "PNG" and tile else None
        # taken out before loading, which turns TIFF files otherwise
        orientation = file.getexif().pop(_ORIENTATION, 1)
        frames, lossy = getattr(file, "n_frames", 1), file.format in ("JPEG", "MPO")
        file.load()  # decodes the pixels: a truncated file fails here
        image: Image.Image = file
        if coding in ("RGB;16B", "RGBA;16B"):  # of which Pillow gives 8 bits
            pixels = kornia_rs.io.read_image_png_u16(str(path), image.mode.lower())[..., :3]
        elif coding == "LA;16B":
            raise DataError(f"{path}: gray of 16 bits with an alpha channel, of which Pillow reads 8: save it without")
        elif image.mode == "I" and image.format == "PNG":  # whose integers have 16 bits at most
            pixels = np.asarray(image).astype(np.uint16)
        elif image.mode in _DEEP_MODES:
            pixels = np.array(image)
        elif kind == "labels" and image.mode in _INDEX_MODES:
            pixels = np.array(image, dtype=np.uint8)
        else:
            if "transparency" in image.info:
                image = image.convert("RGBA")  # Pillow warns where such a palette goes to RGB at once
            pixels = np.array(image.convert("RGB"))
    return Raster(pixels, orientation if orientation in range(1, 9) else 1, 1 if lossy else frames, lossy)


@contextlib.contextmanager
def _open(path: Path) -> Iterator[Image.Image]:
    """Open a file by Pillow without its own limit of pixels, which is a setting of the whole process."""
    with _pillow_limit:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            file = Image.open(path)
        finally:
            Image.MAX_IMAGE_PIXELS = limit
    with file:
        yield file


def _read_deep_tiff(path: Path, max_pixels: int | None) -> Raster | None:
    """What Pillow can't read as it is: several channels of more than 8 bits, or more channels than RGB and alpha."""
    try:
        file = tifffile.TiffFile(path)
    except tifffile.TiffFileError:  # no TIFF at all: Pillow says what is wrong
        return None
    with file:
        page, series = file.pages.first, file.series[0]
        samples, alpha = page.samplesperpixel, bool(set(page.extrasamples) & set(_ALPHA))
        usual = page.bitspersample <= 8 and (samples <= 3 + alpha or page.photometric == _CMYK)
        single = samples == 1 and page.bitspersample <= 32
        if "C" not in series.axes and (usual or single):
            return None
        _check_extent(path, page.imagewidth, page.imagelength, max_pixels)
        pixels, axes, frames = series.asarray(), series.axes, 1
        while pixels.ndim > 2 + bool(set("CS") & set(axes)):
            frames, axes, pixels = frames * len(pixels), axes[1:], pixels[0]
        for axis in set("CS") & set(axes):
            pixels = np.moveaxis(pixels, axes.index(axis), -1)
        if alpha and pixels.ndim > 2:
            pixels = pixels[..., : samples - 1]
        tag = page.tags.get(_ORIENTATION)
        return Raster(pixels, tag.value if tag else 1, frames, False)


def _check_extent(path: Path, width: int, height: int, max_pixels: int | None) -> None:
    largest = MAX_PIXELS if max_pixels is None else max_pixels
    if width * height > largest:
        raise DataError(f"{path}: {width}x{height} is more than {largest} pixels; --max-pixels raises the limit")


def _turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """The pixels as an EXIF orientation says that they are to be shown."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)
