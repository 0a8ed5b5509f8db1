import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("PIL", reason="Pillow isn't installed: it comes with the extra [train]")
from PIL import Image

from fastseg.data import DataConfig, DataError, Pair, PairReader, read_label_map

IGNORE = 255


def read(folder: Path, mask: np.ndarray | Image.Image, reader: PairReader, name: str = "mask.png") -> np.ndarray:
    picture = mask if isinstance(mask, Image.Image) else Image.fromarray(mask)
    pair = Pair(folder / "image.png", folder / name)
    Image.new("RGB", picture.size).save(pair.image)
    picture.save(pair.mask, **({"quality": 75} if name.endswith(".jpg") else {}))
    return reader.read(pair)[1]


def quarters(*values: object) -> np.ndarray:
    """Four squares of 16 pixels' side, which JPEG's blocks of 8 don't mix."""
    return np.array(values, dtype=np.uint8)[np.repeat(np.repeat([[0, 1], [2, 3]], 16, 0), 16, 1)]


COLORS = {"0,0,0": "ground", "200,30,60": "road", "10,200,10": None, "0, 0, 250": "sky"}
NUMBERS = {"255": "road", "0": "ground", "100": None, "7": "sky"}


@pytest.mark.parametrize("suffix", ["png", "jpg"])
@pytest.mark.parametrize(
    ("label_map", "values", "expected"),
    [
        pytest.param(COLORS, [(0, 0, 0), (200, 30, 60), (10, 200, 10), (0, 0, 250)], (0, 1, IGNORE, 2), id="colours"),
        # the order of the map is that of the classes
        pytest.param(NUMBERS, [255, 0, 100, 7], (0, 1, IGNORE, 2), id="numbers"),
        pytest.param(NUMBERS, [(255,) * 3, (0,) * 3, (100,) * 3, (7,) * 3], (0, 1, IGNORE, 2), id="gray-as-colours"),
    ],
)
def test_a_label_map_gives_the_classes_in_its_order(
    tmp_path: Path, suffix: str, label_map: dict, values: list, expected: tuple[int, ...]
) -> None:
    (tmp_path / "map.json").write_text(json.dumps(label_map))
    reader = PairReader(label_map=read_label_map(tmp_path / "map.json"))
    labels = read(tmp_path, quarters(*values), reader, f"mask.{suffix}")
    assert np.array_equal(labels, quarters(*expected))
    assert reader.class_names == tuple(name for name in label_map.values() if name)


def test_colours_of_a_palette_file_can_be_mapped(tmp_path: Path) -> None:
    mask = Image.fromarray(quarters(0, 1, 1, 0))
    mask.putpalette([0, 0, 0, 200, 30, 60])
    assert np.array_equal(read(tmp_path, mask, PairReader(label_map=COLORS)), quarters(0, 1, 1, 0))


@pytest.mark.parametrize("suffix", ["png", "jpg"])
@pytest.mark.parametrize(
    "values", [(0, 255, 255, 0), ((0, 0, 0), (0, 0, 255), (255,) * 3, (0, 0, 0))], ids=["L", "RGB"]
)
def test_binary_masks(tmp_path: Path, suffix: str, values: tuple) -> None:
    reader = PairReader(binary=True)
    labels = read(tmp_path, quarters(*values), reader, f"mask.{suffix}")
    assert np.array_equal(labels, quarters(0, 1, 1, 0))
    assert reader.class_names == ("background", "foreground")


def test_reduced_labels(tmp_path: Path) -> None:
    labels = read(tmp_path, quarters(0, 1, IGNORE, 150), PairReader(reduce_labels=True))
    assert np.array_equal(labels, quarters(IGNORE, 0, IGNORE, 149))


