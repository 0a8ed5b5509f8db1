"""Finding the images of a data set and their masks on disk."""

import random
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from fastseg.data.errors import DataError

SPLITS = ("train", "val", "test")

_MAX_NAMES = 5  # an error lists this many names; the rest is counted


class Pair(NamedTuple):
    """An image file and the mask file that labels its pixels."""

    image: Path
    mask: Path


class Layout(NamedTuple):
    """Where a data set has its files; ``{split}`` stands for the name of a split."""

    images: str  # folder
    masks: str  # folder
    lists: str = ""  # text file that names the images of a split, one in each line
    splits: tuple[str, ...] = SPLITS  # the layout's own names of these
    pattern: str = "*"  # the files in both folders
    image_suffix: str = ""  # what the stem of an image has after the name that it shares with its mask
    mask_suffix: str = ""  # and the stem of a mask
    label_map: str = ""  # what the masks' values mean: a file in fastseg/data/label_maps
    ignore_index: int = 255  # label of the pixels that don't count, where none is given

    def places(self, root: Path, split: str) -> tuple[Path, Path, Path]:
        """The folder of a split's images, that of its masks, and its list."""
        own = self.splits[SPLITS.index(split)]
        images, masks, names = (root / text.format(split=own) for text in (self.images, self.masks, self.lists))
        return images, masks, names

    def has(self, root: Path, split: str) -> bool:
        """Whether a split is there."""
        images, masks, names = self.places(root, split)
        return names.is_file() if self.lists else images.is_dir() and masks.is_dir()

    def files(self, root: Path) -> set[Path]:
        """All files in the folders of all splits."""
        folders = {folder for split in SPLITS for folder in self.places(root, split)[:2]}
        return {path for folder in folders for path in folder.glob(self.pattern) if not path.is_dir()}

    @property
    def drawn(self) -> bool:
        """Whether the splits are drawn at random, because the files don't say them."""
        return "{split}" not in self.images + self.lists


LAYOUTS = {  # tried in this order where none is named
    "camvid": Layout("{split}", "{split}annot", label_map="camvid", ignore_index=11),
    "voc": Layout("JPEGImages", "SegmentationClass", "ImageSets/Segmentation/{split}.txt", label_map="voc"),
    "cityscapes": Layout(
        "leftImg8bit/{split}", "gtFine/{split}", pattern="*/*", image_suffix="_leftImg8bit",
        mask_suffix="_gtFine_labelIds", label_map="cityscapes",
    ),
    "ade20k": Layout(
        "images/{split}", "annotations/{split}", splits=("training", "validation", "testing"), label_map="ade20k"
    ),
    "lists": Layout("images", "masks", "{split}.txt"),
    "split/images": Layout("{split}/images", "{split}/masks"),
    "images/split": Layout("images/{split}", "masks/{split}"),
    "images": Layout("images", "masks"),
}  # fmt: skip


def find_layout(root: str | Path, name: str = "auto") -> str:
    """The name in ``LAYOUTS`` of a data set's layout.

    Args:
        root: Folder of the data set.
        name: The layout that it must have; ``"auto"`` takes the first that fits.

    Raises:
        DataError: The folder is missing, the name is unknown, or no layout fits.
    """
    root = Path(root)
    if name != "auto" and name not in LAYOUTS:
        raise DataError(f"layout must be auto or one of {', '.join(LAYOUTS)}, but it is {name!r}")
    if not root.is_dir():
        raise DataError(f"{root}: no such folder")
    if name != "auto":
        return name
    for known, layout in LAYOUTS.items():
        if any(layout.has(root, split) for split in SPLITS):
            return known
    raise DataError(
        f"{root}: expected images/ + masks/ or train/ + trainannot/ or another layout of {', '.join(LAYOUTS)}; "
        f"{_contents(root)}"
    )


