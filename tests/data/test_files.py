import contextlib
import os
import pickle
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

pytest.importorskip("PIL", reason="Pillow isn't installed: it comes with the extra [train]")
import tifffile
from PIL import Image, ImageOps

from fastseg.data import DataError, MaskDataset, Pair, PairReader, read_image

HEIGHT, WIDTH = 12, 20  # not square: swapped axes show


def gradient() -> np.ndarray:
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    return np.stack([rows * 10, columns * 10, rows + columns], axis=-1).astype(np.uint8)


def labels(num_classes: int = 4) -> np.ndarray:
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    return ((rows // 3 + columns // 5) % num_classes).astype(np.uint8)


def write_pair(folder: Path, image: Image.Image, mask: Image.Image, *, suffix: str = ".png") -> Pair:
    pair = Pair(folder / f"image{suffix}", folder / "mask.png")
    image.save(pair.image)
    mask.save(pair.mask)
    return pair


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return write_pair(tmp_path, Image.fromarray(gradient()), Image.fromarray(labels()))


def test_an_item_is_the_files_content(pair: Pair) -> None:
    dataset = MaskDataset([pair], num_classes=4)
    image, mask = dataset[0]
    assert dataset.pairs == [pair]
    assert len(dataset) == 1
    assert image.dtype == mask.dtype == torch.uint8
    assert image.is_contiguous()
    assert torch.equal(image, torch.from_numpy(gradient()).permute(2, 0, 1))
    assert torch.equal(mask, torch.from_numpy(labels()))


def test_a_data_loader_stacks_the_items_of_a_pickled_copy(pair: Pair) -> None:
    dataset = pickle.loads(pickle.dumps(MaskDataset([pair] * 4)))  # as worker processes get it
    images, masks = next(iter(DataLoader(dataset, batch_size=4)))
    assert images.shape == (4, 3, HEIGHT, WIDTH)
    assert masks.shape == (4, HEIGHT, WIDTH)


def test_size_resizes_the_image_smoothly_and_the_mask_to_the_nearest_label(pair: Pair) -> None:
    image, mask = MaskDataset([pair], size=(6, 5))[0]
    assert image.shape == (3, 6, 5)
    assert mask.shape == (6, 5)
    # the same filter, but Pillow rounds to a grey level after each axis: twice half a level
    full = torch.from_numpy(gradient()).permute(2, 0, 1)[None].float()
    expected = torch.nn.functional.interpolate(full, size=(6, 5), mode="bilinear", antialias=True)[0]
    assert (image.float() - expected).abs().max() <= 1
    nearest = torch.nn.functional.interpolate(torch.from_numpy(labels())[None, None], size=(6, 5), mode="nearest-exact")
    assert torch.equal(mask, nearest[0, 0])


def test_enlarging_a_mask_makes_no_new_label(pair: Pair) -> None:
    _, mask = MaskDataset([pair], size=(31, 57))[0]
    assert set(mask.unique().tolist()) == {0, 1, 2, 3}


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_images_of_every_mode_become_rgb(tmp_path: Path, mode: str) -> None:
    source = Image.fromarray(gradient()).convert(mode)
    suffix = ".tiff" if mode == "CMYK" else ".png"
    pair = write_pair(tmp_path, source, Image.fromarray(labels()), suffix=suffix)
    image, _ = MaskDataset([pair])[0]
    assert torch.equal(image, torch.from_numpy(np.array(source.convert("RGB"))).permute(2, 0, 1))


def test_a_palette_image_with_a_transparency_table_becomes_rgb(tmp_path: Path) -> None:
    source = Image.fromarray(gradient()).quantize(8)
    source.save(tmp_path / "image.png", transparency=bytes(range(0, 256, 32)))
    expected = torch.from_numpy(np.array(source.convert("RGB"))).permute(2, 0, 1)
    assert torch.equal(read_image(tmp_path / "image.png"), expected)


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
def test_an_image_is_turned_as_its_exif_orientation_says(tmp_path: Path, suffix: str) -> None:
    source = Image.fromarray(gradient())
    exif = Image.Exif()
    exif[0x0112] = 6  # Orientation: a quarter turn clockwise
    path = tmp_path / f"image{suffix}"
    source.save(path, exif=exif)
    turned = np.rot90(gradient(), -1).copy()
    assert torch.equal(read_image(path), torch.from_numpy(turned).permute(2, 0, 1))


def test_read_image_resizes(tmp_path: Path, pair: Pair) -> None:
    assert torch.equal(read_image(pair.image, size=(6, 5)), MaskDataset([pair], size=(6, 5))[0][0])


@pytest.mark.parametrize("size", [None, (24, 10)], ids=["own-size", "resized"])
def test_palette_masks_keep_their_indices(tmp_path: Path, size: tuple[int, int] | None) -> None:
    mask = Image.fromarray(labels())
    mask.putpalette(np.random.default_rng(0).integers(0, 256, 768, dtype=np.uint8).tobytes())
    pair = write_pair(tmp_path, Image.fromarray(gradient()), mask)
    plain = Image.fromarray(labels())
    if size is not None:
        plain = plain.resize(size[::-1], Image.Resampling.NEAREST)
    assert torch.equal(MaskDataset([pair], size=size)[0][1], torch.from_numpy(np.array(plain)))


def test_bilevel_masks_are_the_classes_0_and_1(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, Image.fromarray(gradient()), Image.fromarray(labels(2) == 1))
    _, mask = MaskDataset([pair], num_classes=2)[0]
    assert mask.dtype == torch.uint8
    assert torch.equal(mask, torch.from_numpy(labels(2)))


@pytest.mark.parametrize(
    ("num_classes", "ignore_index", "factor", "dtype"),
    [
        pytest.param(None, 255, 300, torch.int64, id="16-bit-file"),
        pytest.param(901, 255, 300, torch.int64, id="many-classes"),
        pytest.param(4, 65535, 1, torch.int64, id="large-ignore_index"),
        pytest.param(4, 255, 1, torch.uint8, id="few-classes-in-a-16-bit-file"),
        pytest.param(4, -100, 1, torch.uint8, id="negative-ignore_index"),
    ],
)
def test_masks_are_int64_where_labels_may_exceed_255(
    tmp_path: Path, num_classes: int | None, ignore_index: int, factor: int, dtype: torch.dtype
) -> None:
    values = labels().astype(np.uint16) * factor
    pair = write_pair(tmp_path, Image.fromarray(gradient()), Image.fromarray(values))
    _, mask = MaskDataset([pair], num_classes=num_classes, ignore_index=ignore_index)[0]
    assert mask.dtype == dtype
    assert torch.equal(mask.long(), torch.from_numpy(values.astype(np.int64)))


def test_sizes_that_differ_are_named_with_both_files(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, Image.fromarray(gradient()), Image.fromarray(labels()[:, :-1]))
    message = f"{re.escape(str(pair.image))} is 20x12, but its mask {re.escape(str(pair.mask))} is 19x12"
    with pytest.raises(DataError, match=message):
        MaskDataset([pair], size=(6, 5))[0]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA"])
def test_colour_masks_are_refused(tmp_path: Path, mode: str) -> None:
    pair = write_pair(tmp_path, Image.fromarray(gradient()), Image.fromarray(gradient()).convert(mode))
    message = r"mask\.png: a mask holds one class number for each pixel .* this holds \(\d+,\d+,\d+\).*--label-map FILE"
    with pytest.raises(DataError, match=message):
        MaskDataset([pair])[0]


@pytest.mark.parametrize("size", [None, (6, 5)], ids=["own-size", "resized"])
def test_images_of_16_bits_are_shares_of_the_largest_value(tmp_path: Path, size: tuple[int, int] | None) -> None:
    values = gradient()[..., 1].astype(np.uint16) * 250
    pair = write_pair(tmp_path, Image.fromarray(values), Image.fromarray(labels()))
    image, _ = MaskDataset([pair], size)[0]
    expected = torch.from_numpy(values.astype(np.float32) / 65535)[None]
    if size is not None:
        expected = torch.nn.functional.interpolate(expected[None], size=size, mode="bilinear", antialias=True)[0]
    torch.testing.assert_close(image, expected)


@pytest.mark.parametrize("damaged", ["image", "mask"])
@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda data: data[: len(data) // 2], id="truncated"),
        pytest.param(lambda data: b"", id="empty"),
        pytest.param(lambda data: b"not an image", id="no-image"),
        pytest.param(lambda data: data[:40] + b"\0" * 20 + data[60:], id="overwritten"),
    ],
)
def test_a_damaged_file_is_named(pair: Pair, damaged: str, damage: Callable[[bytes], bytes]) -> None:
    path = getattr(pair, damaged)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=rf"^{re.escape(str(path))}: can't be read as an image"):
        MaskDataset([pair])[0]


