from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("PIL", reason="Pillow isn't installed: it comes with the extra [train]")
from PIL import Image

from fastseg.data import CAMVID_CLASSES, PALETTES, colorize, overlay, palette, save_mask, with_legend

IGNORE = 255


@pytest.mark.parametrize("num_classes", [1, 2, 10, 21, 150, 256])
def test_every_class_has_a_colour_of_its_own(num_classes: int) -> None:
    colors = palette(num_classes)
    assert colors.dtype == np.uint8
    assert colors.shape == (num_classes, 3)
    assert len(np.unique(colors, axis=0)) == num_classes
    assert np.array_equal(colors, palette(num_classes))
    assert colors.any(axis=1).all()  # black is for ignored pixels


def test_a_class_keeps_its_colour_when_classes_are_added() -> None:
    assert np.array_equal(palette(5), palette(30)[:5])


def test_eleven_classes_have_camvids_colours() -> None:
    assert len(CAMVID_CLASSES) == 11
    assert palette(11).tolist() == palette("camvid").tolist()
    assert palette(11)[CAMVID_CLASSES.index("road")].tolist() == [128, 64, 128]


def test_palettes_by_name() -> None:
    sizes = {name: palette(name).shape for name in PALETTES}
    assert sizes == {"ade20k": (150, 3), "camvid": (11, 3), "cityscapes": (19, 3), "voc": (21, 3)}
    person = {"ade20k": (12, (150, 5, 61)), "cityscapes": (11, (220, 20, 60)), "voc": (15, (192, 128, 128))}
    for name, (label, color) in person.items():
        assert tuple(palette(name)[label].tolist()) == color
    with pytest.raises(ValueError, match="there is no palette 'kitti', only ade20k, camvid, cityscapes, voc"):
        palette("kitti")


def test_the_legend_names_what_occurs() -> None:
    names, colors = ["road", "sidewalk of stone", "sky", "car"], palette(4)
    picture, labels = Image.new("RGB", (40, 200), "gray"), torch.zeros(200, 40, dtype=torch.int64)
    labels[:20], labels[20:30], labels[30:40] = 2, 3, 255
    result = np.array(with_legend(picture, labels, names, colors))
    assert result.shape[0] == 200
    assert (result[:, :40] == 128).all()
    shown = {tuple(color) for color in result[:, 40:].reshape(-1, 3).tolist()}
    present = [tuple(color) in shown for color in colors.tolist()]
    assert present == [True, False, True, True]
    assert (result[:, 40:].min(2) < 60).any()  # letters
    many = with_legend(picture, torch.arange(150).view(10, 15), ["class"] * 150, palette(150))
    assert many.width > 40 + 15 * 20  # in columns


def test_palette_refuses_no_classes() -> None:
    with pytest.raises(ValueError, match="num_classes must be positive, but it is 0"):
        palette(0)


@pytest.mark.parametrize("as_type", [torch.tensor, np.array], ids=["tensor", "array"])
def test_colorize_paints_each_label_and_blackens_ignored_ones(
    as_type: Callable[[list[list[int]]], torch.Tensor | np.ndarray],
) -> None:
    colors = palette(3)
    picture = colorize(as_type([[0, 1, IGNORE], [2, 2, 0]]), colors, IGNORE)
    assert picture.mode == "RGB"
    assert picture.size == (3, 2)
    black = np.zeros(3, dtype=np.uint8)
    assert np.array_equal(np.array(picture), [[colors[0], colors[1], black], [colors[2], colors[2], colors[0]]])


def test_colorize_blackens_an_ignored_class() -> None:
    assert np.array(colorize(torch.tensor([[1, 0]]), palette(2), 1)).tolist() == [[[0, 0, 0], palette(2)[0].tolist()]]


