from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("PIL", reason="Pillow isn't installed: it comes with the extra [train]")
from fastseg.data import DataError, Pair, find_layout, find_pairs
from fastseg.data.pairs import SPLITS


def write_files(folder: Path, *names: str) -> None:
    """Empty files: find_pairs goes by names alone."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()


def write_stems(root: Path, count: int) -> set[str]:
    stems = {f"photo{number:03d}" for number in range(count)}
    write_files(root / "images", *(f"{stem}.jpg" for stem in stems))
    write_files(root / "masks", *(f"{stem}.png" for stem in stems))
    return stems


def stems_of(pairs: list[Pair]) -> list[str]:
    return [pair.image.stem for pair in pairs]


@pytest.mark.parametrize("split", SPLITS)
def test_camvid_layout_pairs_the_folders_of_the_split(tmp_path: Path, split: str) -> None:
    write_files(tmp_path / split, "b.jpg", "a.png")
    write_files(tmp_path / f"{split}annot", "a.png", "b.png")
    assert find_layout(tmp_path) == "camvid"
    assert find_pairs(tmp_path, split) == [
        Pair(tmp_path / split / "a.png", tmp_path / f"{split}annot" / "a.png"),
        Pair(tmp_path / split / "b.jpg", tmp_path / f"{split}annot" / "b.png"),
    ]


def test_images_and_masks_match_by_stem_whatever_their_suffixes(tmp_path: Path) -> None:
    write_files(tmp_path / "images", "a.JPG", "b.tiff", "c.d.webp", ".hidden.png", "notes.txt")
    write_files(tmp_path / "masks", "a.png", "b.PNG", "c.d.bmp", "Thumbs.db", "._a.png")
    assert find_layout(tmp_path) == "images"
    pairs = find_pairs(str(tmp_path), "train", val_fraction=0)
    assert [(pair.image.name, pair.mask.name) for pair in pairs] == [
        ("a.JPG", "a.png"),
        ("b.tiff", "b.PNG"),
        ("c.d.webp", "c.d.bmp"),
    ]


@pytest.mark.parametrize(
    ("count", "val_fraction", "test_fraction", "sizes"),
    [
        pytest.param(100, 0.2, 0.0, (80, 20, 0), id="default"),
        pytest.param(100, 0.25, 0.15, (60, 25, 15), id="three-splits"),
        pytest.param(7, 0.3, 0.3, (3, 2, 2), id="rounded"),
        pytest.param(3, 0.1, 0.1, (1, 1, 1), id="a-fraction-gives-at-least-one"),
        pytest.param(5, 0.0, 0.0, (5, 0, 0), id="all-for-training"),
    ],
)
def test_fractions_divide_the_images(
    tmp_path: Path, count: int, val_fraction: float, test_fraction: float, sizes: tuple[int, int, int]
) -> None:
    stems = write_stems(tmp_path, count)
    found: list[str] = []
    for split, size in zip(SPLITS, sizes, strict=True):
        if size == 0:
            with pytest.raises(DataError, match=f"the split '{split}' is empty: {count} images"):
                find_pairs(tmp_path, split, val_fraction=val_fraction, test_fraction=test_fraction)
            continue
        pairs = find_pairs(tmp_path, split, val_fraction=val_fraction, test_fraction=test_fraction)
        assert len(pairs) == size
        assert stems_of(pairs) == sorted(stems_of(pairs))
        found += stems_of(pairs)
    assert len(found) == count  # no file in two splits
    assert set(found) == stems


def test_the_seed_decides_the_split(tmp_path: Path) -> None:
    write_stems(tmp_path, 50)
    first = find_pairs(tmp_path, "val", seed=3)
    assert find_pairs(tmp_path, "val", seed=3) == first
    assert find_pairs(tmp_path, "val", seed=4) != first


def test_the_split_of_a_seed_is_the_same_on_every_machine(tmp_path: Path) -> None:
    # Recorded once: a change here would mix training and validation images of runs that are resumed.
    write_stems(tmp_path, 10)
    assert stems_of(find_pairs(tmp_path, "val", val_fraction=0.3, seed=0)) == ["photo003", "photo005", "photo007"]


def layout_without_root(root: Path) -> Path:
    return root / "absent"


def layout_without_known_folders(root: Path) -> Path:
    write_files(root / "pictures", "a.png")
    return root


def layout_empty(root: Path) -> Path:
    return root


def layout_without_masks(root: Path) -> Path:
    write_files(root / "images", "a.png")
    return root


def layout_with_unmasked_image(root: Path) -> Path:
    write_files(root / "images", *(f"{letter}.jpg" for letter in "abcdefgh"))
    write_files(root / "masks", "a.png")
    return root


def layout_with_unpictured_mask(root: Path) -> Path:
    write_files(root / "images", "a.jpg")
    write_files(root / "masks", "a.png", "b.png")
    return root


def layout_without_images(root: Path) -> Path:
    write_files(root / "images", "readme.txt")
    write_files(root / "masks", "a.png")
    return root


def layout_with_duplicate_stem(root: Path) -> Path:
    write_files(root / "images", "a.jpg", "a.png")
    write_files(root / "masks", "a.png")
    return root


def layout_with_train_alone(root: Path) -> Path:
    write_files(root / "train", "a.png")
    write_files(root / "trainannot", "a.png")
    write_files(root / "val", "b.png")
    return root


@pytest.mark.parametrize(
    ("layout", "split", "message"),
    [
        pytest.param(layout_without_root, "train", r"absent: no such folder", id="no-root"),
        pytest.param(
            layout_empty, "train", r"expected images/ \+ masks/ or train/ \+ .*; it is empty", id="empty-root"
        ),
        pytest.param(layout_without_known_folders, "train", r"it holds pictures/", id="unknown-layout"),
        pytest.param(layout_without_masks, "train", r"it holds images/", id="no-masks"),
        pytest.param(
            layout_with_unmasked_image,
            "train",
            r"images: no mask in .*masks for b.jpg, c.jpg, d.jpg, e.jpg, f.jpg and 2 more",
            id="image-without-mask",
        ),
        pytest.param(
            layout_with_unpictured_mask, "train", r"masks: no image in .*images for b.png", id="mask-without-image"
        ),
        pytest.param(layout_without_images, "train", r"images: no images in this folder", id="no-images"),
        pytest.param(
            layout_with_duplicate_stem, "train", r"images: a.jpg and a.png have the same stem", id="same-stem"
        ),
        pytest.param(
            layout_with_train_alone,
            "val",
            r"the split 'val' needs val/ and valannot/; it holds train/, trainannot/, val/",
            id="camvid-without-the-split",
        ),
        pytest.param(
            layout_with_train_alone, "valid", r"split must be one of train, val, test.*'valid'", id="split-name"
        ),
    ],
)
def test_a_broken_folder_is_named(tmp_path: Path, layout: Callable[[Path], Path], split: str, message: str) -> None:
    root = layout(tmp_path)
    with pytest.raises(DataError, match=message) as error:
        find_pairs(root, split)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("fractions", "message"),
    [
        pytest.param(
            {"val_fraction": 1.0}, r"val_fraction must be in \[0, 1\), but it is 1.0", id="all-for-validation"
        ),
        pytest.param({"test_fraction": -0.1}, r"test_fraction must be in \[0, 1\), but it is -0.1", id="negative"),
        pytest.param({"val_fraction": 0.5, "test_fraction": 0.5}, r"leave nothing to train on", id="nothing-left"),
    ],
)
def test_fractions_outside_their_range_are_refused(tmp_path: Path, fractions: dict[str, float], message: str) -> None:
    write_stems(tmp_path, 4)
    with pytest.raises(DataError, match=message):
        find_pairs(tmp_path, "train", **fractions)


@pytest.mark.parametrize(
    ("layout", "files", "pair"),
    [
        pytest.param("camvid", ["train/a.png", "trainannot/a.png"], ("train/a.png", "trainannot/a.png"), id="camvid"),
        pytest.param(
            "voc",
            ["JPEGImages/2007_1.jpg", "JPEGImages/2007_2.jpg", "SegmentationClass/2007_1.png"],  # most have no mask
            ("JPEGImages/2007_1.jpg", "SegmentationClass/2007_1.png"),
            id="voc",
        ),
        pytest.param(
            "cityscapes",
            [
                "leftImg8bit/train/ulm/ulm_0_1_leftImg8bit.png",
                *(f"gtFine/train/ulm/ulm_0_1_gtFine_{kind}.png" for kind in ("color", "instanceIds", "labelIds")),
                "gtFine/train/ulm/ulm_0_1_gtFine_polygons.json",
            ],
            ("leftImg8bit/train/ulm/ulm_0_1_leftImg8bit.png", "gtFine/train/ulm/ulm_0_1_gtFine_labelIds.png"),
            id="cityscapes",
        ),
        pytest.param(
            "ade20k",
            ["images/training/ADE_train_1.jpg", "annotations/training/ADE_train_1.png"],
            ("images/training/ADE_train_1.jpg", "annotations/training/ADE_train_1.png"),
            id="ade20k",
        ),
        pytest.param("lists", ["images/b.jpg", "masks/b.png"], ("images/b.jpg", "masks/b.png"), id="list-of-stems"),
        pytest.param("lists", ["x/c.jpg", "y/z.png"], ("x/c.jpg", "y/z.png"), id="list-of-paths"),
        pytest.param(
            "split/images",
            ["train/images/a.png", "train/masks/a.png"],
            ("train/images/a.png", "train/masks/a.png"),
            id="split/images",
        ),
        pytest.param(
            "images/split",
            ["images/train/a.png", "masks/train/a.png"],
            ("images/train/a.png", "masks/train/a.png"),
            id="images/split",
        ),
        pytest.param("images", ["images/a.png", "masks/a.png"], ("images/a.png", "masks/a.png"), id="images"),
    ],
)
def test_every_layout_is_found_out_and_has_its_pairs(
    tmp_path: Path, layout: str, files: list[str], pair: tuple[str, str]
) -> None:
    lists = {
        "voc": ("ImageSets/Segmentation/train.txt", "2007_1\n"),
        "lists": ("train.txt", "b.jpg\n" if "masks/b.png" in files else "/x/c.jpg  /y/z.png\n\n"),
    }
    for name in files:
        write_files((tmp_path / name).parent, (tmp_path / name).name)
    if layout in lists:
        name, text = lists[layout]
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    expected = [Pair(*(tmp_path / name for name in pair))]
    assert find_layout(tmp_path) == layout
    for named in ("auto", layout):
        assert find_pairs(tmp_path, "train", layout=named, val_fraction=0) == expected
    with pytest.raises(DataError, match=r"the split 'val' (needs|is empty)"):
        find_pairs(tmp_path, "val", val_fraction=0)


def test_a_suffix_of_the_masks(tmp_path: Path) -> None:
    write_files(tmp_path / "images", "a.jpg", "b.jpg")
    write_files(tmp_path / "masks", "a_mask.png", "b_mask.png", "a_edges.png")
    pairs = find_pairs(tmp_path, "train", mask_suffix="_mask", val_fraction=0)
    assert [pair.mask.name for pair in pairs] == ["a_mask.png", "b_mask.png"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\nc\n", r"train.txt: no image in .*images for c$"),
        ("b\n", r"train.txt: no mask in .*masks for b$"),
        ("\n", r"train.txt: the list is empty"),
    ],
    ids=["no-image", "no-mask", "empty"],
)
def test_a_wrong_list_is_named(tmp_path: Path, text: str, message: str) -> None:
    write_files(tmp_path / "images", "a.jpg", "b.jpg")
    write_files(tmp_path / "masks", "a.png")
    (tmp_path / "train.txt").write_text(text)
    with pytest.raises(DataError, match=message):
        find_pairs(tmp_path, "train")


def test_an_unknown_layout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"layout must be auto or one of camvid, voc, .*'pascal'"):
        find_layout(tmp_path, "pascal")
