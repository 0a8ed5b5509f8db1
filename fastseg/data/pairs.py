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


def camvid_layout(root: str | Path) -> bool:
    """Whether ``root`` is laid out as CamVid: a folder of a split beside its ``...annot`` folder.

    Args:
        root: Folder of the data set.

    Returns:
        True where at least one of ``train`` + ``trainannot``, ``val`` + ``valannot``, ``test`` + ``testannot`` exists.
    """
    return any(_is_camvid_split(Path(root), split) for split in SPLITS)


def find_pairs(
    root: str | Path, split: str, *, val_fraction: float = 0.2, test_fraction: float = 0.0, seed: int = 0
) -> list[Pair]:
    """Find the images of one split and their masks; an image and its mask have the same stem.

    Two layouts are known:

    * CamVid's: ``train/`` + ``trainannot/``, ``val/`` + ``valannot/``, ``test/`` + ``testannot/``. The fractions and
      the seed are not used.
    * ``images/`` + ``masks/``: the sorted stems are shuffled with ``seed``, then the first ``round(n * test_fraction)``
      are the test split, the next ``round(n * val_fraction)`` the validation split (each at least one where its
      fraction is not zero) and the rest the training split. The splits of one seed never share a file.

    Files whose suffix Pillow can't read and hidden files are passed over.

    Args:
        root: Folder of the data set.
        split: ``"train"``, ``"val"`` or ``"test"``.
        val_fraction: Share of the images for validation, in [0, 1).
        test_fraction: Share of the images for the test, in [0, 1); both fractions together stay below 1.
        seed: Seed of the shuffle.

    Returns:
        The pairs of the split, sorted by stem; never an empty list.

    Raises:
        DataError: A folder is missing, an image has no mask or a mask no image, two files share a stem, the split is
            empty or unknown, or a fraction is outside its range.
    """
    root = Path(root)
    if split not in SPLITS:
        raise DataError(f"split must be one of {', '.join(SPLITS)}, but it is {split!r}")
    if not root.is_dir():
        raise DataError(f"{root}: no such folder")
    if camvid_layout(root):
        if not _is_camvid_split(root, split):
            raise DataError(f"{root}: the split {split!r} needs {split}/ and {split}annot/; {_contents(root)}")
        return _match(root / split, root / f"{split}annot")
    if not ((root / "images").is_dir() and (root / "masks").is_dir()):
        raise DataError(f"{root}: expected images/ + masks/ or train/ + trainannot/; {_contents(root)}")
    pairs = _match(root / "images", root / "masks")
    chosen = _split(pairs, split, val_fraction, test_fraction, seed)
    if not chosen:
        raise DataError(
            f"{root}: the split {split!r} is empty: {len(pairs)} images, "
            f"val_fraction {val_fraction}, test_fraction {test_fraction}"
        )
    return chosen


def _is_camvid_split(root: Path, split: str) -> bool:
    return (root / split).is_dir() and (root / f"{split}annot").is_dir()


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


def _match(images: Path, masks: Path) -> list[Pair]:
    """Every image of the folder ``images`` with the mask of the same stem, sorted by stem."""
    image_files, mask_files = images_by_stem(images), images_by_stem(masks)
    if not image_files:
        raise DataError(f"{images}: no images in this folder")
    if unmasked := image_files.keys() - mask_files.keys():
        raise DataError(f"{images}: no mask in {masks} for {_names(image_files[stem].name for stem in unmasked)}")
    if unpictured := mask_files.keys() - image_files.keys():
        raise DataError(f"{masks}: no image in {images} for {_names(mask_files[stem].name for stem in unpictured)}")
    return [Pair(image_files[stem], mask_files[stem]) for stem in sorted(image_files)]


def images_by_stem(folder: Path) -> dict[str, Path]:
    """The files of a folder whose suffix Pillow reads, hidden ones left out, in the order of their names.

    Args:
        folder: An existing folder.

    Returns:
        The path of each file by its stem.

    Raises:
        DataError: Two files share a stem.
    """
    files: dict[str, Path] = {}
    suffixes = _readable_suffixes()
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in suffixes or path.name.startswith("."):
            continue
        if path.stem in files:
            raise DataError(f"{folder}: {files[path.stem].name} and {path.name} have the same stem")
        files[path.stem] = path
    return files


def _readable_suffixes() -> set[str]:
    return {suffix for suffix, name in Image.registered_extensions().items() if name in Image.OPEN}


def _contents(root: Path) -> str:
    names = [path.name + "/" * path.is_dir() for path in root.iterdir()]
    return f"it holds {_names(names)}" if names else "it is empty"


def _names(names: Iterable[str]) -> str:
    """The first few names in order, and how many more there are."""
    ordered = sorted(names)
    more = len(ordered) - _MAX_NAMES
    return ", ".join(ordered[:_MAX_NAMES]) + (f" and {more} more" if more > 0 else "")