def find_pairs(
    root: str | Path,
    split: str,
    *,
    layout: str = "auto",
    mask_suffix: str | None = None,
    val_fraction: float = 0.2,
    test_fraction: float = 0.0,
    seed: int = 0,
) -> list[Pair]:
    """Find the images of one split and their masks; an image and its mask have the same stem.

    The layouts:

    * ``camvid``: ``train/`` + ``trainannot/``, ``val/`` + ``valannot/``, ``test/`` + ``testannot/``.
    * ``voc``: ``JPEGImages/`` + ``SegmentationClass/``, lists in ``ImageSets/Segmentation/``.
    * ``cityscapes``: ``leftImg8bit/train/CITY/`` + ``gtFine/train/CITY/``, masks ``..._gtFine_labelIds.png``.
    * ``ade20k``: ``images/training/`` + ``annotations/training/``, ``validation`` likewise.
    * ``lists``: ``train.txt``, ``val.txt``, ``test.txt``; a line is a name in ``images/`` + ``masks/``, or the paths of
      an image and of its mask below ``root``.
    * ``split/images``: ``train/images/`` + ``train/masks/``, ...; ``images/split``: ``images/train/`` +
      ``masks/train/``, ...
    * ``images``: ``images/`` + ``masks/``: the sorted stems are shuffled with ``seed``, then the first
      ``round(n * test_fraction)`` are the test split, the next ``round(n * val_fraction)`` the validation split (each
      at least one where its fraction is not zero) and the rest the training split. The splits of one seed never share
      a file. Only this layout uses the fractions and the seed.

    Files whose suffix Pillow can't read and hidden files are passed over.

    Args:
        root: Folder of the data set.
        split: ``"train"``, ``"val"`` or ``"test"``.
        layout: The name of a layout; ``"auto"`` takes the first of them that fits.
        mask_suffix: What the stem of a mask has after that of its image; None takes the layout's.
        val_fraction: Share of the images for validation, in [0, 1).
        test_fraction: Share of the images for the test, in [0, 1); both fractions together stay below 1.
        seed: Seed of the shuffle.

    Returns:
        The pairs of the split, sorted by stem, or in the order of its list; never an empty list.

    Raises:
        DataError: A folder is missing, an image has no mask or a mask no image, two files share a stem, the split is
            empty or unknown, or a fraction is outside its range.
    """
    root = Path(root)
    if split not in SPLITS:
        raise DataError(f"split must be one of {', '.join(SPLITS)}, but it is {split!r}")
    found = LAYOUTS[find_layout(root, layout)]
    if mask_suffix is not None:
        found = found._replace(mask_suffix=mask_suffix)
    if not found.has(root, split):
        images, masks, names = (str(path.relative_to(root)) for path in found.places(root, split))
        needs = names if found.lists else f"{images}/ and {masks}/"
        raise DataError(f"{root}: the split {split!r} needs {needs}; {_contents(root)}")
    pairs = (_listed if found.lists else _matched)(root, found, split)
    if found.drawn:
        every, pairs = len(pairs), _split(pairs, split, val_fraction, test_fraction, seed)
        if not pairs:
            raise DataError(
                f"{root}: the split {split!r} is empty: {every} images, "
                f"val_fraction {val_fraction}, test_fraction {test_fraction}"
            )
    return pairs


def _split(pairs: list[Pair], split: str, val_fraction: float, test_fraction: float, seed: int) -> list[Pair]:
    """The part of ``pairs`` (sorted by stem) that belongs to ``split``, sorted by stem."""
    for name, fraction in (("val_fraction", val_fraction), ("test_fraction", test_fraction)):
        if not 0 <= fraction < 1:
            raise DataError(f"{name} must be in [0, 1), but it is {fraction}")
    if val_fraction + test_fraction >= 1:
        raise DataError(f"val_fraction {val_fraction} + test_fraction {test_fraction} leave nothing to train on")
    # Python promises the sequence of Random.random() for a seed across versions, but not that of shuffle().
    generator = random.Random(seed)
    shuffled = sorted(pairs, key=lambda _: generator.random())
    test_end = _count(len(pairs), test_fraction)
    val_end = test_end + _count(len(pairs), val_fraction)
    parts = {"test": shuffled[:test_end], "val": shuffled[test_end:val_end], "train": shuffled[val_end:]}
    return sorted(parts[split])