def test_a_file_deleted_since_it_was_found_is_named(pair: Pair) -> None:
    pair.mask.unlink()
    with pytest.raises(DataError, match=rf"^{re.escape(str(pair.mask))}: can't be read"):
        MaskDataset([pair])[0]


@pytest.mark.parametrize(
    ("num_classes", "ignore_index", "message"),
    [
        pytest.param(3, 255, "label 3 is outside the classes 0..2 and is not the ignored label 255", id="outside"),
        pytest.param(4, 255, None, id="inside"),
        pytest.param(3, 3, None, id="ignored"),
        pytest.param(1, 3, "label 1 is outside the classes 0..0", id="one-class"),
    ],
)
def test_a_label_outside_the_classes_is_named(
    pair: Pair, num_classes: int, ignore_index: int, message: str | None
) -> None:
    dataset = MaskDataset([pair], num_classes=num_classes, ignore_index=ignore_index)
    if message is None:
        assert dataset[0][1].max() == 3
        return
    with pytest.raises(DataError, match=rf"^{re.escape(str(pair.mask))}: {message}"):
        dataset[0]


def test_a_label_that_resizing_would_drop_is_still_found(tmp_path: Path) -> None:
    values = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    values[0, 0] = 9
    pair = write_pair(tmp_path, Image.fromarray(gradient()), Image.fromarray(values))
    with pytest.raises(DataError, match="label 9"):
        MaskDataset([pair], size=(2, 2), num_classes=4)[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param({"size": (0, 5)}, r"size must be two positive numbers.*\(0, 5\)", id="size"),
        pytest.param({"num_classes": 0}, "num_classes must be positive, but it is 0", id="num_classes"),
    ],
)
def test_bad_arguments_are_refused(pair: Pair, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MaskDataset([pair], **arguments)


@pytest.mark.parametrize("suffix", [".jpg", ".tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_that_exif_turns_otherwise_than_its_mask_needs_a_word(
    tmp_path: Path, orientation: int, suffix: str
) -> None:
    turned = tmp_path / f"turned{suffix}"
    source = Image.fromarray(np.kron(labels(2), np.full((16, 16), 255, np.uint8))).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = orientation
    source.save(turned, exif=exif)
    shown = ImageOps.exif_transpose(Image.open(turned)) if suffix == ".jpg" else Image.open(turned).copy()
    as_shown, as_stored = (Image.fromarray((np.array(x.convert("L")) > 127).astype(np.uint8)) for x in (shown, source))
    for choice, mask in (("apply", as_shown), ("ignore", as_stored)):
        mask.save(tmp_path / "mask.png")
        pair = Pair(turned, tmp_path / "mask.png")
        image, read = MaskDataset([pair], reader=PairReader(exif=choice))[0]
        assert torch.equal((image[0] > 127).to(torch.uint8), read)
        if orientation != 1:
            with pytest.raises(DataError, match=rf"EXIF orientation is {orientation}, .* is 1: --exif apply turns"):
                MaskDataset([pair])[0]
    # a mask that is turned as its image is no question
    as_stored.save(tmp_path / "mask.png", exif=exif)
    image, read = MaskDataset([pair])[0]
    assert torch.equal((image[0] > 127).to(torch.uint8), read)


RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("pixels", "options"),
    [
        pytest.param(RNG.integers(0, 2**16, (9, 7, 3), np.uint16), {"photometric": "rgb"}, id="RGB-16-bit"),
        pytest.param(RNG.integers(0, 2**8, (9, 7, 5), np.uint8), {"planarconfig": "contig"}, id="5-channels"),
        pytest.param(
            RNG.integers(0, 2**16, (9, 7, 4), np.uint16).transpose(2, 0, 1),
            {"planarconfig": "separate", "photometric": "minisblack"},
            id="4-planes-16-bit",
        ),
        pytest.param(
            RNG.integers(0, 2**8, (9, 7, 4), np.uint8),
            {"photometric": "rgb", "extrasamples": [0]},
            id="RGB-and-infrared",
        ),
        pytest.param(RNG.random((9, 7), np.float32), {}, id="float32"),
        pytest.param(RNG.random((9, 7, 2)), {"planarconfig": "contig"}, id="2-channels-float64"),
        pytest.param(
            RNG.integers(0, 2**16, (3, 9, 7), np.uint16), {"imagej": True, "metadata": {"axes": "CYX"}}, id="CYX"
        ),
    ],
)
@pytest.mark.parametrize("compression", [None, "zlib"])
def test_tiff_files_are_read_as_what_they_are(
    tmp_path: Path, pixels: np.ndarray, options: dict, compression: str | None
) -> None:
    if compression and "imagej" in options:
        compression = None  # which the format doesn't have
    path = tmp_path / "image.tif"
    tifffile.imwrite(path, pixels, compression=compression, **options)
    channels_first = options.get("planarconfig") == "separate" or "imagej" in options
    expected = torch.from_numpy(np.atleast_3d(pixels.transpose(1, 2, 0) if channels_first else pixels)).permute(2, 0, 1)
    image = read_image(path)
    if pixels.dtype == np.uint8:
        assert torch.equal(image, expected)
    else:
        share = expected.float() / 65535 if pixels.dtype == np.uint16 else expected.float()
        torch.testing.assert_close(image, share)
    assert read_image(path, (5, 4)).shape == (len(image), 5, 4)


def png(path: Path, pixels: np.ndarray) -> None:
    """Write a PNG file of 16 bits, as Pillow can't."""
    height, width, channels = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    kind = {2: 4, 3: 2, 4: 6}[channels]  # gray with alpha, RGB, RGB with alpha
    header = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    file = b"\x89PNG\r\n\x1a\n"
    for data in (b"IHDR" + header, b"IDAT" + zlib.compress(rows), b"IEND"):
        file += struct.pack(">I", len(data) - 4) + data + struct.pack(">I", zlib.crc32(data))
    path.write_bytes(file)


@pytest.mark.parametrize("channels", [3, 4])
def test_colours_of_16_bits_in_png_keep_them(tmp_path: Path, channels: int) -> None:
    pixels = RNG.integers(0, 2**16, (9, 7, channels), np.uint16)
    png(tmp_path / "deep.png", pixels)
    expected = torch.from_numpy(pixels[..., :3].astype(np.float32) / 65535).permute(2, 0, 1)
    assert torch.equal(read_image(tmp_path / "deep.png"), expected)


def test_gray_of_16_bits_with_an_alpha_channel_is_refused(tmp_path: Path) -> None:
    png(tmp_path / "gray.png", RNG.integers(0, 2**16, (9, 7, 2), np.uint16))
    with pytest.raises(DataError, match=r"gray\.png: gray of 16 bits with an alpha channel"):
        read_image(tmp_path / "gray.png")


def test_an_alpha_channel_of_16_bits_is_dropped(tmp_path: Path) -> None:
    pixels = RNG.integers(0, 2**16, (9, 7, 4), np.uint16)
    tifffile.imwrite(tmp_path / "image.tif", pixels, photometric="rgb", extrasamples=["unassalpha"])
    assert read_image(tmp_path / "image.tif").shape == (3, 9, 7)


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "image.tif", np.array([[0.5, np.nan]], np.float32))
    with pytest.raises(DataError, match=r"image\.tif: holds values that are not finite"):
        read_image(tmp_path / "image.tif")