@pytest.mark.parametrize(
    ("mask", "name", "reader", "message"),
    [
        pytest.param(quarters(0, 1, 2, 3), "mask.jpg", {}, "a JPEG file doesn't keep class numbers", id="jpeg"),
        pytest.param(
            quarters(*[(0, 0, 0), (200, 30, 60)] * 2),
            "mask.png",
            {},
            r"this holds \(0,0,0\), \(200,30,60\); --label-map FILE .*--binary",
            id="colours",
        ),
        pytest.param(
            quarters(0, 7, 9, 0), "mask.png", {"label_map": NUMBERS}, "doesn't have its values 9$", id="number"
        ),
        pytest.param(
            quarters(*[(0, 0, 0), (1, 30, 60)] * 2),
            "mask.png",
            {"label_map": COLORS},
            r"doesn't have its values \(1,30,60\)$",
            id="colour",
        ),
        pytest.param(
            np.full((4, 4), 10**7, np.int32),
            "mask.tif",
            {},
            r"labels must be in 0\.\.65535, but one is 10000000",
            id="large",
        ),
        pytest.param(np.full((4, 4), -1, np.int32), "mask.tif", {}, r"in 0\.\.65535, but one is -1", id="negative"),
        pytest.param(np.ones((4, 4), np.float32), "mask.tif", {}, "a mask holds integers, .* float32", id="float"),
    ],
)
def test_masks_that_need_a_word_are_refused(
    tmp_path: Path, mask: np.ndarray, name: str, reader: dict, message: str
) -> None:
    with pytest.raises(DataError, match=rf"{name}: .*{message}"):
        read(tmp_path, mask, PairReader(**reader), name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "can't be read as a label map"),
        ("[1]", "a label map is a JSON object"),
        ('{"0": 1}', "a label map is a JSON object"),
        ('{"red": "road"}', "one is 'red'"),
        ('{"1,2": "road"}', "one is '1,2'"),
        ('{"1,2,256": "road"}', "one is '1,2,256'"),
        ('{"70000": "road"}', "one is '70000'"),
        ('{"0": "a", "1,2,3": "b"}', "all numbers or all colours"),
        ('{"0": null}', "a name for a class"),
        ('{"0": "a", " 0": "b"}', "each number or colour once"),
        ("{}", "a name for a class"),
    ],
)
def test_a_wrong_label_map_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "map.json"
    path.write_text(text)
    with pytest.raises(DataError, match=rf"map\.json: .*{message}"):
        read_label_map(path)


def test_maps_exclude_each_other() -> None:
    with pytest.raises(DataError, match="only one of label_map, binary and reduce_labels"):
        PairReader(binary=True, reduce_labels=True)


@pytest.mark.parametrize(
    ("folders", "classes", "first", "values", "expected"),
    [
        # sky and void
        pytest.param(["train", "trainannot"], 11, "sky", (0, 10, 11, 3), (0, 10, 11, 3), id="camvid"),
        pytest.param(["ImageSets/Segmentation"], 21, "background", (0, 20, 255, 3), (0, 20, 255, 3), id="voc"),
        # unlabeled, road, bicycle, parking
        pytest.param(["leftImg8bit/val", "gtFine/val"], 19, "road", (0, 7, 33, 9), (255, 0, 18, 255), id="cityscapes"),
        pytest.param(
            ["images/training", "annotations/training"], 150, "wall", (0, 1, 150, 3), (255, 0, 149, 2), id="ade20k"
        ),
    ],
)
def test_a_named_layout_brings_its_classes(
    tmp_path: Path, folders: list[str], classes: int, first: str, values: tuple, expected: tuple
) -> None:
    for folder in folders:
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "ImageSets/Segmentation/train.txt").write_text("a") if "ImageSets" in folders[0] else None
    reader = DataConfig(data=tmp_path).reader()
    assert (len(reader.class_names), reader.class_names[0]) == (classes, first)
    assert np.array_equal(read(tmp_path, quarters(*values), reader), quarters(*expected))
    assert not DataConfig(data=tmp_path, classes=classes + 5).reader().class_names  # the files' own numbers


def test_the_ignored_label_is_no_class(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="ignore_index must be none of 3 classes, but it is 2"):
        PairReader(label_map=NUMBERS, ignore_index=2)
    with pytest.raises(DataError, match="label 8, one less, would be the ignored label"):
        read(tmp_path, quarters(0, 1, 7, 8), PairReader(reduce_labels=True, ignore_index=7))
    (tmp_path / "train").mkdir()
    (tmp_path / "trainannot").mkdir()
    twelve = {str(value): f"class {value}" for value in range(12)}
    assert DataConfig(data=tmp_path, label_map=twelve).reader().ignore_index == IGNORE  # not CamVid's 11