def test_colorize_refuses_labels_without_a_colour() -> None:
    with pytest.raises(ValueError, match="mask holds the label 3, but the palette has 3 colours"):
        colorize(torch.tensor([[3]]), palette(3), IGNORE)


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 1.0])
def test_overlay_blends_the_colours_and_leaves_ignored_pixels(alpha: float) -> None:
    image = torch.randint(256, (3, 2, 3), dtype=torch.uint8)
    mask = torch.tensor([[0, 1, IGNORE], [1, -1, 0]])
    result = np.array(overlay(image, mask, palette(2), alpha)).astype(np.float64)
    pixels = image.permute(1, 2, 0).double().numpy()
    labels = mask.numpy()
    painted = (labels == 0) | (labels == 1)
    blend = (1 - alpha) * pixels + alpha * palette(2)[np.where(painted, labels, 0)]
    expected = np.where(painted[..., None], blend, pixels)
    assert np.abs(result - expected).max() <= 1  # rounding to a grey level


def test_overlay_takes_pictures_too() -> None:
    image = torch.randint(256, (3, 2, 3), dtype=torch.uint8)
    mask = torch.tensor([[0, 1, 0], [1, 1, 0]])
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    assert overlay(picture, mask, palette(2)).tobytes() == overlay(image, mask, palette(2)).tobytes()


@pytest.mark.parametrize(
    ("image", "mask", "alpha", "message"),
    [
        pytest.param(
            torch.zeros(3, 2, 3, dtype=torch.uint8),
            torch.zeros(3, 2, dtype=torch.uint8),
            0.5,
            "image is 3x2, but mask is 2x3",
            id="sizes",
        ),
        pytest.param(
            torch.zeros(3, 2, 3, dtype=torch.uint8),
            torch.zeros(2, 3, dtype=torch.uint8),
            1.5,
            "alpha must be in .* 1.5",
            id="alpha",
        ),
        pytest.param(
            torch.zeros(3, 2, 3, dtype=torch.int16),
            torch.zeros(2, 3, dtype=torch.uint8),
            0.5,
            "image must be uint8 or float",
            id="int16-image",
        ),
        pytest.param(
            torch.zeros(3, 2, 3, dtype=torch.uint8), torch.zeros(2, 3), 0.5, "mask must be integer", id="float-mask"
        ),
        pytest.param(
            torch.zeros(3, 2, 3, dtype=torch.uint8),
            torch.zeros(1, 2, 3, dtype=torch.uint8),
            0.5,
            r"of shape \(1, 2, 3\)",
            id="rank",
        ),
    ],
)
def test_overlay_refuses_bad_input(image: torch.Tensor, mask: torch.Tensor, alpha: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        overlay(image, mask, palette(2), alpha)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64], ids=str)
@pytest.mark.parametrize("num_classes", [2, 11, 256])
def test_a_saved_mask_holds_its_labels_and_shows_their_colours(
    tmp_path: Path, num_classes: int, dtype: torch.dtype
) -> None:
    mask = torch.randint(num_classes, (20, 30), dtype=dtype)
    mask[0, :5] = IGNORE
    save_mask(mask, tmp_path / "mask.png", palette(num_classes))
    with Image.open(tmp_path / "mask.png") as saved:
        assert saved.mode == "P"
        assert np.array_equal(np.array(saved), mask.numpy())
        shown = np.array(saved.convert("RGB"))
    if num_classes < 256:  # otherwise 255 is a class
        assert np.array_equal(shown, np.array(colorize(mask, palette(num_classes), IGNORE)))


def test_a_mask_without_a_palette_gets_the_general_one(tmp_path: Path) -> None:
    save_mask(torch.tensor([[0, 3]]), tmp_path / "mask.png")
    with Image.open(tmp_path / "mask.png") as saved:
        assert np.array_equal(np.array(saved.convert("RGB"))[0], palette(4)[[0, 3]])


def test_labels_beyond_255_are_saved_with_16_bits(tmp_path: Path) -> None:
    mask = torch.tensor([[0, 255, 256, 65535]])
    save_mask(mask, tmp_path / "mask.png", palette(300))
    with Image.open(tmp_path / "mask.png") as saved:
        assert np.array_equal(np.array(saved), mask.numpy())


@pytest.mark.parametrize("label", [-1, 65536])
def test_labels_that_no_file_holds_are_refused(tmp_path: Path, label: int) -> None:
    with pytest.raises(ValueError, match=rf"a mask file holds labels 0\.\.65535, but mask holds .*{label}"):
        save_mask(torch.tensor([[0, label]]), tmp_path / "mask.png")
    assert not (tmp_path / "mask.png").exists()