def _count(total: int, fraction: float) -> int:
    return max(1, round(total * fraction)) if fraction > 0 else 0


def _matched(root: Path, layout: Layout, split: str) -> list[Pair]:
    """Every image of the split's folder with the mask of the same name, sorted by name."""
    images, masks, _ = layout.places(root, split)
    image_files = images_by_stem(images, layout.pattern, layout.image_suffix)
    mask_files = images_by_stem(masks, layout.pattern, layout.mask_suffix)
    if not image_files:
        raise DataError(f"{images}: no images in this folder")
    if unmasked := image_files.keys() - mask_files.keys():
        raise DataError(f"{images}: no mask in {masks} for {list_names(image_files[stem].name for stem in unmasked)}")
    if unpictured := mask_files.keys() - image_files.keys():
        raise DataError(f"{masks}: no image in {images} for {list_names(mask_files[stem].name for stem in unpictured)}")
    return [Pair(image_files[stem], mask_files[stem]) for stem in sorted(image_files)]


def _listed(root: Path, layout: Layout, split: str) -> list[Pair]:
    """The pairs that the split's list names, in its order."""
    images, masks, path = layout.places(root, split)
    image_files = images_by_stem(images, layout.pattern, layout.image_suffix)
    mask_files = images_by_stem(masks, layout.pattern, layout.mask_suffix)
    pairs, suffixes = [], _readable_suffixes()
    for line in filter(None, map(str.strip, path.read_text(encoding="utf-8").splitlines())):
        name = str(Path(line).with_suffix("")) if Path(line).suffix.lower() in suffixes else line
        if name in image_files and name in mask_files:
            pairs.append(Pair(image_files[name], mask_files[name]))
        elif len(files := line.split()) == 2:
            pairs.append(Pair(*(root / file.lstrip("/") for file in files)))
        else:
            raise DataError(
                f"{path}: no {f'mask in {masks}' if name in image_files else f'image in {images}'} for {line}"
            )
    if not pairs:
        raise DataError(f"{path}: the list is empty")
    return pairs


def images_by_stem(folder: Path, pattern: str = "*", suffix: str = "") -> dict[str, Path]:
    """The files of a folder whose suffix Pillow reads, hidden ones left out, in the order of their names.

    Args:
        folder: The folder; one that isn't there has no files.
        pattern: The files in it, as for `pathlib.Path.glob`.
        suffix: Only the files whose stem ends so.

    Returns:
        The path of each file by its stem, ``suffix`` left out, and by the folders before it where ``pattern`` has some.

    Raises:
        DataError: Two files share a stem.
    """
    files: dict[str, Path] = {}
    suffixes = _readable_suffixes()
    for path in sorted(folder.glob(pattern)):
        if path.suffix.lower() not in suffixes or path.name.startswith(".") or not path.stem.endswith(suffix):
            continue
        name = str(path.relative_to(folder).with_name(path.stem.removesuffix(suffix)))
        if name in files:
            raise DataError(f"{folder}: {files[name].name} and {path.name} have the same stem")
        files[name] = path
    return files


def _readable_suffixes() -> set[str]:
    return {suffix for suffix, name in Image.registered_extensions().items() if name in Image.OPEN}


def _contents(root: Path) -> str:
    names = [path.name + "/" * path.is_dir() for path in root.iterdir()]
    return f"it holds {list_names(names)}" if names else "it is empty"


def list_names(names: Iterable[object]) -> str:
    """The first few names in order, and how many more there are."""
    ordered = sorted(map(str, names))
    more = len(ordered) - _MAX_NAMES
    return ", ".join(ordered[:_MAX_NAMES]) + (f" and {more} more" if more > 0 else "")