@pytest.mark.parametrize("suffix", [".gif", ".png", ".webp", ".tif"])
def test_of_an_animation_the_first_frame_is_read(tmp_path: Path, suffix: str, caplog: pytest.LogCaptureFixture) -> None:
    frames = [Image.fromarray(np.full((9, 7), value, np.uint8)) for value in (0, 255, 100)]
    path = tmp_path / f"image{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:])
    assert read_image(path).max() == 0
    assert caplog.messages == [f"{path}: the first of its 3 frames is read"]


def test_what_is_no_regular_file_is_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(DataError, match=r"pipe\.png: not a regular file"):
        read_image(tmp_path / "pipe.png")


def test_the_limit_of_pixels_is_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)  # Pillow's, which warns, and refuses twice as many
    path = tmp_path / "image.png"
    Image.fromarray(gradient()).save(path)
    assert read_image(path, max_pixels=HEIGHT * WIDTH).shape == (3, HEIGHT, WIDTH)
    with pytest.raises(DataError, match=r"image\.png: 20x12 is more than 239 pixels; --max-pixels raises the limit"):
        read_image(path, max_pixels=HEIGHT * WIDTH - 1)
    assert Image.MAX_IMAGE_PIXELS == 10
    tifffile.imwrite(tmp_path / "deep.tif", gradient().astype(np.uint16), photometric="rgb")
    with pytest.raises(DataError, match=r"deep\.tif: 20x12 is more than 239"):
        read_image(tmp_path / "deep.tif", max_pixels=239)


def test_masks_can_keep_their_size(pair: Pair) -> None:
    image, mask = MaskDataset([pair], size=(6, 5), native_masks=True)[0]
    assert image.shape == (3, 6, 5)
    assert torch.equal(mask, torch.from_numpy(labels()))


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow warns of what it leaves out of damaged tags
def test_a_damaged_tiff_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "image.tif"
    for compression in (None, "zlib"):
        tifffile.imwrite(path, gradient().astype(np.uint16), photometric="rgb", compression=compression)
        whole = path.read_bytes()
        for place in range(0, min(len(whole), 300)):  # the header and the first tags
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
            with contextlib.suppress(DataError):
                read_image(path, max_pixels=10**6)
    path.write_bytes(whole[:-20])
    with pytest.raises(DataError, match=r"image\.tif: can't be read as an image"):
        read_image(path)
